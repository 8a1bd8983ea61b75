"""Image encoders from open_clip: the visual tower of any CLIP there, read before its pooling and projection.

Three forms of tower come out of open_clip: its own VisionTransformer (ln_post over the patch tokens), a ModifiedResNet (the
feature map before the attention pool, stride 32), and a timm trunk (SigLIP, EVA, ConvNeXt, ...), read as in from_timm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from mm1.model.towers.base import (
    CLIP,
    ImageEncoder,
    Normalisation,
    check_depth,
    chosen,
    map_to_patches,
    refuse_depth,
    weights_path,
)
from mm1.model.towers.from_timm import read_patches, strip


class OpenClipEncoder(ImageEncoder):
    """The visual tower of an open_clip model.

    architecture   an open_clip name ("ViT-L-14-336-quickgelu"), "local-dir:FOLDER", or the model configuration itself
    weights        a pretrained tag ("openai"; fetched by open_clip), a file (.safetensors, or a torch file of tensors only), None
    image_size     pixels a side; positions are interpolated as open_clip does (bicubic, antialiased)
    depth          keep only this many blocks (ViT); None: all
    mean, std      instead of the ones that belong to the tag or architecture
    """

    kind = "open_clip"

    def __init__(
        self,
        architecture: str | dict[str, Any],
        *,
        image_size: int,
        weights: str | None = None,
        patch_size: int | None = None,
        depth: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(image_size=image_size, patch_size=patch_size, depth=depth)
        import open_clip

        config = open_clip.get_model_config(architecture) if isinstance(architecture, str) else architecture
        if config is None:
            raise UserError(
                f"image_encoder.architecture={architecture}: open_clip has no such model. python -c 'import open_clip; "
                "print(open_clip.list_models())' lists them."
            )
        self.architecture = {
            "embed_dim": config["embed_dim"],
            "vision_cfg": dict(config["vision_cfg"])
            | {"image_size": image_size, "timm_model_pretrained": False, "patch_dropout": 0.0},
            "quick_gelu": bool(config.get("quick_gelu", False)),
        }
        if weights is None and not str(architecture).startswith("local-dir:"):
            visual = self._random_tower()
            own = _normalisation(architecture, strict=False)
        else:
            assert isinstance(architecture, str), "weights come by an architecture's name"
            visual, own = _load(architecture, weights, image_size, given=mean is not None and std is not None)
        patch = self._keep(visual)
        self._finish(patch, chosen(mean, std, own))

    def _random_tower(self) -> nn.Module:
        from open_clip.model import _build_vision_tower

        return _build_vision_tower(**self.architecture)

    def _keep(self, visual: Any) -> int:
        """Keep what the patches need; returns the patch size. The three kinds of tower differ in what that is."""
        self.form = type(visual).__name__
        if self.form == "VisionTransformer":
            if visual.attn_pool is not None:
                raise UserError(
                    "image_encoder.architecture: this open_clip tower (CoCa) pools with attention before its norm; its patches "
                    "are not normalised by anything it was trained with. Take the plain CLIP of the same size."
                )
            blocks = visual.transformer.resblocks
            if self.depth is not None:
                check_depth(self.depth, len(blocks))
                visual.transformer.resblocks = blocks[: self.depth]
            visual.proj = None
            self.tower = visual
            return visual.patch_size[0]
        if self.form == "TimmModel":
            self.tower = visual.trunk
            if hasattr(self.tower, "set_input_size"):  # open_clip builds a timm trunk at its native size whatever it is asked
                self.tower.set_input_size(img_size=self.image_size)
            patch, self.stage = strip(self.tower, self.depth, self._expected_patch)
            return patch
        refuse_depth(self.depth, "a ResNet")
        visual.attnpool = nn.Identity()
        self.tower = visual
        return 32

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.tower
        if self.form == "VisionTransformer":
            return tower.ln_post(tower.transformer(tower._embeds(pixels)))[:, 1:]
        if self.form == "TimmModel":
            return read_patches(tower, pixels, self.stage)
        return map_to_patches(tower(pixels))

    def gradient_checkpointing(self, enable: bool = True) -> None:
        self.tower.set_grad_checkpointing(enable)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "architecture": self.architecture, "weights": None} | self.common_settings()


def _load(architecture: str, weights: str | None, image_size: int, given: bool) -> tuple[nn.Module, Normalisation]:
    """The loaded tower with its positions at `image_size`, and the normalisation it was trained with."""
    import open_clip

    file = weights_path(weights) if weights else None
    own = CLIP
    if file is not None and Path(file).is_file() and not given:
        own = _normalisation(architecture, strict=True)
    elif file is not None and not Path(file).is_file() and open_clip.get_pretrained_cfg(architecture, file) in (None, {}):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"image_encoder.weights={weights}: neither a file nor a tag of {architecture}, whose tags are: {tags}.")
    try:
        # patch dropout would take patches away in training, and with them the grid
        model = open_clip.create_model(
            architecture, pretrained=file, force_image_size=image_size, force_patch_dropout=0.0, pretrained_text=False
        )
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"image_encoder.weights={weights}: open_clip could not load it for {architecture} ({str(error)[:300]}). With a "
            "network, tags are downloaded; without one give the path of a file, or take image_encoder=vit_tiny, which needs none."
        ) from error
    if file is None or not Path(file).is_file():
        preprocess = open_clip.get_model_preprocess_cfg(model)
        own = (preprocess["mean"], preprocess["std"])
    return model.visual, own


def _normalisation(architecture: str | dict[str, Any], strict: bool) -> Normalisation:
    """The normalisation shared by all pretrained tags of the architecture. Where they differ, a file does not tell its own."""
    import open_clip

    if not isinstance(architecture, str):
        return CLIP
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    found: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
    for tag in tags:
        config = open_clip.get_pretrained_cfg(architecture, tag)
        found.setdefault((tuple(config.get("mean") or CLIP[0]), tuple(config.get("std") or CLIP[1])), []).append(tag)
    if strict and len(found) > 1:
        lines = "; ".join(f"{', '.join(names)}: mean {list(mean)}, std {list(std)}" for (mean, std), names in found.items())
        raise UserError(
            f"image_encoder.mean=null: {architecture} was trained with different normalisations, and a weights file does not say "
            f"which. Set image_encoder.mean and image_encoder.std. {lines}."
        )
    return next(iter(found)) if len(found) == 1 else CLIP
