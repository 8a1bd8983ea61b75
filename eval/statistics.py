"""Item-level statistics: a mean and its standard error, clustered by image.

Several questions about one image are not independent: GQA asks 31.6 an image, and taking them for independent makes errors
1.6-2.7 times too small. With residuals e_i = x_i - mean, summed within each of G clusters,

    SE^2 = G / (G - 1) * sum_clusters (sum_{i in cluster} e_i)^2 / n^2

which for clusters of one is the textbook standard error. The same formula serves CIDEr: its corpus value is the mean of
per-image values at fixed document frequencies, and the frequencies' own sampling error (common to all cells of a comparison) is
left out on purpose. This is the error over *items*; training seeds and demonstration seeds are other sources of variance and
are never mixed into it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error; `se` is None where there are fewer than two clusters and so nothing to estimate it
    from."""

    mean: float
    se: float | None
    n: int
    clusters: int


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of `values` (n,) and its standard error by the formula above; `clusters[i]` names the image of item i.

    Raises ValueError for no values, or for lengths that differ.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(
            f"{len(values)} values and {len(clusters)} cluster names: need as many names as values, and at least one"
        )
    mean = math.fsum(values) / len(values)
    residuals: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster].append(value - mean)
    groups = len(residuals)
    if groups < 2:
        return Estimate(mean, None, len(values), groups)
    between = math.fsum(math.fsum(group) ** 2 for group in residuals.values())
    return Estimate(mean, math.sqrt(groups / (groups - 1) * between) / len(values), len(values), groups)


def mean_over_tasks(estimates: Iterable[Estimate]) -> tuple[float, float | None]:
    """Mean over tasks with equal weights, and sqrt(sum SE^2) / k: tasks are different items, so their errors are
    independent."""
    tasks = list(estimates)
    mean = math.fsum(task.mean for task in tasks) / len(tasks)
    errors = [task.se for task in tasks if task.se is not None]
    return mean, math.sqrt(math.fsum(se**2 for se in errors)) / len(tasks) if len(errors) == len(tasks) else None
