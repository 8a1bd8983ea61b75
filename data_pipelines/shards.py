"""Shards: webdataset tars with a manifest beside them; writing, indexing, reading at random.

A corpus is a folder:

    manifest.json                     what is in it: sources, splits, shards with counts and SHA-256, packages it was made from
    captions-train-000000.tar ...     samples; the members of one sample share the part of their name before the first dot
    tokenizer/                        a transformers tokeniser, where the corpus brings one

The reader does not stream. It scans a shard's headers once and afterwards reads any sample with one pread, so that the order of
samples can be any permutation (see order.py) and a sample's image can never meet another sample's caption: members belong
together only if they stand side by side in one shard under one key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
BLOCK = 512


# ------------------------------------------------------------------------------------------------------------- manifest


@dataclass
class Shard:
    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class Split:
    """One split of one source: its shards, and what they hold together."""

    format: str
    shards: list[Shard] = field(default_factory=list)
    images: int = 0
    characters: int = 0

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass
class Package:
    """A third-party package the corpus was made from."""

    registry: str
    name: str
    version: str
    licence: str
    sha256: str


@dataclass
class Task:
    """A few-shot task that comes with the corpus; `kind` says how eval/tasks/corpus.py reads its samples.

    captioning   describe or name the picture; scored against every reference
    vqa          answer a question about the picture
    binding      tell apart two names that the sample's own demonstrations give to two pictures

    `chance`: the share (0 to 1) that guessing gets right, where it is known.
    """

    kind: str
    description: str
    support: str
    query: str
    chance: float | None = None


@dataclass
class Manifest:
    """`splits` maps source -> split -> Split; tasks name their splits as "source/split"."""

    corpus: str
    recipe: str
    splits: dict[str, dict[str, Split]] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    packages: list[Package] = field(default_factory=list)
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    """Of the folder's tokenizer.json; filled in when the manifest is saved."""
    settings: dict[str, object] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the hashes of shards and tokeniser: one fingerprint, the same bytes cut into the same tokens."""
        names = [f"tokenizer/{self.tokenizer_sha256}"] if self.tokenizer_sha256 else []
        names += [
            f"{source}/{split}/{shard.sha256}"
            for source, splits in sorted(self.splits.items())
            for split, content in sorted(splits.items())
            for shard in content.shards
        ]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the manifest last and in one move: a folder with a manifest is a finished corpus."""
        vocabulary = folder / (self.tokenizer or "") / "tokenizer.json"
        self.tokenizer_sha256 = sha256_of(vocabulary) if self.tokenizer and vocabulary.is_file() else None
        text = json.dumps(asdict(self) | {"fingerprint": self.fingerprint}, indent=1, ensure_ascii=False)
        partial = folder / (MANIFEST + ".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises UserError if the folder holds no finished corpus, or one of another version."""
        path = folder / MANIFEST
        if not path.is_file():
            make = f"python -m data_pipelines.prepare corpus={folder.name}"
            raise UserError(f"No corpus at {folder} (there is no {MANIFEST}). Make it: {make}")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("version") != MANIFEST_VERSION:
                found = raw.get("version")
                raise UserError(f"{path}: version is {found!r}, this suite reads {MANIFEST_VERSION}. Prepare the corpus again.")
            raw.pop("fingerprint", None)
            splits = {
                source: {
                    name: Split(**(split | {"shards": [Shard(**shard) for shard in split["shards"]]}))
                    for name, split in by_split.items()
                }
                for source, by_split in raw.pop("splits").items()
            }
            tasks = {name: Task(**task) for name, task in raw.pop("tasks").items()}
            packages = [Package(**package) for package in raw.pop("packages")]
            return cls(splits=splits, tasks=tasks, packages=packages, **raw)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}). Delete the folder and prepare the corpus again.") from error

    def split(self, source: str, split: str) -> Split:
        try:
            return self.splits[source][split]
        except KeyError:
            known = ", ".join(f"{s}/{n}" for s, by_split in self.splits.items() for n in by_split)
            raise UserError(f"Corpus {self.corpus!r} has no {source}/{split}. It has: {known}.") from None


# -------------------------------------------------------------------------------------------------------------- writing


class SplitWriter:
    """Writes samples of one split into shards of at most `shard_bytes`, through webdataset's TarWriter.

    The modification time is a whole number on purpose: a fraction would add a PAX header to every member (17 % more bytes, half
    the reading speed) and make the shard's hash depend on the clock.
    """

    def __init__(self, folder: Path, source: str, split: str, *, format: str, shard_bytes: int = 64_000_000) -> None:
        self.folder, self.prefix, self.shard_bytes = folder, f"{source}-{split}", shard_bytes
        self.split = Split(format=format)
        self._writer: Any = None  # webdataset has no types
        self._path: Path | None = None
        self._count = self._bytes = self._total = 0

    def write(self, members: Mapping[str, bytes | str], *, images: int = 0, characters: int = 0) -> str:
        """Append one sample; `members` maps extension -> content. Returns the sample's key (zero-padded, unique in the split)."""
        import webdataset

        key = f"{self._total:08d}"
        size = sum(len(value) for value in members.values())
        if self._writer is not None and self._bytes + size > self.shard_bytes:
            self._finish_shard()
        if self._writer is None:
            self._path = self.folder / f"{self.prefix}-{len(self.split.shards):06d}.tar"
            self._writer = webdataset.TarWriter(str(self._path), encoder=False, mtime=0)
        encoded = {ext: value.encode() if isinstance(value, str) else value for ext, value in members.items()}
        self._writer.write({"__key__": key, **encoded})
        self._count += 1
        self._total += 1
        self._bytes += size
        self.split.images += images
        self.split.characters += characters
        return key

    def _finish_shard(self) -> None:
        assert self._writer is not None
        assert self._path is not None
        self._writer.close()
        self.split.shards.append(Shard(self._path.name, self._count, self._path.stat().st_size, sha256_of(self._path)))
        self._writer, self._count, self._bytes = None, 0, 0

    def close(self) -> Split:
        if self._writer is not None:
            self._finish_shard()
        return self.split


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises UserError before any work is done, if the disk under `folder` cannot hold `needed_bytes`."""
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{purpose} needs {needed_bytes / 1e9:.2f} GB under {folder}, but only {free / 1e9:.2f} GB are free. "
            "Free some space, or set MM1_HOME to a folder on a larger disk."
        )


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """Where one sample's members lie in its shard: extension -> (offset, size), in bytes."""

    key: str
    members: Mapping[str, tuple[int, int]]


def tar_number(field_bytes: bytes) -> int:
    if field_bytes[0] & 0x80:  # base-256, for members of 8 GiB and more
        return int.from_bytes(field_bytes, "big") & ((1 << (8 * len(field_bytes) - 1)) - 1)
    return int(field_bytes.split(b"\0", 1)[0].strip() or b"0", 8)


def pax_records(body: bytes) -> dict[str, str]:
    records, rest = {}, body
    while rest[:1].isdigit():
        length, _, _ = rest.partition(b" ")
        record, rest = rest[len(length) + 1 : int(length) - 1], rest[int(length) :]
        name, _, value = record.partition(b"=")
        records[name.decode()] = value.decode("utf-8", "replace")
    return records


def scan_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) for every regular member of a tar, reading headers only.

    Raises UserError with the byte position when a header is damaged or a member reaches past the end of the file.
    """
    total = path.stat().st_size
    with open(path, "rb") as file:
        position, long_name = 0, None
        pax: dict[str, str] = {}
        while position + BLOCK <= total:
            file.seek(position)
            header = file.read(BLOCK)
            if header == bytes(BLOCK):
                return
            try:
                size, checksum = tar_number(header[124:136]), tar_number(header[148:156])
            except ValueError:
                checksum, size = -1, 0
            if sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
                raise UserError(
                    f"{path}: the tar header at byte {position} is damaged. Restore the shard or prepare the corpus again."
                )
            if "size" in pax:
                size = int(pax["size"])
            body = position + BLOCK
            if body + size > total:
                raise UserError(f"{path}: truncated; a member at byte {position} wants {size} bytes, {total - body} are there.")
            kind = header[156:157]
            if kind == b"L":
                long_name = file.read(size).rstrip(b"\0").decode("utf-8", "replace")
            elif kind == b"x":
                pax = pax_records(file.read(size))
            else:
                if kind in (b"0", b"\0"):
                    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
                    prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace") if header[257:262] == b"ustar" else ""
                    yield pax.get("path") or long_name or (f"{prefix}/{name}" if prefix else name), body, size
                long_name, pax = None, {}
            position = body + (size + BLOCK - 1) // BLOCK * BLOCK
        raise UserError(f"{path}: truncated at byte {total}; the two closing blocks of the tar are missing.")


def index_shard(path: Path) -> list[SampleIndex]:
    """Group a shard's members into samples: neighbours whose names agree up to the first dot of the last path component."""
    samples: list[SampleIndex] = []
    current_key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    for name, offset, size in scan_members(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != current_key or extension in members:
            if current_key is not None:
                samples.append(SampleIndex(current_key, members))
            current_key, members = key, {}
        members[extension] = (offset, size)
    if current_key is not None:
        samples.append(SampleIndex(current_key, members))
    return samples


class ShardReader:
    """Random access to the samples of one split: `reader[i]` for 0 <= i < len(reader), in the order they were written.

    Indexes are built when a shard is first touched. File handles are opened per process, so the reader can be handed to
    DataLoader workers before or after first use.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder, self.split = folder, split
        self._starts = [0]
        for shard in split.shards:
            self._starts.append(self._starts[-1] + shard.samples)
        self._indexes: dict[int, list[SampleIndex]] = {}
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, position: int) -> tuple[int, SampleIndex]:
        """(shard number, index entry) of sample `position`."""
        import bisect

        if not 0 <= position < len(self):
            raise IndexError(position)
        number = bisect.bisect_right(self._starts, position) - 1
        if number not in self._indexes:
            shard = self.split.shards[number]
            path = self.folder / shard.file
            if not path.is_file():
                raise UserError(f"{path} is named in {MANIFEST} but missing. Prepare the corpus again.")
            samples = index_shard(path)
            if len(samples) != shard.samples:
                raise UserError(
                    f"{path} holds {len(samples)} samples, its manifest says {shard.samples}. Prepare the corpus again."
                )
            self._indexes[number] = samples
        return number, self._indexes[number][position - self._starts[number]]

    def __getitem__(self, position: int) -> tuple[str, str, dict[str, bytes]]:
        """(shard file name, key, members) of sample `position`."""
        number, entry = self.locate(position)
        if self._pid != os.getpid():  # after a fork: never share file descriptors
            self._files, self._pid = {}, os.getpid()
        if number not in self._files:
            self._files[number] = os.open(self.folder / self.split.shards[number].file, os.O_RDONLY)
        handle = self._files[number]
        members = {extension: os.pread(handle, size, offset) for extension, (offset, size) in entry.members.items()}
        return self.split.shards[number].file, entry.key, members

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}


def read_all(folder: Path, split: Split) -> Iterable[tuple[str, str, dict[str, bytes]]]:
    """Every sample of a split, in order."""
    reader = ShardReader(folder, split)
    return (reader[i] for i in range(len(reader)))
