"""Where a model answers: the name on the command line -> a torch device that is there."""

from __future__ import annotations

import re

from configs.errors import UserError

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device(device: str) -> None:
    """Raises UserError for a name that is no device's; whether it is there needs torch, and is `pick_device`'s business."""
    if not _NAME.fullmatch(device):
        raise UserError(f"device={device}: choose auto, cpu, cuda, or one GPU by its number, such as cuda:0.")


def pick_device(device: str | None) -> str:
    """None or auto: a GPU where there is one. Raises UserError for a name that is no device's, or a GPU that is not there."""
    import torch

    device = "auto" if device is None else str(device)
    check_device(device)
    count = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if count else "cpu"
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        there = f"only {count} (cuda:0 is the first)" if count else "no GPU"
        raise UserError(f"device={device}: torch sees {there} here. Give device=cpu or auto.")
    return device
