"""optim.law: a fitted learning-rate law in place of MM1's, part of a run's identity by what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ablations.law import Optimum, as_yaml, fit
from configs.command import compose
from configs.errors import UserError
from mm1.config import OptimConfig, TrainConfig
from mm1.optim import peak_learning_rate


def config(*overrides: str) -> TrainConfig:
    return compose("train", TrainConfig, ["data=shapes", "image_encoder=vit_tiny", *overrides])


def law_file(path: Path, a: object = -0.5, b: object = 0.25) -> Path:
    path.write_text(f"a: {a}\nb: {b}\noptima: []\n")
    return path


def test_the_fitted_law_gives_the_peak(tmp_path: Path) -> None:
    """From the fit's file to the rate: exp(a ln N + b)."""
    rates = {1_000_000: 2e-3, 4_000_000: 1e-3}
    law = fit([Optimum(str(n), n, rate, {rate: 1.0}) for n, rate in rates.items()])
    path = tmp_path / "law.yaml"
    path.write_text(as_yaml(law, "two sizes"))
    optim = config(f"optim.law={path}").optim
    for n, rate in rates.items():
        assert optim.peak(n) == pytest.approx(rate)
    assert optim.peak(16_000_000) == pytest.approx(5e-4)


def test_without_a_law_it_is_mm1s_and_a_given_rate_is_taken() -> None:
    assert OptimConfig().peak(9_000_000) == peak_learning_rate(9_000_000) == pytest.approx(6.7e-4, rel=0.02)
    assert OptimConfig(peak_lr=0.125).peak(9_000_000) == 0.125


def test_a_run_is_known_by_what_its_law_says(tmp_path: Path) -> None:
    one, copy = law_file(tmp_path / "one.yaml"), law_file(tmp_path / "copy.yaml")
    other = law_file(tmp_path / "other.yaml", b=0.26)
    plain, *hashes = (config(*more).hash("x") for more in ([], *([f"optim.law={path}"] for path in (one, copy, other))))
    assert hashes[0] == hashes[1]
    assert len({plain, *hashes}) == 3
    assert config(f"optim.law={one}").identity()["optim"]["law"] == {"a": -0.5, "b": 0.25}
    assert "law" not in config().identity()["optim"]


def test_without_a_law_a_runs_identity_is_what_it_was_before_there_were_any() -> None:
    """Key by key: a new one would rename every run."""
    assert config().identity()["optim"] == {
        "peak_lr": None, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "warmup_steps": 40, "final_lr": 0.1,
        "grad_clip": 1.0, "z_loss": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: -0.4\n", "b=None"),
        ("a: steep\nb: 1\n", "a='steep'"),
        ("a: .nan\nb: 1\n", "a=nan"),
        ("a: true\nb: 1\n", "a=True"),
        ("- 1\n- 2\n", "a=None"),
        ("a: [unclosed\n", "no readable YAML"),
    ],
)
def test_a_file_that_is_no_law_is_named(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "law.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        config(f"optim.law={path}")
    assert str(path) in str(error.value)
    assert named in str(error.value)


def test_a_law_and_a_rate_a_missing_file_and_an_absurd_rate_are_refused(tmp_path: Path) -> None:
    path = law_file(tmp_path / "law.yaml")
    with pytest.raises(UserError, match=r"optim\.peak_lr=0\.001 and optim\.law="):
        config(f"optim.law={path}", "optim.peak_lr=0.001")
    with pytest.raises(UserError, match="no such file"):
        config(f"optim.law={tmp_path / 'absent.yaml'}")
    optim = config(f"optim.law={law_file(tmp_path / 'up.yaml', a=0.4)}").optim
    with pytest.raises(UserError, match=r"a=0\.4"):
        optim.peak(1_000_000)
    assert math.isfinite(config(f"optim.law={path}").optim.peak(1_000_000))
