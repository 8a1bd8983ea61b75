"""Shards and the manifest beside them: what a corpus is, and how one is written.

A corpus is a folder:

    manifest.json                     what is in it: sources, splits, shards with counts and SHA-256, packages it was made from
    captions-train-000000.tar ...     samples; the members of one sample share the part of their name before the first dot
    index/captions-train.idx ...      where every member of every sample lies (index.py)
    tokenizer/                        a transformers tokeniser, where the corpus brings one

Shards may also lie elsewhere, on this machine or behind a URL; the manifest and the indexes are always here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.index import IndexBuilder
from data_pipelines.storage import is_remote, open_file
from data_pipelines.tar import Damage, samples

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
HASHED_AT_ONCE = 1 << 23


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
    faults: int = 0
    """Samples and regions that were left out when the corpus was prepared (corpus.max_faults), listed in its faults.jsonl."""

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

    def save(self, folder: Path, indexes: Mapping[tuple[str, str], IndexBuilder] | None = None) -> None:
        """Write the indexes, and last and in one move the manifest: a folder with a manifest is a finished corpus.

        `indexes`: (source, split) -> the index of shards that were indexed while they were checked; all others are scanned here.
        Raises UserError naming a shard that is not whole.
        """
        for source, splits in self.splits.items():
            for split, content in splits.items():
                built = (indexes or {}).get((source, split)) or build_index(folder, content)
                built.save(index_path(folder, source, split))
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
                raise UserError(
                    f"{path}: version is {found!r}, this suite reads {MANIFEST_VERSION}. Prepare the corpus again: force=true"
                )
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


def index_path(folder: Path, source: str, split: str) -> Path:
    return folder / "index" / f"{source}-{split}.idx"


def shard_place(folder: Path, file: str) -> str:
    """The path or URL of a shard, as its manifest names it: relative to the corpus, absolute, or remote."""
    return file if is_remote(file) else str(folder / file)


def build_index(folder: Path, content: Split) -> IndexBuilder:
    """The index of shards that must be whole. Raises UserError naming the shard and the byte of the first damage."""
    index = IndexBuilder()
    for shard in content.shards:
        file = open_file(shard_place(folder, shard.file))
        found = []
        for item in samples(file):
            if isinstance(item, Damage):
                where = f"{file.name}: bytes {item.start:,}-{item.end:,}"
                raise UserError(f"{where}: {item.reason}. Prepare the corpus again (force=true).")
            found.append(item)
        file.close()
        if index.add_shard(found) != shard.samples:
            raise UserError(f"{file.name}: {len(found)} samples, its manifest says {shard.samples}. Prepare the corpus again.")
    return index


def sha256_of(place: str | Path) -> str:
    """Of a file by path or URL."""
    if not is_remote(place):
        with open(place, "rb") as local:
            return hashlib.file_digest(local, "sha256").hexdigest()
    file, hasher = open_file(place), hashlib.sha256()
    for at in range(0, file.size, HASHED_AT_ONCE):
        hasher.update(file.read(at, min(HASHED_AT_ONCE, file.size - at)))
    file.close()
    return hasher.hexdigest()


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises UserError before any work is done, if the disk under `folder` cannot hold `needed_bytes`."""
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{purpose} needs {needed_bytes / 1e9:.2f} GB under {folder}, but only {free / 1e9:.2f} GB are free. "
            "Free some space, or set MM1_HOME to a folder on a larger disk."
        )
