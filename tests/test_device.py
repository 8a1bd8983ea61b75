"""Devices of an evaluation: names are checked without torch, and a GPU is taken only where there is one."""

from __future__ import annotations

import pytest
import torch

from configs.command import compose
from configs.errors import UserError
from eval.device import pick_device
from eval.fewshot import EvalConfig
from eval.textcore import TextcoreConfig
from eval.workers import device_of


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "CUDA", ""])
def test_a_name_that_is_no_devices_is_refused_by_every_command(name: str) -> None:
    with pytest.raises(UserError, match=f"device={name}: choose auto, cpu, cuda"):
        compose("eval", EvalConfig, ["run=x", f"device={name}"])
    with pytest.raises(UserError, match=f"device={name}: choose auto, cpu, cuda"):
        compose("textcore", TextcoreConfig, ["run=x", "datasets=y", f"device={name}"])
    with pytest.raises(UserError, match=f"device={name}: choose auto, cpu, cuda"):
        pick_device(name)


@pytest.mark.parametrize(
    ("count", "name", "picked"),
    [(0, "auto", "cpu"), (0, None, "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
)
def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, count: int, name: str | None, picked: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert pick_device(name) == picked


@pytest.mark.parametrize(("count", "name", "sees"), [(0, "cuda", "no GPU"), (0, "cuda:0", "no GPU"), (2, "cuda:2", "only 2")])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, count: int, name: str, sees: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for pick in (pick_device, lambda device: device_of(device, 0)):
        with pytest.raises(UserError, match=f"device={name}: torch sees {sees}"):
            pick(name)


def test_processes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of("auto", index) for index in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of("cuda:1", 0) == "cuda:1"
