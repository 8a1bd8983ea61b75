"""What keeping a frozen encoder's features saved: images a second while they were computed, and while they were read.

Both rates are of the suite's own steps (metrics.jsonl), so nothing is trained twice to measure them. The first run with a tower
meets most pictures for the first time; later in it, and in every later run with that tower, they come from the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ablations.report.curves import Training
from ablations.report.tables import number, sortable
from data_pipelines.html_text import safe

COMPUTED, READ = 0.1, 0.9
"""Share of a logged window's pictures that came from the store: up to which it counts as computed, from which as read."""


@dataclass(frozen=True)
class Rates:
    """Medians of images a second over logged windows, and how many windows those are; nan without any."""

    computing: float
    reading: float
    computed: int
    read: int

    @property
    def ratio(self) -> float:
        return self.reading / self.computing


def rates(windows: Iterable[tuple[float, float]]) -> Rates:
    """`windows`: (share of the pictures that were read, images a second)."""
    held = list(windows)
    slow = [rate for share, rate in held if share <= COMPUTED]
    fast = [rate for share, rate in held if share >= READ]
    computing, reading = (float(np.median(own)) if own else math.nan for own in (slow, fast))
    return Rates(computing, reading, len(slow), len(fast))


def frozen_encoder(trainings: Sequence[Training]) -> str:
    """The section of the report; empty where no run had a frozen encoder."""
    held = [t for t in trainings if t.features_read + t.features_computed]
    if not held:
        return ""
    read, computed = (sum(getattr(t, key) for t in held) for key in ("features_read", "features_computed"))
    total = rates(window for t in held for window in t.windows)
    told = f"Of {read + computed:,} pictures in all steps {computed:,} were encoded, the others read from the store."
    if not math.isnan(total.ratio):
        told += (
            f" <b>{total.reading:.0f} images a second while reading, {total.computing:.0f} while computing: "
            f"{total.ratio:.1f} times as fast</b> (medians of {total.read} and {total.computed} logged windows)."
        )
    else:
        kind = "computed" if total.computed == 0 else "read"
        told += f" Nothing to compare: no logged window {kind} nearly all of its pictures' features."
    heads = ["variant", "encoded", "read", "images/s computing", "images/s reading", "ratio"]
    bodies = []
    for t in held:
        own = rates(t.windows)
        cells = [number(f"{t.features_computed:,}", t.features_computed), number(f"{t.features_read:,}", t.features_read)]
        for value, form in ((own.computing, "{:.0f}"), (own.reading, "{:.0f}"), (own.ratio, "{:.1f}")):
            known = not math.isnan(value)
            cells.append(number(form.format(value) if known else "", value if known else None))
        bodies.append(f'<tr><th scope="row">{safe(t.label)}</th>{"".join(cells)}</tr>')
    note = (
        f'<p class="note">Computing: windows in which at most {COMPUTED:.0%} of the pictures came from the store; reading: at '
        f"least {READ:.0%}. Rates are of the whole step, with connector and decoder, beside whatever else ran on the machine.</p>"
    )
    return f'<p class="prose">{told}</p>' + sortable(heads, bodies) + note
