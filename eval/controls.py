"""Which image each item is shown with: its own, or, as a control, another item's or none.

`shuffled` gives every query and every demonstration the image of another item of its split, by a fixed derangement keyed by the
seed. A model that reads its images falls to what the text alone allows; one that scores the same never looked. Items that share
an image share the wrong one too. `none` leaves the images out of the prompt. A control's results are a row of their own, never
mixed with the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from configs.errors import UserError
from eval.plan import derangement
from eval.tasks.example import Example
from eval.tasks.pool import Pool, TaskData

IMAGES = {"true": None, "shuffled": "shuffled", "none": "none"}
"""The command's images=... -> the name of the control in the results."""

Show = Callable[[Pool, str], Example]
"""(pool, id) -> the Example as it is shown."""


def show_plainly(pool: Pool, name: str) -> Example:
    return pool.example(name)


def show_blindly(pool: Pool, name: str) -> Example:
    """Without its image, which need not be there."""
    return pool.example(name, image=False)


def show_shuffled(task: TaskData, seed: int) -> Show:
    """Raises UserError for a split with too few images to exchange them."""
    if task.support is None:
        return _shuffled_episodes(task, seed)
    swaps: dict[str, dict[str, str]] = {}
    owners: dict[str, dict[str, str]] = {}
    for pool in (task.support, task.queries):
        images = pool.image_ids
        swaps[pool.place] = derangement(list(images.values()), seed=seed, key=f"{task.name}/{pool.place}")
        owners[pool.place] = {image: name for name, image in reversed(images.items())}

    def show(pool: Pool, name: str) -> Example:
        own = pool.example(name)
        other = owners[pool.place][swaps[pool.place][own.image_id]]
        return replace(own, image=pool.example(other).image)

    return show


def _shuffled_episodes(task: TaskData, seed: int) -> Show:
    """Binding: demonstrations take the images of the next episode, the query those of the one after, so that no pair still
    belongs."""
    following = derangement(task.queries.ids, seed=seed, key=task.name)
    if len(following) < 3:
        raise UserError(f"images=shuffled: task {task.name} has {len(following)} episodes, exchanging their images needs 3.")

    def show(pool: Pool, name: str) -> Example:
        own, other = pool.example(name), pool.example(following[name])
        pairs = zip(own.demonstrations, other.demonstrations, strict=True)
        demonstrations = tuple(replace(mine, image=theirs.image) for mine, theirs in pairs)
        return replace(own, image=pool.example(following[following[name]]).image, demonstrations=demonstrations)

    return show
