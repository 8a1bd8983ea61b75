"""The error bars: against brute force, published values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ablations import statistics as st
from configs.errors import UserError


def scores(values: list[float], clusters: list[str] | None = None, ids: list[str] | None = None, task: str = "t") -> st.Scores:
    names = ids or [f"q{i}" for i in range(len(values))]
    return st.Scores(task, tuple(names), np.array(values, float), tuple(clusters or names))


@pytest.mark.parametrize(
    ("df", "probability", "expected"),
    [(1, 0.975, 12.7062047), (2, 0.975, 4.3026527), (10, 0.975, 2.2281389), (30, 0.95, 1.6972609), (1000, 0.975, 1.9623391)],
)
def test_t_quantiles_are_the_tabulated_ones(df: int, probability: float, expected: float) -> None:
    assert st.t_quantile(probability, df) == pytest.approx(expected, abs=2e-7)
    assert st.t_two_sided(expected, df) == pytest.approx(2 * (1 - probability), rel=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.7, 2.5, 9.0, 60.0])
def test_t_tails_in_closed_form(t: float) -> None:
    assert st.t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9, abs=1e-12)
    assert st.t_two_sided(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6, abs=1e-9)
    assert st.t_two_sided(t, math.inf) == pytest.approx(math.erfc(t / math.sqrt(2)))
    assert st.t_two_sided(t, 1e7) == pytest.approx(st.t_two_sided(t, math.inf), rel=1e-3, abs=1e-12)


def test_one_item_a_cluster_is_the_textbook_standard_error() -> None:
    values = np.array([10.0, 0, 100, 55, 20, 20])
    estimate = st.clustered_mean(values, list("abcdef"))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(values.std(ddof=1) / math.sqrt(6))
    assert (estimate.n, estimate.clusters, estimate.df) == (6, 6, 5)


def test_equal_clusters_are_the_standard_error_of_cluster_means() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(20, 5))
    estimate = st.clustered_mean(values.reshape(-1), np.repeat(np.arange(20), 5))
    assert estimate.se == pytest.approx(values.mean(1).std(ddof=1) / math.sqrt(20))


def test_unequal_clusters_by_brute_force() -> None:
    values, clusters = [1.0, 5, 2, 8, 8, 9, 0], list("aabbbcd")
    mean = sum(values) / 7
    total = 0.0
    for i in range(7):
        for j in range(7):
            total += (values[i] - mean) * (values[j] - mean) * (clusters[i] == clusters[j])
    assert st.clustered_mean(np.array(values), clusters).se == pytest.approx(math.sqrt(4 / 3 * total) / 7)


def test_repeating_every_item_adds_no_information() -> None:
    values = np.array([0.0, 100, 100, 0, 50])
    once = st.clustered_mean(values, list("abcde"))
    often = st.clustered_mean(np.repeat(values, 30), np.repeat(list("abcde"), 30))
    assert often.se == pytest.approx(once.se)
    assert st.clustered_mean(np.repeat(values, 30), np.arange(150)).se < once.se / 5


def test_one_cluster_has_no_error_bar() -> None:
    assert math.isnan(st.clustered_mean(np.array([1.0, 2.0]), ["a", "a"]).se)


def test_pairs_are_found_by_id_and_not_by_order() -> None:
    a = scores([10, 20, 30], ids=["x", "y", "z"], clusters=["1", "1", "2"])
    b = scores([31, 9, 22], ids=["z", "x", "y"], clusters=["2", "1", "1"])
    assert st.paired_estimate(a, b).mean == pytest.approx((1 - 2 - 1) / 3)
    assert st.align(a, b).scores.tolist() == [9, 22, 31]


@pytest.mark.parametrize(
    "other",
    [
        scores([1, 2], ids=["x", "y"]),
        scores([1, 2, 3], ids=["x", "y", "w"]),
        scores([1, 2, 3], ids=["x", "y", "y"]),
        scores([1, 2, 3], ids=["x", "y", "z"], clusters=["1", "2", "2"]),
        scores([1, 2, 3], ids=["x", "y", "z"], task="u"),
    ],
)
def test_items_that_cannot_be_paired_are_refused(other: st.Scores) -> None:
    with pytest.raises(UserError, match="'t'"):
        st.align(scores([1, 2, 3], ids=["x", "y", "z"]), other)


def test_intervals_cover_the_truth_where_images_are_shared() -> None:
    """Two correlated runs, 30 images of 1-8 questions: the 95 % interval covers a true difference of 0 about 95 times in 100."""
    generator = np.random.default_rng(7)
    t_covers = boot_covers = naive_covers = 0
    trials = 600
    for trial in range(trials):
        sizes = generator.integers(1, 9, 30)
        clusters = np.repeat(np.arange(30), sizes)
        shared, own = generator.normal(size=30)[clusters], generator.normal(size=(2, 30))[:, clusters]
        a, b = (shared + own[k] + generator.normal(size=clusters.size) for k in (0, 1))
        estimate = st.clustered_mean(a - b, clusters)
        t_covers += abs(estimate.mean) <= st.t_quantile(0.975, estimate.df) * estimate.se
        naive_covers += abs(estimate.mean) <= 1.96 * (a - b).std(ddof=1) / math.sqrt(a.size)
        if trial < 200:
            draws = st.bootstrap_difference(estimate.mean, st.bootstrap_draws(a - b, clusters, 500, seed=trial))
            boot_covers += draws.low <= 0 <= draws.high
    assert 0.92 <= t_covers / trials <= 0.975
    assert 0.88 <= boot_covers / 200 <= 0.985
    assert naive_covers / trials < 0.85, "ignoring the clusters must show, or the simulation proves nothing"


def test_bootstrap_agrees_with_the_analytic_error() -> None:
    generator = np.random.default_rng(3)
    clusters = [str(c) for c in np.repeat(np.arange(200), 3)]
    ids = [f"q{i}" for i in range(600)]
    a, b = scores(list(generator.normal(50, 10, 600)), clusters, ids), scores(list(generator.normal(48, 10, 600)), clusters, ids)
    analytic, drawn = st.paired_difference(a, b), st.paired_bootstrap(a, b, draws=4000)
    assert drawn.value == pytest.approx(analytic.value)
    assert drawn.se == pytest.approx(analytic.se, rel=0.05)
    assert drawn.low == pytest.approx(analytic.low, abs=0.1)
    assert drawn.high == pytest.approx(analytic.high, abs=0.1)
    assert drawn == st.paired_bootstrap(a, b, draws=4000), "the same seed draws the same clusters"
    assert drawn != st.paired_bootstrap(a, b, draws=4000, seed=1)


def test_a_run_against_itself_differs_by_nothing() -> None:
    a = scores([10, 50, 70])
    assert st.paired_difference(a, a) == st.Difference(0, 0, 0, 0, 1, 2)
    constant = st.paired_difference(scores([11, 51, 71]), a)
    assert (constant.low, constant.high, constant.p) == (1, 1, 0)


def test_interval_excludes_zero_exactly_when_p_is_below_5_percent() -> None:
    generator = np.random.default_rng(11)
    for _ in range(60):
        found = st.paired_difference(scores(list(generator.normal(0.4, 1, 12))), scores([0.0] * 12))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_mean_over_tasks_has_equal_weights() -> None:
    tasks = [st.Estimate(10, 3, 9, 10, 10), st.Estimate(50, 4, 999, 1000, 1000)]
    mean = st.mean_over_tasks(tasks)
    assert (mean.mean, mean.se) == (30, 2.5)
    assert mean.df == pytest.approx(25**2 / (81 / 9 + 256 / 999))
    assert st.mean_over_tasks(tasks[:1]) == tasks[0]


def test_holm_by_hand() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert st.holm([0.02]) == [0.02]
    assert st.holm([]) == []
    assert st.holm([math.nan, 0.02]) == pytest.approx([1.0, 0.04])


def test_holm_keeps_the_family_wise_error() -> None:
    generator = np.random.default_rng(5)
    false_alarms = sum(min(st.holm(list(generator.uniform(size=6)))) < 0.05 for _ in range(3000))
    assert false_alarms / 3000 == pytest.approx(0.05, abs=0.013)


def test_detectable_differences_of_the_reference() -> None:
    """n = 1000, yes/no scores at 50 % (SD 50 points): 6.3 points unpaired, 2.8 where the two runs' answers correlate by 0.8."""
    assert round(st.detectable_difference(50, 1000), 1) == 6.3
    assert round(st.detectable_difference(50, 1000, correlation=0.8), 1) == 2.8


def test_a_difference_of_the_detectable_size_is_found_with_the_stated_power() -> None:
    generator = np.random.default_rng(9)
    n, rho, sd, found = 200, 0.6, 20.0, 0
    effect = st.detectable_difference(sd, n, correlation=rho)
    for _ in range(800):
        shared = generator.normal(size=n) * math.sqrt(rho)
        a, b = (sd * (shared + generator.normal(size=n) * math.sqrt(1 - rho)) for _ in range(2))
        estimate = st.clustered_mean(a + effect - b, np.arange(n))
        found += st.difference(estimate.mean, estimate.se, estimate.df).p < 0.05
    assert found / 800 == pytest.approx(0.8, abs=0.045)


def test_correlation_is_recovered_from_three_standard_errors() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(size=400)
    b = 0.5 * a + generator.normal(size=400)
    singles = np.arange(400)
    errors = [st.clustered_mean(values, singles).se for values in (a, b, a - b)]
    assert st.correlation(*errors) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_seed_and_item_variance_are_kept_apart() -> None:
    items = st.Estimate(50, 3, 99, 100, 100)
    assert st.combine_seeds(items, [50]) == st.Combined(50, 3, None, 99, 100, 100)
    three = st.combine_seeds(items, [46, 50, 54])
    assert three.se_items == 3
    assert three.se_seeds == pytest.approx(4 / math.sqrt(3))
    assert three.se == pytest.approx(math.hypot(3, 4 / math.sqrt(3)))
    assert 2 < three.df < 99
    assert st.combine_items_and_seeds(items, (1.0, 2), None).se_seeds is None, "one single seed leaves it item-level"
