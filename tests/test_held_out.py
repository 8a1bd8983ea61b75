"""Held-out losses of a suite: paired within seeds, averaged over the settings of other axes, by hand on a small study."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ablations import statistics as st
from ablations.student import t_quantile
from ablations.suites.suite import SuiteConfig
from ablations.tables.held_out import WORTH, HeldOut, held_out_of, held_out_sections
from tests.suite_folders import Study

AXES = {"kind": ["a", "b"], "size": ["small", "large"]}
SEEDS = (0, 1, 2)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("MM1_HOME", str(tmp_path))
    axes: dict[str, Any] = {axis: {variant: [] for variant in variants} for axis, variants in AXES.items()}
    return Study(SuiteConfig(name="mine", about="", axes=axes, baseline={"kind": "a", "size": "small"}), seeds=SEEDS)


def train(study: Study, losses: dict[str, list[float | None]], shuffled: float = 0.5) -> HeldOut | None:
    """`losses`: label -> captions' loss of each seed, None for one that is not trained."""
    for label, values in losses.items():
        for seed, value in enumerate(values):
            if value is not None:
                validation = {"loss_captions": value, "loss_captions_shuffled_images": value + shuffled + seed, "loss_text": 7.0}
                study.train(label, seed, validation=validation)
    return held_out_of(study.cells, AXES)


LOSSES: dict[str, list[float | None]] = {
    "a.small": [4.0, 5.0, 4.5], "b.small": [3.9, 4.8, 4.2], "a.large": [4.1, 5.3, 4.5], "b.large": [3.8, 4.9, 4.3],
}  # fmt: skip


def test_differences_are_taken_within_seeds(study: Study) -> None:
    found = train(study, LOSSES)
    assert found is not None
    assert found.kinds == ["captions", "text", WORTH]
    assert [row.label for row in found.rows] == ["a.small", "a.large", "b.small", "b.large"]
    base, _, row, _ = found.rows
    assert base.changes == {}
    assert base.means == pytest.approx({"captions": 4.5, "text": 7.0, WORTH: 1.5})
    change = row.changes["captions"]
    half = t_quantile(0.975, 2) * math.sqrt(0.01 / 3)  # differences -0.1, -0.2, -0.3: their variance is 0.01
    assert change.difference.value == pytest.approx(-0.2)
    assert (change.difference.low, change.difference.high) == pytest.approx((-0.2 - half, -0.2 + half))
    assert row.changes["text"].difference.value == 0
    assert row.changes[WORTH].difference.value == pytest.approx(0)
    compared = [c for r in found.rows[1:] for c in r.changes.values()]
    assert [c.p_holm for c in compared] == pytest.approx(list(st.holm([c.difference.p for c in compared])))


def test_an_axis_is_averaged_over_the_settings_of_the_others_within_seeds(study: Study) -> None:
    found = train(study, LOSSES)
    assert found is not None
    kind, size = found.effects
    assert (kind.axis, kind.variant, kind.against, kind.pairs) == ("kind", "b", "a", 2)
    # b - a at small: -0.1, -0.2, -0.3; at large: -0.3, -0.4, -0.2; averaged within seeds: -0.2, -0.3, -0.25
    assert kind.changes["captions"].difference.value == pytest.approx(-0.25)
    assert kind.changes["captions"].difference.se == pytest.approx(0.05 / math.sqrt(3))
    assert size.changes["captions"].difference.value == pytest.approx((0.1 + 0.3 + 0.0 - 0.1 + 0.1 + 0.1) / 6)


def test_only_seeds_that_both_sides_have_are_compared(study: Study) -> None:
    found = train(study, LOSSES | {"b.small": [3.9, None, None], "b.large": [None, 4.9, 4.3]})
    assert found is not None
    rows = {row.label: row for row in found.rows}
    one = rows["b.small"].changes["captions"]
    assert (one.seeds, one.difference.value) == ((0,), pytest.approx(-0.1))
    assert math.isnan(one.difference.se)
    assert math.isnan(one.p_holm)
    assert rows["b.large"].changes["captions"].seeds == (1, 2)
    assert found.effects == []  # no seed has all the cells of either effect
    text = "\n".join(" ".join(line) for section in held_out_sections(found) for line in section.lines)
    assert "-0.100 [?]" in text


def test_without_validation_or_baseline_there_is_no_table(study: Study) -> None:
    study.train("b.small", 0, validation={})
    assert held_out_of(study.cells, AXES) is None
    study.train("b.small", 1, validation={"loss_text": 3.0})
    assert held_out_of(study.cells, AXES) is None
    study.train("a.small", 1, validation={"loss_text": 2.5})
    found = held_out_of(study.cells, AXES)
    assert found is not None
    assert found.kinds == ["text"]
    assert held_out_sections(found)[0].lines == [["a.small", "2.500", "baseline", "1"], ["b.small", "3.000", "+0.500 [?]", "1"]]
