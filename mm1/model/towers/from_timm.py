"""Image encoders from timm: the patch tokens of a plain ViT, or a stage's feature map of a convolutional network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from mm1.model.towers.base import ImageEncoder, check_depth, chosen, map_to_patches, refuse_depth, weights_path


class TimmEncoder(ImageEncoder):
    """A timm model: the patch tokens of a ViT, or a stage's feature map of a convolutional network.

    architecture   a timm name ("tf_efficientnet_lite0", "vit_small_patch14_dinov2")
    weights        a file (.safetensors, or a torch file of tensors only), package:NAME (see pretrained.py), None, or "hub" (timm
                   downloads its default weights; the only way this class reaches a network)
    patch_size     for a convolutional network the stride that picks the stage, its deepest of that stride; None: the last stage
    depth          keep only this many blocks (ViT); None: all
    options        further keyword arguments of timm.create_model (embed_dim, depth, num_heads, ... of a ViT from scratch)
    """

    kind = "timm"

    def __init__(
        self,
        architecture: str,
        *,
        image_size: int,
        weights: str | None = None,
        patch_size: int | None = None,
        depth: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(image_size=image_size, patch_size=patch_size, depth=depth)
        self.architecture, self.options = architecture, dict(options or {})
        tower = self._create(pretrained=weights == "hub")
        own = (tower.pretrained_cfg["mean"], tower.pretrained_cfg["std"])
        if weights not in (None, "hub"):
            _load(tower, architecture, str(weights))
        patch, self.stage = strip(tower, depth, patch_size)
        self.tower = tower
        self._finish(patch, chosen(mean, std, own))

    def _create(self, pretrained: bool) -> Any:
        import timm

        if not timm.is_model(self.architecture):
            near = ", ".join(timm.list_models(f"*{self.architecture.split('_')[0]}*")[:6])
            raise UserError(
                f"image_encoder.architecture={self.architecture}: timm has no such model. It has {near or 'others'}, ..."
            )
        try:
            return timm.create_model(
                self.architecture, pretrained=pretrained, img_size=self.image_size, num_classes=0, **self.options
            )
        except TypeError as error:
            if "img_size" not in str(error):
                raise UserError(f"image_encoder.options={self.options}: {error}.") from error
        return timm.create_model(self.architecture, pretrained=pretrained, num_classes=0, **self.options)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.stage is not None:
            # 1.5 times as fast on a CPU. The weights stay as they are: safetensors and ZeRO want them contiguous.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return read_patches(self.tower, pixels, self.stage)

    def gradient_checkpointing(self, enable: bool = True) -> None:
        self.tower.set_grad_checkpointing(enable)

    def settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "architecture": self.architecture, "weights": None, "options": self.options}
        return own | self.common_settings()


def _load(tower: nn.Module, architecture: str, weights: str) -> None:
    """Load a file into the tower, by the architecture's own conversion of names and positions. UserError if one is missing."""
    import timm
    from timm.models import load_state_dict

    path = weights_path(weights)
    if not Path(path).is_file():
        raise UserError(
            f"image_encoder.weights={weights}: no such file. Give a file, package:NAME, hub, or null for random weights."
        )
    state = load_state_dict(path, weights_only=True)
    convert = getattr(sys.modules[timm.model_entrypoint(architecture).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, tower)
    try:
        missing = tower.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise UserError(f"image_encoder.weights={weights}: does not fit {architecture}: {str(error)[:300]}") from error
    if missing:
        raise UserError(
            f"image_encoder.weights={weights}: {len(missing)} weights of {architecture} are not in it "
            f"({', '.join(missing[:3])}, ...)."
        )


def strip(trunk: Any, depth: int | None, stride: int | None) -> tuple[int, int | None]:
    """Cut a timm model down to what gives the patches. Returns (patch size, stage); stage None: a ViT, whose tokens count."""
    if hasattr(trunk, "num_prefix_tokens"):
        if depth is not None:
            check_depth(depth, len(trunk.blocks))
        # from the last kept block on: later blocks, pooling and classifier go, the final norm stays
        trunk.prune_intermediate_layers([(depth or len(trunk.blocks)) - 1], prune_norm=False, prune_head=True)
        if getattr(trunk, "cls_token", None) is not None and not trunk.num_prefix_tokens:
            raise UserError("image_encoder.architecture: this timm model pools its class token away; it gives no patches.")
        return trunk.patch_embed.patch_size[0], None
    refuse_depth(depth, "a network of stages")
    strides = [stage["reduction"] for stage in trunk.feature_info]
    if stride is not None and stride not in strides:
        raise UserError(f"image_encoder.patch_size={stride}: this network's feature maps have strides {sorted(set(strides))}.")
    stage = len(strides) - 1 if stride is None else max(i for i, s in enumerate(strides) if s == stride)
    trunk.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
    return strides[stage], stage


def read_patches(trunk: Any, pixels: torch.Tensor, stage: int | None) -> torch.Tensor:
    if stage is None:
        return trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    return map_to_patches(trunk.forward_intermediates(pixels, indices=[stage], norm=False, intermediates_only=True)[0])
