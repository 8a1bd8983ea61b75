"""Item-level statistics: a mean and its standard error, clustered by image. The one place of these formulas; ablations import it.

Several questions about one image are not independent: GQA asks 31.6 an image, and taking them for independent makes errors
1.6-2.7 times too small. With residuals e_i = x_i - mean of the n items, summed within each of G clusters of n_g items,

    u_g  = sum_{i in g} e_i,   w_g = n_g / n
    SE^2 = 1/n^2 * sum_g u_g^2 / (1 - w_g)                            (CR2: Bell & McCaffrey 2002)
    df   = 2 E[SE^2]^2 / Var[SE^2]                                    (Satterthwaite; errors exchangeable within clusters)

1 - w_g makes up for what a cluster pulls the mean towards itself; in clusters of one size it is G / (G - 1) (Liang & Zeger
1986) with df = G - 1, and in clusters of one item the textbook standard error. In clusters of different sizes df is smaller: an
interval with G - 1 degrees of freedom covers 88 to 94 % there instead of 95 % (10 to 20 clusters), this one 94 to 98 %. The
variances that E and Var take are those of items that correlate by rho within a cluster, estimated from the residuals (Imbens &
Kolesar 2016). What no error bar mends are few successes: yes/no scores of 10 % on 20 images are covered about 90 times in 100.

The same formula serves CIDEr: its corpus value is the mean of per-image values at fixed document frequencies, and the
frequencies' own sampling error (common to all cells of a comparison) is left out on purpose. This is the error over *items*;
training seeds and demonstration seeds are other sources of variance (ablations/statistics.py) and are never mixed into it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean of n items in `clusters` clusters, its standard error and that one's degrees of freedom; both are None where there
    are fewer than two clusters and so nothing to estimate them from."""

    mean: float
    se: float | None
    df: float | None
    n: int
    clusters: int

    @property
    def error(self) -> tuple[float, float]:
        """(SE, degrees of freedom), nan where they are unknown."""
        return (math.nan if self.se is None else self.se), (math.nan if self.df is None else self.df)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which items share an image. `numbers` (n,), int64: of each item's cluster, in order of appearance; `count` of them."""

    numbers: Array
    count: int

    @classmethod
    def of(cls, names: Iterable[Hashable] | Array | Clusters) -> Clusters:
        """`names[i]`: the image of item i. What is numbered already is returned as it is."""
        if isinstance(names, Clusters):
            return names
        known: dict[Hashable, int] = {}
        listed = names.tolist() if isinstance(names, np.ndarray) else names
        numbers = np.array([known.setdefault(name, len(known)) for name in listed], np.int64)
        return cls(numbers, len(known))

    def __len__(self) -> int:
        """Items."""
        return len(self.numbers)

    @cached_property
    def sizes(self) -> Array:
        """Items of each cluster, float64 (count,)."""
        return np.bincount(self.numbers, minlength=self.count).astype(np.float64)

    @cached_property
    def shares(self) -> Array:
        """Of all items, float64 (count,)."""
        return self.sizes / len(self)

    @cached_property
    def pairs(self) -> float:
        """Ordered pairs of different items in one cluster."""
        return float((self.sizes**2).sum()) - len(self)

    def sums(self, values: Array) -> Array:
        """float64 (n,) -> (count,)."""
        return np.bincount(self.numbers, values, self.count)

    @cached_property
    def weight(self) -> float:
        """Sum of c_g = w_g^2 / (1 - w_g)."""
        return float((self.shares**2 / (1 - self.shares)).sum())

    @cached_property
    def moments(self) -> tuple[list[list[float]], list[list[float]]]:
        """What `_degrees_of_freedom` sums over clusters, as polynomials of the correlation rho within them, lowest power first.

        With s_g = 1/n_g + rho (1 - 1/n_g) and c_g = w_g^2 / (1 - w_g): the sums of w^2 s, c s, c w s and c^2 s, linear in rho;
        those of c w^2 s^2 and c^2 (1 - 4w) s^2, quadratic. A table asks for them thousands of times with the same clusters.
        """
        w, u = self.shares, 1 / self.sizes
        c, v = w**2 / (1 - w), 1 - u
        linear = np.stack([w**2, c, c * w, c**2]) @ np.stack([u, v], 1)
        quadratic = np.stack([c * w**2, c**2 * (1 - 4 * w)]) @ np.stack([u * u, 2 * u * v, v * v], 1)
        return linear.tolist(), quadratic.tolist()


def clustered_mean(values: Sequence[float] | Array, clusters: Sequence[Hashable] | Array | Clusters) -> Estimate:
    """Mean of `values` (n,) and its standard error by the formula above; `clusters[i]` names the image of item i.

    Raises ValueError for no values, or for lengths that differ.
    """
    if not len(values) or len(values) != len(clusters):
        raise ValueError(
            f"{len(values)} values and {len(clusters)} cluster names: need as many names as values, and at least one"
        )
    held = Clusters.of(clusters)
    scores = np.asarray(values, np.float64)
    n = len(scores)
    mean = math.fsum(scores.tolist()) / n
    if held.count < 2:
        return Estimate(mean, None, None, n, held.count)
    residuals = scores - mean
    sums = held.sums(residuals)
    variance = float((sums**2 / (1 - held.shares)).sum()) / n**2
    return Estimate(mean, math.sqrt(variance), _degrees_of_freedom(held, sums, residuals), n, held.count)


def _degrees_of_freedom(clusters: Clusters, sums: Array, residuals: Array) -> float:
    """Satterthwaite's for SE^2 = sum_g c_g (m_g - m)^2, m_g a cluster's mean of variance s_g, m = sum_g w_g m_g.

    With p_g = w_g s_g and T = Var m = sum_g w_g p_g the deviations have Cov_gh = T - p_g - p_h (+ s_g where g = h); E and Var of
    the quadratic form are then sums over single clusters.
    """
    n, squares = len(residuals), float(residuals @ residuals)
    rho = (float(sums @ sums) - squares) / clusters.pairs / (squares / n) if clusters.pairs and squares else 0.0
    rho = min(1.0, max(0.0, rho))
    linear, quadratic = clusters.moments
    total, cs, cp, ccs = (a + b * rho for a, b in linear)
    cpp, ccss = (a + b * rho + d * rho * rho for a, b, d in quadratic)
    expected = cs - 2 * cp + total * clusters.weight
    off = (total * clusters.weight) ** 2 + 2 * clusters.weight * cpp - 4 * total * clusters.weight * cp + 2 * cp**2
    on = ccss + 2 * total * ccs  # the diagonal's (s + T - 2p)^2 - (T - 2p)^2
    return round(expected**2 / (off + on), 9)  # equal clusters: G - 1, without rounding's tail


def add_variances(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Independent (standard error, degrees of freedom) pairs -> those of the sum: df = (sum SE^2)^2 / sum(SE^4 / df)."""
    total = math.fsum(se * se for se, _ in parts)
    if total == 0:
        return 0.0, min(df for _, df in parts)
    return math.sqrt(total), total * total / math.fsum(se**4 / df for se, df in parts if se != 0)


def average_tasks(estimates: Iterable[Estimate]) -> Estimate:
    """Mean over k tasks: equal weights, SE = sqrt(sum SE^2) / k (tasks are different items, so their errors are independent),
    degrees of freedom by Welch-Satterthwaite. One task of unknown error makes the mean's unknown."""
    tasks = list(estimates)
    mean = math.fsum(task.mean for task in tasks) / len(tasks)
    n, clusters = sum(task.n for task in tasks), sum(task.clusters for task in tasks)
    if any(task.se is None for task in tasks):
        return Estimate(mean, None, None, n, clusters)
    se, df = add_variances([(task.error[0] / len(tasks), task.error[1]) for task in tasks])
    return Estimate(mean, se, df, n, clusters)


def mean_over_tasks(estimates: Iterable[Estimate]) -> tuple[float, float | None]:
    """`average_tasks` as a summary wants it: (mean, SE or None)."""
    average = average_tasks(estimates)
    return average.mean, average.se
