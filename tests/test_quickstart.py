"""The quick start at its smallest, command by command as the README gives it, on the corpus that needs no network."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.models import TRAIN_OVERRIDES

SMALL_SHAPES = ["corpus=shapes", "corpus.captions=120", "corpus.interleaved=60", "corpus.text=40", "corpus.queries=24"]


def run(home: Path, cwd: Path, module: str, *arguments: str) -> str:
    """Standard output of `python -m module arguments`, started from a folder that has nothing to do with the project."""
    environment = os.environ | {"MM1_HOME": str(home), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{module} {arguments}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_from_nothing_to_a_table(home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(home, elsewhere, "data_pipelines.prepare", *SMALL_SHAPES)
    for arguments in (["+ablation=connector_avgpool"], ["connector=cabstractor", "connector.hidden=16", "connector.depth=1"]):
        chosen = [o for o in TRAIN_OVERRIDES if o != "connector=avgpool"]
        run(home, elsewhere, "mm1.train", "data=shapes", *chosen, *arguments, "packing.seq_len=192")
    names = {path.name.rpartition("-")[0] for path in (home / "runs").iterdir()}
    assert names == {"base", "connector_avgpool"}
    for name in sorted(names):
        run(home, elsewhere, "eval.fewshot", f"run={name}", "shots=[0,4]", "limit=6")
    table = run(home, elsewhere, "ablations.table", "runs=[base,connector_avgpool]", "shots=[0,4]")
    assert re.search(r"^\|\s*base", table, flags=re.MULTILINE)
    assert re.search(r"^\|\s*connector_avgpool", table, flags=re.MULTILINE)
    (csv_file,) = home.rglob("table*.csv")
    rows = list(csv.DictReader(csv_file.open()))
    assert {row["variant"] for row in rows} == names
    # The table's numbers are the evaluation's, and a second call of everything finds finished work and changes nothing.
    summaries = {p: p.read_text() for p in home.rglob("summary.json")}
    assert len(summaries) == 2
    tasks = [task for text in summaries.values() for task in json.loads(text)["tasks"].values()]
    scores = {round(shot["mean"], 3) for task in tasks for shot in task["shots"].values()}
    assert {round(float(row["value"]), 3) for row in rows if row["task"] != "mean"} <= scores
    assert "Already trained" in run(
        home, elsewhere, "mm1.train", "data=shapes", *TRAIN_OVERRIDES, "+ablation=connector_avgpool", "packing.seq_len=192"
    )
    run(home, elsewhere, "eval.fewshot", "run=base", "shots=[0,4]", "limit=6")
    assert {p: p.read_text() for p in home.rglob("summary.json")} == summaries
    assert list(elsewhere.iterdir()) == []  # nothing is littered where a command happens to be started
