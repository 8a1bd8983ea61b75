"""Example: the one type that every few-shot task's items become, whatever files they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One item of a task.

    `references`: captioning, its reference captions; vqa, the annotators' answers; binding, the right name alone. `names` and
    `demonstrations` are filled for binding only, whose demonstrations belong to the item instead of being drawn from a pool.
    `number`: the image's in ImageFeatures, where that stands for the bytes.
    """

    id: str
    image_id: str
    image: bytes
    question: str | None
    references: tuple[str, ...]
    names: tuple[str, ...] = ()
    demonstrations: tuple[Example, ...] = ()
    number: int | None = None

    @property
    def shown_answer(self) -> str:
        """What a demonstration says: the most common reference, the earliest of equals (for captions mostly just the first)."""
        return max(self.references, key=self.references.count)
