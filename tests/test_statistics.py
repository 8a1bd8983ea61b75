"""The error bars: against brute force, published values and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ablations import statistics as st
from ablations.student import t_df
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


@pytest.mark.parametrize("probability", [0.501, 0.6, 0.975, 0.9999999])
@pytest.mark.parametrize("df", [0.3, 1, 1.5, 4, 29.7, 1e3, 1e6, math.inf])
def test_t_quantiles_undo_the_tail(df: float, probability: float) -> None:
    assert st.t_two_sided(st.t_quantile(probability, df), df) == pytest.approx(2 * (1 - probability), rel=1e-7)


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
    assert (estimate.n, estimate.clusters, estimate.df) == (6, 6, pytest.approx(5))


def test_equal_clusters_are_the_standard_error_of_cluster_means() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(20, 5))
    estimate = st.clustered_mean(values.reshape(-1), np.repeat(np.arange(20), 5))
    assert estimate.se == pytest.approx(values.mean(1).std(ddof=1) / math.sqrt(20))


UNEQUAL = list("aabbbcdeeeee")


def test_unequal_clusters_by_a_double_sum_over_items() -> None:
    values = [1.0, 5, 2, 8, 8, 9, 0, 3, 3, 4, 1, 7]
    mean = sum(values) / 12
    total = 0.0
    for i in range(12):
        for j in range(12):
            if UNEQUAL[i] == UNEQUAL[j]:
                total += (values[i] - mean) * (values[j] - mean) / (1 - UNEQUAL.count(UNEQUAL[i]) / 12)
    assert st.clustered_mean(np.array(values), UNEQUAL).se == pytest.approx(math.sqrt(total) / 12)


def test_the_clustered_variance_is_unbiased_for_independent_items_and_lies_between_sandwich_and_jackknife() -> None:
    """E[SE^2] = sigma^2 / n whatever the sizes: SE^2 is the quadratic form x'Ax, and trace A must be 1/n."""
    unit = np.eye(12)
    held = st.Clusters.of(UNEQUAL)
    numbers, groups = held.numbers, held.count

    def form(x: np.ndarray, y: np.ndarray) -> float:  # by polarisation
        plus, minus = (st.clustered_mean(v, UNEQUAL).error[0] for v in (x + y, x - y))
        return (plus**2 - minus**2) / 4

    assert sum(form(row, row) for row in unit) == pytest.approx(1 / 12)
    values = np.random.default_rng(4).normal(size=12)
    left_out = np.array([values[numbers != g].mean() for g in range(groups)])
    weights = 1 - np.bincount(numbers) / 12
    sandwich = float((weights**2 * (left_out - values.mean()) ** 2).sum())  # sum of u_g^2 over n^2
    jackknife = float(((left_out - values.mean()) ** 2).sum())
    se = st.clustered_mean(values, UNEQUAL).error[0]
    assert sandwich < se**2 < jackknife
    assert se**2 == pytest.approx(float((weights * (left_out - values.mean()) ** 2).sum()))


def test_clusters_are_numbered_as_they_appear() -> None:
    cases = [[0, 1, 1, 0, 2], [1, 0, 2], [0, 2, 1], [0, 0], [3, 3, 5], [-1, 0], [0, -1, 1]]
    for case in cases:
        order = list(dict.fromkeys(case))
        for clusters in (case, np.array(case), np.array(case, np.int32), [str(c) for c in case]):
            held = st.Clusters.of(clusters)
            assert (held.numbers.tolist(), held.count) == ([order.index(c) for c in case], len(order))
            assert held.numbers.dtype == np.int64
            assert st.Clusters.of(held) is held
            assert len(held) == held.sizes.sum() == len(case)
            assert held.sizes.tolist() == [case.count(c) for c in order]


@pytest.mark.parametrize("shared", [-0.9, 0.0, 3.0])
def test_degrees_of_freedom_by_the_whole_matrix(shared: float) -> None:
    """df = 2 E[q]^2 / Var[q] = tr(AV)^2 / tr(AVAV) for q = x'Ax, with A and V written out item by item."""
    values, held = np.random.default_rng(8).normal(size=12), st.Clusters.of(UNEQUAL)
    values += shared * (held.sums(values) / held.sizes)[held.numbers]
    numbers, groups = held.numbers, held.count
    same = numbers[:, None] == numbers
    centre = np.eye(12) - 1 / 12
    sums = np.stack([(numbers == g) @ centre / 12 for g in range(groups)])
    a = sums.T @ np.diag(1 / (1 - np.bincount(numbers) / 12)) @ sums
    residuals = values - values.mean()
    outer = np.outer(residuals, residuals)
    rho = outer[same & ~np.eye(12, dtype=bool)].mean() / np.diag(outer).mean()
    assert [rho < 0, 0 < rho < 1, rho > 1] == [shared < 0, shared == 0, shared > 0]
    rho = min(1.0, max(0.0, rho))
    v = np.where(same, rho, 0.0) + (1 - rho) * np.eye(12)
    estimate = st.clustered_mean(values, UNEQUAL)
    assert estimate.se == pytest.approx(math.sqrt(values @ a @ values))
    assert estimate.df == pytest.approx(np.trace(a @ v) ** 2 / np.trace(a @ v @ a @ v))
    assert 1 < estimate.error[1] < groups - 1


def test_repeating_every_item_adds_no_information() -> None:
    values = np.array([0.0, 100, 100, 0, 50])
    once = st.clustered_mean(values, list("abcde"))
    often = st.clustered_mean(np.repeat(values, 30), np.repeat(list("abcde"), 30))
    assert often.se == pytest.approx(once.se)
    assert st.clustered_mean(np.repeat(values, 30), np.arange(150)).error[0] < once.error[0] / 5


def test_one_cluster_has_no_error_bar() -> None:
    alone = st.clustered_mean(np.array([1.0, 2.0]), ["a", "a"])
    assert (alone.mean, alone.se, alone.df) == (1.5, None, None)
    one, other = scores([1, 2], ["a", "a"]), scores([1, 3], ["a", "a"])
    assert math.isnan(st.paired_difference(one, other).p)
    assert math.isnan(st.paired_bootstrap(one, other).p)
    assert st.average_tasks([alone, st.clustered_mean([1.0, 2.0], "ab")]).se is None


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


def test_bootstrap_draws_every_resample_as_often_as_it_should() -> None:
    """Four clusters of unequal sizes: 4^4 equally likely resamples, enumerated."""
    values, clusters = np.array([1.0, 5, 2, 8, 8, 9, 0]), list("aabbbcd")
    groups = [[0, 1], [2, 3, 4], [5], [6]]
    exact: dict[float, float] = {}
    for drawn in itertools.product(groups, repeat=4):
        mean = round(float(np.mean([values[i] for group in drawn for i in group])), 9)
        exact[mean] = exact.get(mean, 0) + 4**-4
    draws = st.bootstrap_draws(values, clusters, draws=40_000, seed=2).round(9)
    found = {value: np.count_nonzero(draws == value) / draws.size for value in exact}
    assert sum(found.values()) == pytest.approx(1), "nothing else is ever drawn"
    assert all(abs(found[value] - share) < 5 * math.sqrt(share / draws.size) for value, share in exact.items())


def test_the_bootstrap_of_few_clusters_is_as_wide_as_t() -> None:
    """Normal draws of SE s around 10 with 6 clusters: the exact answer is the t interval of SE s * sqrt(6/5), and its p-value."""
    draws = 10 + 4 * np.array([st.NORMAL.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    drawn, exact = st.bootstrap_difference(10, draws, 5), st.difference(10, 4 * math.sqrt(6 / 5), 5)
    assert (drawn.low, drawn.high, drawn.se) == pytest.approx((exact.low, exact.high, exact.se), rel=1e-3, abs=0.02)
    assert drawn.p == pytest.approx(exact.p, rel=0.01)


def test_a_run_against_itself_differs_by_nothing() -> None:
    a = scores([10, 50, 70])
    assert st.paired_difference(a, a) == st.Difference(0, 0, 0, 0, 1, pytest.approx(2))  # type: ignore[arg-type]
    constant = st.paired_difference(scores([11, 51, 71]), a)
    assert (constant.low, constant.high, constant.p) == (1, 1, 0)


def test_interval_excludes_zero_exactly_when_p_is_below_5_percent() -> None:
    generator = np.random.default_rng(11)
    for _ in range(60):
        found = st.paired_difference(scores(list(generator.normal(0.4, 1, 12))), scores([0.0] * 12))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_mean_over_tasks_has_equal_weights() -> None:
    tasks = [st.Estimate(10, 3, 9, 10, 10), st.Estimate(50, 4, 999, 1000, 1000)]
    mean = st.average_tasks(tasks)
    assert (mean.mean, mean.se) == (30, 2.5)
    assert mean.df == pytest.approx(25**2 / (81 / 9 + 256 / 999))
    assert st.average_tasks(tasks[:1]) == tasks[0]


def test_holm_by_hand() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert st.holm([0.02]) == [0.02]
    assert st.holm([]) == []
    assert st.holm([math.nan, 0.02]) == pytest.approx([1.0, 0.04])


def test_holm_is_the_closed_test_of_bonferroni_bounds() -> None:
    """By enumeration (Marcus, Peritz & Gabriel 1976): a hypothesis falls when every set that holds it falls by Bonferroni."""
    generator = np.random.default_rng(21)
    for size in (1, 2, 5, 7):
        p = list(generator.beta(0.4, 3, size).round(2))  # rounded: ties occur
        expected = [
            max(
                min(1.0, len(chosen) * min(p[j] for j in chosen))
                for count in range(1, size + 1)
                for chosen in itertools.combinations(range(size), count)
                if i in chosen
            )
            for i in range(size)
        ]
        assert st.holm(p) == pytest.approx(expected)


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
        found += st.difference(estimate.mean, *estimate.error).p < 0.05
    assert found / 800 == pytest.approx(0.8, abs=0.045)


def test_few_clusters_can_only_show_larger_differences() -> None:
    """8 images: with normal quantiles in place of t's, the power would be 0.7 where 0.8 is stated."""
    generator = np.random.default_rng(13)
    effect = st.detectable_from_se(1 / math.sqrt(8), df=7)
    draws = generator.normal(effect, 1, (4000, 8))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(8))
    assert (np.abs(t) > st.t_quantile(0.975, 7)).mean() == pytest.approx(0.8, abs=0.025)
    assert effect > 1.1 * st.detectable_from_se(1 / math.sqrt(8))


def test_correlation_is_recovered_from_three_standard_errors() -> None:
    generator = np.random.default_rng(2)
    a = generator.normal(size=400)
    b = 0.5 * a + generator.normal(size=400)
    singles = np.arange(400)
    errors = [st.clustered_mean(values, singles).error[0] for values in (a, b, a - b)]
    assert st.correlation(*errors) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_seed_demonstration_and_item_variance_are_kept_apart() -> None:
    items = st.Estimate(50, 3, 99, 100, 100)
    alone = st.combine(items, seeds=[None])
    assert (alone.se, alone.df, alone.se_seeds, alone.se_demonstrations) == (3, 99, None, None)
    three = st.combine(items, seeds=[st.Spread(4, 2)], demonstrations=st.Spread(1, 4))
    assert (three.se_items, three.se_seeds, three.se_demonstrations) == (3, 4, 1)
    assert three.se == pytest.approx(math.sqrt(9 + 16 + 1))
    half = math.hypot(3 * st.t_quantile(0.975, 99), math.sqrt(17) * st.t_quantile(0.975, 17**2 / (4**4 / 2 + 1 / 4)))
    assert st.t_quantile(0.975, three.df) * three.se == pytest.approx(half)
    assert st.combine(items, seeds=[st.Spread(1, 2), None]).se_seeds is None, "one single seed leaves it item-level"
    assert st.combine(items, seeds=[st.Spread(3, 2), st.Spread(4, 2)]).se_seeds == 5
    assert st.combine(items, seeds=[st.Spread(5, 2, by_items=9)]).se_seeds == 4, "what items hold already is left out"
    assert st.spread([(np.zeros((1, 5)), list("abcde"))]) is None
    assert st.combine(items, seeds=[st.Spread(0, 2)]).df == 99, "seeds that agree add nothing"


def test_the_spread_is_the_variance_component_of_the_repeats() -> None:
    """Two-way analysis of variance by hand: (mean square of repeats - residual mean square) / (R n), for items of their own."""
    generator = np.random.default_rng(6)
    scores = generator.normal(size=30) + generator.normal(size=(4, 1)) + generator.normal(size=(4, 30))
    between = 30 * scores.mean(1).var(ddof=1)
    left = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    residual = float((left**2).sum()) / (3 * 29)
    found = st.spread([(scores, np.arange(30))])
    assert found is not None
    assert found.raw**2 - found.by_items == pytest.approx((between - residual) / (4 * 30))
    assert found.df == 3
    constant = st.spread([(scores - scores.mean(1, keepdims=True), np.arange(30))])
    assert constant is not None
    assert constant.se == 0, "repeats whose means agree more than their items let expect show nothing of their own"
    two_tasks = st.spread([(scores, np.arange(30))] * 2)
    assert two_tasks is not None
    assert two_tasks.se > found.se, "a seed that is good at both tasks counts whole, its chance errors on items by half"


@pytest.mark.parametrize("df", [0.8, 1, 2.5, 40, 1e4])
def test_degrees_of_freedom_are_found_from_the_quantile(df: float) -> None:
    assert t_df(st.t_quantile(0.975, df), 0.975) == pytest.approx(df, rel=1e-6)
    assert t_df(1.95, 0.975) == math.inf
