"""Whether the images that an evaluation will show are there, asked before a model is loaded.

Which images those are is the control's business (images=shuffled shows other items'), so the control itself is asked: over pools
whose items have, in place of an image, their own id.
"""

from __future__ import annotations

from collections.abc import Iterable

from configs.errors import UserError
from eval.controls import show_plainly, show_shuffled
from eval.plan import Plan, sample_queries
from eval.tasks.example import Example
from eval.tasks.official.records import OfficialPool
from eval.tasks.pool import TaskData

NAMED = 5
"""How many missing images an error names."""


class _Unread:
    """An official pool whose Examples have their id for an image: nothing is read."""

    def __init__(self, pool: OfficialPool) -> None:
        self.pool, self.place = pool, pool.place
        self.ids, self.image_ids = pool.ids, pool.image_ids

    def example(self, name: str, *, image: bool = True) -> Example:
        return Example(name, self.image_ids[name], name.encode(), None, ())


def check_images(tasks: Iterable[TaskData], plan: Plan, control: str | None) -> None:
    """Raises UserError naming the first missing images of official tasks, of all that the plan shows under this control."""
    if control == "none":
        return
    lost: list[str] = []
    for task in tasks:
        if not isinstance(task.queries, OfficialPool) or not isinstance(task.support, OfficialPool):
            continue
        queries = _Unread(task.queries)
        support = queries if task.support is task.queries else _Unread(task.support)
        unread = TaskData(task.name, task.kind, None, queries, support)  # type: ignore[arg-type]
        show = show_shuffled(unread, plan.seed) if control == "shuffled" else show_plainly
        planned = plan.tasks[task.name]
        drawn = dict.fromkeys(name for shown in planned.demonstrations.values() for name in shown)
        for pool, names in ((queries, planned.queries), (support, list(drawn))):
            lost += pool.pool.missing(sorted({show(pool, name).image.decode() for name in names}))  # type: ignore[arg-type]
    _refuse(lost, "that the plan shows")


def check_compared(tasks: Iterable[TaskData], *, limit: int | None, seed: int) -> None:
    """The same for demonstrations=nearest, which encodes the whole support split and the sampled queries to make its plan."""
    lost: list[str] = []
    for task in tasks:
        if isinstance(task.queries, OfficialPool) and isinstance(task.support, OfficialPool):
            lost += task.queries.missing(sample_queries(task.queries.ids, task=task.name, seed=seed, limit=limit))
            lost += task.support.missing(task.support.ids)
    _refuse(lost, "that demonstrations=nearest compares")


def _refuse(lost: list[str], which: str) -> None:
    if lost := list(dict.fromkeys(lost)):
        more = f"\n  and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        raise UserError(
            f"{len(lost)} of the images {which} are missing or empty:\n  "
            + "\n  ".join(lost[:NAMED])
            + more
            + "\nPut them there (docs/datasets.md), or say where the folder is: +files.TASK.query.json.images=PATH, and the same "
            "with support for demonstrations."
        )
