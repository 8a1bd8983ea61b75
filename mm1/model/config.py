"""The typed settings of image encoders and connectors, and what can be checked of them before loading anything. No torch here.

A YAML file of configs/image_encoder or configs/connector names its schema first (`/schema/connector/cabstractor@_here_`) and is
then checked against the dataclass: unknown keys and wrong types are Hydra's to refuse, impossible numbers are refused by
`validate` and `tokens`. `settings()` is what build_image_encoder and build_connector take, and what a checkpoint keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from configs.command import register
from configs.errors import UserError
from mm1.model import geometry

TRAIN_MODES = ("full", "frozen")


# --------------------------------------------------------------------------------------------------------- image encoders


@dataclass
class ImageEncoderConfig:
    """What every image encoder has. `mean` and `std` (of pixels in [0, 1]) default to the tower's own."""

    kind: str = "???"
    image_size: int = "???"  # type: ignore[assignment]  # OmegaConf's mark of a value that a YAML file must give
    """Pixels a side; positions are interpolated to it."""
    patch_size: int = "???"  # type: ignore[assignment]
    """Pixels a patch; for a convolutional tower the stride of the feature map, which picks the stage."""
    train: str = "full"
    """full, or frozen: the tower keeps its weights and runs without gradients."""
    lr_scale: float = 1.0
    """The tower's learning rate relative to the rest."""
    depth: int | None = None
    """Keep only the first blocks of a transformer; null: all."""
    mean: list[float] | None = None
    std: list[float] | None = None

    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; UserError if image_size is no multiple of patch_size."""
        return geometry.grid(self.image_size, self.patch_size)

    def validate(self) -> None:
        """Raises UserError for a value no tower can work with."""
        self.grid()
        if self.train not in TRAIN_MODES:
            raise UserError(f"image_encoder.train={self.train}: unknown. Take one of {', '.join(TRAIN_MODES)}.")
        if self.lr_scale <= 0:
            raise UserError(
                f"image_encoder.lr_scale={self.lr_scale}: must be above 0. To keep the weights, image_encoder.train=frozen."
            )
        if self.depth is not None and self.depth < 1:
            raise UserError(f"image_encoder.depth={self.depth}: must be at least 1 block, or null for all.")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != 3:
                raise UserError(f"image_encoder.{key}={values}: must have 3 values, for red, green and blue.")
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"image_encoder.std={self.std}: deviations must be above 0.")

    def settings(self) -> dict[str, Any]:
        """For build_image_encoder: all but how it is trained."""
        return {key: value for key, value in asdict(self).items() if key not in ("train", "lr_scale")}


@dataclass
class OpenClipConfig(ImageEncoderConfig):
    """An open_clip tower: `architecture` is its name there, or local-dir:FOLDER; `weights` a tag, a file, or null (random)."""

    kind: str = "open_clip"
    architecture: str = "???"
    weights: str | None = None


@dataclass
class TransformersConfig(ImageEncoderConfig):
    """A transformers vision model: from `path` (folder or hub id), or from scratch by `config` with its model_type."""

    kind: str = "transformers"
    path: str | None = None
    config: dict[str, Any] | None = None

    def validate(self) -> None:
        super().validate()
        if (self.path is None) == (self.config is None):
            raise UserError(
                f"image_encoder.path={self.path}, image_encoder.config={self.config}: give exactly one of them, a folder or "
                "hub id, or a configuration to start from scratch."
            )


@dataclass
class TimmConfig(ImageEncoderConfig):
    """A timm model: `weights` is a file, package:NAME, hub, or null; `options` are further arguments of timm.create_model."""

    kind: str = "timm"
    architecture: str = "???"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- connectors


@dataclass
class ConnectorConfig:
    """What every connector has. `_target_` is its class; the other keys are that class's keyword arguments."""

    _target_: str = "???"
    num_tokens: int | None = None
    """Image tokens an image, a square number (MM1: 64 and 144)."""

    def validate(self) -> None:
        """Raises UserError for a value this connector can work with on no grid."""
        if self.num_tokens is None:
            raise UserError("connector.num_tokens=null: this connector needs a number of image tokens (MM1 uses 64 and 144).")
        geometry.square_side(self.num_tokens)

    def tokens(self, grid: tuple[int, int]) -> int:
        """Image tokens for a grid of patches; UserError if this connector cannot make that number of them."""
        self.validate()
        assert self.num_tokens is not None
        if self.num_tokens > grid[0] * grid[1]:
            raise UserError(
                f"connector.num_tokens={self.num_tokens}: more than the {grid[0]} x {grid[1]} patches there are. Ask for at most "
                f"{grid[0] * grid[1]}, or raise image_encoder.image_size."
            )
        return self.num_tokens

    def settings(self, grid: tuple[int, int]) -> dict[str, Any]:
        """For build_connector, and for a checkpoint: num_tokens is filled in."""
        return asdict(self) | {"num_tokens": self.tokens(grid)}


@dataclass
class AvgPoolConfig(ConnectorConfig):
    _target_: str = "mm1.model.connector.AveragePooling"


@dataclass
class AttnPoolConfig(ConnectorConfig):
    _target_: str = "mm1.model.connector.AttentionPooling"
    heads: int = 8
    mlp_ratio: float = 4.0

    def validate(self) -> None:
        super().validate()
        _at_least(1, self, "heads")


@dataclass
class ResamplerConfig(ConnectorConfig):
    _target_: str = "mm1.model.connector.PerceiverResampler"
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    mlp_ratio: float = 4.0

    def validate(self) -> None:
        super().validate()
        _at_least(1, self, "depth", "heads", "head_width")


@dataclass
class CAbstractorConfig(ConnectorConfig):
    _target_: str = "mm1.model.connector.CAbstractor"
    depth: int = 3
    """RegNet blocks before the pooling and again after it; 0: pooling and the readout MLP alone."""
    hidden: int = 1024
    """Width of the blocks."""

    def validate(self) -> None:
        super().validate()
        _at_least(0, self, "depth")
        _at_least(1, self, "hidden")


@dataclass
class MLPConfig(ConnectorConfig):
    """One token a patch: num_tokens is null (or says the same)."""

    _target_: str = "mm1.model.connector.MLPProjector"

    def validate(self) -> None:
        pass

    def tokens(self, grid: tuple[int, int]) -> int:
        patches = grid[0] * grid[1]
        if self.num_tokens not in (None, patches):
            raise UserError(
                f"connector.num_tokens={self.num_tokens}: the MLP connector keeps every patch, here {grid[0]} x {grid[1]} "
                f"= {patches}. Set connector.num_tokens=null, or take a connector that pools."
            )
        return patches


@dataclass
class PixelShuffleConfig(ConnectorConfig):
    _target_: str = "mm1.model.connector.PixelShuffle"

    def tokens(self, grid: tuple[int, int]) -> int:
        tokens = super().tokens(grid)
        geometry.shuffle_factor(grid, tokens)
        return tokens


def _at_least(minimum: int, config: ConnectorConfig, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < minimum:
            raise UserError(f"connector.{key}={getattr(config, key)}: must be at least {minimum}.")


# --------------------------------------------------------------------------------------------------------------- schemas

IMAGE_ENCODERS: dict[str, type[ImageEncoderConfig]] = {
    "open_clip": OpenClipConfig,
    "transformers": TransformersConfig,
    "timm": TimmConfig,
}
CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "avgpool": AvgPoolConfig,
    "attnpool": AttnPoolConfig,
    "resampler": ResamplerConfig,
    "cabstractor": CAbstractorConfig,
    "mlp": MLPConfig,
    "pixelshuffle": PixelShuffleConfig,
}


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as /schema/image_encoder/NAME and /schema/connector/NAME."""
    for name, encoder in IMAGE_ENCODERS.items():
        register(name, encoder, "schema/image_encoder")
    for name, connector in CONNECTORS.items():
        register(name, connector, "schema/connector")


register_schemas()
