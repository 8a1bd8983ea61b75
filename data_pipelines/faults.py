"""Faults: what could not be read, why, where its bytes lie, and how much of it a run may lose.

    reader, formats, images -> Fault -> rides with the lane's next sequence -> FaultLog (faults.jsonl, each fault once)
                                        and is counted in the lane's state  -> check_budgets

A damaged sample is a property of the corpus's bytes: every run on the same bytes skips the same samples, whatever its ranks and
workers, and a resumed run counts each of them once. A file that cannot be *read* just now is no fault but a reader.ShardError: it
stops the run, which goes on from its checkpoint, and never counts as a lost sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import UserError

SLACK = 8
"""Samples beyond the allowed share before a run stops: a share means nothing after the first dozen."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with bytes [start, end) of a shard; `key` where a sample can be named."""

    source: str
    shard: str
    key: str | None
    start: int
    end: int
    reason: str

    def __str__(self) -> str:
        name = ":".join(part for part in (self.source, self.shard, self.key) if part)
        return f"{name} (bytes {self.start:,}-{self.end:,}): {self.reason}"


class SampleFault(UserError):
    """Raised by whatever finds a sample that cannot be used; as a UserError it ends a command that needs every sample."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault

    def __reduce__(self) -> tuple[type[SampleFault], tuple[Fault]]:
        return SampleFault, (self.fault,)


class FaultLog:
    """A file of JSON lines with every fault once, however often its sample comes by: epochs, lanes and resumes repeat it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: set[tuple[str, str, str | None, int]] = set()
        if path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")  # a kill may have left half a line
            self._seen = {self._key(Fault(**json.loads(line))) for line in whole}

    def __len__(self) -> int:
        return len(self._seen)

    @staticmethod
    def _key(fault: Fault) -> tuple[str, str, str | None, int]:
        return fault.source, fault.shard, fault.key, fault.start

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Write those that are new; returns them."""
        new = {self._key(fault): fault for fault in faults if self._key(fault) not in self._seen}
        if new:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(fault)) + "\n" for fault in new.values())
            self._seen |= new.keys()
        return list(new.values())


@dataclass(frozen=True, slots=True)
class Loss:
    """Of one source: samples read so far, and those among them that could not be used."""

    read: int
    skipped: int


def too_many(loss: Loss, share: float) -> bool:
    """More is lost than `share` allows; the first SLACK samples count only against a share of 0."""
    return loss.skipped > (share * loss.read + SLACK if share else 0)


def check_budgets(losses: Mapping[str, Loss], budgets: Mapping[str, float], log: str) -> None:
    """Raises UserError naming each source of which more is lost than `budgets` (source -> share of its samples) allows.

    `log`: where the faults are listed, for the message.
    """
    over = []
    for source, loss in losses.items():
        share = budgets[source]
        if too_many(loss, share):
            lost = f"{loss.skipped:,} of {loss.read:,} samples could not be used"
            over.append(f"{source}: {lost} (data.sources.{source}.max_faults={share:g})")
    if over:
        raise UserError(
            f"Too much of the data is damaged. {'; '.join(over)}. Each is listed with its reason in {log}. Mend the shards "
            "(python -m data_pipelines.verify lists every fault) and prepare the corpus again, or raise the budget."
        )
