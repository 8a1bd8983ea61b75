"""Pool: what planning, prompts and controls ask of a split of a task, whatever files it lies in; and the task made of two of
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from eval.tasks.example import Example


class Pool(Protocol):
    """The items of one split. Planning reads ids and image ids alone; images are read when an Example is asked for."""

    place: str
    """Names the split, for errors and as a key of its own within the task."""

    @property
    def ids(self) -> list[str]:
        """Different ones, in the order of the files."""

    @property
    def image_ids(self) -> dict[str, str]:
        """id -> image id: the same for items that show the same image, in both pools of a task."""

    def example(self, name: str, *, image: bool = True) -> Example:
        """Raises UserError if the item's image cannot be read. `image` False: it is b"", and need not be there."""

    def __hash__(self) -> int:
        """Pools are told apart by what they are, and keys of caches."""


@dataclass
class TaskData:
    """A task ready to be planned: `support` is None where items bring their own demonstrations. `chance` in points (0 to
    100)."""

    name: str
    kind: str
    chance: float | None
    queries: Pool
    support: Pool | None
