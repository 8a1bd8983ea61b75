"""Pictures: what they are drawn from, and that nothing is picked."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ablations import plots
from ablations.results import Run, read_run
from ablations.tables.building import build
from ablations.tables.selection import select
from configs.errors import UserError
from data_pipelines.shards import Manifest, SplitWriter, Task
from tests.test_table import Folders, answers

ITEMS = 6


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with two tasks, metrics, and the corpus that it was evaluated on."""
    monkeypatch.setenv("MM1_HOME", str(tmp_path))
    corpus = tmp_path / "data" / "starter"
    corpus.mkdir(parents=True)
    manifest = Manifest("starter", "starter")
    picture = io.BytesIO()
    Image.new("RGBA", (24, 16), (200, 30, 30, 128)).save(picture, "png")
    for name, kind, answer in (("captions", "captioning", "references"), ("colours", "vqa", "answers")):
        writer = SplitWriter(corpus, name, "test", format="task")
        for i in range(ITEMS):
            record = {"id": f"{name}{i}", "image_id": f"image{i // 2}", answer: [f"a $thing {i}"], "question": "what?"}
            writer.write({"png": picture.getvalue(), "json": json.dumps(record)})
        manifest.splits[name] = {"test": writer.close()}
        manifest.tasks[name] = Task(kind, "", f"{name}/test", f"{name}/test")
    manifest.save(corpus)
    folders = Folders(tmp_path / "runs")
    folder = folders.run("base", "aaaa0000", corpus={"name": "starter", "fingerprint": manifest.fingerprint})
    folders.evaluation(folder, answers(1, n=ITEMS))
    rows = [
        {"step": s, "loss": 2 + math.exp(-s / 5), "loss_captions": 1 + math.exp(-s / 5), "loss_text": 3.0} for s in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


def test_a_last_row_over_fewer_steps_is_no_point() -> None:
    rows = [{"step": step, "loss": 1.0, **({"loss_text": 2.0} if step != 10 else {})} for step in (5, 10, 15, 17)]
    assert [step for step, _ in plots.logged(rows, "loss")] == [5, 10, 15]
    assert plots.logged(rows, "loss_text") == [(5, 2.0), (15, 2.0)]
    assert [step for step, _ in plots.logged(rows[:3], "loss")] == [5, 10, 15]


def test_smoothing_neither_lags_nor_bends() -> None:
    line = np.arange(50) * -0.1 + 7
    assert plots.smooth(list(line), 11) == pytest.approx(line), "a trailing mean would lie above a falling line"
    noise = np.random.default_rng(0).normal(size=400)
    assert plots.smooth(list(noise), 1).tolist() == pytest.approx(noise.tolist())
    assert plots.smooth(list(noise), 21)[20:-20].std() < noise.std() / 3
    assert plots.smooth(list(noise), 5)[10] == pytest.approx(noise[8:13].mean())


def test_pictures_are_written_and_the_same_every_time(run: Run, tmp_path: Path) -> None:
    table = build(select(["base"]))
    written = plots.loss_curves([run], tmp_path / "docs/loss") + plots.score_bars(table, tmp_path / "docs/scores.png")
    assert [path.name for path in written] == ["loss.png", "loss.svg", "scores.png", "scores.svg"]
    for path in written[::2]:
        assert min(Image.open(path).size) > 300
    again = plots.loss_curves([run], tmp_path / "again/loss")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written[:2]]


def test_samples_are_the_first_of_the_plan(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, list[int]]] = []
    text = plots._text
    monkeypatch.setattr(
        plots, "_text", lambda example, lines, kind: shown.append((example.id, list(lines))) or text(example, lines, kind)
    )
    [path] = plots.samples(run, run.evaluations[0], "captions", tmp_path / "samples", n=5)
    assert shown == [(f"captions{i}", [0, 4]) for i in range(5)]
    assert min(Image.open(path).size) > 300
    with pytest.raises(UserError, match="task=birds"):
        plots.samples(run, run.evaluations[0], "birds", tmp_path / "samples")


def test_another_corpus_is_refused(run: Run, tmp_path: Path) -> None:
    path = run.folder / "run.json"
    path.write_text(path.read_text().replace(run.corpus_fingerprint, "0" * 64))
    other = read_run(run.folder)
    with pytest.raises(UserError, match="is not the corpus of base-aaaa0000"):
        plots.samples(other, other.evaluations[0], "captions", tmp_path / "samples")


def test_verdicts() -> None:
    assert plots.verdict("A red  box.", ["the box", "a red box"], 31, "captioning") == "right"
    assert plots.verdict("a red circle", ["a red box"], 60, "captioning") == "partly"
    assert plots.verdict("a cat", ["a red box"], 0, "captioning") == "wrong"
    assert plots.verdict("box", ["boxes", "box"], 30, "vqa") == "right"
    assert plots.verdict("boxed", ["boxes"], 90, "vqa") == "right"
    assert plots.verdict("", ["boxes"], 0, "vqa") == "wrong"


def test_a_run_without_a_curve_says_so(run: Run, tmp_path: Path) -> None:
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n')
    with pytest.raises(UserError, match="fewer than two logged steps"):
        plots.loss_curves([run], tmp_path / "loss")


def test_names_tell_runs_apart(run: Run) -> None:
    from dataclasses import replace

    assert plots.names([run, replace(run, name="avgpool")]) == ["base", "avgpool"]
    assert plots.names([run, replace(run, seed=1)]) == ["base, seed 0", "base, seed 1"]
    assert plots.names([run, replace(run, hash="bbbb0000")]) == ["base-aaaa0000", "base-bbbb0000"]
