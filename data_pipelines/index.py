"""The index of a split: where each member of each sample lies, in one file that is mapped into memory.

    tar.samples -> IndexBuilder, when a corpus is prepared -> <corpus>/index/captions-train.idx -> SplitIndex, in every process

A run starts without scanning a shard, ten thousand shards cost it one open file, and the pages that are touched are the kernel's,
shared by all workers. For every member the index keeps a CRC of its header block: the reader compares it, so a shard that was
exchanged or damaged since then gives faults and never another sample's bytes.

    magic | length of the header | header (JSON) | arrays, little-endian, 8-byte aligned
    member_ends u64 (samples)   key_ends u64 (samples)   offset u64 (members)   size u32   check u32   extension u16   keys bytes
"""

from __future__ import annotations

import json
import mmap
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from configs.errors import UserError
from data_pipelines.tar import Sample

MAGIC = b"mm1index"
VERSION = 1
Code = Literal["Q", "I", "H", "B"]
ARRAYS: dict[str, Code] = {
    "member_ends": "Q",
    "key_ends": "Q",
    "offset": "Q",
    "size": "I",
    "check": "I",
    "extension": "H",
    "keys": "B",
}


Entries = dict[str, tuple[int, int, int]]
"""extension -> (offset of the body, size, CRC of the header block)"""


class IndexBuilder:
    """Collects samples shard by shard and writes the file."""

    def __init__(self) -> None:
        self.shards: list[int] = []
        self._extensions: dict[str, int] = {}
        self._arrays = {name: array(code) for name, code in ARRAYS.items()}

    def add_shard(self, samples: Iterable[Sample]) -> int:
        """Append the samples of the next shard; returns how many they were."""
        count, arrays = 0, self._arrays
        for sample in samples:
            for extension, member in sample.members.items():
                arrays["offset"].append(member.offset)
                arrays["size"].append(member.size)
                arrays["check"].append(member.check)
                arrays["extension"].append(self._extensions.setdefault(extension, len(self._extensions)))
            arrays["keys"].frombytes(sample.key.encode("utf-8", "surrogateescape"))
            arrays["member_ends"].append(len(arrays["offset"]))
            arrays["key_ends"].append(len(arrays["keys"]))
            count += 1
        self.shards.append(count)
        return count

    def save(self, path: Path) -> None:
        """Written beside and moved, so that no half of it is ever found."""
        if len(self._extensions) > 1 << 16:
            raise UserError(f"{path}: {len(self._extensions):,} different extensions, at most 65,536. Have keys dots in them?")
        places, at = {}, 0
        for name, content in self._arrays.items():
            places[name] = [at, len(content)]
            at += -(-len(content) * content.itemsize // 8) * 8
        header = {"version": VERSION, "shards": self.shards, "extensions": list(self._extensions), "arrays": places}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            file.write(MAGIC + len(text).to_bytes(8, "little") + text)
            for content in self._arrays.values():
                if sys.byteorder == "big":
                    content.byteswap()
                file.write(content.tobytes() + bytes(-len(content) * content.itemsize % 8))
        partial.replace(path)


class SplitIndex:
    """The index of one split, opened lazily and once a process: `index.sample(i)` for 0 <= i < len(index)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._views: tuple[memoryview[int], ...] | None = None
        """The arrays, in the order of ARRAYS."""
        self._extensions: list[str] = []
        self.shards: list[int] = []
        self._open()

    def _open(self) -> tuple[memoryview[int], ...]:
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing. Prepare the corpus again (force=true).")
        with open(self.path, "rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            try:
                if start[:8] != MAGIC or length > self.path.stat().st_size:
                    raise ValueError("it is no index")
                header = json.loads(file.read(length))
                if header["version"] != VERSION:
                    raise ValueError(f"version {header['version']}, this suite reads {VERSION}")
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                arrays = header["arrays"]
                views = tuple(self._view(mapped, 16 + length, code, *arrays[name]) for name, code in ARRAYS.items())
                self.shards, self._extensions = list(map(int, header["shards"])), list(map(str, header["extensions"]))
                if len(views[0]) != sum(self.shards):
                    raise ValueError("its counts disagree")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path} is damaged ({error}). Prepare the corpus again (force=true).") from error
        self._views = views
        return views

    @staticmethod
    def _view(mapped: memoryview, base: int, code: Code, at: int, count: int) -> memoryview[int]:
        width = array(code).itemsize
        view = mapped[base + at : base + at + count * width]
        if len(view) != count * width:
            raise ValueError("it ends too early")
        if sys.byteorder == "big":
            swapped = array(code, view.tobytes())
            swapped.byteswap()
            return memoryview(swapped)
        return view.cast(code)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": None}

    def __len__(self) -> int:
        return sum(self.shards)

    def sample(self, number: int) -> tuple[str, Entries]:
        """Key and members of sample `number`."""
        ends, key_ends, offset, size, check, extension, keys = self._views or self._open()
        first, key_first = (ends[number - 1], key_ends[number - 1]) if number else (0, 0)
        names = self._extensions
        entries = {names[extension[i]]: (offset[i], size[i], check[i]) for i in range(first, ends[number])}
        return str(keys[key_first : key_ends[number]], "utf-8", "surrogateescape"), entries
