"""A run that was killed, or was killed while it saved, ends with the files of one that never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mm1 import trainer
from mm1.flops import peak_flops
from tests.corpus import write_corpus
from tests.models import TRAIN_OVERRIDES
from tests.test_trainer import environment, the_run

OVERRIDES = [*TRAIN_OVERRIDES, "decoder.architecture.attention_dropout=0.3", "train.steps=6", "train.log_every=4"]
OVERRIDES += [
    "train.checkpoint_every=3",
    "train.keep_checkpoints=1",
    *(f"data.sources.{s}.max_faults=1" for s in ("captions", "text")),
]
KILLED_AFTER_SAVING = """
import os, sys
from mm1.cpu import use_whole_width
use_whole_width()  # as the command does, before torch is there
from mm1 import train, trainer
save, last = trainer.Trainer._save, int(sys.argv.pop(1))
def save_and_die(self):
    save(self)
    if self.step == last:
        os._exit(9)
trainer.Trainer._save = save_and_die
train.main()
"""


def run(home: Path, corpus: Path, *start: str, status: int = 0) -> None:
    arguments = [sys.executable, *start, *OVERRIDES, f"data.corpus={corpus}"]
    result = subprocess.run(arguments, env=environment(home), capture_output=True, text=True, timeout=240)
    assert result.returncode == status, result.stdout[-2000:] + result.stderr[-2000:]


def measured(home: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (the_run(home) / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "images_per_second", "loader_wait", "seconds", "mfu")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_a_killed_run_leaves_the_files_of_one_that_never_stopped(home: Path, tmp_path: Path) -> None:
    """Killed after step 3 of 6, between two logged rows, with dropout and damaged samples."""
    corpus = write_corpus(tmp_path / "corpus", captions=32)
    shard = corpus / "captions-train-000000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[512 + 20] ^= 255  # in a picture
    shard.write_bytes(damaged)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(straight, corpus, "-m", "mm1.train")
    run(killed, corpus, "-c", KILLED_AFTER_SAVING, "3", status=9)
    assert (the_run(killed) / "faults.jsonl").is_file()
    assert json.loads((the_run(killed) / "run.json").read_text())["sources"]
    (the_run(killed) / "checkpoints" / "step-0000007.partial").mkdir()  # as a kill while saving leaves
    run(killed, corpus, "-m", "mm1.train")
    assert [path.name for path in (the_run(killed) / "checkpoints").iterdir()] == ["step-0000006"]
    assert measured(killed) == measured(straight)
    assert [row["step"] for row in measured(straight)] == [4, 6]
    faults = [(the_run(home) / "faults.jsonl").read_text() for home in (straight, killed)]
    assert faults[0] == faults[1] != ""
    ours, expected = (load_file(the_run(home) / "export" / "model.safetensors") for home in (killed, straight))
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


def test_what_measures_the_machine_draws_nothing() -> None:
    before = torch.get_rng_state()
    peak_flops(torch.device("cpu"), "fp32")
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_a_gpu_are_part_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, there = torch.device("cuda", 1), torch.tensor([1, 2], dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", mock.Mock(return_value=there))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore := mock.Mock())
    states = trainer.get_generators(gpu)
    expected = torch.rand(3)
    trainer.set_generators(states, gpu)
    assert torch.equal(torch.rand(3), expected)
    restore.assert_called_once_with(there, gpu)
    trainer.set_generators({"cpu": states["cpu"]}, gpu)  # saved on a CPU, or before GPUs' states were
    restore.assert_called_once()
