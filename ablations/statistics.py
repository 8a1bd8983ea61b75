"""Error bars for few-shot scores: clustered, paired, over tasks, training seeds and demonstration seeds, in numpy alone.

Every score here is a *per-item* score in points (0-100 for accuracies, 100 x CIDEr for captions), items come in clusters (the
questions on one image share whatever makes that image hard), and every comparison is paired: two runs answered the same items.

    mean of n items, G clusters    eval/statistics.py: CR2 standard error, Satterthwaite degrees of freedom
    paired difference              the same of d_i = a_i - b_i
    mean over k tasks              equal weights, SE^2 = sum SE_t^2 / k^2    (tasks taken as independent)
    R repeats                      training seeds or demonstration seeds; items: SE of the per-item scores averaged over them;
                                   repeats: SE^2 = Var(R means) / R - V, at least 0, where V is the variance by items that answer
                                   differently from repeat to repeat, which the item-level error holds already
    total                          SE^2 = items^2 + repeats^2, the repeats of all kinds and runs added up
    interval                       items alone: mean +- t * SE; with repeats: half-width^2 = sum of the two (t_{df} SE)^2 (Zou &
                                   Donner 2008), repeats added by Satterthwaite; given as the t of a total df
    smallest detectable difference (t_{1-alpha/2, df} + t_{power, df}) * SE, with df = infinity where it is planned ahead

Repeats are crossed with items (Searle, Casella & McCulloch 1992, chapter 4). In simulations of 3 and 5 seeds these intervals
cover 94 to 97 % (3 seeds that are nearly all the error there is, a third of it by chance on items: 91 %); without taking out V up
to 99 %, with Satterthwaite's df for items and seeds together down to 92 %. Two seeds are too few for anything (90 %). Training
seeds of two runs are independent; demonstration seeds are shared by all runs, so their spread is that of the paired difference.

The paired bootstrap (clusters drawn with replacement) makes no assumption of shape and serves as the check on the t interval.
Plain percentiles are too narrow for few clusters by what t_{G-1} exceeds the normal and by sqrt(G/(G-1)); they are widened
by both (the expanded percentiles of Hesterberg 2015, section 4.3).

Simulated (tests/test_statistics_coverage.py): 2,000 evaluations each, coverage of 95 % intervals within 93-97 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ablations.student import t_df, t_quantile, t_two_sided
from configs.errors import UserError
from eval.statistics import Array, Clusters, Estimate, add_variances, average_tasks, clustered_mean

__all__ = [
    "Clusters",
    "Combined",
    "Difference",
    "Estimate",
    "Scores",
    "Spread",
    "add_variances",
    "align",
    "average_tasks",
    "bootstrap_difference",
    "bootstrap_draws",
    "clustered_mean",
    "combine",
    "correlation",
    "detectable_difference",
    "detectable_from_se",
    "difference",
    "holm",
    "paired_bootstrap",
    "paired_difference",
    "paired_estimate",
    "spread",
    "t_quantile",
    "t_two_sided",
]

NORMAL = NormalDist()

# --------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Difference:
    """value = this - baseline in points, its standard error, confidence interval and two-sided p-value (not yet corrected)."""

    value: float
    se: float
    low: float
    high: float
    p: float
    df: float


@dataclass(frozen=True)
class Scores:
    """One run's scores on one task at one number of shots: parallel item ids, scores in points, and cluster names."""

    task: str
    ids: tuple[str, ...]
    scores: Array
    clusters: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.scores) == len(self.clusters):
            raise ValueError(f"{self.task}: {len(self.ids)} ids, {len(self.scores)} scores and {len(self.clusters)} clusters")


# ---------------------------------------------------------------------------------------------------------- comparisons


def align(first: Scores, other: Scores) -> Scores:
    """`other` in the order of `first`, matched by item id. Raises UserError unless both hold exactly the same items once each."""
    where = {identifier: position for position, identifier in enumerate(other.ids)}
    if len(where) != len(other.ids) or len(set(first.ids)) != len(first.ids):
        raise UserError(
            f"Task {first.task!r}: an item id occurs twice in one result; items cannot be paired. Evaluate that run again."
        )
    if first.task != other.task or where.keys() != set(first.ids):
        only_first = [i for i in first.ids if i not in where]
        only_other = sorted(where.keys() - set(first.ids))
        raise UserError(
            f"Task {first.task!r} (the other: {other.task!r}): {len(only_first)} items are only in the one result (such as "
            f"{only_first[:3]}) and {len(only_other)} only in the other (such as {only_other[:3]}). "
            "Comparisons are paired: evaluate both runs on one plan."
        )
    order = [where[i] for i in first.ids]
    clusters = tuple(other.clusters[p] for p in order)
    if clusters != first.clusters:
        raise UserError(
            f"Task {first.task!r}: the same items stand in different clusters in two results. Evaluate both on one plan."
        )
    return Scores(first.task, first.ids, np.asarray(other.scores)[order], clusters)


def paired_estimate(a: Scores, b: Scores) -> Estimate:
    """Mean of a_i - b_i over the items they share, and its clustered SE; see `align` for what is refused."""
    return clustered_mean(np.asarray(a.scores) - align(a, b).scores, a.clusters)


def difference(value: float, se: float, df: float, confidence: float = 0.95) -> Difference:
    """A difference with its t interval and p-value. SE 0 (every item differs by the same) gives p = 1 for 0, else p = 0."""
    half = 0.0 if se == 0 else t_quantile((1 + confidence) / 2, df) * se
    p = (1.0 if value == 0 else 0.0) if se == 0 else t_two_sided(value / se, df)
    return Difference(value, se, value - half, value + half, p, df)


def paired_difference(a: Scores, b: Scores, confidence: float = 0.95) -> Difference:
    """a - b on one task, items matched by id: t interval and p-value; nan where there is a single cluster."""
    estimate = paired_estimate(a, b)
    return difference(estimate.mean, *estimate.error, confidence)


def bootstrap_draws(values: Array, clusters: Sequence[str] | Array | Clusters, draws: int = 10_000, seed: int = 0) -> Array:
    """(draws,) means of `values` with whole clusters drawn with replacement. The same seed draws the same clusters."""
    held = Clusters.of(clusters)
    count, sums, sizes = held.count, held.sums(np.asarray(values, dtype=np.float64)), held.sizes
    generator, parts, left = np.random.default_rng(seed), [], draws
    while left:
        rows = min(left, max(1, 4_000_000 // count))  # at most 32 MB of random numbers at a time
        picked = generator.integers(0, count, (rows, count))
        parts.append(sums[picked].sum(1) / sizes[picked].sum(1))
        left -= rows
    return np.concatenate(parts)


def bootstrap_difference(value: float, draws: Array, df: float = math.inf, confidence: float = 0.95) -> Difference:
    """A difference with the interval and p-value of its bootstrap draws, widened for `df` degrees of freedom (clusters - 1).

    interval: percentiles at the normal tail of t_{df} * sqrt((df + 1) / df); p: the same turned round, from twice the smaller
    share of draws on either side of 0 (at least 2/(draws + 1)). nan where `df` is: a single cluster cannot be resampled.
    """
    if math.isnan(df):
        return Difference(value, math.nan, math.nan, math.nan, math.nan, df)
    wider = math.sqrt((df + 1) / df) if math.isfinite(df) else 1.0
    tail = 100 * NORMAL.cdf(-wider * t_quantile((1 + confidence) / 2, df))
    low, high = np.percentile(draws, [tail, 100 - tail])
    beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    share = min(0.5, (beyond + 1) / (draws.size + 1))
    p = t_two_sided(NORMAL.inv_cdf(share) / wider, df)
    return Difference(value, float(draws.std(ddof=1)) * wider, float(low), float(high), p, df)


def paired_bootstrap(a: Scores, b: Scores, draws: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Difference:
    """a - b on one task by the paired cluster bootstrap."""
    deltas = np.asarray(a.scores) - align(a, b).scores
    estimate = clustered_mean(deltas, a.clusters)
    return bootstrap_difference(estimate.mean, bootstrap_draws(deltas, a.clusters, draws, seed), estimate.error[1], confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p-values in the given order; a nan counts as 1."""
    clean = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted, highest = [1.0] * len(clean), 0.0
    for rank, position in enumerate(sorted(range(len(clean)), key=clean.__getitem__)):
        highest = max(highest, min(1.0, (len(clean) - rank) * clean[position]))
        adjusted[position] = highest
    return adjusted


# ---------------------------------------------------------------------------------------------------- seeds and planning


@dataclass(frozen=True)
class Spread:
    """What R repeats (training or demonstration seeds) say of the error of their mean.

    `raw`: SD of the R means / sqrt(R), points; `df` = R - 1; `by_items`: V, the variance of the mean by items that answer
    differently from repeat to repeat, held by `raw` and by the item-level error alike.
    """

    raw: float
    df: float
    by_items: float = 0.0

    @property
    def se(self) -> float:
        """What the repeats add to the item-level error."""
        return math.sqrt(max(0.0, self.raw**2 - self.by_items))


def spread(repeats: Sequence[tuple[Array, Sequence[str] | Array | Clusters]]) -> Spread | None:
    """The spread of the mean over tasks; one pair a task: scores (R, n) in points, and the n items' clusters.

    None with one repeat, where the spread cannot be known.
    """
    count = len(repeats[0][0])
    if count < 2:
        return None
    means = np.mean([scores.mean(1) for scores, _ in repeats], axis=0)
    by_items = 0.0
    for scores, clusters in repeats:
        left = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
        held = Clusters.of(clusters)
        if held.count > 1:
            sums = np.stack([held.sums(row) for row in left])
            by_items += float((sums**2 / (1 - held.shares)).sum()) / (len(held) ** 2 * count * (count - 1))
    return Spread(float(np.std(means, ddof=1)) / math.sqrt(count), count - 1, by_items / len(repeats) ** 2)


@dataclass(frozen=True)
class Combined:
    """A mean whose sources of error are kept apart, in points; `se` is their total, `df` that of its t interval.

    `se_seeds`, `se_demonstrations`: None with one training seed, one demonstration seed: then `se` holds nothing of them.
    """

    mean: float
    se: float
    df: float
    se_items: float
    se_seeds: float | None
    se_demonstrations: float | None
    n: int
    clusters: int


def combine(items: Estimate, *, seeds: Sequence[Spread | None] = (), demonstrations: Spread | None = None) -> Combined:
    """`items`: from per-item scores averaged over all repeats; `seeds`: one spread for each run involved (two in a difference).

    If one run's seed spread is unknown, no seed error is added.
    """
    known = [run for run in seeds if run is not None]
    known = known if len(known) == len(seeds) else []
    se, df = _total(items.error, known + ([] if demonstrations is None else [demonstrations]))
    return Combined(
        mean=items.mean,
        se=se,
        df=df,
        se_items=items.error[0],
        se_seeds=_pooled(known)[0] if known else None,
        se_demonstrations=None if demonstrations is None else demonstrations.se,
        n=items.n,
        clusters=items.clusters,
    )


def _pooled(spreads: Sequence[Spread]) -> tuple[float, float]:
    """(SE beyond the items', df) of independent repeats added up."""
    raw, df = add_variances([(s.raw, s.df) for s in spreads])
    return Spread(raw, df, math.fsum(s.by_items for s in spreads)).se, df


def _total(items: tuple[float, float], spreads: Sequence[Spread]) -> tuple[float, float]:
    """(SE, df) of items and repeats: with this df the 95 % t interval has half-width sqrt(sum (t_{df_i} SE_i)^2)."""
    repeats = _pooled(spreads) if spreads else (0.0, math.nan)
    if repeats[0] == 0 or math.isnan(items[0]):
        return items
    if items[0] == 0:
        return repeats
    se = math.hypot(items[0], repeats[0])
    return se, t_df(math.hypot(*(t_quantile(0.975, df) * own for own, df in (items, repeats))) / se, 0.975)


def detectable_from_se(se: float, *, df: float = math.inf, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference (points) that a two-sided t test at `alpha` finds with probability `power`, given its SE."""
    return (t_quantile(1 - alpha / 2, df) + t_quantile(power, df)) * se


def detectable_difference(sd: float, n: int, *, correlation: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> float:
    """The same planned ahead: n items a run with per-item standard deviation `sd` (points; 50 for a yes/no score at 50 %).

    correlation 0 is the unpaired comparison; the paired one has the correlation of two runs' scores on the same items.
    """
    return detectable_from_se(sd * math.sqrt(2 * (1 - correlation) / n), power=power, alpha=alpha)


def correlation(se_a: float, se_b: float, se_difference: float) -> float:
    """Correlation of two runs' means that makes Var(a - b) = Var a + Var b - 2 rho SD a SD b; nan where a run has no spread."""
    return (se_a**2 + se_b**2 - se_difference**2) / (2 * se_a * se_b) if se_a and se_b else math.nan
