"""The figures of a report without the page around them: axes, ticks, marks, and what its numbers are made of."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ablations.report import frozen
from ablations.report.curves import Training
from ablations.report.figures import Layout, in_order, pareto, scores
from ablations.report.svg import log_ticks, ticks
from ablations.statistics import Combined
from ablations.tables.cells import Block, Cell, Row


def test_axes_are_ordered_where_their_numbers_are() -> None:
    assert in_order(["100-0", "67-33", "50-50", "0-100"])
    assert in_order(["0.4M", "1.4M", "9M", "1.2B"])
    assert in_order(["4e-4", "8e-4", "1.6e-3"])
    assert not in_order(["8e-4", "4e-4", "1.6e-3"])
    assert not in_order(["few", "7", "9"])
    assert not in_order(["7", "7", "9"])
    assert not in_order(["vit-1", "vit-2", "vit-3"])


def test_the_pareto_front_is_what_no_other_beats() -> None:
    draw = np.random.default_rng(0)
    points = [(float(c), float(s)) for c, s in draw.integers(0, 8, (60, 2))]

    def beaten(point: tuple[float, float]) -> bool:
        return any(c <= point[0] and s >= point[1] and (c, s) != point for c, s in points)

    front = [points[i] for i in pareto(points)]
    assert set(front) == {point for point in points if not beaten(point)}
    assert len(front) == len(set(front))
    assert front == sorted(front)


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 50) == [0, 10, 20, 30, 40, 50]
    assert ticks(-3.2, 4.1) == [-2, 0, 2, 4]
    assert ticks(3, 3) == [3]
    assert log_ticks(1e-4, 1e-3) == pytest.approx([1e-4, 2e-4, 5e-4, 1e-3])
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]


def test_intervals_end_where_their_panel_ends() -> None:
    def cell(mean: float) -> Cell:
        return Cell(Combined(mean, 9.0, 5.0, 9.0, None, None, 20, 20))

    names = ["1e-4", "2e-4", "4e-4"]
    rows = [Row(name, None, [0], True, {0: cell(2.0 + number)}) for number, name in enumerate(names)]
    layout = Layout({"rate": names}, {name: {"rate": name} for name in names}, [0])
    drawn = scores(Block("captions", "cider_d", "captioning", None, rows, {}), layout)
    ends = [
        float(y) for line in re.findall(r"<line [^>]*stroke soft[^>]*>", drawn) for y in re.findall(r' y[12]="([\d.]+)"', line)
    ]
    marks = [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', drawn)]
    zero = marks[0] + 2 * (marks[0] - marks[1])  # means 2 and 3 tell where 0 is drawn
    assert len(ends) == 6
    assert max(ends) == pytest.approx(zero, abs=0.5)


def test_the_speed_of_reading_features_is_that_of_windows_that_read_nearly_all() -> None:
    windows = [(0.0, 10.0), (0.1, 30.0), (0.05, 20.0), (0.5, 1000.0), (0.9, 70.0), (1.0, 90.0)]
    held = frozen.rates(windows)
    assert (held.computing, held.reading, held.computed, held.read) == (20.0, 80.0, 3, 2)
    shown = frozen.frozen_encoder([Training("a", features_read=4, features_computed=3, windows=windows), Training("no tower")])
    assert "80 images a second while reading, 20 while computing: 4.0 times as fast" in shown
    assert "no tower" not in shown
    assert "no logged window read nearly all" in frozen.frozen_encoder([Training("a", features_computed=3, windows=windows[:3])])
    assert frozen.frozen_encoder([Training("no tower")]) == ""
