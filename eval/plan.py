"""The plan: which queries are asked, and which demonstrations stand before each. A pure function of seeds, corpus and features.

    per_query   stream(q) = support[blake2b(seed, task, q, rank) mod |support|]   for rank = 0, 1, 2, ...
                demonstrations(q, k) = the first k of stream(q) that show neither the query's image nor one shown already
    fixed       the same without q in the key: all queries share their demonstrations (but where one of them shows the query's
                own image: there the stream's next one steps in)
    nearest     the k support images of greatest cosine similarity to the query's, the most similar one last, next to the query
                (RICES: Yang et al. 2022; Flamingo, Alayrac et al. 2022, appendix A.2); equal ones by keyed hash

A query's demonstrations depend on nothing but its own id (and image, for nearest): not on the order of queries, the sample, the
batch size or the number of processes. 4-shot is the beginning of 8-shot (for nearest its end), and 0-shot has no demonstrations
at all. The sample of `limit` queries is the `limit` smallest blake2b(seed, task, id), so a smaller sample lies within a larger
one. A demonstration seed of its own redraws the demonstrations and leaves the sample as it is.

The plan is saved beside the results. Its fingerprint says whether two runs met the same items with the same demonstrations,
which every paired comparison needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from configs.errors import UserError
from eval.tasks.pool import Pool, TaskData

if TYPE_CHECKING:
    import numpy as np

PLAN_VERSION = 1
MODES = ("per_query", "fixed", "nearest")


class Features(Protocol):
    """What `nearest` compares images by; eval/nearest.py has the one of a run's image encoder."""

    @property
    def fingerprint(self) -> str:
        """Names the features: the weights and the corpus that they are of."""

    def __call__(self, task: TaskData, pool: Pool, names: Sequence[str]) -> np.ndarray:
        """float32 (len(names), C) of length 1 each: the features of the images of these items of one of the task's pools."""


def keyed_hash(*key: object) -> int:
    """64 bits that depend on the key alone."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class TaskPlan:
    """`demonstrations`: query id -> ids of max(shots) demonstrations in the order shown. k-shot takes the first k, or, where
    the nearest stands last, the last k."""

    queries: list[str]
    demonstrations: dict[str, list[str]]
    nearest_last: bool = False

    def shown(self, query: str, shots: int) -> list[str]:
        """Ids of the query's demonstrations at this number of shots, in the order shown."""
        every = self.demonstrations[query]
        return every[len(every) - shots :] if self.nearest_last else every[:shots]


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
    demonstration_seed: int | None = None
    """None: `seed`."""
    features: str | None = None
    """Fingerprint of what nearest demonstrations were found by."""

    def to_json(self) -> dict[str, Any]:
        """What is saved and fingerprinted. Later fields that say nothing are left out: plans without them stay the same plans."""
        content = {key: value for key, value in asdict(self).items() if value is not None or key == "limit"}
        for task in content["tasks"].values():
            if not task["nearest_last"]:
                del task["nearest_last"]
        return content

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
                raise _too_few(task, query, available, count)
        name = order[keyed_hash(seed, task, query if mode == "per_query" else None, rank) % len(order)]
        rank += 1
        if name != query and support[name] not in shown:
            chosen.append(name)
            shown.add(support[name])
    return chosen


def draw_nearest(task: TaskData, queries: Sequence[str], features: Features, count: int, *, seed: int) -> dict[str, list[str]]:
    """Query id -> ids of the `count` support items with the nearest images, the nearest last; one item of each image.

    Similarities only preselect in blocks; those near the last place are computed again one by one in float64, so that neither the
    block nor the machine's matrix product decides. Raises UserError when the support does not hold `count` images other than the
    query's.
    """
    import numpy as np

    assert task.support is not None
    support, asked = task.support.image_ids, task.queries.image_ids
    items: dict[str, list[str]] = {}
    for name, image in sorted(support.items()):
        items.setdefault(image, []).append(name)
    images = list(items)
    known = features(task, task.support, [names[0] for names in items.values()])
    wanted = features(task, task.queries, queries)
    place = {image: position for position, image in enumerate(images)}
    chosen: dict[str, list[str]] = {}
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        similar = wanted[start : start + QUERY_BLOCK] @ known.T
        for row, query in enumerate(block):
            allowed = np.full(len(images), True)
            for image in {asked[query], support.get(query, asked[query])} & place.keys():
                # its own picture, or one that no item but the query itself shows
                allowed[place[image]] = image != asked[query] and items[image] != [query]
            if int(allowed.sum()) < count:
                raise _too_few(task.name, query, int(allowed.sum()), count)
            if count == 0:
                chosen[query] = []
                continue
            values = np.where(allowed, similar[row], -np.inf)
            near = np.flatnonzero(values >= np.partition(values, -count)[-count] - PRESELECTION)
            exact = (known[near].astype(np.float64) * wanted[start + row].astype(np.float64)).sum(1)
            ranked = sorted(
                (-float(value), keyed_hash(seed, task.name, "nearest", query, images[at]), images[at])
                for value, at in zip(exact, near.tolist(), strict=True)
                if allowed[at]
            )
            nearest = [image for _, _, image in ranked[:count]]
            of_image = [
                min((keyed_hash(seed, task.name, "nearest", query, name), name) for name in items[image] if name != query)[1]
                for image in nearest
            ]
            chosen[query] = of_image[::-1]
    return chosen


QUERY_BLOCK = 64
PRESELECTION = 1e-4
"""How far a float32 similarity may be from the exact one."""


def _too_few(task: str, query: str, available: int, count: int) -> UserError:
    return UserError(
        f"Task {task}: {count} shots want as many images besides the query's own; the support split has {available} for query "
        f"{query!r}. Lower shots=..."
    )


def make_plan(
    tasks: Sequence[TaskData],
    *,
    corpus: str,
    corpus_fingerprint: str,
    shots: Sequence[int],
    limit: int | None,
    seed: int,
    mode: str = "per_query",
    demonstration_seed: int | None = None,
    features: Features | None = None,
) -> Plan:
    """`features` are those of the mode nearest. Items that bring their own demonstrations have these in every mode.

    Raises UserError for an unknown mode, shots or a limit that make no sense, or too few demonstrations.
    """
    if mode not in MODES:
        raise UserError(f"demonstrations={mode}: no such mode. Known: {', '.join(MODES)}.")
    if not shots or sorted(set(shots)) != list(shots) or shots[0] < 0:
        raise UserError(f"shots={list(shots)}: give different numbers in rising order, none negative, such as [0,4,8].")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: give a number of queries a task from 1 up, or null for all of them.")
    if (mode == "nearest") != (features is not None):
        raise ValueError(f"mode {mode} {'wants' if mode == 'nearest' else 'has no use for'} image features")
    most, drawn = shots[-1], seed if demonstration_seed is None else demonstration_seed
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
        elif features is not None:
            demonstrations = draw_nearest(task, queries, features, most, seed=drawn)
        else:
            support, images = task.support.image_ids, task.queries.image_ids
            order = sorted(support)
            for query in queries:
                demonstrations[query] = draw(query, images[query], support, order, most, task=task.name, seed=drawn, mode=mode)
        planned[task.name] = TaskPlan(queries, demonstrations, features is not None and task.support is not None)
    return Plan(
        corpus,
        corpus_fingerprint,
        seed,
        mode,
        limit,
        list(shots),
        planned,
        demonstration_seed=None if demonstration_seed == seed else demonstration_seed,
        features=None if features is None else features.fingerprint,
    )


def derangement(names: Sequence[str], *, seed: int, key: str) -> dict[str, str]:
    """A fixed mapping of every name to another one: the names in keyed-hash order, each to its successor, the last to the
    first.

    Raises UserError for fewer than two names, which cannot be deranged.
    """
    distinct = sorted(set(names), key=lambda name: (keyed_hash(seed, key, "derangement", name), name))
    if len(distinct) < 2:
        raise UserError(f"images=shuffled: task {key} has {len(distinct)} image, there is no other one to show instead.")
    return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
