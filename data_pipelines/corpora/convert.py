"""Your own files written anew as the suite's shards: rows, which have no random access, and pictures that should be smaller.

    files -> records (a tar's samples, the rows of jsonl[.gz|.zst] and parquet) -> Document -> shards, manifest, tokenizer

    captions      tars                     interleaved   tars (energon, MMC4, MINT-1T), rows (OBELICS, OmniCorpus, MMC4)
    text          tars, rows

One record is in memory at a time; text for the tokenizer is up to TOKENIZER_CHARACTERS a source. Documents keep the order of the
files given and of the records in them, their parts keep theirs, and pictures keep their bytes unless corpus.image_size shrinks
them: the same files and settings give the same shards. A record that does not follow its layout stops the conversion, with file
and row; a picture that is not in the image store is listed (formats/store.py). A conversion that stopped leaves no files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.corpora.building import FORMATS, CorpusBuilder, dumps, refuse_inputs_inside, unit
from data_pipelines.corpora.config import ConvertConfig
from data_pipelines.corpora.detection import PROBE, detect, examine
from data_pipelines.corpora.quarantine import Quarantine
from data_pipelines.corpora.tars import (
    TOKENIZER_CHARACTERS,
    expand,
    given_tokenizer,
    inputs,
    make_tokenizer,
    read_shard,
    tar_reader,
)
from data_pipelines.document import Document, Image, Origin
from data_pipelines.faults import Fault
from data_pipelines.formats import ROW_READERS, mmc4, obelics
from data_pipelines.formats.pictures import PictureError, stored
from data_pipelines.formats.rows import container, needs_module, read_rows
from data_pipelines.formats.store import Fetch, ImageStore
from data_pipelines.shards import Manifest, require_space, sha256_of
from data_pipelines.storage import is_remote

LISTING = "missing_images.jsonl"

Content = Mapping[str, Any]
Records = Iterator[tuple[Origin, Content | UserError, int]]
"""(where it is, members or fields, bytes of the file read so far); a UserError in place of what cannot be read"""


def prepare(config: ConvertConfig, folder: Path) -> Manifest:
    """Read every file once and write shards, manifest and tokenizer into `folder`.

    Raises UserError naming the file and the row or sample that is missing, damaged or not of its source's layout.
    """
    named = {source: expand(source, patterns) for source, patterns in config.patterns().items()}
    store = [("corpus.image_store", config.image_store)] if config.image_store else []
    refuse_inputs_inside(folder, [*inputs(config, named), *store])
    files = {source: _local(source, names) for source, names in named.items()}
    for source, paths in files.items():  # all of them, before hours of reading the first
        for path in paths:
            kind = container(path)
            needs_module(path, kind)
            _layouts(config, source, path, kind)
    given = given_tokenizer(config)
    if config.image_size is None:
        require_space(folder, sum(path.stat().st_size for paths in files.values() for path in paths), "The conversion")
    with CorpusBuilder(folder) as builder:
        return _Conversion(config, builder).run(files, given)


def _local(source: str, names: Sequence[str]) -> list[Path]:
    if remote := [name for name in names if is_remote(name)]:
        raise UserError(
            f"corpus.{source}: {remote[0]} is not on this machine. Conversion reads local files: download or mount them."
        )
    return [Path(name) for name in names]


def _layouts(config: ConvertConfig, source: str, path: Path, kind: str) -> tuple[str, ...]:
    """The layouts that `path` may have; UserError when its source or the layout that was set does not come in such files."""
    layouts = config.layouts(source) if kind == "tar" else config.row_layouts(source)
    if not layouts:
        set_to = f" with corpus.interleaved_format={config.interleaved_format}" if source == "interleaved" else ""
        wanted = "jsonl or parquet" if kind == "tar" else "a tar"
        raise UserError(f"corpus.{source}: {path} is {'a tar' if kind == 'tar' else kind}; {source}{set_to} come as {wanted}.")
    return layouts


class _Conversion:
    def __init__(self, config: ConvertConfig, builder: CorpusBuilder) -> None:
        self.config, self.builder = config, builder
        self.quarantine = Quarantine(builder.partial, config.max_faults)
        self.keep = partial(stored, longest=config.image_size, quality=config.quality)
        images = Path(config.image_store).expanduser() if config.image_store else None
        self.store = ImageStore(images, self.builder.partial / LISTING, self.keep)
        self.emptied = 0
        self.inputs: list[dict[str, object]] = []

    def run(self, files: Mapping[str, Sequence[Path]], given: Path | None) -> Manifest:
        texts: list[str] = []
        for source, paths in files.items():
            heard = self.source(source, paths)
            texts += heard if given is None else []
        self.settle_missing()
        self.quarantine.report()
        make_tokenizer(given, texts, self.config.vocab_size, self.builder.partial / "tokenizer")
        settings: dict[str, object] = {"config": asdict(self.config), "inputs": self.inputs}
        if self.store.missing:
            settings |= {"missing_images": self.store.missing, "emptied_documents": self.emptied}
        return self.builder.finish(recipe="convert", tasks={}, packages=[], settings=settings, tokenizer="tokenizer")

    def source(self, source: str, paths: Sequence[Path]) -> list[str]:
        """Convert all files of one source; returns text of its train split for the tokenizer, an equal part of every file."""
        from tqdm import tqdm

        texts: list[str] = []
        hashes: dict[str, Path] = {}
        written = 0
        size = sum(path.stat().st_size for path in paths)
        with tqdm(total=size, desc=f"  converting {source}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for path in paths:
                layout, read = self.reader(source, path)
                start, room, count = bar.n, TOKENIZER_CHARACTERS // len(paths), 0
                for origin, content, done in records(source, path, self.config):
                    count += 1
                    before, from_byte = self.store.missing, bar.n - start
                    bar.update(start + done - bar.n)
                    try:
                        document = self.document(read, origin, content)
                        members = self.members(source, document)
                    except UserError as error:
                        fault = Fault(source, str(path), origin.key, from_byte, done, str(error).removeprefix(f"{origin}: "))
                        self.quarantine.add(fault, str(error))
                        continue
                    if not document.parts and self.store.missing > before:
                        self.emptied += 1
                        continue
                    self.quarantine.good(source)
                    if self.refusing:
                        continue  # from here on only to list every missing picture
                    split = self.split(source, written)
                    images = len(document.images)
                    self.builder.sample(source, split, members, images=images, characters=len(document.text))
                    written += 1
                    if split == "train" and room > 0:
                        texts.append(document.text[:room])
                        room -= len(texts[-1])
                if count == 0:
                    raise UserError(f"{path}: holds no samples. Leave it out of corpus.{source}.")
                self.note(source, path, layout, count, hashes)
                bar.update(start + path.stat().st_size - bar.n)
        if not written and not self.refusing:
            raise UserError(
                f"corpus.{source}: every document was left without content. {self.store.missing:,} images are missing."
            )
        return texts

    @property
    def refusing(self) -> bool:
        return self.store.missing > 0 and self.config.missing_images == "refuse"

    def reader(self, source: str, path: Path) -> tuple[str, Callable[[Origin, Content], Document]]:
        """(layout, reader) of one file. Looking for the layout fetches no picture, and so misses none."""
        kind = container(path)
        layouts = _layouts(self.config, source, path, kind)

        def made(layout: str, fetch: Fetch) -> Callable[[Origin, Content], Document]:
            if kind == "tar":
                return tar_reader(layout)
            options = {"key": self.config.text_key} if layout == "text" else {}
            read = partial(ROW_READERS[layout], **options)
            return lambda origin, row: examine(layout, origin, partial(read, row, origin, fetch))

        looking = {layout: made(layout, _fetch_nothing) for layout in layouts}
        if self.config.interleaved_format is not None and source == "interleaved":
            layout = layouts[0]
        else:
            probed = islice(records(source, path, self.config), PROBE)
            readable = ((origin, content) for origin, content, _ in probed if not isinstance(content, UserError))
            layout = detect(f"corpus.{source}={path}", looking, readable)
        return layout, made(layout, self.store)

    def split(self, source: str, number: int) -> str:
        """The second document is held out and the first is not, so that both splits exist wherever there are two documents."""
        share = self.config.val_share
        if share == 0 or number == 0:
            return "train"
        return "val" if number == 1 or unit(self.config.seed, "validation document", source, number) < share else "train"

    def document(self, read: Callable[[Origin, Content], Document], origin: Origin, content: Content | UserError) -> Document:
        """Raises UserError naming the record when it is malformed, or empty although no picture of it is missing."""
        if isinstance(content, UserError):
            raise content
        before = self.store.missing
        document = read(origin, content)
        if not document.parts and self.store.missing == before:
            raise UserError(f"{origin}: holds neither text nor image. Take it out.")
        return document

    def members(self, source: str, document: Document) -> dict[str, bytes | str]:
        """As the suite's own layouts have it. Raises UserError for a picture that cannot be kept."""
        members: dict[str, bytes | str] = {}
        images: list[str | None] = []
        for part in document.parts:
            if isinstance(part, Image):
                try:
                    data, extension = self.keep(part.data)
                except PictureError as error:
                    raise UserError(f"{document.origin}: {part.name} {error}. Mend it, or take the sample out.") from error
                name = extension if FORMATS[source] == "img2dataset" else f"{len(members):03d}.{extension}"
                members[name] = data
                images.append(name)
            else:
                images.append(None)
        if FORMATS[source] == "energon":
            texts = [part if isinstance(part, str) else None for part in document.parts]
            return {"json": dumps({"images": images, "texts": texts}), **members}
        return {**members, "txt": document.text}

    def note(self, source: str, path: Path, layout: str, documents: int, hashes: dict[str, Path]) -> None:
        """Where the corpus came from, for the manifest; the hash is taken while the file is still in the page cache."""
        sha256 = sha256_of(path)
        if sha256 in hashes:
            raise UserError(f"{path} and {hashes[sha256]} are the same, byte for byte. Leave one out of corpus.{source}.")
        hashes[sha256] = path
        entry = {"source": source, "file": str(path), "layout": layout, "documents": documents}
        self.inputs.append(entry | {"bytes": path.stat().st_size, "sha256": sha256})

    def settle_missing(self) -> None:
        """Say what is missing; UserError unless the user chose to go on without."""
        if not self.store.missing:
            return
        with open(self.store.listing, encoding="utf-8") as listing:
            first = json.loads(next(listing))
        found = f"{self.store.missing:,} images are missing or unusable in corpus.image_store={self.config.image_store}"
        if not self.refusing:
            print(
                f"  {found}: left out and listed in {LISTING}; {self.emptied:,} documents had nothing else and are gone",
                flush=True,
            )
            return
        folder = self.builder.folder
        kept = folder.parent / f"{folder.name}.{LISTING}"
        self.store.listing.replace(kept)
        raise UserError(
            f"{found}. The first: {first['image']!r} of {first['document']} ({first['reason']}). All are listed in {kept}. "
            "Bring them there, or go on without them: corpus.missing_images=drop"
        )


def _fetch_nothing(origin: Origin, kind: str, value: str) -> Image | None:
    return None


def records(source: str, path: Path, config: ConvertConfig) -> Records:
    """All records of one file, in order."""
    if container(path) == "tar":
        for item in read_shard(source, str(path)):
            if isinstance(item, Fault):
                yield Origin(source, str(path), item.key or f"bytes {item.start:,}"), UserError(str(item)), item.end
                continue
            origin, members, sample = item
            yield origin, members, sample.end
        return
    columns = (config.text_key,) if source == "text" else tuple(dict.fromkeys(obelics.COLUMNS + mmc4.COLUMNS))
    for row, fields, done in read_rows(path, columns):
        yield Origin(source, str(path), row), fields, done
