"""`python -m benchmarks.mixture --json`: how far the sources of a mixture stray from their ratios, in each unit.

Drawn captions, interleaved pages and texts (benchmarks.packing) at ratios 0.45, 0.45 and 0.1 in lanes as training runs them:

    UNIT_LANES_batch   the largest distance of a source's share of one global batch from its ratio
    UNIT_LANES_total   the same for all batches so far, after each of the steps: bounded, so its share of the total goes to zero

ours: in sequences (what a sequence holds of the unit on average); peer: each sequence, document or block of tokens from a source
drawn by chance, as webdataset's RandomMix does; limit: one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from benchmarks.packing import IMAGE_TOKENS, MAX_IMAGES, SEQ_LEN, drawn
from benchmarks.report import Row, arguments, print_rows
from data_pipelines.config import UNITS, PackingConfig
from data_pipelines.lanes import Lane, LaneStream
from data_pipelines.mixture import Mixture

RATIOS = {"captions": 0.45, "interleaved": 0.45, "text": 0.1}
STEPS = 100


def stream(unit: str, lanes: int) -> LaneStream:
    """What a Lane asks of its stream, with drawn documents in place of a corpus."""

    def source(number: int, name: str) -> SimpleNamespace:
        return SimpleNamespace(number=number, name=name, read=lambda lane, place: drawn(name, place * lanes + lane))

    found = SimpleNamespace(
        sources=[source(number, name) for number, name in enumerate(RATIOS)],
        packing=PackingConfig(SEQ_LEN, MAX_IMAGES),
        image_tokens=IMAGE_TOKENS,
        data=SimpleNamespace(unit=unit, sources={name: SimpleNamespace(ratio=ratio) for name, ratio in RATIOS.items()}),
        global_batch=lanes,
        seed=0,
    )
    return cast(LaneStream, found)


def taken(unit: str, lanes: int) -> np.ndarray:
    """Units of each source in each global batch, float (STEPS, sources)."""
    running: list[Any] = [Lane(number, stream(unit, lanes)) for number in range(lanes)]
    mixture, names = Mixture(RATIOS, lanes, seed=0), list(RATIOS)
    counts = np.zeros((STEPS, len(RATIOS)))
    for step, row in enumerate(counts):
        slots = mixture.slots(step)
        for lane in running:
            if unit == "sequence":
                row[names.index(slots[lane.number])] += 1
                continue
            lane.packers[0].pop()
        if unit != "sequence":
            field = "taken_documents" if unit == "document" else "taken_tokens"
            so_far = [sum(getattr(lane.feeds[k].counts, field) for lane in running) for k in range(len(RATIOS))]
            row[:] = np.array(so_far) - counts[:step].sum(0)
    return counts


def strayed(counts: np.ndarray) -> float:
    """Largest distance from the ratios, in units."""
    return float(np.abs(counts - counts.sum(1, keepdims=True) * np.array(list(RATIOS.values()))).max())


def rows(unit: str, lanes: int) -> Iterator[Row]:
    counts = taken(unit, lanes)
    a_sequence = counts.sum() / (STEPS * lanes)
    # By chance: as many draws as documents were taken; for tokens, blocks of a sequence's length.
    draws = round(a_sequence * lanes) if unit == "document" else lanes
    chance = np.random.default_rng(0).multinomial(draws, list(RATIOS.values()), STEPS) * (counts.sum() / STEPS / draws)
    for name, ours, peer in (("batch", counts, chance), ("total", counts.cumsum(0), chance.cumsum(0))):
        mine, theirs = strayed(ours) / a_sequence, strayed(peer) / a_sequence
        yield Row(f"{unit}_{lanes}_{name}", mine, theirs, mine / theirs, 1.0, "sequences", "drawn by chance", "one sequence")


CASES = {f"{unit}_{lanes}": partial(rows, unit, lanes) for unit in UNITS for lanes in (4, 32, 128)}


def main() -> None:
    chosen = arguments(__doc__ or "", CASES)
    print_rows((row for case, run in CASES.items() if not chosen.case or case in chosen.case for row in run()), chosen.json)


if __name__ == "__main__":
    main()
