"""Image features: every distinct image encoded once, kept in memory up to a budget and on disk beyond it.

    image bytes -> place in a fixed order -> groups of 8 -> image encoder + connector -> (M, D) tokens an image
                                                         memory (least recently used) <-> file of groups

Images are encoded in fixed groups, in the order in which they were registered. Were they encoded as batches happen to need them,
a resumed evaluation would group them differently, and floating-point sums could differ in the last bit. The file holds a record
a group, with a digest of what the group is and a checksum of what it holds: what a killed evaluation has encoded is found again
by the next one, and by other processes of the same one.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines.images import decode_image

if TYPE_CHECKING:
    import torch

IMAGE_GROUP = 8
FEATURE_BUDGET = 2_000_000_000
"""Bytes of image tokens kept on the device."""
_DIGEST = 16
_HEAD = _DIGEST + 4


@dataclass(frozen=True)
class _Member:
    digest: bytes
    read: Callable[[], bytes]
    name: str


class ImageFeatures:
    """Image tokens (M, D) by content, on `device`.

    `budget`: bytes kept in memory. `spill`: the file for what is beyond, and for other processes; without one, an image that fell
    out of memory is encoded again, with its group. `key` says what else decides the features (weights, dtype).
    """

    def __init__(
        self, model: Any, device: str, budget: int = FEATURE_BUDGET, *, spill: Path | None = None, key: str = ""
    ) -> None:
        self.model, self.device, self.budget, self.spill, self.key = model, device, budget, spill, key
        self.encoded = 0
        """Images encoded by this object, as against those found in the file."""
        self._number: dict[bytes, int] = {}
        self._groups: list[list[_Member]] = []
        self._sealed = 0
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def register(self, image: bytes, name: str = "image", read: Callable[[], bytes] | None = None) -> int:
        """Give an image its number in the fixed order; the same bytes keep the one they have.

        With `read`, which brings the bytes again, they need not stay in memory until the image is encoded.
        """
        digest = hashlib.blake2b(image, digest_size=_DIGEST).digest()
        if digest not in self._number:
            # A group that was encoded is closed: what comes later must not make it a different one.
            if len(self._groups) == self._sealed or len(self._groups[-1]) == IMAGE_GROUP:
                self._groups.append([])
            self._number[digest] = (len(self._groups) - 1) * IMAGE_GROUP + len(self._groups[-1])
            self._groups[-1].append(_Member(digest, read or (lambda: image), name))
        return self._number[digest]

    def __len__(self) -> int:
        """Distinct images registered."""
        return len(self._number)

    def digest(self, number: int) -> bytes:
        return self._groups[number // IMAGE_GROUP][number % IMAGE_GROUP].digest

    def encode_all(self, first: int = 0, every: int = 1) -> Iterator[int]:
        """Encode every `every`-th group from `first` on, but for what is in memory or in the file; yields the images of each."""
        for group in range(first, len(self._groups), every):
            if group * IMAGE_GROUP not in self._kept and self._load(group) is None:
                self._encode(group)
            yield len(self._groups[group])

    def get(self, images: Sequence[bytes | int]) -> torch.Tensor | None:
        """(N, M, D) on the device, of images or their numbers; None for no images."""
        import torch

        if not images:
            return None
        numbers = [image if isinstance(image, int) else self.register(image) for image in images]
        return torch.stack([self._one(number) for number in numbers])

    def _one(self, number: int) -> torch.Tensor:
        if number not in self._kept:
            group = number // IMAGE_GROUP
            loaded = self._load(group)
            if loaded is None:
                self._encode(group)
            else:
                self._keep(group, loaded)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _encode(self, group: int) -> None:
        import torch

        self._sealed = max(self._sealed, group + 1)
        members = self._groups[group]
        size = self.model.config.image_size
        pixels = torch.stack([decode_image(member.read(), size, name=member.name) for member in members])
        with torch.inference_mode():
            features = self.model.encode_images(pixels.to(self.device))
        self.encoded += len(members)
        self._save(group, features)
        self._keep(group, features)

    def _keep(self, group: int, features: torch.Tensor) -> None:
        first = group * IMAGE_GROUP
        self._kept |= {first + at: feature.clone() for at, feature in enumerate(features)}
        most = max(IMAGE_GROUP, self.budget // (features[0].numel() * features.element_size()))
        while len(self._kept) > most:
            self._kept.popitem(last=False)

    # ----------------------------------------------------------------------------------------------------------- the file

    def _layout(self) -> tuple[torch.dtype, tuple[int, int], int]:
        """dtype and (M, D) of an image's tokens, and the bytes of one image."""
        weight = self.model.get_input_embeddings().weight
        shape = (self.model.config.num_image_tokens, int(weight.shape[1]))
        return weight.dtype, shape, shape[0] * shape[1] * weight.dtype.itemsize

    def _record(self, group: int) -> tuple[bytes, int, int]:
        """(digest of what the group is, where its record begins, bytes of its features)."""
        dtype, shape, size = self._layout()
        digest = hashlib.blake2b(f"{self.key} {dtype} {shape}".encode(), digest_size=_DIGEST)
        for member in self._groups[group]:
            digest.update(member.digest)
        return digest.digest(), group * (_HEAD + IMAGE_GROUP * size), len(self._groups[group]) * size

    def _save(self, group: int, features: torch.Tensor) -> None:
        import torch

        if self.spill is None:
            return
        digest, at, _ = self._record(group)
        content = features.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        try:
            file = os.open(self.spill, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _write(file, content, at + _HEAD)
                _write(file, digest + zlib.crc32(content).to_bytes(4, "little"), at)  # last: it says that the rest is there
            finally:
                os.close(file)
        except OSError as error:
            needed = len(self) * self._layout()[2] / 1e9
            raise UserError(
                f"{self.spill}: image features cannot be written ({error.strerror}). All of them take {needed:.1f} GB: make room "
                "there, or lower limit=..."
            ) from error

    def _load(self, group: int) -> torch.Tensor | None:
        """A group's features from the file, on the device; None where it has none, or not these."""
        import torch

        if self.spill is None or not self.spill.is_file():
            return None
        digest, at, size = self._record(group)
        with open(self.spill, "rb") as file:
            file.seek(at)
            head, content = file.read(_HEAD), file.read(size)
        if head != digest + zlib.crc32(content).to_bytes(4, "little"):
            return None
        self._sealed = max(self._sealed, group + 1)
        dtype, shape, _ = self._layout()
        return torch.frombuffer(bytearray(content), dtype=dtype).view(-1, *shape).to(self.device)


def _write(file: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done
