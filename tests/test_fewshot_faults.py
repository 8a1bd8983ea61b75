"""Few-shot evaluations that meet trouble on their way: numbers that are none, damaged files of results, cells resumed late."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from eval.fewshot import evaluate
from eval.saved import read_saved
from eval.workers import _obituary
from mm1.model.multimodal import MultimodalLM
from tests.corpus import tokenizer
from tests.models import tiny_model
from tests.test_fewshot import config_for, copy_of, files
from tests.test_fewshot import corpus as corpus
from tests.test_fewshot import export as export


@pytest.mark.parametrize("task", ["colours", "names"])
def test_a_model_whose_probabilities_are_no_numbers_gives_no_answers(corpus: Path, tmp_path: Path, task: str) -> None:
    broken: MultimodalLM = tiny_model(seed=1)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = math.nan
    broken.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=rf"run model, task {task}, 0-shot, item '\w+-\d+': logprob nan, .*dtype=float32"):
        evaluate(config_for(tmp_path / "model", corpus, tasks=[task]))
    assert not [path for path in (tmp_path / "model/results").rglob("*.jsonl*") if path.stat().st_size]


def unfinished(folder: Path, cell: str, keep: slice) -> Path:
    """The finished cell as an interruption leaves it, with a part of its items."""
    (folder / "summary.json").unlink()
    lines = (folder / f"{cell}.jsonl").read_text(encoding="utf-8").splitlines()[keep]
    (folder / f"{cell}.jsonl").unlink()
    records = [json.loads(line) for line in lines]
    partial = folder / f"{cell}.jsonl.partial"
    written = [{key: value for key, value in record.items() if key != "score"} for record in records]
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written), encoding="utf-8")
    return partial


@pytest.mark.parametrize("keep", [slice(0, 5), slice(1, None), slice(None)])
def test_a_cell_that_ends_before_its_last_batch_leaves_no_file_of_work_under_way(
    export: Path, corpus: Path, tmp_path: Path, keep: slice
) -> None:
    config = config_for(copy_of(export, tmp_path), corpus, batch_size=1, tasks=["colours"])
    folder = evaluate(config)[1]
    whole = files(folder)
    unfinished(folder, "colours.2", keep)
    assert evaluate(config)[1] == folder
    assert files(folder) == whole


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 50 + b"\n", b'{"id": "\xff"}\n', b"[]\n", b"{}\n"],
    ids=["zeros", "no UTF-8", "no object", "no id"],
)
def test_answers_before_a_damaged_line_are_kept_and_the_others_given_again(
    export: Path, corpus: Path, tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(copy_of(export, tmp_path), corpus, tasks=["colours"])
    folder = evaluate(config)[1]
    whole = files(folder)
    partial = unfinished(folder, "colours.2", slice(0, 3))
    first, *others = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(first + damage + b"".join(others))
    capsys.readouterr()
    evaluate(config)
    assert f"{partial}: damaged after 1 items" in capsys.readouterr().out
    assert files(folder) == whole


def test_a_process_that_raises_says_what_and_blames_no_memory(export: Path, corpus: Path, tmp_path: Path) -> None:
    config = config_for(copy_of(export, tmp_path), corpus, tasks=["colours"], processes=2, threads=2**70)
    with pytest.raises(RuntimeError, match=r"(?s)An evaluation process failed:\nTraceback .*set_num_threads") as failed:
        evaluate(config)
    assert "memory" not in str(failed.value)


def test_memory_is_blamed_for_processes_that_were_killed_alone() -> None:
    assert "code -9, most often because memory ran out" in _obituary(-9)
    assert "code 1, for what it wrote above" in _obituary(1)


def test_results_that_are_no_text_are_named(export: Path, corpus: Path, tmp_path: Path) -> None:
    config = config_for(copy_of(export, tmp_path), corpus, tasks=["names"], shots=[0])
    folder = evaluate(config)[1]
    cell, plan = folder / "names.0.jsonl", folder / "plan.json"
    good = cell.read_bytes()
    cell.write_bytes(b"\xff" + good)
    for read in (lambda: evaluate(config), lambda: read_saved(folder)):
        with pytest.raises(UserError, match=rf"{cell} is damaged"):
            read()
    cell.write_bytes(good)
    plan.write_bytes(b"\xff" + plan.read_bytes())
    with pytest.raises(UserError, match=rf"{plan} is damaged"):
        evaluate(config)
