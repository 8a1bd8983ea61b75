"""Quarantine: what a preparation leaves out of the corpus, listed in its faults.jsonl, and how much that may be.

corpus.max_faults = 0 (the default): the first damaged sample stops the preparation, since left out silently it would change the
corpus without anyone knowing. A share above 0 lets it go on without such samples, as large crawls need it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from configs.errors import UserError
from data_pipelines.faults import Fault, FaultLog, Loss, too_many

LISTING = "faults.jsonl"


class Quarantine:
    def __init__(self, folder: Path, share: float) -> None:
        self.share, self.log = share, FaultLog(folder / LISTING)
        self._good: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()

    def good(self, source: str) -> None:
        self._good[source] += 1

    def count(self, source: str) -> int:
        return self._lost[source]

    def add(self, fault: Fault, text: str | None = None) -> int:
        """Leave a sample out; returns 1. Raises UserError (with `text` if it says more than the fault) when none, or no more, may
        be left out."""
        if not self.share:
            raise UserError(
                f"{text or fault} (python -m data_pipelines.verify lists every fault; corpus.max_faults=0.01 leaves out up to "
                "one sample in a hundred.)"
            )
        source = fault.source
        self._lost[source] += 1
        self.log.add([fault])
        loss = Loss(self._good[source] + self._lost[source], self._lost[source])
        if too_many(loss, self.share):
            raise UserError(
                f"corpus.{source}: {loss.skipped:,} of the first {loss.read:,} samples cannot be used, more than "
                f"corpus.max_faults={self.share:g} allows. The last: {text or fault}"
            )
        return 1

    def report(self) -> None:
        for source, lost in self._lost.items():
            print(f"  {source}: {lost:,} samples or regions left out, listed in {LISTING}", flush=True)
