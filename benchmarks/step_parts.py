"""Where a step's time, memory and arithmetic go: each part alone, forward and backward, on what it is given in a real step.

The inputs of every part are caught by hooks in one forward pass; then the part runs on them again, by itself, and its output's
gradient is a constant. What a step takes beyond the sum (embeddings, norms, counting) is `rest`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mm1.speed import decoder_layers


@dataclass
class Part:
    seconds: float
    saved: int
    """Bytes kept for the backward pass."""


class Catcher:
    """Remembers what modules are called with in one forward pass: Catcher(modules), the pass, then `parts()`."""

    def __init__(self, modules: dict[str, list[nn.Module]]) -> None:
        self.modules = modules
        self.calls: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in modules}
        self._handles = [
            module.register_forward_pre_hook(self._catch(name), with_kwargs=True)
            for name, own in modules.items()
            for module in own
        ]

    def _catch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[name].append((module, args, kwargs))

        return hook

    def parts(self, repeats: int) -> dict[str, Part]:
        for handle in self._handles:
            handle.remove()
        return {name: measure(partial(_again, calls), repeats) for name, calls in self.calls.items()}


def _again(calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    return [module(*_fresh(args), **_fresh(kwargs)) for module, args, kwargs in calls]


def _fresh(arguments: Any) -> Any:
    """Floating-point tensors as leaves that want a gradient, all else as it is."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().requires_grad_(value.requires_grad)
        return value

    return tree_map(leaf, arguments)


def measure(forward: Callable[[], list[Any]], repeats: int) -> Part:
    """The best of `repeats` runs, forward and backward, after one that warms up."""
    best, saved = float("inf"), 0
    for _ in range(repeats + 1):
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        synchronise()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [output[0] if isinstance(output, tuple) else output for output in forward()]
        wanted = [output for output in outputs if output.requires_grad]
        if wanted:
            # contiguous, as what comes next in a step gives it back
            gradients = [torch.full(o.shape, 1e-3, dtype=o.dtype, device=o.device) for o in wanted]
            torch.autograd.backward(wanted, gradients)
        synchronise()
        best, saved = min(best, time.perf_counter() - start), sum(seen.values())
    return Part(best, saved)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def decoder_parts(decoder: nn.Module) -> dict[str, list[nn.Module]]:
    """The attention and MLP of every layer, by the names transformers gives them."""
    found: dict[str, list[nn.Module]] = {"attention": [], "mlp": []}
    for layer in decoder_layers(decoder):
        for name, child in layer.named_children():
            if "attn" in name or "attention" in name:
                if "norm" not in name:
                    found["attention"].append(child)
            elif name in ("mlp", "feed_forward"):
                found["mlp"].append(child)
    return found
