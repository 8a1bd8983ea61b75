"""Convolutions that carry the batch norm after them, by way of oneDNN: most of a convolutional tower's time on a CPU.

    conv + norm   y = act(conv(x, s W) + t)       s = gamma / sqrt(variance + eps), t = beta - mean s + s b

A batch norm on stored statistics (mm1/model/image_encoder.py: the towers' always are) is an affine map of each channel, so it
can be moved into the convolution before it: its own pass over the feature map is saved, forward and backward, and gradients reach
W, gamma and beta through s W and t. The activation is applied while the convolution's result is still in cache.

`use_onednn` changes modules' classes in place: parameters, names and hooks stay what they are. For training in float32 on a CPU;
on other inputs (float64, bfloat16, meta) each module falls back to the plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mm1.model import depthwise
from mm1.model.flops import on_meta


def use_onednn(encoder: nn.Module) -> int:
    """Let `encoder`'s pairs of convolution and batch norm run as above; returns how many there are."""
    if not torch.backends.mkldnn.is_available():
        return 0
    pairs = conv_norm_pairs(encoder)
    for conv, norm in pairs:
        fold(conv, norm)
    return len(pairs)


def _float32(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def conv_norm_pairs(encoder: nn.Module) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Convolutions whose result goes into one batch norm on stored statistics and nowhere else, found on the meta device."""
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    found: list[tuple[nn.Conv2d, _BatchNorm, Any]] = []

    def after(conv: nn.Module, args: Any, output: torch.Tensor) -> None:
        made[id(output)] = (conv, output)  # type: ignore[assignment]  # the tensor is kept, so that its id stays its own

    def before(norm: nn.Module, args: Any) -> None:
        conv, output = made.get(id(args[0]), (None, None))
        foldable = not norm.training and norm.track_running_stats and norm.affine
        if conv is not None and output is not None and foldable:
            found.append((conv, norm, output.grad_fn))  # type: ignore[arg-type]

    handles = []
    for module in encoder.modules():
        if type(module) in (nn.Conv2d, Conv2dSame) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            handles.append(module.register_forward_hook(after))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d):
            handles.append(module.register_forward_pre_hook(before))
    size = int(encoder.image_size)  # type: ignore[arg-type]
    tensors = on_meta(encoder)
    for name, _ in encoder.named_parameters():
        tensors[name].requires_grad_()
    try:
        with torch.enable_grad():
            images = torch.empty(1, 3, size, size, dtype=torch.uint8, device="meta")
            output = functional_call(encoder, tensors, (images,))
    finally:
        for handle in handles:
            handle.remove()
    uses, queue, seen = dict.fromkeys([node for _, _, node in found], 0), [output.grad_fn], set()
    while queue:
        node = queue.pop()
        for child, _ in () if node in seen else node.next_functions:
            if child in uses:
                uses[child] += 1
            if child is not None:
                queue.append(child)
        seen.add(node)
    modules = [module for conv, norm, _ in found for module in (conv, norm)]
    return [(conv, norm) for conv, norm, node in found if uses[node] == 1 and modules.count(conv) == modules.count(norm) == 1]


def fold(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """Make `conv` do `norm`'s work, and `norm` only what comes after (activation and dropout, in timm's BatchNormAct2d)."""
    act = norm.act if isinstance(norm, BatchNormAct2d) and isinstance(norm.drop, nn.Identity) else None
    conv.fused = {nn.ReLU6: "relu6", nn.ReLU: "relu"}.get(type(act), "none")  # type: ignore[arg-type, assignment]
    conv.same = isinstance(conv, Conv2dSame)  # type: ignore[assignment]
    conv.norm = (norm,)  # type: ignore[assignment]  # in a tuple: torch would take a bare module for a child of `conv`
    norm.done = conv.fused != "none" or not isinstance(norm, BatchNormAct2d)  # type: ignore[assignment]
    norm.__class__ = FoldedNorm if isinstance(norm, BatchNormAct2d) else FoldedPlainNorm
    conv.__class__ = NormedConv2d


class NormedConv2d(nn.Conv2d):
    """A convolution that carries the batch norm after it. `fused`: the activation it applies as well."""

    norm: tuple[_BatchNorm]
    same: bool
    fused: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        (norm,) = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = self.weight * scale.view(-1, 1, 1, 1)
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        padding = self.padding
        if self.same:
            input, padding = pad_same(input, [*self.kernel_size], [*self.stride], [*self.dilation]), (0, 0)
        if _float32(input, weight):
            return _Convolution.apply(input, weight, shift, self.stride, padding, self.dilation, self.groups, self.fused)
        out = F.conv2d(input, weight, shift, self.stride, padding, self.dilation, self.groups)
        return {"relu6": F.relu6, "relu": F.relu}.get(self.fused, lambda y: y)(out)


class FoldedNorm(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.done else self.act(self.drop(x))


class FoldedPlainNorm(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


class _Convolution(torch.autograd.Function):
    """act(conv(x, weight) + shift). What is kept for the backward pass is the result, which the next layer keeps as well: where
    an activation cut its input off, its output is at a bound."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        shift: torch.Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        fused: str,
    ) -> torch.Tensor:
        act = {"relu6": ("hardtanh", [0.0, 6.0]), "relu": ("relu", []), "none": ("none", [])}[fused]
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, shift, list(padding), list(stride), list(dilation), groups, act[0], act[1], ""
        )
        ctx.save_for_backward(x, weight, y if fused != "none" else None)
        ctx.geometry, ctx.fused = (list(stride), list(padding), list(dilation), False, [0, 0], groups), fused
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, y = ctx.saved_tensors
        if ctx.fused == "relu6":
            gradient = torch.ops.aten.hardtanh_backward(gradient, y, 0.0, 6.0)
        elif ctx.fused == "relu":
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0.0)
        # The shift's gradient apart: convolution_backward takes ten times as long over the sum as the sum takes.
        of_weight = _of_depthwise(x, gradient, weight, *ctx.geometry) if ctx.needs_input_grad[1] else None
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and of_weight is None, False]
        of_x, by_torch, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *ctx.geometry, mask)
        of_weight = by_torch if of_weight is None else of_weight
        of_shift = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1]).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_shift, None, None, None, None, None


def _of_depthwise(
    x: torch.Tensor,
    gradient: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> torch.Tensor | None:
    """The weights' gradient by depthwise.c where that is faster: from 4 x 4 on. None elsewhere."""
    kernel = weight.shape[2]
    square = weight.shape[3] == kernel and len({*stride}) == len({*padding}) == 1 and {*dilation} == {1}
    if not (groups == x.shape[1] == weight.shape[0] and square and 4 <= kernel <= depthwise.MAX_KERNEL):
        return None
    return depthwise.weight_gradient(x, gradient, kernel, stride[0], padding[0])
