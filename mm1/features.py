"""A frozen image encoder while its run trains: each picture is encoded once, by whichever run of the machine comes to it first.

    images without features -> groups of a fixed size, the last one filled up -> image encoder -> (n, P, C) -+-> FeatureStore
    images with features    -> their places in the FeatureStore -----------------------------> (n, P, C) ---+-> connector

The results are the same to the bit with an empty store, a full one or none: kernels choose their order of summation by the shape
of a batch, so every group has the same one, and `FrozenEncoder` looks once whether a picture's features then depend on its place
in the group or on its neighbours. Where they do, pictures are encoded one by one, which is said.

A store is of everything that decides the bits: the encoder's weights and settings, dtype, group, kernels, threads, processor,
library versions, and the source of what decodes and encodes. A picture is known by its encoded bytes; the corpus and the place in
it need not be in the key, so that corpora with pictures in common share them. Nothing of this is in a run's hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipelines import paths
from mm1.cpu import whole_width_in_use
from mm1.feature_store import FeatureStore

if TYPE_CHECKING:
    from mm1.config import EngineConfig, TrainConfig
    from mm1.model.image_encoder import ImageEncoder

GROUPS = {"cpu": 8, "cuda": 32}
"""Pictures the encoder sees at once."""
LIBRARIES = ("torch", "timm", "transformers", "open_clip_torch", "simplejpeg", "pillow")
SOURCES = (
    "data_pipelines/images.py", "data_pipelines/resize.py", "mm1/model/towers/*.py", "mm1/model/onednn.py", "mm1/features.py",
)  # fmt: skip
"""What turns encoded bytes into features; changed, it makes stores of its own."""


def folder() -> Path:
    """Of all stores."""
    return paths.home() / "cache" / "features"


def shared_out(engine: EngineConfig) -> bool:
    """Whether processes hold shares of the weights (ZeRO-3): the encoder then runs on all of them together, or on none."""
    return engine.stage == 3


def kept(config: TrainConfig) -> bool:
    """Whether a run of this configuration reads and leaves features."""
    return config.image_encoder.train == "frozen" and config.engine.feature_cache_gb > 0 and not shared_out(config.engine)


class FrozenEncoder:
    """The encoder of a model that trains with image_encoder.train=frozen, behind its features.

    `hits` and `misses` count pictures since the run (or its resumption) began: features read, features computed.
    """

    def __init__(self, encoder: ImageEncoder, engine: EngineConfig, device: torch.device, *, keep: bool) -> None:
        """After the engine has laid out, and a checkpoint has loaded, the weights. Raises UserError where nothing can be kept."""
        self.encoder, self.device = encoder.eval(), device
        self.hits = self.misses = 0
        self.group, like = _probe(encoder, GROUPS.get(device.type, 32), device)
        self.shape, self.dtype = (like.shape[1], like.shape[2]), like.dtype
        self.store: FeatureStore | None = None
        if keep:
            about = describe(encoder, engine, device, self.group)
            self.store = FeatureStore(folder(), about, self.shape, self.dtype, int(engine.feature_cache_gb * 1e9))
        self._new: list[tuple[list[bytes], torch.Tensor]] = []

    def __call__(self, images: torch.Tensor, places: np.ndarray | None = None, keys: np.ndarray | None = None) -> torch.Tensor:
        """Features (N, P, C) on the device. `places`, `keys`: of all N (data_pipelines/batch.py); `images`, uint8 (M, 3, H, H) on
        the device: of those M whose place is -1. Without places: of all."""
        if places is None or keys is None or self.store is None:
            self.misses += len(images)
            return self._encode(images)
        places = places.copy()
        pending = np.flatnonzero(places < 0)
        if len(pending):  # another run may have been here since a worker asked
            self.store.refresh()
            places[pending] = [self.store.find(keys[i].tobytes()) for i in pending]
        missing = np.flatnonzero(places[pending] < 0)
        found = places >= 0
        self.hits, self.misses = self.hits + int(found.sum()), self.misses + len(missing)
        features = torch.empty(len(places), *self.shape, dtype=self.dtype, device=self.device)
        if found.any():
            kept = self.store.read(places[found])
            features[torch.from_numpy(found).to(self.device)] = kept.to(self.device, non_blocking=True)
        if len(missing):
            computed = self._encode(images[torch.from_numpy(missing).to(images.device)])
            features[torch.from_numpy(~found).to(self.device)] = computed
            if not self.store.full:
                self._new.append(([keys[i].tobytes() for i in pending[missing]], computed))
        return features

    def keep(self) -> str:
        """Write what was computed since the last call: after a step, so that a GPU is not waited for within it.

        Returns why nothing more is kept, the one time that this turns out.
        """
        new, self._new = self._new, []
        if self.store is None or self.store.full:
            return ""
        for keys, features in new:
            self.store.put(keys, features.cpu())
        return self.store.full

    @torch.no_grad()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.empty(len(images), *self.shape, dtype=self.dtype, device=self.device)
        for start in range(0, len(images), self.group):
            group = images[start : start + self.group]
            features[start : start + self.group] = self.encoder(_filled(group, self.group))[: len(group)]
        return features


def _filled(images: torch.Tensor, group: int) -> torch.Tensor:
    if len(images) == group:
        return images.contiguous()
    filled = images.new_zeros(group, *images.shape[1:])
    filled[: len(images)] = images
    return filled


@torch.no_grad()
def _probe(encoder: ImageEncoder, group: int, device: torch.device) -> tuple[int, torch.Tensor]:
    """The size of the groups, `group` or 1, and the features of one. Noise, moved round the group and by itself throughout."""
    size = encoder.image_size
    noise = torch.randint(0, 256, (group, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = noise.to(device)
    features = encoder(noise)
    alone = encoder(noise[:1].expand_as(noise).contiguous())
    moved = encoder(noise.roll(1, dims=0))
    if torch.equal(moved, features.roll(1, dims=0)) and torch.equal(alone, features[:1].expand_as(features)):
        return group, features
    if os.environ.get("RANK", "0") == "0":
        print("  the frozen image encoder's features depend on their place in a batch here: pictures are encoded one by one")
    return 1, features


# ----------------------------------------------------------------------------------------------------- what decides the bits


def describe(encoder: ImageEncoder, engine: EngineConfig, device: torch.device, group: int) -> dict[str, Any]:
    """Everything that decides an image's features to the bit, as plain values."""
    return {
        "weights": fingerprint(encoder),
        "image_encoder": encoder.settings(),
        "group": group,
        "kernels": engine.kernels,
        "compile": engine.compile,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "processor": processor(device),
        "whole_width": whole_width_in_use() if device.type == "cpu" else None,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "source": _source(),
    }


def fingerprint(encoder: ImageEncoder) -> str:
    """Of the weights and statistics with their dtypes."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        hasher.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


@cache
def _source(patterns: Sequence[str] = SOURCES) -> str:
    root, hasher = Path(__file__).resolve().parent.parent, hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        hasher.update(path.name.encode() + path.read_bytes())
    return hasher.hexdigest()
