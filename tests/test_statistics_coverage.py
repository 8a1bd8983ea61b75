"""Error bars by simulation: of 2,000 evaluations made up with a known truth, 95 % intervals hold it in 93 to 97 per cent.

A score is a base level, plus what its image shares, plus its own part (and what a seed adds); the generators are seeded, so the
figures are the same at every run. 2,000 evaluations measure a coverage to about half a per cent (one standard error).
"""

from __future__ import annotations

import numpy as np
import pytest

from ablations import statistics as st

EVALUATIONS = 2000
COVERED = (0.93, 0.97)


def holds(estimate: st.Estimate | st.Combined, truth: float) -> bool:
    """Whether the 95 % interval covers the truth: exactly where the p-value of the distance to it is 5 % or more."""
    se, df = estimate.error if isinstance(estimate, st.Estimate) else (estimate.se, estimate.df)
    return st.difference(estimate.mean - truth, se, df).p >= 0.05


def within(covered: int | float) -> None:
    assert COVERED[0] <= covered / EVALUATIONS <= COVERED[1], f"{covered / EVALUATIONS:.1%} covered"


def sizes_of(kind: str, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Items a cluster: one, five, 1 to 8, or many small clusters and a few large ones (GQA)."""
    if kind in ("one", "five"):
        return np.full(clusters, {"one": 1, "five": 5}[kind])
    if kind == "1-8":
        return generator.integers(1, 9, clusters)
    return np.append(40, np.minimum(generator.geometric(0.12, clusters - 1), 60))


def latent(numbers: np.ndarray, shared: float, generator: np.random.Generator) -> np.ndarray:
    """Standard normal values that correlate by `shared` within a cluster."""
    of_images = generator.normal(size=numbers.max() + 1)[numbers]
    return np.sqrt(shared) * of_images + np.sqrt(1 - shared) * generator.normal(size=numbers.size)


@pytest.mark.parametrize(
    ("clusters", "kind", "shared"),
    [
        (200, "one", 0.0),
        (10, "five", 0.3),
        (20, "1-8", 0.5),
        (20, "uneven", 0.0),
        (20, "uneven", 0.3),
        (60, "uneven", 0.8),
    ],
)
def test_clustered_means(clusters: int, kind: str, shared: float) -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(EVALUATIONS):
        numbers = np.repeat(np.arange(clusters), sizes_of(kind, clusters, generator))
        covered += holds(st.clustered_mean(50 + 20 * latent(numbers, shared, generator), numbers), 50)
    within(covered)


@pytest.mark.parametrize(("clusters", "kind", "threshold", "truth"), [
    (200, "1-8", 1.2815515655, 10.0),
    (60, "five", 1.2815515655, 10.0),
    (20, "1-8", 0.0, 50.0),
    (20, "uneven", 0.0, 50.0),
])  # fmt: skip
def test_yes_or_no_scores(clusters: int, kind: str, threshold: float, truth: float) -> None:
    """Skewed (10 % right) and even ones, the questions of one image alike in part."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(EVALUATIONS):
        numbers = np.repeat(np.arange(clusters), sizes_of(kind, clusters, generator))
        covered += holds(st.clustered_mean(100.0 * (latent(numbers, 0.3, generator) > threshold), numbers), truth)
    within(covered)


def test_ignoring_clusters_or_their_sizes_shows() -> None:
    """Else the simulations above would prove nothing: independent items cover far too little, and so does t with G - 1."""
    generator = np.random.default_rng(3)
    naive = equal = 0
    for _ in range(EVALUATIONS):
        numbers = np.repeat(np.arange(20), sizes_of("uneven", 20, generator))
        values = latent(numbers, 0.3, generator)
        naive += holds(st.clustered_mean(values, np.arange(values.size)), 0)
        sums = np.bincount(numbers, values - values.mean())
        equal += holds(st.Estimate(values.mean(), float(np.sqrt(20 / 19 * (sums**2).sum())) / values.size, 19, 0, 20), 0)
    assert naive / EVALUATIONS < 0.75
    assert equal / EVALUATIONS < 0.925


@pytest.mark.parametrize(("clusters", "kind"), [(200, "one"), (20, "1-8"), (30, "uneven")])
def test_paired_differences(clusters: int, kind: str) -> None:
    """Two runs' yes/no scores on the same items: 46 % and 54 % right, hard items hard for both."""
    generator = np.random.default_rng(4)
    truth = 100 * (st.NORMAL.cdf(0.1) - st.NORMAL.cdf(-0.1))
    covered = 0
    for _ in range(EVALUATIONS):
        numbers = np.repeat(np.arange(clusters), sizes_of(kind, clusters, generator))
        common = np.sqrt(0.6) * latent(numbers, 0.4, generator)
        a, b = (common + np.sqrt(0.4) * latent(numbers, 0.2, generator) for _ in range(2))
        covered += holds(st.clustered_mean(100.0 * (a > -0.1) - 100.0 * (b > 0.1), numbers), truth)
    within(covered)


@pytest.mark.parametrize(("clusters", "kind"), [(15, "one"), (20, "1-8"), (100, "five")])
def test_paired_bootstrap(clusters: int, kind: str) -> None:
    generator = np.random.default_rng(5)
    covered = plain = 0
    for number in range(EVALUATIONS):
        numbers = np.repeat(np.arange(clusters), sizes_of(kind, clusters, generator))
        deltas = 30 * latent(numbers, 0.4, generator)
        estimate = st.clustered_mean(deltas, numbers)
        draws = st.bootstrap_draws(deltas, numbers, 400, seed=number)
        found = st.bootstrap_difference(estimate.mean, draws, estimate.error[1])
        covered += found.low <= 0 <= found.high
        low, high = np.percentile(draws, [2.5, 97.5])
        plain += low <= 0 <= high
    within(covered)
    assert plain < covered - 0.005 * EVALUATIONS or clusters > 50, "plain percentiles of few clusters are too narrow"


def test_means_over_tasks_of_different_sizes() -> None:
    generator = np.random.default_rng(6)
    covered = 0
    for _ in range(EVALUATIONS):
        tasks = []
        for clusters, sd in ((12, 30.0), (200, 10.0), (40, 50.0)):
            numbers = np.repeat(np.arange(clusters), sizes_of("1-8", clusters, generator))
            tasks.append(st.clustered_mean(sd * latent(numbers, 0.3, generator), numbers))
        covered += holds(st.average_tasks(tasks), 0)
    within(covered)


SPREADS = [
    pytest.param(30, 0.0, 30, id="seeds differ on items only"),
    pytest.param(30, 1.0, 30, id="seeds differ a little"),
    pytest.param(40, 3.0, 30, id="as much as items"),
    pytest.param(5, 10.0, 5, id="seeds are nearly all"),
]


def simulated(
    repeats: int, items: float, between: float, own: float, generator: np.random.Generator, hard: np.ndarray
) -> np.ndarray:
    """(repeats, 200) scores: items of the given difficulty, seeds with SD `between`, and SD `own` for each item and seed."""
    return items * hard + between * generator.normal(size=(repeats, 1)) + own * generator.normal(size=(repeats, 200))


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize(("items", "between", "own"), SPREADS)
def test_training_seeds_or_demonstration_seeds_of_a_mean(count: int, items: float, between: float, own: float) -> None:
    """The two kinds of repeat enter a mean alike; items in pairs on 100 images."""
    generator = np.random.default_rng(7)
    numbers = np.arange(200) // 2
    covered = total = 0.0
    for _ in range(EVALUATIONS):
        scores = simulated(count, items, between, own, generator, latent(numbers, 0.4, generator))
        found = st.combine(st.clustered_mean(scores.mean(0), numbers), seeds=[st.spread([(scores, numbers)])])
        covered += holds(found, 0)
        total += found.se**2 / EVALUATIONS
    within(covered)
    truth = items**2 * 1.4 / 200 + between**2 / count + own**2 / (200 * count)
    assert 0.9 * truth < total < 1.35 * truth, "what items and seeds share is counted once; a spread below 0 counts as 0"


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize(("items", "between", "own"), SPREADS)
def test_differences_of_runs_with_training_seeds(count: int, items: float, between: float, own: float) -> None:
    generator = np.random.default_rng(8)
    numbers = np.arange(200) // 2
    covered = 0
    for _ in range(EVALUATIONS):
        hard = latent(numbers, 0.4, generator)
        a, b = (simulated(count, items, between, own, generator, hard + 0.5 * latent(numbers, 0.2, generator)) for _ in range(2))
        paired = st.clustered_mean(a.mean(0) - b.mean(0), numbers)
        covered += holds(st.combine(paired, seeds=[st.spread([(a, numbers)]), st.spread([(b, numbers)])]), 0)
    within(covered)


def test_differences_under_demonstrations_that_all_runs_share() -> None:
    """5 demonstration seeds move both runs by 8 points alike and by 2 points each alone: only the latter is in the difference."""
    generator = np.random.default_rng(9)
    numbers = np.arange(200) // 2
    covered, width = 0, 0.0
    for _ in range(EVALUATIONS):
        hard, alike = latent(numbers, 0.4, generator), 8 * generator.normal(size=(5, 1))
        a, b = (alike + simulated(5, 30, 2, 20, generator, hard + 0.3 * latent(numbers, 0.2, generator)) for _ in range(2))
        paired = st.clustered_mean(a.mean(0) - b.mean(0), numbers)
        found = st.combine(paired, demonstrations=st.spread([(a - b, numbers)]))
        covered += holds(found, 0)
        width += found.se / EVALUATIONS
    within(covered)
    assert width == pytest.approx(np.sqrt(2 * 9**2 * 1.2 / 200 + 2 * 2**2 / 5 + 2 * 20**2 / 1000), rel=0.1)


def test_training_seeds_and_demonstration_seeds_together() -> None:
    generator = np.random.default_rng(10)
    numbers = np.arange(200) // 2
    covered = 0
    for _ in range(EVALUATIONS):
        scores = 30 * latent(numbers, 0.4, generator) + generator.normal(size=(3, 4, 200)) * 25
        scores += 2 * generator.normal(size=(3, 1, 1)) + 2 * generator.normal(size=(1, 4, 1))
        items = st.clustered_mean(scores.mean((0, 1)), numbers)
        seeds, demonstrations = (st.spread([(scores.mean(axis), numbers)]) for axis in (1, 0))
        covered += holds(st.combine(items, seeds=[seeds], demonstrations=demonstrations), 0)
    within(covered)
