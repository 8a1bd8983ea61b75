"""The settings of the corpus recipes; the YAML files of configs/corpus are checked against these."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.formats import LAYOUTS, ROW_LAYOUTS
from data_pipelines.tokenizer import SMALLEST_VOCABULARY


@dataclass
class CorpusConfig:
    """What every recipe has. `recipe` is fixed by the group's option; `name` is the folder the corpus gets."""

    recipe: str = "???"
    name: str = "???"
    seed: int = 0
    vocab_size: int = 4096
    """Of the tokenizer that is trained on the corpus's own text."""

    def validate(self) -> None:
        """Raises UserError for a value the recipe cannot work with."""
        if self.name in ("", ".", ".."):  # <home>/data itself, or what it lies in
            raise UserError(
                f"corpus.name={self.name!r}: names no folder of its own. Give a name, or a path with a {os.sep} in it."
            )


@dataclass
class PicturesConfig(CorpusConfig):
    """What the recipes have in common that write pictures themselves."""

    image_size: int = 128
    """Pixels a side; pictures are square on white."""
    quality: int = 85
    """Of the WebP pictures, 1 to 100."""

    def validate(self) -> None:
        super().validate()
        if not 16 <= self.image_size <= 1024:
            raise UserError(f"corpus.image_size={self.image_size}: pictures are 16 to 1024 pixels a side.")
        if not 1 <= self.quality <= 100:
            raise UserError(f"corpus.quality={self.quality}: WebP quality goes from 1 to 100.")


@dataclass
class StarterConfig(PicturesConfig):
    recipe: str = "starter"
    name: str = "starter"
    held_out_concepts: float = 0.05
    """Share of concepts no training picture shows."""
    held_out_pictures: float = 0.08
    """Share of further concepts of which one style's pictures are kept for the queries."""
    validation: float = 0.05
    """Share of further concepts of which one style's pictures go to the validation splits."""
    skin_tones: int = 2
    """How many of the five skin tones of a concept each style shows, chosen by the seed: all would be half the corpus."""
    shape_captions: int = 1000
    """Captions made for easy-VQA's training images."""
    chart_passes: int = 1
    """How often every picture appears on a chart of its subgroup."""
    chain_pages: int = 500
    question_pages: int = 500
    shape_question_pages: int = 300
    naming_pages: int = 500
    queries_per_picture: int = 2
    binding_episodes: int = 300
    processes: int = 2
    """That render pictures; the result does not depend on it."""
    synthetic_captions: bool = False
    """Whether the captioned pictures stand in a second source too, captions_synthetic, with longer captions (synthetic.py)."""


@dataclass
class StarterSyntheticConfig(StarterConfig):
    """The starter corpus with its second source of captions, for suite=data_quality."""

    name: str = "starter_synthetic"
    synthetic_captions: bool = True


@dataclass
class FullConfig(StarterConfig):
    """The starter corpus and Debian packages. The starter's settings mean what they mean there."""

    recipe: str = "full"
    name: str = "full"
    vocab_size: int = 8192
    held_out_stamps: float = 0.3
    """Share of the stamps' captions, of those the starter does not train on, kept for the task captions_stamps."""
    debian_validation: float = 0.02
    """Share of captions, of pages of manuals and of texts from Debian that go to the validation splits."""
    text_characters: int = 100_000_000
    """At most so many characters of text in all; from Debian's texts, so many are left out, chosen by the seed."""
    missing_packages: str = "drop"
    """A package that this Debian release does not have: drop names it, here and in the manifest; refuse stops."""

    def validate(self) -> None:
        super().validate()
        for key in ("held_out_stamps", "debian_validation"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"corpus.{key}={getattr(self, key)}: a share, 0 or more and below 1.")
        if self.missing_packages not in ("refuse", "drop"):
            raise UserError(f"corpus.missing_packages={self.missing_packages}: must be refuse or drop.")
        if self.text_characters < 1:
            raise UserError(f"corpus.text_characters={self.text_characters}: must be positive.")


@dataclass
class ShapesConfig(PicturesConfig):
    recipe: str = "shapes"
    name: str = "shapes"
    image_size: int = 64
    vocab_size: int = 1024
    captions: int = 4000
    interleaved: int = 800
    text: int = 3000
    validation: int = 100
    """Samples of each source kept for its validation split."""
    queries: int = 300
    """Queries of each task."""
    support: int = 200
    """Demonstrations of each task."""
    held_out_pairs: int = 8
    """How many of the 64 colour-and-shape pairs no training picture, caption or page shows."""


@dataclass
class OwnConfig(CorpusConfig):
    """Files that are there already. Each source: one pattern or a list of them, paths or URLs, with {000..127} or * in them."""

    vocab_size: int = 32_000
    captions: Any = None
    captions_synthetic: Any = None
    """A second source of captions, say rewritten by a model, that mixtures can take some of (data=two_captions)."""
    interleaved: Any = None
    text: Any = None
    interleaved_format: str | None = None
    """The layout of the interleaved source; null: found from its first valid samples."""
    max_faults: float = 0.0
    """Share of a source's samples that may be left out because they are damaged; 0: the first one stops the preparation."""
    val_share: float = 0.01
    tokenizer: str | None = None
    """Folder of a transformers tokenizer to use in place of a trained one; `vocab_size` then means nothing."""

    def patterns(self) -> dict[str, list[str]]:
        """source -> its patterns, for the sources that are given."""
        given = {source: getattr(self, source) for source in LAYOUTS}
        return {source: [value] if isinstance(value, str) else list(value) for source, value in given.items() if value}

    def layouts(self, source: str) -> tuple[str, ...]:
        """The layouts a source's tars may have: all of the source's, or the one that was set."""
        chosen = self.interleaved_format if source == "interleaved" else None
        return tuple(layout for layout in LAYOUTS[source] if chosen in (None, layout))

    def validate(self) -> None:
        super().validate()
        for source in LAYOUTS:
            value = getattr(self, source)
            items = value if isinstance(value, (list, tuple)) else [value]
            if value is not None and not all(isinstance(item, str) and item for item in items):
                raise UserError(f"corpus.{source}={value!r}: give a path, a pattern as /data/mine-{{000..127}}.tar, or a list.")
        if not self.patterns():
            raise UserError(
                f"corpus={self.recipe}: no shards given. Set one or more of corpus.captions, corpus.interleaved and corpus.text, "
                "for example 'corpus.captions=/data/cc12m-{000..127}.tar'."
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"corpus.vocab_size={self.vocab_size}: at least {SMALLEST_VOCABULARY}, for 256 bytes and 3 marks.")
        if not 0 <= self.max_faults < 1:
            raise UserError(f"corpus.max_faults={self.max_faults}: a share of the samples, 0 or more and below 1.")
        if not 0 <= self.val_share < 1:
            raise UserError(f"corpus.val_share={self.val_share}: a share of the data, 0 or more and below 1.")
        if self.interleaved_format is not None and self.interleaved_format not in self.interleaved_formats():
            known = ", ".join(self.interleaved_formats())
            raise UserError(f"corpus.interleaved_format={self.interleaved_format}: corpus={self.recipe} reads {known}.")
        if self.tokenizer is not None and not (Path(self.tokenizer).expanduser() / "tokenizer_config.json").is_file():
            raise UserError(
                f"corpus.tokenizer={self.tokenizer}: no tokenizer there (no tokenizer_config.json). Give a folder that "
                "save_pretrained wrote, or leave the key out to have one trained on the corpus."
            )

    def interleaved_formats(self) -> tuple[str, ...]:
        return LAYOUTS["interleaved"]


@dataclass
class TarsConfig(OwnConfig):
    """Tars that stay where they are (formats.LAYOUTS). `val_share` counts whole shards: at least one where there are two."""

    recipe: str = "tars"


@dataclass
class ConvertConfig(OwnConfig):
    """Tars, jsonl, jsonl.gz, jsonl.zst and parquet that become shards of the suite. `val_share` counts documents."""

    recipe: str = "convert"
    image_store: str | None = None
    """Folder of the pictures that rows name by URL or by file name (formats/store.py)."""
    missing_images: str = "refuse"
    """refuse: a picture that is not in the store stops the conversion, after all have been listed; drop: left out and listed."""
    image_size: int | None = None
    """Pixels of the longer side that larger pictures are shrunk to, as WebP; null: every picture keeps its bytes."""
    quality: int = 85
    """Of the pictures that are shrunk, 1 to 100."""
    text_key: str = "text"
    """The field that holds a row's text, of the text source."""

    def interleaved_formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(LAYOUTS["interleaved"] + ROW_LAYOUTS["interleaved"]))

    def row_layouts(self, source: str) -> tuple[str, ...]:
        """The layouts a source's jsonl and parquet files may have."""
        chosen = self.interleaved_format if source == "interleaved" else None
        return tuple(layout for layout in ROW_LAYOUTS[source] if chosen in (None, layout))

    def validate(self) -> None:
        super().validate()
        if self.missing_images not in ("refuse", "drop"):
            raise UserError(f"corpus.missing_images={self.missing_images}: must be refuse or drop.")
        if self.image_size is not None and not 16 <= self.image_size <= 8192:
            raise UserError(f"corpus.image_size={self.image_size}: 16 to 8192 pixels, or null to keep every picture as it is.")
        if not 1 <= self.quality <= 100:
            raise UserError(f"corpus.quality={self.quality}: WebP quality goes from 1 to 100.")
        if not self.text_key:
            raise UserError("corpus.text_key is empty. Give the name of the field that holds the text.")
        if self.image_store is not None and not Path(self.image_store).expanduser().is_dir():
            raise UserError(f"corpus.image_store={self.image_store}: no such folder.")
