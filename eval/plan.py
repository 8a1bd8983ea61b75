"""The plan: which queries are asked, and which demonstrations stand before each. A pure function of the seed and the corpus.

    stream(q) = support[blake2b(seed, task, q, rank) mod |support|]   for rank = 0, 1, 2, ...
    demonstrations(q, k) = the first k of stream(q) that show neither the query's image nor one shown already

A query's demonstrations depend on nothing but its own id: not on the order of queries, the sample, the batch size or the number
of processes. 4-shot is the beginning of 8-shot, and 0-shot has no demonstrations at all. `fixed` leaves the query's id out of
the key, so that all queries share their demonstrations (but where one of them shows the query's own image: there the stream's
next one steps in). The sample of `limit` queries is the `limit` smallest blake2b(seed, task, id), so a smaller sample lies
within a larger one.

The plan is saved beside the results. Its fingerprint says whether two runs met the same items with the same demonstrations,
which every paired comparison needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from configs.errors import UserError
from eval.tasks.pool import TaskData

PLAN_VERSION = 1
MODES = ("per_query", "fixed")


def keyed_hash(*key: object) -> int:
    """64 bits that depend on the key alone."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class TaskPlan:
    """`demonstrations`: query id -> ids of max(shots) demonstrations in the order shown; k-shot takes the first k."""

    queries: list[str]
    demonstrations: dict[str, list[str]]


@dataclass(frozen=True)
class Plan:
    corpus: str
    corpus_fingerprint: str
    seed: int
    mode: str
    limit: int | None
    shots: list[int]
    tasks: dict[str, TaskPlan]
    version: int = PLAN_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over everything but the corpus's name (a copy under another name is the same corpus)."""
        content = {key: value for key, value in self.to_json().items() if key != "corpus"}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def sample_queries(ids: Sequence[str], *, task: str, seed: int, limit: int | None) -> list[str]:
    """The `limit` ids of smallest keyed hash, in the order given; None or a large limit: all of them."""
    if limit is None or limit >= len(ids):
        return list(ids)
    chosen = set(sorted(ids, key=lambda name: (keyed_hash(seed, task, "query", name), name))[:limit])
    return [name for name in ids if name in chosen]


def draw(
    query: str, image_id: str, support: Mapping[str, str], order: Sequence[str], count: int, *, task: str, seed: int, mode: str
) -> list[str]:
    """Ids of `count` demonstrations for one query. `support`: id -> image id; `order`: its ids, sorted.

    Raises UserError when the support does not hold `count` images other than the query's.
    """
    chosen: list[str] = []
    shown = {image_id}
    rank = 0
    while len(chosen) < count:
        if rank == 16 * (count + 1):  # too many draws: are there enough at all? Asking that of a large support takes long
            available = len({image for name, image in support.items() if image != image_id and name != query})
            if available < count:
                raise UserError(
                    f"Task {task}: {count} shots want as many images besides the query's own; the support split has {available} "
                    f"for query {query!r}. Lower shots=..."
                )
        name = order[keyed_hash(seed, task, query if mode == "per_query" else None, rank) % len(order)]
        rank += 1
        if name != query and support[name] not in shown:
            chosen.append(name)
            shown.add(support[name])
    return chosen


def make_plan(
    tasks: Sequence[TaskData],
    *,
    corpus: str,
    corpus_fingerprint: str,
    shots: Sequence[int],
    limit: int | None,
    seed: int,
    mode: str = "per_query",
) -> Plan:
    """Raises UserError for an unknown mode, shots or a limit that make no sense, or too few demonstrations."""
    if mode not in MODES:
        raise UserError(f"demonstrations={mode}: no such mode. Known: {', '.join(MODES)}.")
    if not shots or sorted(set(shots)) != list(shots) or shots[0] < 0:
        raise UserError(f"shots={list(shots)}: give different numbers in rising order, none negative, such as [0,4,8].")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of queries a task from 1 up, or null for all of them.")
    most = shots[-1]
    planned = {}
    for task in tasks:
        queries = sample_queries(task.queries.ids, task=task.name, seed=seed, limit=limit)
        demonstrations: dict[str, list[str]] = {}
        if task.support is None:
            for query in queries:
                shown = [demonstration.id for demonstration in task.queries.example(query).demonstrations[:most]]
                if len(shown) < most:
                    raise UserError(
                        f"Task {task.name}: item {query!r} brings {len(shown)} demonstrations, shots asks for {most}."
                    )
                demonstrations[query] = shown
        else:
            support, images = task.support.image_ids, task.queries.image_ids
            order = sorted(support)
            for query in queries:
                demonstrations[query] = draw(query, images[query], support, order, most, task=task.name, seed=seed, mode=mode)
        planned[task.name] = TaskPlan(queries, demonstrations)
    return Plan(corpus, corpus_fingerprint, seed, mode, limit, list(shots), planned)


def derangement(names: Sequence[str], *, seed: int, key: str) -> dict[str, str]:
    """A fixed mapping of every name to another one: the names in keyed-hash order, each to its successor, the last to the
    first.

    Raises UserError for fewer than two names, which cannot be deranged.
    """
    distinct = sorted(set(names), key=lambda name: (keyed_hash(seed, key, "derangement", name), name))
    if len(distinct) < 2:
        raise UserError(f"images=shuffled: task {key} has {len(distinct)} image, there is no other one to show instead.")
    return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
