"""Image encoders from transformers: CLIP, SigLIP, SigLIP 2, DINOv2 and 3, AIMv2, ViT, ... by folder, hub id or configuration.

The tower is built without pooling head and mask token, at the wanted image size; weights are read at their own size and their
position table is resized to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.errors import UserError
from mm1.model import geometry
from mm1.model.towers.base import CLIP, HALF, IMAGENET, ImageEncoder, Normalisation, check_depth, chosen

NORMALISATION_OF: dict[str, Normalisation] = {
    "clip_vision_model": CLIP,
    "aimv2_vision_model": CLIP,
    "siglip_vision_model": HALF,
    "siglip2_vision_model": HALF,
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "vit": HALF,
}
"""Used where there is no preprocessor_config.json beside the weights: each family's own."""

BACKBONE_KEYS = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")

HEADLESS = ("vision_use_head", "use_head", "use_mask_token")
"""Switches of the families' pooling heads and mask tokens, all turned off: no patch ever sees them."""


class TransformersEncoder(ImageEncoder):
    """A transformers vision model, or the vision half of a CLIP-like one.

    path         a folder or hub id with config.json and weights; its preprocessor_config.json gives the normalisation
    config       instead of path: the configuration as a dict with its model_type, for a tower from scratch
    image_size   pixels a side; the position table is resized when it differs (bicubic, antialiased)
    depth        keep only this many blocks; None: all
    mean, std    instead of the tower's own
    """

    kind = "transformers"

    def __init__(
        self,
        path: str | None = None,
        *,
        image_size: int,
        config: dict[str, Any] | None = None,
        patch_size: int | None = None,
        depth: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        load_weights: bool = True,
    ) -> None:
        super().__init__(image_size=image_size, patch_size=patch_size, depth=depth)
        from transformers import AutoConfig, AutoModel

        if (path is None) == (config is None):
            raise UserError(
                "image_encoder.path, image_encoder.config: give exactly one of them (a folder or hub id, or a configuration)."
            )
        if path is not None:
            native = _vision_config(path)
            own = _normalisation(path, native.model_type)
        else:
            assert config is not None
            kwargs = dict(config)
            model_type = str(kwargs.pop("model_type", ""))
            try:
                native = AutoConfig.for_model(model_type, **kwargs)
            except ValueError as error:
                raise UserError(f"image_encoder.config.model_type={model_type!r}: transformers knows no such model.") from error
            own = NORMALISATION_OF.get(native.model_type)
        if own is None and not (mean and std):
            raise UserError(
                f"image_encoder.mean=null: the normalisation of a {native.model_type} is not known here. Set image_encoder.mean "
                "and image_encoder.std, or put its preprocessor_config.json beside the weights."
            )
        for key in HEADLESS:
            # SigLIP's configuration has no such field in transformers 5.17, but its model looks for one all the same
            if hasattr(native, key) or (key == "vision_use_head" and native.model_type.startswith("siglip")):
                setattr(native, key, False)
        if depth is not None:
            check_depth(depth, native.num_hidden_layers)
            native.num_hidden_layers = depth
        # backbone configurations list their stages, which a changed depth contradicts; nothing here reads them
        resized = AutoConfig.for_model(**{k: v for k, v in native.to_dict().items() if k not in BACKBONE_KEYS})
        _set_image_size(resized, image_size)
        self.tower = _headless(AutoModel.from_config(resized))
        if path is not None and load_weights:
            self.tower.load_state_dict(_resize_positions(_weights(path, native), self.tower, path))
        self.config = self.tower.config.to_dict()
        self.form = native.model_type
        self._finish(_patch_size(native), chosen(mean, std, own or HALF))

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.form == "siglip2_vision_model":
            return self._siglip2_patches(pixels)
        hidden = self.tower(pixel_values=pixels).last_hidden_state
        if self.form == "clip_vision_model":  # the one family whose last_hidden_state lacks the final norm
            hidden = self.tower.post_layernorm(hidden)
        return hidden[:, hidden.shape[1] - self.num_patches :]

    def _siglip2_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """SigLIP 2 takes ragged lists of patches; with one square size, its masks and per-image positions are only overhead."""
        p, tower = self.patch_size, self.tower
        cells = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        hidden = tower.embeddings.patch_embedding(cells) + tower.embeddings.position_embedding.weight
        return tower.post_layernorm(tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state)

    def gradient_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.tower.gradient_checkpointing_enable()
        else:
            self.tower.gradient_checkpointing_disable()

    def settings(self) -> dict[str, Any]:
        # depth is already in the configuration
        return (
            {"kind": self.kind, "path": None, "config": json.loads(json.dumps(self.config, default=str))}
            | self.common_settings()
            | {"depth": None}
        )


def _vision_config(path: str) -> Any:
    """The vision configuration at a folder or hub id."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"image_encoder.path={path}: no transformers configuration there ({str(error).splitlines()[0][:200]}). Give a folder "
            "with config.json, or a hub id while there is a network; image_encoder=vit_tiny needs neither."
        ) from error
    return getattr(config, "vision_config", config)


def _normalisation(path: str, model_type: str) -> Normalisation | None:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(path)
        return tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (OSError, KeyError):
        return NORMALISATION_OF.get(model_type)


def _patch_size(config: Any) -> int:
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise UserError(f"image_encoder.config: a {config.model_type} configuration has no patch_size; take a tower of patches.")
    return patch if isinstance(patch, int) else patch[0]


def _set_image_size(config: Any, image_size: int) -> None:
    rows, columns = geometry.grid(image_size, _patch_size(config))
    if config.model_type == "siglip2_vision_model":
        config.num_patches = rows * columns
    else:
        config.image_size = image_size


def _headless(tower: Any) -> Any:
    """Remove what no configuration key removes: poolers and mask tokens."""
    if getattr(tower, "pooler", None) is not None:
        tower.pooler = None
    if getattr(getattr(tower, "embeddings", None), "mask_token", None) is not None:
        tower.embeddings.mask_token = None
    return tower


def _weights(path: str, native: Any) -> dict[str, torch.Tensor]:
    """The weights at `path` under the names of the vision model, at their own resolution."""
    from transformers import AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report lists every key of the text tower
    try:
        model, report = AutoModel.from_pretrained(path, config=native, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise UserError(f"image_encoder.path={path}: no weights there ({str(error).splitlines()[0][:200]}).") from error
    finally:
        logging.set_verbosity(verbosity)
    model = _headless(model)
    state = model.state_dict()
    if missing := sorted(set(report["missing_keys"]) & set(state)):
        raise UserError(
            f"image_encoder.path={path}: {len(missing)} weights of a {native.model_type} are not in it ("
            f"{', '.join(missing[:3])}, ...). The folder's config.json and its weights belong to different models."
        )
    return state


def _resize_positions(state: dict[str, torch.Tensor], tower: nn.Module, path: str) -> dict[str, torch.Tensor]:
    """Bring every position table of `state` to the tower's shape, (T, C) or (1, T, C); leading rows that are no patch stay."""
    wanted = tower.state_dict()
    out = {}
    for name, tensor in state.items():
        shape = wanted[name].shape
        if tensor.shape != shape:
            if "position" not in name or tensor.shape[-1] != shape[-1]:
                raise UserError(f"image_encoder.path={path}: {name} is {tuple(tensor.shape)}, {tuple(shape)} at this image_size.")
            tensor = resize_position_table(tensor.reshape(-1, shape[-1]), shape.numel() // shape[-1]).reshape(shape)
        out[name] = tensor
    return out


def resize_position_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """(T, C) -> (length, C): the square of patch positions resized bicubically with antialiasing, as open_clip does.

    Both lengths are a square plus the same few leading tokens; UserError if they are not.
    """
    for prefix in range(8):
        old, new = len(table) - prefix, length - prefix
        if old > 0 and new > 0 and isqrt(old) ** 2 == old and isqrt(new) ** 2 == new:
            square = table[prefix:].T.reshape(1, -1, isqrt(old), isqrt(old))
            resized = F.interpolate(square, (isqrt(new), isqrt(new)), mode="bicubic", antialias=True, align_corners=False)
            return torch.cat([table[:prefix], resized.flatten(2)[0].T])
    raise UserError(
        f"image_encoder.image_size: a position table of {len(table)} cannot be resized to {length}; neither is a square grid."
    )
