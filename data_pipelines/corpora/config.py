"""The settings of the corpus recipes; the YAML files of configs/corpus are checked against these."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipelines.errors import UserError


@dataclass
class CorpusConfig:
    """What every recipe has. `recipe` is fixed by the group's option; `name` is the folder the corpus gets."""

    recipe: str = "???"
    name: str = "???"
    seed: int = 0
    image_size: int = 128
    """Pixels a side; pictures are square on white."""
    quality: int = 85
    """Of the WebP pictures, 1 to 100."""
    vocab_size: int = 4096

    def validate(self) -> None:
        """Raises UserError for a value no recipe can work with."""
        if not 16 <= self.image_size <= 1024:
            raise UserError(f"corpus.image_size={self.image_size}: pictures are 16 to 1024 pixels a side.")
        if not 1 <= self.quality <= 100:
            raise UserError(f"corpus.quality={self.quality}: WebP quality goes from 1 to 100.")


@dataclass
class StarterConfig(CorpusConfig):
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


@dataclass
class ShapesConfig(CorpusConfig):
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
