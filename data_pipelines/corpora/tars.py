"""Your own shards as a corpus: webdataset tars that are checked, counted and hashed where they lie, not copied.

    patterns -> shards -> every sample read once by its layout's reader -> manifest with absolute paths -> tokenizer

A source's layout (formats.LAYOUTS) is found from its first valid samples (detection.py), or set; from then on every sample must
follow it. What does not (a truncated shard, a missing caption, a web page saved as a picture) stops the preparation with shard
and key: left out silently it would change the corpus without anyone knowing. The val split is made of whole shards, and so needs
no copy either.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from configs.errors import UserError
from data_pipelines.corpora.building import CorpusBuilder
from data_pipelines.corpora.config import OwnConfig, TarsConfig
from data_pipelines.corpora.detection import checked, detect
from data_pipelines.document import Document, Origin
from data_pipelines.formats import LAYOUTS
from data_pipelines.order import keyed
from data_pipelines.shards import Manifest, Shard, Split, index_shard, sha256_of
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.tokens import load_tokenizer

RATIOS = {"captions": 0.45, "interleaved": 0.45, "text": 0.10}
"""The mixture of configs/data/own.yaml, rescaled in the advice for a corpus that lacks a source."""

TOKENIZER_CHARACTERS = 20_000_000
"""Of each source, at most, for training the tokenizer: enough for 32,000 entries, and it stays in memory."""

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Not copied along with a tokenizer that lies in a model's folder."""


def prepare(config: TarsConfig, folder: Path) -> Manifest:
    """Read every sample of every shard once and write the manifest and the tokenizer into `folder`.

    Raises UserError naming the pattern, the shard or the sample that is missing, damaged or not of its source's layout.
    """
    shards = {source: expand(source, patterns) for source, patterns in config.patterns().items()}
    given = given_tokenizer(config)
    splits: dict[str, dict[str, Split]] = {}
    texts: list[str] = []
    for source, paths in shards.items():
        held = held_out(source, [path.stat().st_size for path in paths], config.val_share, config.seed)
        print(f"  {source}: {division(len(paths), len(held), config.val_share)}", flush=True)
        splits[source], heard = read_source(source, paths, held, config.layouts(source))
        texts += heard if given is None else []
    builder = CorpusBuilder(folder)
    make_tokenizer(given, texts, config.vocab_size, builder.partial / "tokenizer")
    return builder.finish(
        recipe="tars", tasks={}, packages=[], settings={"config": asdict(config)}, tokenizer="tokenizer", splits=splits
    )


# --------------------------------------------------------------------------------------------------------------- shards


def expand(source: str, patterns: Sequence[str]) -> list[Path]:
    """Absolute paths of all shards: braces in their order, what * matches in sorted order.

    Raises UserError naming the pattern when it matches nothing or only in part, and when a shard is named twice.
    """
    from braceexpand import braceexpand

    found: dict[Path, Path] = {}  # resolved -> as named, so that a link cannot bring one shard in twice
    for pattern in patterns:
        where = f"corpus.{source}={pattern}"
        if "://" in pattern or pattern.startswith("pipe:"):
            raise UserError(f"{where}: only files on this machine can be read at random. Download the shards, or mount them.")
        try:
            pieces = list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{where}: {error}. Write braces as in shard-{{000..127}}.tar.") from error
        matches = {piece: _matches(piece) for piece in pieces}
        missing = [piece for piece in pieces if not matches[piece]]
        if missing:
            folder = next((piece for piece in missing if Path(piece).expanduser().is_dir()), None)
            advice = f"{folder} is a folder: add /*.tar." if folder else "Correct the pattern, or bring the shards there."
            raise UserError(f"{where}: {len(missing)} of {len(pieces)} not found, the first is {missing[0]}. {advice}")
        for path in (path for piece in pieces for path in matches[piece]):
            if (real := path.resolve()) in found:
                raise UserError(f"{where}: {path} is named twice (first as {found[real]}). Each shard may be in a corpus once.")
            found[real] = path
    return list(found.values())


def _matches(piece: str) -> list[Path]:
    path = Path(os.path.abspath(Path(piece).expanduser()))
    if path.is_file():  # also one with a * or [ in its name
        return [path]
    if not glob.has_magic(piece):
        return []
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]


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


def read_source(source: str, paths: Sequence[Path], held: set[int], layouts: Sequence[str]) -> tuple[dict[str, Split], list[str]]:
    """(split name -> Split, text for the tokenizer): all samples read and checked; the text is of train shards alone."""
    from tqdm import tqdm

    format = find_format(source, paths[0], layouts)
    names = ["val" if number in held else "train" for number in range(len(paths))]
    splits = {name: Split(format) for name in dict.fromkeys(sorted(names))}
    # An equal part from every shard, so that each kind of document is heard even where every shard holds another kind.
    quota = TOKENIZER_CHARACTERS // names.count("train")
    texts: list[str] = []
    hashes: dict[str, Path] = {}
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, desc=f"  reading {source}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for path, name in zip(paths, names, strict=True):
            split, samples, room, end = splits[name], 0, quota, bar.n + path.stat().st_size
            for origin, members in read_shard(source, path):
                document = checked(format, members, origin)
                text = document.text
                samples += 1
                split.images += len(document.images)
                split.characters += len(text)
                if name == "train" and room > 0:
                    texts.append(text[:room])
                    room -= len(text)
                bar.update(sum(map(len, members.values())))
            if samples == 0:
                raise UserError(f"{path}: holds no samples. Leave it out of corpus.{source}.")
            sha256 = sha256_of(path)  # straight after reading, while the shard is still in the page cache
            if sha256 in hashes:
                raise UserError(f"{path} and {hashes[sha256]} are the same, byte for byte. Leave one out of corpus.{source}.")
            hashes[sha256] = path
            split.shards.append(Shard(str(path), samples, path.stat().st_size, sha256))
            bar.update(end - bar.n)
    return splits, texts


def read_shard(source: str, path: Path) -> Iterator[tuple[Origin, dict[str, bytes]]]:
    """Every sample of one shard, in order. Raises UserError naming the shard when it is truncated, damaged or compressed."""
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed; reading samples at random needs a plain tar. Unpack it: gunzip {path}")
        for entry in index_shard(path):
            members = {}
            for extension, (offset, size) in entry.members.items():
                file.seek(offset)
                members[extension] = file.read(size)
            yield Origin(source, str(path), entry.key), members


def find_format(source: str, path: Path, layouts: Sequence[str]) -> str:
    """The layout of the first valid samples of `path`; raises UserError with what was seen and what each layout missed.

    A single layout is not looked for: what does not follow it is named by the reading itself.
    """
    if len(layouts) == 1 and layouts != LAYOUTS[source]:
        return layouts[0]
    readers = {layout: tar_reader(layout) for layout in layouts}
    return detect(f"corpus.{source}={path}", readers, read_shard(source, path))


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


def next_step(manifest: Manifest) -> str:
    """The command that trains on the corpus, with the ratios of the sources it has."""
    present = [source for source in RATIOS if source in manifest.splits]
    total = sum(RATIOS[source] for source in present)
    ratios = {source: round(RATIOS[source] / total, 2) if source in present else 0.0 for source in RATIOS}
    ratios[present[-1]] += 1 - sum(ratios.values())
    changed = [f"data.sources.{s}.ratio={ratio:.2g}" for s, ratio in ratios.items() if abs(ratio - RATIOS[s]) > 1e-9]
    return " ".join(["Train on it: python -m mm1.train data=own", f"data.corpus={manifest.corpus}", *changed])
