"""What DeepSpeed is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm1.config import EngineConfig, OptimConfig
from mm1.engine import Engine


class Told(Exception):
    pass


def told(settings: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import deepspeed

    def initialize(*, config: dict[str, Any], **_: Any) -> None:
        raise Told(config)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    model = torch.nn.Linear(2, 2)
    workers: Any = SimpleNamespace(world=1, device=torch.device("cpu"))
    with pytest.raises(Told) as raised:
        Engine(model, [{"params": list(model.parameters()), "lr_scale": 1.0}], workers, settings, OptimConfig(), 4)
    return raised.value.args[0]


def test_a_section_of_deepspeeds_configuration_keeps_what_it_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    settings = EngineConfig(zero_stage=2, deepspeed={"zero_optimization": offload, "wall_clock_breakdown": True})
    config = told(settings, monkeypatch)
    assert config["zero_optimization"] == {"stage": 2, **offload}
    assert config["wall_clock_breakdown"]
    assert config["train_batch_size"] == 4


def test_a_stage_that_deepspeeds_configuration_names_is_the_one_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineConfig(zero_stage=1, deepspeed={"zero_optimization": {"stage": 3}})
    assert settings.stage == told(settings, monkeypatch)["zero_optimization"]["stage"] == 3
    assert EngineConfig(zero_stage=1).stage == 1
