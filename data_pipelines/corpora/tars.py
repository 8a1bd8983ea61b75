"""Your own shards as a corpus: webdataset tars that are checked, counted and hashed where they lie, not copied.

    patterns -> shards -> every sample read once by its layout's reader -> manifest with absolute paths -> tokenizer

    captions      KEY.jpg (png, webp), KEY.txt, KEY.json          as img2dataset writes them (LAION, COYO, DataComp, CC12M)
    interleaved   KEY.json {images, texts}, KEY.000.jpg ...       as energon writes them, and the suite itself
    text          KEY.txt

A source's format is the first of its LAYOUTS that reads the first sample; from then on every sample must follow it. What does not
(a truncated shard, a missing caption, a web page saved as a picture) stops the preparation with shard and key: left out silently
it would change the corpus without anyone knowing. The val split is made of whole shards, and so needs no copy either.
"""

from __future__ import annotations

import glob
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from configs.errors import UserError
from data_pipelines.corpora.building import CorpusBuilder
from data_pipelines.corpora.config import TarsConfig
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats import read_document
from data_pipelines.formats.img2dataset import IMAGE_EXTENSIONS
from data_pipelines.images import MAX_PIXELS
from data_pipelines.order import keyed
from data_pipelines.shards import Manifest, Shard, Split, index_shard, sha256_of
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.tokens import load_tokenizer

LAYOUTS: dict[str, tuple[str, ...]] = {"captions": ("img2dataset",), "interleaved": ("energon",), "text": ("text",)}
"""source -> the formats its shards may have (data_pipelines/formats), tried in this order on the first sample."""

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
    given = Path(config.tokenizer).expanduser() if config.tokenizer else None
    if given is not None:
        load_tokenizer(given)  # before hours of reading: is it one, and does it end documents?
    splits: dict[str, dict[str, Split]] = {}
    texts: list[str] = []
    for source, paths in shards.items():
        held = held_out(source, [path.stat().st_size for path in paths], config.val_share, config.seed)
        print(f"  {source}: {division(len(paths), len(held), config.val_share)}", flush=True)
        splits[source], heard = read_source(source, paths, held)
        texts += heard if given is None else []
    builder = CorpusBuilder(folder)
    if given is not None:
        copy_tokenizer(given, builder.partial / "tokenizer")
    else:
        print(f"  training the tokenizer on {sum(map(len, texts)):,} characters of the train splits", flush=True)
        train_tokenizer(texts, config.vocab_size, builder.partial / "tokenizer")
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


def read_source(source: str, paths: Sequence[Path], held: set[int]) -> tuple[dict[str, Split], list[str]]:
    """(split name -> Split, text for the tokenizer): all samples read and checked; the text is of train shards alone."""
    from tqdm import tqdm

    format = find_format(source, paths[0])
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


def find_format(source: str, path: Path) -> str:
    """The first of the source's formats that reads the first sample of `path`; raises UserError with what each missed."""
    first = next(read_shard(source, path), None)
    if first is None:
        raise UserError(f"{path}: holds no samples. Leave it out of corpus.{source}.")
    complaints = []
    for format in LAYOUTS[source]:
        try:
            checked(format, first[1], first[0])
        except UserError as error:
            complaints.append(f"{error}")
        else:
            return format
    known = " or ".join(LAYOUTS[source])
    raise UserError(f"corpus.{source}: the first sample is not of layout {known}. " + " ".join(complaints))


def checked(format: str, members: dict[str, bytes], origin: Origin) -> Document:
    """The sample as a document of strings and pictures that uses every picture of the sample; else UserError naming it."""
    try:
        document = read_document(format, members, origin)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # no UTF-8, no JSON, JSON of another shape
        raise UserError(
            f"{origin}: does not follow the layout {format!r} ({type(error).__name__}: {error}). Correct it, or take it out."
        ) from error
    for number, part in enumerate(document.parts):
        if not isinstance(part, (str, Image)):
            raise UserError(f"{origin}: text slot {number} holds {part!r}, which is no text. Correct it, or take it out.")
    pictures = {member for member in members if member.rpartition(".")[2].lower() in IMAGE_EXTENSIONS}
    if unused := sorted(pictures - {image.name for image in document.images}):
        raise UserError(
            f"{origin}: layout {format!r} has no place for the picture {', '.join(unused)}, which would be lost. Give the shard "
            "as the source it belongs to (captions, interleaved), or take the picture out."
        )
    for image in document.images:
        _check_picture(image, origin)
    return document


def _check_picture(image: Image, origin: Origin) -> None:
    """By its header alone, which takes microseconds; a picture damaged further in is found when training decodes it."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(image.data)) as picture:
            pixels = picture.width * picture.height
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{origin}: {image.name} is no picture that can be decoded ({error}). Take the sample out.") from error
    if pixels > MAX_PIXELS:
        raise UserError(f"{origin}: {image.name} has {pixels:,} pixels; the cap is {MAX_PIXELS:,}. Shrink it, or take it out.")


# ------------------------------------------------------------------------------------------------------------ afterwards


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
