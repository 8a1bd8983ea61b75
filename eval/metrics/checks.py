"""What every caption metric refuses: a candidate too many or too few, and an image without references."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from configs.errors import UserError


def check_lengths(metric: str, candidates: Sized, references: Sized) -> None:
    """Raises UserError unless there is one candidate for each image, and at least one image."""
    if len(candidates) != len(references):
        raise UserError(
            f"{metric}: {len(candidates)} candidates for {len(references)} images. Give one candidate for each image."
        )
    if not len(references):
        raise UserError(f"{metric}: no images given. Give at least one with its references and a candidate.")


def check_references(metric: str, references: Sequence[Any]) -> None:
    """Raises UserError for an image whose references are missing or are one string instead of a list."""
    for position, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise UserError(
                f"{metric}: image {position} has no list of reference captions (found {captions!r}). Give at least one."
            )
