"""Image encoders: uint8 pixels (N, 3, H, H) -> the last hidden states of the patches (N, P, C), from any of three libraries.

    kind            class                 towers
    open_clip       OpenClipEncoder       the visual tower of any CLIP there: ViT, ResNet, or a timm trunk (SigLIP, EVA, ...)
    transformers    TransformersEncoder   CLIP, SigLIP, SigLIP 2, DINOv2, AIMv2, ViT, ... by folder, hub id or configuration
    timm            TimmEncoder           plain ViTs and convolutional networks, whose feature map is read as a patch grid

Each kind is a module of mm1/model/towers/; a new one is a subclass of ImageEncoder there and a line in ENCODERS here.

The contract is the same for all: pixels are normalised inside with the tower's own mean and deviation; positions are
interpolated to `image_size` when the tower is built; class and register tokens are dropped; patches come row-major, after the
tower's final norm where it has one; whatever the patches do not need (pooling heads, projections, later blocks) is not kept, so
that parameter counts are honest and every parameter gets a gradient. `settings()` is JSON and rebuilds the architecture without
the original weight files.

Batch norm always runs on its stored statistics, in training too: with a few images of one document a step, batch statistics would
differ between training and few-shot evaluation. Its scale and shift train. A convolutional tower without weights therefore starts
unnormalised (mean 0, variance 1): use it with weights.
"""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from mm1.model.towers.base import ImageEncoder
from mm1.model.towers.from_open_clip import OpenClipEncoder
from mm1.model.towers.from_timm import TimmEncoder
from mm1.model.towers.from_transformers import TransformersEncoder, resize_position_table

__all__ = [
    "ENCODERS",
    "ImageEncoder",
    "OpenClipEncoder",
    "TimmEncoder",
    "TransformersEncoder",
    "build_image_encoder",
    "resize_position_table",
]

ENCODERS: dict[str, type[ImageEncoder]] = {"open_clip": OpenClipEncoder, "transformers": TransformersEncoder, "timm": TimmEncoder}
"""Closed on purpose: a checkpoint from elsewhere names its kind of encoder, and must not name any callable it likes."""


def build_image_encoder(settings: dict[str, Any], *, load_weights: bool) -> ImageEncoder:
    """Build the encoder `settings` describe: a configuration's settings(), or those an encoder gave of itself.

    load_weights False builds the architecture with random weights and reads no weight file (a checkpoint is about to be loaded).
    UserError for an unknown kind or setting.
    """
    own = dict(settings)
    kind = own.pop("kind", None)
    if kind not in ENCODERS:
        raise UserError(f"image_encoder.kind={kind!r}: unknown. Take one of {', '.join(ENCODERS)}.")
    if kind == "transformers":
        own["load_weights"] = load_weights
    elif not load_weights:
        own["weights"] = None
    try:
        return ENCODERS[kind](**own)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error) or ENCODERS[kind].__name__ not in str(error):
            raise
        raise UserError(f"image_encoder: {error}. Remove that key.") from error
