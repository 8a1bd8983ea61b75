"""Error bars for few-shot scores: clustered, paired, over tasks and over training seeds, in numpy alone.

Every score here is a *per-item* score in points (0-100 for accuracies, 100 x CIDEr for captions), items come in clusters (the
questions on one image share whatever makes that image hard), and every comparison is paired: two runs answered the same items.

    mean of n items, G clusters    m = sum_i s_i / n,   u_g = sum_{i in g} (s_i - m)            (computed by eval/statistics.py)
                                   SE^2 = G/(G-1) * sum_g u_g^2 / n^2        (Liang & Zeger 1986; one item a cluster: s^2 / n)
    paired difference              the same of d_i = a_i - b_i
    mean over k tasks              equal weights, SE^2 = sum SE_t^2 / k^2    (tasks taken as independent)
    several training seeds         items: SE of the per-item scores averaged over the S seeds; seeds: SD of the S means / sqrt(S);
                                   kept apart, and total SE^2 = items^2 + seeds^2
    interval, p-value              Student's t with G-1 degrees of freedom; sums of variances by Welch-Satterthwaite
    smallest detectable difference (z_{1-alpha/2} + z_{power}) * sd * sqrt(2 (1 - rho) / n)

The t interval and not the normal one, because small suites have few clusters, and there the normal interval is too short. The
paired bootstrap (clusters drawn with replacement) makes no assumption of shape and serves as the check on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from configs.errors import UserError
from eval import statistics as item_statistics

Array = np.ndarray


# ------------------------------------------------------------------------------------------------------- t distribution


def t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t: the regularised incomplete beta I_x(df/2, 1/2) at x = df / (df + t^2)."""
    if math.isnan(t) or math.isnan(df):
        return math.nan
    if math.isinf(t):
        return 0.0
    if math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t), 1 - df / (df + t * t))


def t_quantile(probability: float, df: float) -> float:
    """The value that Student's t stays below with `probability` (0.5 < probability < 1), by bisection to 1e-10."""
    if math.isnan(df):
        return math.nan
    low, high = 0.0, 2.0
    while t_two_sided(high, df) > 2 * (1 - probability):
        high *= 2
    while high - low > 1e-10 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 2 * (1 - probability) else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b) by Lentz's continued fraction (DLMF 8.17.22); `complement` = 1 - x is handed over, lest rounding lose it."""
    if x <= 0 or complement <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, complement, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(complement)) / a
    tiny, fraction, c, d = 1e-300, 1.0, 1.0, 0.0
    for step in range(400):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 + term * d
        d = 1 / (d if abs(d) > tiny else tiny)
        c = 1 + term / (c if abs(c) > tiny else tiny)
        fraction *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (fraction - 1)


# ------------------------------------------------------------------------------------------------------------ estimates


@dataclass(frozen=True)
class Estimate:
    """A mean with its item-level standard error, both in points; `df` degrees of freedom, n items in `clusters` clusters."""

    mean: float
    se: float
    df: float
    n: int
    clusters: int


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


def cluster_numbers(clusters: Sequence[str] | Array) -> tuple[Array, int]:
    """(number of its cluster for each item, how many clusters there are)."""
    names, numbers = np.unique(np.asarray(clusters), return_inverse=True)
    return numbers.reshape(-1), len(names)


def clustered_mean(scores: Array, clusters: Sequence[str] | Array) -> Estimate:
    """Mean of n scores (points) and its SE, errors correlated inside clusters; with a single cluster the SE is nan: unknown."""
    found = item_statistics.clustered_mean(np.asarray(scores, dtype=np.float64).tolist(), np.asarray(clusters).tolist())
    if found.se is None:
        return Estimate(found.mean, math.nan, math.nan, found.n, found.clusters)
    return Estimate(found.mean, found.se, found.clusters - 1, found.n, found.clusters)


def mean_over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Equal weights, SE = sqrt(sum SE^2) / k, degrees of freedom by Welch-Satterthwaite."""
    k = len(estimates)
    mean = sum(e.mean for e in estimates) / k
    se, df = add_variances([(e.se / k, e.df) for e in estimates])
    return Estimate(mean, se, df, sum(e.n for e in estimates), sum(e.clusters for e in estimates))


def add_variances(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Independent (standard error, degrees of freedom) pairs -> those of the sum: df = (sum SE^2)^2 / sum(SE^4 / df)."""
    total = sum(se * se for se, _ in parts)
    if total == 0:
        return 0.0, min(df for _, df in parts)
    return math.sqrt(total), total * total / sum(se**4 / df for se, df in parts if se != 0)


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
    """a - b on one task, items matched by id: t interval and p-value with clusters - 1 degrees of freedom."""
    estimate = paired_estimate(a, b)
    return difference(estimate.mean, estimate.se, estimate.df, confidence)


def bootstrap_draws(values: Array, clusters: Sequence[str] | Array, draws: int = 10_000, seed: int = 0) -> Array:
    """(draws,) means of `values` with whole clusters drawn with replacement. The same seed draws the same clusters."""
    numbers, count = cluster_numbers(clusters)
    sums = np.bincount(numbers, weights=np.asarray(values, dtype=np.float64), minlength=count)
    sizes = np.bincount(numbers, minlength=count).astype(np.float64)
    generator, parts, left = np.random.default_rng(seed), [], draws
    while left:
        rows = min(left, max(1, 4_000_000 // count))  # at most 32 MB of random numbers at a time
        picked = generator.integers(0, count, (rows, count))
        parts.append(sums[picked].sum(1) / sizes[picked].sum(1))
        left -= rows
    return np.concatenate(parts)


def bootstrap_difference(value: float, draws: Array, confidence: float = 0.95) -> Difference:
    """Percentile interval of draws of a difference; p = twice the smaller share on either side of 0, at least 2/(draws + 1)."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    p = min(1.0, 2 * (beyond + 1) / (draws.size + 1))
    return Difference(value, float(draws.std(ddof=1)), float(low), float(high), p, math.inf)


def paired_bootstrap(a: Scores, b: Scores, draws: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Difference:
    """a - b on one task by the paired cluster bootstrap."""
    deltas = np.asarray(a.scores) - align(a, b).scores
    return bootstrap_difference(float(deltas.mean()), bootstrap_draws(deltas, a.clusters, draws, seed), confidence)


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
class Combined:
    """A mean whose two sources of error are kept apart; `se_seeds` is None with one training seed (item-level only)."""

    mean: float
    se_items: float
    se_seeds: float | None
    df: float
    n: int
    clusters: int

    @property
    def se(self) -> float:
        return self.se_items if self.se_seeds is None else math.hypot(self.se_items, self.se_seeds)


def combine_seeds(items: Estimate, seed_means: Sequence[float]) -> Combined:
    """`items`: the estimate from per-item scores averaged over the training seeds; `seed_means`: one mean a seed.

    The total counts the item-by-seed interaction in both parts: slightly too wide, never too narrow.
    """
    return combine_items_and_seeds(items, seed_spread(seed_means))


def seed_spread(seed_means: Sequence[float]) -> tuple[float, float] | None:
    """(SD of the means / sqrt(S), S - 1), or None with one seed, where the spread cannot be known."""
    count = len(seed_means)
    return None if count < 2 else (float(np.std(seed_means, ddof=1)) / math.sqrt(count), count - 1)


def combine_items_and_seeds(items: Estimate, *spreads: tuple[float, float] | None) -> Combined:
    """Item-level error and the seed error of every run involved; if one of them is unknown, the result is item-level only."""
    known = [spread for spread in spreads if spread is not None]
    if not known or len(known) < len(spreads):
        return Combined(items.mean, items.se, None, items.df, items.n, items.clusters)
    se_seeds, _ = add_variances(known)
    _, df = add_variances([(items.se, items.df), *known])
    return Combined(items.mean, items.se, se_seeds, df, items.n, items.clusters)


def detectable_from_se(se: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference (points) that a two-sided test at `alpha` finds with probability `power`, given its SE."""
    return (NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)) * se


def detectable_difference(sd: float, n: int, *, correlation: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> float:
    """The same planned ahead: n items a run with per-item standard deviation `sd` (points; 50 for a yes/no score at 50 %).

    correlation 0 is the unpaired comparison; the paired one has the correlation of two runs' scores on the same items.
    """
    return detectable_from_se(sd * math.sqrt(2 * (1 - correlation) / n), power=power, alpha=alpha)


def correlation(se_a: float, se_b: float, se_difference: float) -> float:
    """Correlation of two runs' means that makes Var(a - b) = Var a + Var b - 2 rho SD a SD b; nan where a run has no spread."""
    return (se_a**2 + se_b**2 - se_difference**2) / (2 * se_a * se_b) if se_a and se_b else math.nan
