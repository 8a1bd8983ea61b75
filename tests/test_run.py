"""A run's folder: found again, never mistaken for another, whole after a kill at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.command import compose
from configs.errors import UserError
from mm1 import run as run_module
from mm1.config import TrainConfig
from mm1.run import find_run, run_for

FINGERPRINT = "0" * 64


@pytest.mark.parametrize("survives", ["run.json", "config.yaml"])
def test_a_kill_while_the_folder_is_made_is_survived(survives: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("train", TrainConfig)
    run = run_for(config, FINGERPRINT)
    write = run_module.write_atomically

    def killed(path: Path, text: str) -> None:
        if path.name != survives:
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            run.create(config, FINGERPRINT)
    run.create(config, FINGERPRINT)
    run.create(config, FINGERPRINT)  # and once more: the same run
    assert run.info["identity"] == config.identity()
    assert run.config["data"]["corpus"] == "starter"
    assert find_run("base").folder == run.folder


def test_an_interrupted_run_that_goes_on_is_running(home: Path) -> None:
    config = compose("train", TrainConfig)
    run = run_for(config, FINGERPRINT)
    run.create(config, FINGERPRINT)
    run.update(status="interrupted")
    run.create(config, FINGERPRINT)
    assert run.info["status"] == "running"


def test_another_configuration_in_the_folder_is_named_key_by_key(home: Path) -> None:
    run = run_for(compose("train", TrainConfig), FINGERPRINT)
    run.create(compose("train", TrainConfig), FINGERPRINT)
    with pytest.raises(UserError, match=r"optim\.beta2: 0\.95 -> 0\.9; train\.steps: 340 -> 341"):
        run.create(compose("train", TrainConfig, ["optim.beta2=0.9", "train.steps=341"]), FINGERPRINT)
    with pytest.raises(UserError, match="the corpus itself"):
        run.create(compose("train", TrainConfig), "1" * 64)


def test_what_does_not_change_the_weights_does_not_change_the_run(home: Path) -> None:
    base = run_for(compose("train", TrainConfig), FINGERPRINT).folder
    for same in ("engine.micro_batch=2", "engine.zero_stage=2", "train.log_every=1", "engine.workers=0"):
        assert run_for(compose("train", TrainConfig, [same]), FINGERPRINT).folder == base
    for other in ("seed=1", "engine.precision=bf16", "packing.seq_len=256", "optim.z_loss=1e-4"):
        assert run_for(compose("train", TrainConfig, [other]), FINGERPRINT).folder != base


def test_the_order_of_sources_is_part_of_a_run_where_it_is_not_that_of_their_names(home: Path) -> None:
    """It decides which source comes first where several are due, hence the stream. The suite's own hashes stay."""
    for data in ("starter", "starter_synthetic", "full", "shapes", "own", "two_captions"):
        assert "order" not in compose("train", TrainConfig, [f"data={data}", "data.corpus=mine"]).identity()["data"]
    config, turned = compose("train", TrainConfig), compose("train", TrainConfig)
    turned.data.sources = dict(reversed(config.data.sources.items()))
    assert turned.hash(FINGERPRINT) != config.hash(FINGERPRINT)
    run = run_for(config, FINGERPRINT)
    run.create(config, FINGERPRINT)
    with pytest.raises(UserError, match=r"data\.order: None -> \['text', 'interleaved', 'captions'\]"):
        run.create(turned, FINGERPRINT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.validation_sequences=-2", r"train\.validation_sequences=-2: sequences a source, or 0"),
        ("engine.threads=-1", r"engine\.threads=-1: at least 1, or null"),
        ("+engine.deepspeed.gradient_clipping=0.01", r"engine\.deepspeed\.gradient_clipping=0\.01.*Set optim\.grad_clip instead"),
        ("+engine.deepspeed.optimizer={type: Lamb}", r"engine\.deepspeed\.optimizer=.*Set the section optim instead"),
        ("+engine.deepspeed.fp16.enabled=true", r"engine\.deepspeed\.fp16=.*Set engine\.precision instead"),
        ("+engine.deepspeed.curriculum_learning.enabled=true", r"engine\.deepspeed\.curriculum_learning=.*has no key for it"),
        ("+engine.deepspeed.zero_optimization=2", r"engine\.deepspeed\.zero_optimization=2: must be a section"),
        ("+engine.deepspeed.zero_optimization.stage=4", r"engine\.deepspeed\.zero_optimization=\{'stage': 4\}"),
    ],
)
def test_settings_of_a_run_that_cannot_be_meant_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose("train", TrainConfig, [override])


def test_a_name_that_fits_two_runs_is_not_chosen_between(home: Path) -> None:
    for seed in (0, 1):
        config = compose("train", TrainConfig, [f"seed={seed}"])
        run_for(config, FINGERPRINT).create(config, FINGERPRINT)
    with pytest.raises(UserError, match=r"run=base fits 2 runs(.|\n)*base-\w{8}(.|\n)*base-\w{8}"):
        find_run("base")
