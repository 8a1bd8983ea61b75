"""Forward FLOPs of a module, counted by torch's own FlopCounterMode on the meta device: exact shapes, no memory, no arithmetic.

A multiply-add is 2 FLOPs. Matrix products, convolutions and attention are counted; element-wise work (norms, activations,
pooling) is not, as is usual for model FLOPs utilisation.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def on_meta(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters and buffers as meta tensors, for functional_call."""

    def shape(tensor: torch.Tensor) -> torch.Size:
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor and the true shape beside it

    tensors = {name: torch.empty(shape(p), dtype=p.dtype, device="meta") for name, p in module.named_parameters()}
    tensors |= {name: torch.empty_like(b, device="meta") for name, b in module.named_buffers()}
    return tensors


def forward_flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs of `module(*inputs)`; the inputs may be meta tensors and are only looked at for their shapes."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # nn.MultiheadAttention's fused inference kernel would hide its matrix products from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(module, on_meta(module), tuple(i.to("meta") for i in inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return int(counter.get_total_flops())
