"""Features of frozen image encoders, kept on disk: same weights to the bit, shared, bounded, safe to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.command import compose
from configs.errors import UserError
from mm1 import feature_store, features
from mm1.config import EngineConfig, TrainConfig
from mm1.feature_store import ENTRY, FeatureStore
from mm1.features import FrozenEncoder
from tests.corpus import write_corpus
from tests.models import TRAIN_OVERRIDES, tiny_model
from tests.test_trainer import curve, environment, kill_after_a_checkpoint, metrics, the_run, train

FROZEN = ("image_encoder.train=frozen", "train.validation_sequences=0")
SHAPE = (3, 5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "tiny", captions=32)


def weights(home: Path) -> dict[str, torch.Tensor]:
    return load_file(the_run(home) / "export" / "model.safetensors")


def info(home: Path) -> dict[str, Any]:
    return json.loads((the_run(home) / "run.json").read_text())


def again(home: Path, cache: Path) -> Path:
    """Another home with the same store."""
    home.mkdir()
    (home / "cache").symlink_to(cache)
    return home


def same_bits(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.fixture(scope="module")
def off(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps nothing."""
    home = tmp_path_factory.mktemp("off")
    train(home, corpus, *FROZEN, "engine.feature_cache_gb=0")
    assert not (home / "cache" / "features").exists()
    return home


# ----------------------------------------------------------------------------------------------------------- whole trainings


def test_cold_warm_and_off_train_the_same_weights(corpus: Path, off: Path, tmp_path: Path) -> None:
    """Through the command, with workers and without; the second run computes nothing, and no run's hash knows of it."""
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    (tmp_path / "cache").mkdir()
    train(again(cold, tmp_path / "cache"), corpus, *FROZEN, "engine.workers=2")
    output = train(again(warm, tmp_path / "cache"), corpus, *FROZEN)
    assert same_bits(weights(off), weights(cold))
    assert same_bits(weights(off), weights(warm))
    assert curve(off) == curve(cold) == curve(warm)
    assert the_run(off).name == the_run(cold).name == the_run(warm).name
    counts = [(info(h)["features_read"], info(h)["features_computed"]) for h in (off, cold, warm)]
    seen = info(off)["images_seen"]
    assert counts[0] == (0, seen)
    assert counts[2] == (seen, 0)
    assert sum(counts[1]) == seen
    assert counts[1][0] > 0  # eight pictures, again and again
    assert metrics(warm)[-1]["features_read"] == 1
    assert "8 pictures in" in output
    assert [info(h)["flops"] for h in (off, cold, warm)] == [info(off)["flops"]] * 3


def test_a_killed_run_goes_on_to_the_bit(corpus: Path, off: Path, home: Path) -> None:
    kill_after_a_checkpoint(home, corpus, *FROZEN, "train.checkpoint_every=4")
    assert "Going on from step" in train(home, corpus, *FROZEN, "train.checkpoint_every=4")
    assert same_bits(weights(off), weights(home))
    assert info(home)["features_read"] + info(home)["features_computed"] == info(home)["images_seen"]


def test_two_processes_share_a_store(corpus: Path, off: Path, home: Path) -> None:
    train(home, corpus, *FROZEN, "engine.micro_batch=2", ranks=2)
    for (loss, norm), (expected_loss, expected_norm) in zip(curve(home), curve(off), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-4)
        assert norm == pytest.approx(expected_norm, rel=2e-3)
    (store,) = (home / "cache" / "features").glob("*/index.bin")
    assert store.stat().st_size == 8 * ENTRY.size  # eight pictures, each once
    assert info(home)["features_read"] + info(home)["features_computed"] == info(home)["images_seen"]


def test_zero_3_says_that_nothing_is_kept(corpus: Path, home: Path) -> None:
    output = train(home, corpus, *FROZEN, "engine.zero_stage=3", "train.steps=4")
    assert "ZeRO-3 shares out the frozen image encoder's weights" in output
    assert not (home / "cache" / "features").exists()


def test_a_full_store_is_said_and_trains_the_same(corpus: Path, off: Path, home: Path) -> None:
    """Room for three of the eight pictures (16 patches of 16 float32 each)."""
    output = train(home, corpus, *FROZEN, f"engine.feature_cache_gb={3 * (1024 + ENTRY.size) / 1e9:.9f}")
    assert output.count("are not kept:") == 1
    assert "engine.feature_cache_gb=" in output
    (store,) = (home / "cache" / "features").glob("*/features.bin")
    assert store.stat().st_size == 3 * 1024
    assert same_bits(weights(off), weights(home))
    assert info(home)["features_computed"] > 3


def test_a_trained_encoder_leaves_no_features(corpus: Path, home: Path) -> None:
    train(home, corpus, "train.steps=4")
    assert not (home / "cache" / "features").exists()
    assert "features_computed" not in info(home)
