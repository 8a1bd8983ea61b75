"""The trainer and its data: damaged samples, budgets, killed workers, exchanged tokenisers, ranks without a single image."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipelines.loader import naming_dead_workers
from data_pipelines.reader import SplitReader
from data_pipelines.shards import Manifest
from tests.corpus import write_corpus
from tests.test_trainer import command, curve, environment, kill_after_a_checkpoint, the_run, train

KINDS = "data.sources.{}.ratio={}"


def only(kind: str) -> list[str]:
    return [KINDS.format(name, int(name == kind)) for name in ("captions", "interleaved", "text")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "tiny", captions=32)


def spoil(corpus: Path, source: str, numbers: list[int], extension: str = "png") -> list[str]:
    """Overwrite a member of training samples with what is no picture; returns their keys."""
    reader = SplitReader(corpus, Manifest.load(corpus), source, "train")
    keys = []
    for number in numbers:
        members = reader[number]
        offset, size, _ = reader.index.sample(number)[1][extension]
        data = bytearray((corpus / members.shard).read_bytes())
        data[offset : offset + size] = b"\xff" * size
        (corpus / members.shard).write_bytes(data)
        keys.append(members.key)
    return keys


def info(home: Path) -> dict:
    return json.loads((the_run(home) / "run.json").read_text())


def test_a_run_skips_what_is_damaged_and_accounts_for_it_also_after_a_kill(home: Path, corpus: Path, tmp_path: Path) -> None:
    """Killed and resumed on other workers: the same curve, each fault listed once, the same numbers of what was delivered."""
    keys = spoil(corpus, "captions", [3, 17])
    train(tmp_path / "whole", corpus, "train.steps=12")
    whole = info(tmp_path / "whole")
    listed = [json.loads(line) for line in (the_run(tmp_path / "whole") / "faults.jsonl").read_text().splitlines()]
    assert sorted(fault["key"] for fault in listed) == sorted(keys)
    assert whole["sources"]["captions"]["skipped"] >= 2
    assert whole["tokens_seen"] == sum(source["tokens"] for source in whole["sources"].values())
    assert whole["images_seen"] == sum(source["images"] for source in whole["sources"].values())

    arguments = ("train.steps=12", "train.checkpoint_every=4")
    kill_after_a_checkpoint(home, corpus, *arguments)
    train(home, corpus, *arguments, "engine.workers=2")
    assert info(home)["sources"] == whole["sources"]
    assert (the_run(home) / "faults.jsonl").read_text() == (the_run(tmp_path / "whole") / "faults.jsonl").read_text()
    assert curve(home) == curve(tmp_path / "whole")


def test_a_run_that_loses_too_much_stops_and_says_of_what(home: Path, corpus: Path) -> None:
    spoil(corpus, "captions", list(range(0, 32, 2)))
    output = train(home, corpus, "train.steps=40", "train.log_every=2", *only("captions"), status=2)
    assert "captions: " in output
    assert "data.sources.captions.max_faults=0.01" in output
    assert "faults.jsonl" in output
    # the budget is no part of what is trained: with a larger one the same run goes on
    output = train(home, corpus, "train.steps=40", "train.log_every=2", "data.sources.captions.max_faults=0.9", *only("captions"))
    assert info(home)["status"] == "finished"


def test_one_fault_stops_a_run_that_allows_none(home: Path, corpus: Path) -> None:
    (key,) = spoil(corpus, "captions", [5])
    output = train(home, corpus, "train.steps=40", "data.sources.captions.max_faults=0", *only("captions"), status=2)
    assert key in output


def test_a_tokeniser_exchanged_in_its_place_is_refused_by_name(home: Path, corpus: Path) -> None:
    """Path and corpus are the same, and so the run's hash is; only the ids are not."""
    kill_after_a_checkpoint(home, corpus, "train.checkpoint_every=4", f"decoder.tokenizer={corpus / 'tokenizer'}")
    path = corpus / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(content))
    output = train(home, corpus, "train.checkpoint_every=4", f"decoder.tokenizer={corpus / 'tokenizer'}", status=2)
    assert "is a checkpoint of other data" in output
    assert "tokenizer: " in output


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed]


def test_a_killed_data_worker_ends_the_run_which_then_goes_on_exactly(home: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("train.steps=400", "train.checkpoint_every=2", "train.log_every=2", "engine.workers=2")
    process = subprocess.Popen(
        command(corpus, *arguments), env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.time() + 120
    while not list(home.glob("runs/*/checkpoints/step-0000004")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    workers = [child for child in children(process.pid) if Path(f"/proc/{child}/comm").read_text().startswith("pt_data_worker")]
    os.kill(workers[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output[-2000:]
    assert "A data worker was killed" in output
    assert "Traceback" not in output
    # The folder is that of a run of 400 steps; shorten both the same way to compare to the end.
    arguments = ("train.checkpoint_every=2", "train.log_every=2", "engine.workers=1")
    train(tmp_path / "whole", corpus, *arguments)
    kill_after_a_checkpoint(tmp_path / "again", corpus, *arguments)
    train(tmp_path / "again", corpus, *arguments)
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")


@pytest.mark.parametrize("end", ["(pid(s) 7) exited unexpectedly", "(pid 7) is killed by signal: Killed. "])
def test_only_a_worker_that_died_is_reported_as_killed(end: str) -> None:
    with pytest.raises(UserError, match="A data worker was killed"), naming_dead_workers():
        raise RuntimeError(f"DataLoader worker {end}")
    with pytest.raises(RuntimeError, match="in DataLoader worker process 0"), naming_dead_workers():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")  # torch's words for what a worker raised


def test_killing_the_trainer_leaves_no_worker_behind(home: Path, corpus: Path) -> None:
    process = subprocess.Popen(
        command(corpus, "train.steps=100000", "train.checkpoint_every=100000", "engine.workers=2"),
        env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 120
    while not any(p.read_text() for p in home.glob("runs/*/metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.kill()
    process.wait()
    while time.time() < deadline and any(alive(worker) for worker in workers):
        time.sleep(0.1)
    assert workers
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_rank_without_images_does_not_keep_the_other_waiting(home: Path, corpus: Path, tmp_path: Path, zero_stage: int) -> None:
    """Micro-batches of one sequence, half of them text: in nearly every step one rank has images and the other has none."""
    ratios = [KINDS.format("captions", 0.5), KINDS.format("interleaved", 0), KINDS.format("text", 0.5)]
    arguments = ("engine.micro_batch=1", "train.global_batch=2", "train.steps=6", *ratios)
    train(tmp_path / "one", corpus, *arguments)
    train(home, corpus, *arguments, f"engine.zero_stage={zero_stage}", ranks=2)
    for (loss, norm), (expected_loss, expected_norm) in zip(curve(home), curve(tmp_path / "one"), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-4)
        assert norm == pytest.approx(expected_norm, rel=2e-3)


def test_held_out_sequences_are_as_many_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer than a micro-batch too; a source with nothing held out is said to have none, and ends no training."""
    from configs.command import compose
    from mm1.config import TrainConfig
    from mm1.train import validation_batches
    from tests.corpus import tokenizer, write_corpus
    from tests.models import TRAIN_OVERRIDES

    corpus = write_corpus(tmp_path / "thin", captions=1)
    for count in (0, 2, 6):
        overrides = [*TRAIN_OVERRIDES, f"data.corpus={corpus}", f"train.validation_sequences={count}", "engine.micro_batch=4"]
        batches = validation_batches(compose("train", TrainConfig, overrides), corpus, tokenizer())
        sizes = {name: sum(len(batch.input_ids) for batch in own) for name, own in batches.items()}
        assert sizes == ({"interleaved": count, "text": count} if count else {})
        assert ("captions: thin holds nothing of it out" in capsys.readouterr().out) == (count > 0)


@pytest.mark.parametrize("unit", ["document", "token"])
def test_other_units_train_and_report_their_shares(home: Path, corpus: Path, unit: str) -> None:
    train(home, corpus, f"data.unit={unit}", "data.block=4", "train.steps=12")
    sources = info(home)["sources"]
    key = {"document": "taken_documents", "token": "taken_tokens"}[unit]
    total = sum(source[key] for source in sources.values())
    assert sources["captions"][key] / total == pytest.approx(0.45, abs=0.03)
    assert sources["text"][key] / total == pytest.approx(0.10, abs=0.03)
