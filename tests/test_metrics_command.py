"""`python -m eval.metrics`: files in, JSON out, mistakes named; torch is never loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from eval.metrics.__main__ import main


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "eval.metrics", *arguments], capture_output=True, text=True, check=False)


def test_command_line_scores_files_and_names_mistakes(tmp_path: Path) -> None:
    for name, content in {
        "answers": {"q1": ["red"] * 10, "q2": ["2"] * 5 + ["3"] * 5},
        "predictions": {"q1": "red", "q2": "two"},
        "short": {"q1": "red"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "twice.json").write_text('{"q1": "red", "q1": "blue"}')
    answers = str(tmp_path / "answers.json")
    done = run_cli("vqa", "--answers", answers, "--predictions", str(tmp_path / "predictions.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"] == {"q1": 1.0, "q2": 1.0}
    short = run_cli("vqa", "--answers", answers, "--predictions", str(tmp_path / "short.json"))
    assert short.returncode == 2
    assert "'q2'" in short.stderr
    twice = run_cli("vqa", "--answers", answers, "--predictions", str(tmp_path / "twice.json"))
    assert twice.returncode == 2
    assert "'q1' stands there twice" in twice.stderr


def test_a_folder_for_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["captions", "--references", str(tmp_path), "--candidates", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be read (Is a directory). Give a JSON file." in capsys.readouterr().err


REFERENCES = {"x": ["a red circle", "one red circle"], "y": ["two blue squares on a table"], "z": ["a dog runs", "a dog"]}
CANDIDATES = {"z": "a dog", "x": "a red circle", "y": "blue squares"}


def write(folder: Path, **files: object) -> dict[str, str]:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in files}


def captions(capsys: pytest.CaptureFixture[str], files: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    code = main(["captions", "--references", files["references"], "--candidates", files["candidates"], *arguments])
    return code, *capsys.readouterr()


def test_one_metric_is_reported_flat_and_several_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path, references=REFERENCES, candidates=CANDIDATES)
    code, out, _ = captions(capsys, files)
    one = json.loads(out)
    assert (code, one["metric"], one["n"], list(one["items"])) == (0, "cider_d", 3, ["x", "y", "z"])
    assert one["corpus"] == pytest.approx(math.fsum(one["items"].values()) / 3)
    code, out, _ = captions(capsys, files, "--metrics", "cider_d, bleu_1,rouge_l")
    several = json.loads(out)
    assert (code, several["n"], list(several["metrics"])) == (0, 3, ["cider_d", "bleu_1", "rouge_l"])
    assert several["metrics"]["cider_d"] == {key: one[key] for key in ("corpus", "standard_error", "items")}
    assert several["metrics"]["rouge_l"]["items"]["x"] == 1.0


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"references": REFERENCES | {"y": []}}, (), "'y' must be a list of strings"),
        ({"references": REFERENCES | {"y": "a string"}}, (), "'y' must be a list of strings"),
        ({"candidates": CANDIDATES | {"y": ["a list"]}}, (), "'y' must be a string"),
        ({"candidates": CANDIDATES | {"w": "more"}}, (), "'w'"),
        ({"references": {}, "candidates": {}}, (), "is empty"),
        ({"references": {"x": ["a"]}, "candidates": {"x": "a"}}, (), "at least 2 images"),
        ({}, ("--metrics", "bleu_5"), "'bleu_5'"),
        ({}, ("--metrics", "rouge_l,rouge_l"), "named twice"),
    ],
)
def test_mistakes_are_named_and_nothing_is_printed(
    changes: dict[str, object], arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path, **({"references": REFERENCES, "candidates": CANDIDATES} | changes))
    code, out, error = captions(capsys, files, *arguments)
    assert (code, out) == (2, "")
    assert says in error


def test_metrics_load_neither_torch_nor_java() -> None:
    code = (
        "import sys; from eval.metrics.captions import score_captions; import eval.metrics.__main__; "
        "score_captions(['cider_d', 'bleu_4', 'rouge_l'], ['a dog', 'a cat'], [['a dog'], ['the cat']]); "
        "assert not {'torch', 'pycocoevalcap'} & set(sys.modules), 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
