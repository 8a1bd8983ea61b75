"""Order and mixture: permutations, exact quotas, independence of everything but the seed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import order
from data_pipelines.mixture import Mixture
from data_pipelines.order import LaneOrder, Permutation, keyed


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_visits_each_index_once(n: int, key: int) -> None:
    permutation = Permutation(n, key)
    assert sorted(permutation[i] for i in range(n)) == list(range(n))


def test_permutations_of_different_keys_differ_and_look_shuffled() -> None:
    n = 5000
    first, second = Permutation(n, 1), Permutation(n, 2)
    agreeing = sum(first[i] == second[i] for i in range(n))
    assert agreeing < 20  # two independent ones agree in one place on average
    steps = [abs(first[i + 1] - first[i]) for i in range(n - 1)]
    assert abs(sum(steps) / len(steps) / n - 1 / 3) < 0.02  # mean distance of two uniform points is n/3


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 10**6), max_size=40))
@settings(max_examples=60, deadline=None)
def test_many_at_once_are_the_same_as_one_by_one(n: int, key: int, indices: list[int]) -> None:
    permutation, inside = Permutation(n, key), [i % n for i in indices]
    assert permutation.many(np.array(inside, np.int64)).tolist() == [permutation[i] for i in inside]


def test_every_epoch_is_whole_and_its_own() -> None:
    order = LaneOrder(100, 4, 0, "order", "captions")
    epochs = [[order[lane, e * 25 + i] for i in range(25) for lane in range(4)] for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)  # type: ignore[type-var]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("n", "lanes"), [(1, 64), (20, 64), (64, 64), (1000, 64), (5, 2)])
def test_a_lane_reads_every_lanes_th_of_the_epochs_however_small_they_are(
    n: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(Permutation):
        def __init__(self, n: int, key: int) -> None:
            made.append(key)
            super().__init__(n, key)

    monkeypatch.setattr(order, "Permutation", Counted)
    ours = LaneOrder(n, lanes, "seed")
    for place in range(40):
        made.clear()
        found = ours[3 % lanes, place]
        assert len(made) <= 9  # so the first sample of a small split is there at once
        epoch, index = divmod(place * lanes + 3 % lanes, n)
        assert found == Permutation(n, keyed("seed", epoch))[index]


def test_a_lane_reads_neighbours_together_where_blocks_are_asked_for() -> None:
    order = LaneOrder(10_000, 4, 0, "order", block=50)
    group = [order[2, place] for place in range(order.MIXED * 50)]
    assert len({sample // 50 for sample in group if sample is not None}) == order.MIXED
    assert group != sorted(group)  # type: ignore[type-var]


def test_keyed_is_the_same_in_another_process() -> None:
    code = "from data_pipelines.order import keyed; print(keyed(7, 'order', 'captions', 0))"
    environment = {"PYTHONHASHSEED": "123"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(other.stdout) == keyed(7, "order", "captions", 0)


RATIOS = st.lists(st.integers(1, 100), min_size=1, max_size=6).map(lambda w: {f"s{i}": v / sum(w) for i, v in enumerate(w)})


@given(RATIOS, st.integers(1, 257), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_each_batch_misses_its_target_by_less_than_one(ratios: dict[str, float], batch: int, seed: int) -> None:
    """And so does everything up to it together."""
    mixture = Mixture(ratios, batch, seed)
    total: Counter[str] = Counter()
    for step in range(40):
        counts = Counter(mixture.slots(step))
        assert sum(counts.values()) == batch
        total.update(counts)
        for name, ratio in ratios.items():
            assert abs(counts[name] - ratio * batch) < 1 + 1e-3
            assert abs(total[name] - ratio * batch * (step + 1)) < 1 + 1e-1


@pytest.mark.parametrize("batch", [1, 16, 20, 512])
def test_long_run_shares_are_exact_and_no_slot_is_left_out(batch: int) -> None:
    ratios = {"captions": 0.45, "interleaved": 0.45, "text": 0.10}
    mixture = Mixture(ratios, batch, seed=3)
    steps = 2000
    total: Counter[str] = Counter()
    seen_in_slot_0: Counter[str] = Counter()
    for step in range(steps):
        slots = mixture.slots(step)
        total.update(slots)
        seen_in_slot_0[slots[0]] += 1
    for name, ratio in ratios.items():
        assert abs(total[name] / (steps * batch) - ratio) < 0.002
        # Plain striding would give some rank one kind only; each slot must see the whole mixture.
        assert abs(seen_in_slot_0[name] / steps - ratio) < 0.05


def test_a_source_of_ratio_zero_never_appears() -> None:
    assert set(Mixture({"a": 1.0, "b": 0.0}, 7, 0).slots(0)) == {"a"}
