"""Your own shards as a corpus: webdataset tars, on this machine or behind URLs, checked and indexed where they lie, not copied.

    patterns -> shards -> every sample read once by its layout's reader -> manifest with absolute paths -> tokenizer

A source's layout (formats.LAYOUTS) is found from its first valid samples (detection.py), or set; from then on every sample must
follow it. What does not (a truncated shard, a missing caption, a web page saved as a picture) stops the preparation with shard
and key, or is left out and listed up to a share that the user allows (quarantine.py); the index then holds the good
ones alone. The val split is made of whole shards, and so needs no copy either.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.corpora.building import CorpusBuilder, refuse_inputs_inside
from data_pipelines.corpora.config import OwnConfig, TarsConfig
from data_pipelines.corpora.detection import checked, detect
from data_pipelines.corpora.quarantine import Quarantine
from data_pipelines.document import Document, Origin
from data_pipelines.faults import Fault
from data_pipelines.formats import LAYOUTS
from data_pipelines.index import IndexBuilder
from data_pipelines.order import keyed
from data_pipelines.shards import Manifest, Shard, Split, sha256_of
from data_pipelines.storage import ReadError, braces, is_remote, matches, open_file, size_of
from data_pipelines.tar import Damage, Sample, read_members, samples
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.tokens import load_tokenizer

RATIOS = {"captions": 0.45, "interleaved": 0.45, "text": 0.10}
"""The mixture of configs/data/own.yaml, rescaled in the advice for a corpus that lacks a source."""

TOKENIZER_CHARACTERS = 20_000_000
"""Of each source, at most, for training the tokenizer: enough for 32,000 entries, and it stays in memory."""

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Not copied along with a tokenizer that lies in a model's folder."""


def prepare(config: TarsConfig, folder: Path) -> Manifest:
    """Read every sample of every shard once and write the manifest, the indexes and the tokenizer into `folder`.

    Raises UserError naming the pattern, the shard or the sample that is missing, damaged or not of its source's layout; samples
    only beyond config.max_faults.
    """
    shards = {source: expand(source, patterns) for source, patterns in config.patterns().items()}
    refuse_inputs_inside(folder, inputs(config, shards))
    given = given_tokenizer(config)
    with CorpusBuilder(folder) as builder:
        return _prepare(config, shards, given, builder)


def _prepare(config: TarsConfig, shards: Mapping[str, Sequence[str]], given: Path | None, builder: CorpusBuilder) -> Manifest:
    quarantine = Quarantine(builder.partial, config.max_faults)
    indexes: dict[tuple[str, str], IndexBuilder] = {}
    splits: dict[str, dict[str, Split]] = {}
    texts: list[str] = []
    for source, names in shards.items():
        held = held_out(source, [size_of(name) for name in names], config.val_share, config.seed)
        print(f"  {source}: {division(len(names), len(held), config.val_share)}", flush=True)
        reading = _Reading(source, names, held, config.layouts(source), quarantine)
        reading.run()
        splits[source] = reading.splits
        indexes |= {(source, split): index for split, index in reading.indexes.items()}
        texts += reading.texts if given is None else []
    quarantine.report()
    make_tokenizer(given, texts, config.vocab_size, builder.partial / "tokenizer")
    settings: dict[str, object] = {"config": asdict(config)}
    return builder.finish(
        recipe="tars", tasks={}, packages=[], settings=settings, tokenizer="tokenizer", splits=splits, indexes=indexes
    )


# --------------------------------------------------------------------------------------------------------------- shards


def expand(source: str, patterns: Sequence[str]) -> list[str]:
    """Absolute paths and URLs of all shards: braces in their order, what * matches in sorted order.

    Raises UserError naming the pattern when it matches nothing or only in part, and when a shard is named twice.
    """
    found: dict[str, str] = {}  # resolved -> as named, so that a link cannot bring one shard in twice
    for pattern in patterns:
        where = f"corpus.{source}={pattern}"
        if pattern.startswith("pipe:"):
            raise UserError(f"{where}: what a command prints cannot be read at random. Give the files, or their URLs.")
        pieces = braces(pattern, where)
        matched = {piece: matches(piece) for piece in pieces}
        missing = [piece for piece in pieces if not matched[piece]]
        if missing:
            folder = next((piece for piece in missing if Path(piece).expanduser().is_dir()), None)
            advice = f"{folder} is a folder: add /*.tar." if folder else "Correct the pattern, or bring the shards there."
            raise UserError(f"{where}: {len(missing)} of {len(pieces)} not found, the first is {missing[0]}. {advice}")
        for name in (name for piece in pieces for name in matched[piece]):
            if (real := name if is_remote(name) else str(Path(name).resolve())) in found:
                raise UserError(f"{where}: {name} is named twice (first as {found[real]}). Each shard may be in a corpus once.")
            found[real] = name
    return list(found.values())


def inputs(config: OwnConfig, files: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(key, path or URL) of all that the corpus is made from: the files of each source, and the tokenizer given."""
    yield from ((f"corpus.{source}", name) for source, names in files.items() for name in names)
    if config.tokenizer is not None:
        yield "corpus.tokenizer", config.tokenizer


def held_out(source: str, sizes: Sequence[int], share: float, seed: int) -> set[int]:
    """Which shards (by number) become the val split: about `share` of them, at least one, never all; none of a single shard.

    Those no larger than the median come first: of a few unequal shards, training must not lose the one with nearly everything.
    """
    if share == 0 or len(sizes) < 2:
        return set()
    median = sorted(sizes)[(len(sizes) - 1) // 2]
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i] > median, keyed(seed, "validation shards", source, i)))
    return set(order[: min(len(sizes) - 1, max(1, round(share * len(sizes))))])


def division(shards: int, held: int, share: float) -> str:
    """One line on how a source's shards are divided, and why there is no val split where there is none."""
    if held:
        return f"{shards} shards, {held} of them held out as the val split (corpus.val_share={share:g})"
    reason = "corpus.val_share=0" if share == 0 else "a single shard cannot be divided without a copy"
    return f"{shards} shard{'s' if shards > 1 else ''}; no val split ({reason}), so no validation loss of this source"


# -------------------------------------------------------------------------------------------------------------- reading


class _Reading:
    """All shards of one source: every sample read and checked; afterwards splits, indexes, and text of the train shards."""

    def __init__(self, source: str, names: Sequence[str], held: set[int], layouts: Sequence[str], quarantine: Quarantine) -> None:
        self.source, self.names, self.held, self.quarantine = source, names, held, quarantine
        self.format = find_format(source, names[0], layouts)
        kinds = sorted({self.split_of(number) for number in range(len(names))})
        self.splits = {name: Split(self.format) for name in kinds}
        self.indexes = {name: IndexBuilder() for name in kinds}
        self.texts: list[str] = []

    def split_of(self, number: int) -> str:
        return "val" if number in self.held else "train"

    def run(self) -> None:
        from tqdm import tqdm

        # An equal part from every shard, so that each kind of document is heard even where every shard holds another kind.
        quota = TOKENIZER_CHARACTERS // (len(self.names) - len(self.held))
        hashes: dict[str, str] = {}
        size = sum(map(size_of, self.names))
        with tqdm(total=size, desc=f"  reading {self.source}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for number, name in enumerate(self.names):
                split, bytes = self.split_of(number), size_of(name)
                end = bar.n + bytes
                lost = self.quarantine.count(self.source)
                good = list(self.shard(name, split, quota if split == "train" else 0, bar))
                if not good and self.quarantine.count(self.source) == lost:
                    raise UserError(f"{name}: holds no samples. Leave it out of corpus.{self.source}.")
                sha256 = sha256_of(name)  # straight after reading, while the shard is still in the page cache
                if sha256 in hashes:
                    raise UserError(
                        f"{name} and {hashes[sha256]} are the same, byte for byte. Leave one out of corpus.{self.source}."
                    )
                hashes[sha256] = name
                self.splits[split].shards.append(Shard(name, self.indexes[split].add_shard(good), bytes, sha256))
                bar.update(end - bar.n)
        self.settle_validation()

    def settle_validation(self) -> None:
        """Without a val split where all its samples were left out: its shards, which then give nothing, count as training's."""
        if "val" not in self.splits or self.splits["val"].samples:
            return
        train, val = self.splits["train"], self.splits.pop("val")
        del self.indexes["val"]
        for shard in val.shards:
            train.shards.append(shard)
            self.indexes["train"].add_shard([])
        train.faults += val.faults
        print(
            f"  {self.source}: no val split, so no validation loss of this source: every sample held out was left out "
            f"({', '.join(shard.file for shard in val.shards)}). Another corpus.seed may hold out others.",
            flush=True,
        )

    def shard(self, name: str, split: str, room: int, bar: Any) -> Iterator[Sample]:
        """The good samples of one shard; up to `room` characters of their text are kept."""
        content = self.splits[split]
        for item in read_shard(self.source, name):
            if isinstance(item, Fault):
                content.faults += self.quarantine.add(item)
                continue
            origin, members, sample = item
            try:
                document = checked(self.format, members, origin)
            except ReadError:
                raise
            except UserError as error:
                reason = str(error).removeprefix(f"{origin}: ")
                fault = Fault(self.source, name, sample.key, sample.start, sample.end, reason)
                content.faults += self.quarantine.add(fault, str(error))
                continue
            self.quarantine.good(self.source)
            text = document.text
            content.images += len(document.images)
            content.characters += len(text)
            if room > 0:
                self.texts.append(text[:room])
                room -= len(text)
            bar.update(sum(map(len, members.values())))
            yield sample


def read_shard(source: str, name: str) -> Iterator[tuple[Origin, dict[str, bytes], Sample] | Fault]:
    """Every sample and every damage of one shard, in order. Raises UserError naming a shard that is compressed."""
    file = open_file(name)
    if file.read(0, 2) == b"\x1f\x8b":
        raise UserError(f"{name} is compressed; reading samples at random needs a plain tar. Unpack it: gunzip {name}")
    for item in samples(file):
        if isinstance(item, Damage):
            yield Fault(source, name, item.key, item.start, item.end, item.reason)
        else:
            yield Origin(source, name, item.key), read_members(file, item), item
    file.close()


def find_format(source: str, name: str, layouts: Sequence[str]) -> str:
    """The layout of the first valid samples of shard `name`; raises UserError with what was seen and what each layout missed.

    A single layout is not looked for: what does not follow it is named by the reading itself.
    """
    if len(layouts) == 1 and layouts != LAYOUTS[source]:
        return layouts[0]
    readers = {layout: tar_reader(layout) for layout in layouts}
    found = ((item[0], item[1]) for item in read_shard(source, name) if not isinstance(item, Fault))
    return detect(f"corpus.{source}={name}", readers, found)


def tar_reader(layout: str) -> Callable[[Origin, Mapping[str, bytes]], Document]:
    return partial(_read, layout)


def _read(layout: str, origin: Origin, members: Mapping[str, bytes]) -> Document:
    return checked(layout, members, origin)


# ------------------------------------------------------------------------------------------------------------ afterwards


def given_tokenizer(config: OwnConfig) -> Path | None:
    """The folder of corpus.tokenizer, read once before hours of reading shards: is it one, and does it end documents?"""
    if config.tokenizer is None:
        return None
    folder = Path(config.tokenizer).expanduser()
    load_tokenizer(folder)
    return folder


def make_tokenizer(given: Path | None, texts: list[str], vocab_size: int, target: Path) -> None:
    """The corpus's tokenizer: a copy of the one given, or one trained on `texts`."""
    if given is not None:
        copy_tokenizer(given, target)
        return
    print(f"  training the tokenizer on {sum(map(len, texts)):,} characters of the train splits", flush=True)
    train_tokenizer(texts, vocab_size, target)


def copy_tokenizer(given: Path, target: Path) -> None:
    """The corpus keeps a copy, so that it stays whole when the folder given goes away."""
    target.mkdir(parents=True)
    for path in sorted(given.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS:
            shutil.copyfile(path, target / path.name)


def next_step(manifest: Manifest, corpus: str) -> str:
    """The command that trains on `corpus` (its name, or its path if it was prepared by path), with its sources' ratios."""
    option, usual = "own", RATIOS
    if "captions_synthetic" in manifest.splits:  # the mixture of configs/data/two_captions.yaml takes none of them
        option, usual = "two_captions", RATIOS | {"captions_synthetic": 0.0}
    shares = {source: share for source, share in usual.items() if source in manifest.splits}
    if "captions" not in shares and "captions_synthetic" in shares:
        shares["captions_synthetic"] = RATIOS["captions"]
    ratios = {source: round(shares.get(source, 0.0) / sum(shares.values()), 2) for source in usual}
    ratios[max(shares, key=lambda source: shares[source])] += 1 - sum(ratios.values())
    changed = [f"data.sources.{s}.ratio={ratio:.2g}" for s, ratio in ratios.items() if abs(ratio - usual[s]) > 1e-9]
    return " ".join([f"Train on it: python -m mm1.train data={option}", shlex.quote(f"data.corpus={corpus}"), *changed])
