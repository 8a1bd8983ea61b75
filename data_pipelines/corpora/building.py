"""What every corpus recipe needs: seeded choices, WebP pictures, pages of images and text, a folder that is finished or absent.

    builder = CorpusBuilder(folder)            writes into a hidden folder beside it
    builder.caption("train", webp, "a star")   ... captions, pages, texts, task samples ...
    builder.finish(manifest fields)            writes the manifest and moves the folder to its place in one step

A process killed before `finish` leaves no manifest and no corpus of that name; the next one starts clean.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from configs.errors import UserError
from data_pipelines.index import IndexBuilder
from data_pipelines.shards import MANIFEST, Manifest, Package, Split, SplitWriter, Task
from data_pipelines.storage import is_remote, local_path
from data_pipelines.tokenizer import train_tokenizer

if TYPE_CHECKING:
    import numpy
    from PIL import Image

FORMATS = {"captions": "img2dataset", "captions_synthetic": "img2dataset", "interleaved": "energon", "text": "text"}
TOKENIZER_CHARACTERS = 4_000_000
"""Of each source, enough for a vocabulary of a few thousand and trained in seconds."""


# -------------------------------------------------------------------------------------------------------------- chance


def digest(*key: object) -> int:
    """A 64-bit number that depends on the key alone: the same on every machine and in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()[:8], "big")


def unit(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return digest(*key) / 2**64


def generator(*key: object) -> numpy.random.Generator:
    """A random generator of its own for one purpose: (seed, what for, which). Adding a purpose disturbs no other."""
    import numpy

    return numpy.random.default_rng(digest(*key))


def sample(rng: numpy.random.Generator, items: Sequence[Any], count: int) -> list[Any]:
    """`count` different items (or all, if there are fewer), in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def choice(rng: numpy.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


# ------------------------------------------------------------------------------------------------------------- pictures


def webp(picture: Image.Image, quality: int) -> bytes:
    """Lossy WebP; quality 100 is lossless."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, lossless=quality == 100, method=4)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- pages


@dataclass
class Page:
    """An interleaved document in the making: text and pictures (WebP bytes) in reading order."""

    parts: list[str | bytes] = field(default_factory=list)

    def add(self, *parts: str | bytes) -> Page:
        """Append; neighbouring text spans grow together, since a slot of the shard holds one span between two images."""
        for part in parts:
            if isinstance(part, str) and self.parts and isinstance(self.parts[-1], str):
                self.parts[-1] += part
            elif part:
                self.parts.append(part)
        return self

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    def members(self) -> dict[str, bytes | str]:
        """The energon layout: parallel lists, one of the two null in every slot."""
        images: list[str | None] = []
        texts: list[str | None] = []
        files: dict[str, bytes | str] = {}
        for part in self.parts:
            name = None if isinstance(part, str) else f"{len(files):03d}.webp"
            images.append(name)
            texts.append(part if isinstance(part, str) else None)
            if name is not None and isinstance(part, bytes):
                files[name] = part
        return {"json": dumps({"images": images, "texts": texts}), **files}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def demonstration_question(question: str, answer: str) -> str:
    """How training pages write what few-shot VQA will ask."""
    return f"Question: {question} Short answer: {answer}\n"


def demonstration_name(name: str) -> str:
    """How training pages write what the binding task will ask."""
    return f"This is a {name}\n"


# --------------------------------------------------------------------------------------------------------------- corpus


def refuse_foreign(folder: Path) -> None:
    """Raises UserError when what lies at `folder` is no corpus: a finished preparation replaces it with everything in it."""
    if (folder / MANIFEST).is_file() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise UserError(
        f"corpus.name={folder.name}: {folder} is there already and is no corpus (it has no {MANIFEST}). The corpus would take "
        "its place, and all in it would be lost: give another corpus.name, or move it away."
    )


def refuse_inputs_inside(folder: Path, inputs: Iterable[tuple[str, str | Path]]) -> None:
    """Raises UserError when one of `inputs`, (key, path or URL), lies in `folder`, which a finished preparation replaces.

    A link counts where it stands and where it leads: either would be gone.
    """
    places = {folder.absolute(), folder.resolve()}
    for key, name in inputs:
        if is_remote(name):
            continue
        path = local_path(name)
        if any(at.is_relative_to(place) for at in (path, path.resolve()) for place in places):
            raise UserError(
                f"{key}: {name} lies in {folder}, whose place the corpus would take: it would be lost. Give another corpus.name, "
                "or move the input elsewhere."
            )


class CorpusBuilder:
    """Collects a corpus's samples into shards; see the module docstring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.writers: dict[tuple[str, str], SplitWriter] = {}
        self.training_text: dict[str, list[str]] = {source: [] for source in FORMATS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """A preparation that stopped leaves no files."""
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def sample(self, source: str, split: str, members: Mapping[str, bytes | str], *, images: int, characters: int) -> None:
        """One sample as it is. Keeps no text for the tokenizer, unlike the methods below, and so takes any number of samples."""
        key = (source, split)
        if key not in self.writers:
            self.writers[key] = SplitWriter(self.partial, source, split, format=FORMATS.get(source, "task"))
        self.writers[key].write(members, images=images, characters=characters)

    def _write(self, source: str, split: str, members: Mapping[str, bytes | str], images: int, text: str) -> None:
        self.sample(source, split, members, images=images, characters=len(text))
        if split == "train":
            self.training_text[source].append(text)

    def caption(self, split: str, image: bytes, text: str, source: str = "captions") -> None:
        self._write(source, split, {"webp": image, "txt": text}, 1, text)

    def page(self, split: str, page: Page) -> None:
        members = page.members()
        self._write("interleaved", split, members, len(members) - 1, page.text)

    def text(self, split: str, text: str) -> None:
        self._write("text", split, {"txt": text}, 0, text)

    def task_sample(self, task: str, split: str, description: Mapping[str, Any], images: Mapping[str, bytes]) -> None:
        """`images` maps member extension ("webp", "q.webp", "000.webp") -> bytes; `description` becomes the json member."""
        self._write(task, split, {"json": dumps(description), **images}, len(images), "")

    def tokenizer(self, vocab_size: int) -> str:
        """Train the corpus's tokenizer on what the train splits hold; returns its folder's name."""
        texts: list[str] = []
        for source in FORMATS:
            room = TOKENIZER_CHARACTERS
            collected = self.training_text[source]
            step = max(
                1, sum(map(len, collected)) // TOKENIZER_CHARACTERS
            )  # every step-th, so that each kind of document is heard
            for text in collected[::step]:
                texts.append(text)
                room -= len(text)
                if room < 0:
                    break
        train_tokenizer(texts, vocab_size, self.partial / "tokenizer")
        return "tokenizer"

    def finish(
        self,
        *,
        recipe: str,
        tasks: dict[str, Task],
        packages: list[Package],
        settings: dict[str, object],
        tokenizer: str,
        splits: Mapping[str, dict[str, Split]] | None = None,
        indexes: Mapping[tuple[str, str], IndexBuilder] | None = None,
    ) -> Manifest:
        """`splits`: source -> split -> Split of shards that lie elsewhere, beside those this builder wrote; `indexes`: theirs."""
        manifest = Manifest(self.folder.name, recipe, tasks=tasks, packages=packages, settings=settings, tokenizer=tokenizer)
        manifest.splits = {source: dict(by_split) for source, by_split in (splits or {}).items()}
        for (source, split), writer in self.writers.items():
            manifest.splits.setdefault(source, {})[split] = writer.close()
        manifest.save(self.partial, indexes)
        refuse_foreign(self.folder)  # once more: hours may have passed since `prepare` looked
        outdated = self.folder.parent / f".{self.folder.name}.outdated"
        shutil.rmtree(outdated, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(outdated)
        self.partial.rename(self.folder)
        shutil.rmtree(outdated, ignore_errors=True)
        return manifest
