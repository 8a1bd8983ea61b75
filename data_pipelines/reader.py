"""Reading a split at random: sample i in one or two reads, checked to be the sample that was indexed.

The reader does not stream. The index says where each member lies, so that the order of samples can be any permutation (order.py)
and a sample costs the same wherever it stands. Members are read when they are asked for: a document that waits to be packed has
read its text and not its pictures.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from configs.errors import UserError
from data_pipelines.faults import Fault, SampleFault
from data_pipelines.index import Entries, SplitIndex
from data_pipelines.shards import MANIFEST, Manifest, index_path, shard_place
from data_pipelines.storage import Access, ShardFile, open_file
from data_pipelines.tar import BLOCK

OPEN_FILES = 128
"""Shards a reader keeps open, the first opened closed first: a process may have a thousand files or so, corpora have more."""


class ShardError(UserError):
    """A shard is missing or cannot be read: no fault of a sample, which would be skipped and counted, but the end of the run."""


class Members(Mapping[str, bytes]):
    """A sample's members by extension, each read when it is asked for and compared with its index entry.

    Raises SampleFault where the shard does not hold what was indexed, ShardError where it cannot be read at all.
    """

    __slots__ = ("_entries", "_number", "_reader", "key", "shard")

    def __init__(self, reader: SplitReader, number: int, shard: str, key: str, entries: Entries) -> None:
        self._reader, self._number, self.shard, self.key, self._entries = reader, number, shard, key, entries

    def __getitem__(self, extension: str) -> bytes:
        offset, size, check = self._entries[extension]
        try:
            content = self._reader.file(self._number).read(offset - BLOCK, BLOCK + size)
        except UserError as error:
            raise ShardError(str(error)) from error
        if zlib.crc32(content[:BLOCK]) != check:
            raise self.fault(f"{extension}: the shard does not hold here what it held when the corpus was prepared")
        if len(content) != BLOCK + size:
            missing = BLOCK + size - len(content)
            raise self.fault(f"{extension}: the shard ends {missing:,} bytes too early")
        return content[BLOCK:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, extension: object) -> bool:
        return extension in self._entries

    def fault(self, reason: str) -> SampleFault:
        """What is wrong with this sample, with its bytes in the shard."""
        start = min(offset for offset, _, _ in self._entries.values()) - BLOCK
        end = max(offset + size for offset, size, _ in self._entries.values())
        return SampleFault(Fault(self._reader.source, self.shard, self.key, start, end, reason))


class SplitReader:
    """Random access to the samples of one split: `reader[i]` for 0 <= i < len(reader), in the order they were written."""

    def __init__(self, folder: Path, manifest: Manifest, source: str, split: str, access: Access | None = None) -> None:
        self.folder, self.source, self.access = folder, source, access or Access()
        self.shards = manifest.split(source, split).shards
        self.index = SplitIndex(index_path(folder, source, split))
        said = [shard.samples for shard in self.shards]
        if said != self.index.shards:
            raise UserError(f"{self.index.path} does not belong to {folder / MANIFEST}. Prepare the corpus again (force=true).")
        self._ends = list(accumulate(said))
        self._total = sum(said)
        self._files: dict[int, ShardFile] = {}

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, number: int) -> Members:
        if not 0 <= number < self._total:
            raise IndexError(number)
        shard = bisect.bisect_right(self._ends, number)
        key, entries = self.index.sample(number)
        return Members(self, shard, self.shards[shard].file, key, entries)

    def __iter__(self) -> Iterator[Members]:
        return (self[number] for number in range(len(self)))

    def file(self, shard: int) -> ShardFile:
        """The open file of a shard. Raises UserError when it is missing."""
        if (file := self._files.get(shard)) is None:
            file = self._files[shard] = open_file(shard_place(self.folder, self.shards[shard].file), self.access)
            if len(self._files) > OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
        return file

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}


def read_all(folder: Path, source: str, split: str) -> Iterator[Members]:
    """Every sample of a split, in order."""
    return iter(SplitReader(folder, Manifest.load(folder), source, split))
