"""Connectors: patches of the image encoder (B, P, C) -> image tokens of the decoder (B, M, D).

    P = h * w patches, row-major    C = the encoder's width    M = image tokens, a square number    D = the decoder's width

    AveragePooling      adaptive average pool to sqrt(M) x sqrt(M), linear                                   MM1, section 3.2
    AttentionPooling    M learned queries, one cross-attention over the patches, MLP, linear                 MM1, section 3.2
    PerceiverResampler  six layers of it; keys and values are [patches; latents]            Flamingo, as built by OpenFlamingo
    CAbstractor         RegNet blocks, adaptive average pool, RegNet blocks, MLP                    Honeybee, arXiv 2312.06742
    MLPProjector        Linear, GELU, Linear; M = P                                                                  LLaVA-1.5
    PixelShuffle        r x r patches folded into one token's channels, LayerNorm, MLP                                InternVL

Pooling is adaptive everywhere (cell i covers floor(i*in/out) to ceil((i+1)*in/out)), so that 16 patches a side pool to 12 as
they do to 8. Nothing is done in place: the patches may be cached features.

Adding a connector: a subclass here (or in any importable module) that takes in_width, grid, out_width, num_tokens and its own
settings by keyword; a dataclass in mm1/model/config.py; configs/connector/NAME.yaml; one line in tests/test_connector.py.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn

from configs.errors import UserError
from mm1.model.flops import forward_flops
from mm1.model.geometry import shuffle_factor, square_side


class Connector(nn.Module, ABC):
    """Base of all connectors: float (B, P, in_width) -> float (B, num_tokens, out_width).

    `grid` is the patches' (rows, columns). A num_tokens that is not a square number is a UserError.
    """

    def __init__(self, *, in_width: int, grid: tuple[int, int], out_width: int, num_tokens: int) -> None:
        super().__init__()
        self.in_width, self.out_width, self.num_tokens = in_width, out_width, num_tokens
        self.grid = (grid[0], grid[1])
        self.side = square_side(num_tokens)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> (B, M, D)."""

    @cached_property
    def _flops(self) -> int:
        return forward_flops(self, torch.empty(1, self.num_patches, self.in_width, device="meta"))

    def flops_per_image(self) -> int:
        """Forward FLOPs for one image, a multiply-add counted as 2."""
        return self._flops

    def as_map(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> (B, C, h, w), a view. Contiguous patches are already channels_last, so convolutions need no copy."""
        return patches.transpose(1, 2).unflatten(2, self.grid)

    def pool(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, sqrt M, sqrt M)."""
        return F.adaptive_avg_pool2d(feature_map, self.side)


def as_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h*w, C), row-major."""
    return feature_map.flatten(2).transpose(1, 2)


def position_embedding(num_patches: int, width: int) -> nn.Parameter:
    """Learned positions (1, P, C), truncated normal of std 0.02. Add them out of place."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_patches, width), std=0.02))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention over (B, M, C), (B, P, C), (B, P, C) -> (B, M, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AveragePooling(Connector):
    """Adaptive average pool, then one linear layer C -> D."""

    def __init__(self, *, in_width: int, grid: tuple[int, int], out_width: int, num_tokens: int) -> None:
        super().__init__(in_width=in_width, grid=grid, out_width=out_width, num_tokens=num_tokens)
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(as_tokens(self.pool(self.as_map(patches))))


class AttentionPooling(Connector):
    """M latents query the patches once; a pre-norm MLP residual and a linear layer C -> D follow.

    MM1 says no more than "k learnable queries"; this is the plainest reading. The latents start as a truncated normal of std
    C^-0.5.
    """

    def __init__(
        self, *, in_width: int, grid: tuple[int, int], out_width: int, num_tokens: int, heads: int = 8, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__(in_width=in_width, grid=grid, out_width=out_width, num_tokens=num_tokens)
        if in_width % heads:
            raise UserError(f"connector.heads={heads}: the image encoder's width {in_width} must be a multiple of it.")
        self.heads = heads
        self.latents = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, in_width), std=in_width**-0.5))
        self.positions = position_embedding(self.num_patches, in_width)
        self.query = nn.Linear(in_width, in_width)
        self.key_value = nn.Linear(in_width, 2 * in_width)
        self.out = nn.Linear(in_width, in_width)
        self.norm = nn.LayerNorm(in_width)
        hidden = int(mlp_ratio * in_width)
        self.mlp = nn.Sequential(nn.Linear(in_width, hidden), nn.GELU(), nn.Linear(hidden, in_width))
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        key, value = self.key_value(patches + self.positions).chunk(2, dim=-1)
        query = self.query(self.latents).expand(len(patches), -1, -1)
        tokens = self.out(attend(query, key, value, self.heads))
        tokens = tokens + self.mlp(self.norm(tokens))
        return self.proj(tokens)


class PerceiverResampler(Connector):
    """Flamingo's resampler as OpenFlamingo builds it: keys and values are [patches; latents], no biases, a final LayerNorm.

    A linear layer C -> D follows. It adds no positions of its own: the patches must carry them.
    """

    def __init__(
        self,
        *,
        in_width: int,
        grid: tuple[int, int],
        out_width: int,
        num_tokens: int,
        depth: int = 6,
        heads: int = 8,
        head_width: int = 64,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(in_width=in_width, grid=grid, out_width=out_width, num_tokens=num_tokens)
        self.latents = nn.Parameter(torch.randn(1, num_tokens, in_width))
        self.layers = nn.ModuleList(ResamplerLayer(in_width, heads, head_width, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(in_width)
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(patches, latents)
        return self.proj(self.norm(latents))


class ResamplerLayer(nn.Module):
    """latents += attention(latents -> [patches; latents]); latents += feed-forward(latents)."""

    def __init__(self, width: int, heads: int, head_width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        inner, hidden = heads * head_width, int(mlp_ratio * width)
        self.norm_patches, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, patches: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        normed = self.norm_latents(latents)
        key, value = self.key_value(torch.cat([self.norm_patches(patches), normed], dim=1)).chunk(2, dim=-1)
        latents = latents + self.out(attend(self.query(normed), key, value, self.heads))
        return latents + self.feed_forward(latents)


class CAbstractor(Connector):
    """Honeybee's C-Abstractor: positions, `depth` RegNet blocks C -> hidden, adaptive average pool, `depth` more, MLP readout.

    A block: 1x1 conv, LN, SiLU; 3x3 depthwise conv, LN, SiLU; squeeze-excite to a quarter of the block's input channels; 1x1
    conv, LN; plus the shortcut (1x1 conv + LN where channels differ); SiLU. depth 0 is pooling and the readout alone.
    """

    def __init__(
        self, *, in_width: int, grid: tuple[int, int], out_width: int, num_tokens: int, depth: int = 3, hidden: int = 1024
    ) -> None:
        super().__init__(in_width=in_width, grid=grid, out_width=out_width, num_tokens=num_tokens)
        width = hidden if depth else in_width
        self.positions = position_embedding(self.num_patches, in_width)
        self.stage1 = reg_stage(depth, in_width, hidden)
        self.stage2 = reg_stage(depth, hidden, hidden)
        self.readout = nn.Sequential(nn.Linear(width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        feature_map = self.stage1(self.as_map(patches + self.positions))
        return self.readout(as_tokens(self.stage2(self.pool(feature_map))))


def reg_stage(depth: int, in_width: int, out_width: int) -> nn.Module:
    """`depth` RegNet bottlenecks of bottle ratio 1, group size 1 (depthwise), SE ratio 0.25, LayerNorm over channels, SiLU."""
    if not depth:
        return nn.Identity()
    return RegStage(
        depth=depth,
        in_chs=in_width,
        out_chs=out_width,
        stride=1,
        dilation=1,
        bottle_ratio=1,
        group_size=1,
        se_ratio=0.25,
        act_layer=nn.SiLU,
        norm_layer=partial(LayerNorm2d, eps=1e-5),  # timm's own default is 1e-6
    )


class MLPProjector(Connector):
    """Linear, GELU, Linear on every patch: M = P. `num_tokens` may be left out; any other value than P is a UserError."""

    def __init__(self, *, in_width: int, grid: tuple[int, int], out_width: int, num_tokens: int | None = None) -> None:
        patches = grid[0] * grid[1]
        if num_tokens not in (None, patches):
            raise UserError(
                f"connector.num_tokens={num_tokens}: the MLP connector gives one token a patch, here {patches}. Leave it null, "
                "or take connector=avgpool or another that pools."
            )
        super().__init__(in_width=in_width, grid=grid, out_width=out_width, num_tokens=patches)
        self.mlp = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.mlp(patches)


class PixelShuffle(Connector):
    """Space to depth: r x r neighbouring patches become one token of r*r*C channels; LayerNorm, Linear, GELU, Linear to D.

    The grid must divide by sqrt(M), else UserError.
    """

    def __init__(self, *, in_width: int, grid: tuple[int, int], out_width: int, num_tokens: int) -> None:
        super().__init__(in_width=in_width, grid=grid, out_width=out_width, num_tokens=num_tokens)
        self.factor = shuffle_factor(self.grid, num_tokens)
        folded = in_width * self.factor**2
        self.mlp = nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(folded), fc1=nn.Linear(folded, out_width), act=nn.GELU(), fc2=nn.Linear(out_width, out_width)
            )
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        cells = patches.unflatten(1, (self.side, self.factor, self.side, self.factor))
        return self.mlp(cells.transpose(2, 3).flatten(3).flatten(1, 2))


FROM_THE_MODEL = ("in_width", "grid", "out_width")
TRUSTED = "MM1_CONNECTORS"
"""Environment variable: modules besides mm1's, separated by commas, that may be imported for a model that names them."""


def build_connector(settings: dict[str, Any], *, in_width: int, grid: tuple[int, int], out_width: int) -> Connector:
    """Build the Connector that `settings["_target_"]` names ("package.module.Class"); the other settings are its keywords.

    UserError if the class cannot be found or is no Connector, if its module is neither imported nor trusted, or if a setting is
    not one of its own.
    """
    own = dict(settings)
    target = str(own.pop("_target_", ""))
    cls = _connector_class(target)
    accepted = [name for name in inspect.signature(cls).parameters if name not in FROM_THE_MODEL]
    for key in own:
        if key not in accepted:
            raise UserError(f"connector.{key}: {cls.__name__} has no such setting. It takes {', '.join(accepted)}.")
    return cls(in_width=in_width, grid=grid, out_width=out_width, **own)


def trust_connector(target: str) -> None:
    """Import the module of a connector ("package.module.Class") that the user has named, so that models with it can be built.

    UserError if there is no such module.
    """
    try:
        importlib.import_module(target.rpartition(".")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"connector._target_={target!r}: not to be found ({error}). Give package.module.Class.") from error


def _connector_class(target: str) -> type[Connector]:
    # A model's config.json names a class; it must not choose which code runs. Modules that are already there have run.
    module, _, name = target.rpartition(".")
    if module.split(".")[0] == "mm1" or module in os.environ.get(TRUSTED, "").split(","):
        trust_connector(target)
    if module not in sys.modules:
        raise UserError(
            f"connector._target_={target!r}: {module or 'its module'} is not part of this suite, and a model does not choose "
            f"what is imported. If you trust it, import it before the model is loaded, or set {TRUSTED}={module}."
        )
    try:
        found = getattr(sys.modules[module], name)
    except AttributeError as error:
        raise UserError(f"connector._target_={target!r}: not to be found ({error}). Give package.module.Class.") from error
    if not (inspect.isclass(found) and issubclass(found, Connector)):
        raise UserError(f"connector._target_={target!r}: is not a mm1.model.connector.Connector. Give the class of a connector.")
    return found
