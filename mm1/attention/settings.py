"""What SparQ attention can be set to. Apart from the method, so that a command knows its settings without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import UserError

GROUPS = ("softmax", "logits")
SUFFIXES = ("sparse", "dense")


@dataclass(unsafe_hash=True)  # not frozen: Hydra takes a frozen schema for one that no command line may change
class SparqSettings:
    """r: components of a key that are read to score it. k: tokens attended to, `local` of them the latest (None: k // 4).

    reallocate: step 5 (off for Llama 3 and Mistral in the paper). group: what is summed over a group of query heads to rank
    tokens. dense_below: fewer valid tokens than this are attended to densely (None: as many as the code at work gains nothing
    on; never fewer than k). suffix: whether several tokens that follow a filled cache at once, such as a question after
    demonstrations, attend sparsely as well (cache.py). Raises UserError for what cannot work.
    """

    r: int = 32
    k: int = 128
    local: int | None = None
    reallocate: bool = True
    group: str = "softmax"
    dense_below: int | None = None
    suffix: str = "sparse"

    def __post_init__(self) -> None:
        for name in ("r", "k"):
            if getattr(self, name) < 1:
                raise UserError(f"sparq.{name}={getattr(self, name)}: give a number from 1 up.")
        if self.local is not None and not 0 <= self.local <= self.k:
            raise UserError(
                f"sparq.local={self.local}: the latest tokens count among the k={self.k}; give 0 to {self.k}, or null."
            )
        if self.group not in GROUPS:
            raise UserError(f"sparq.group={self.group}: choose from {', '.join(GROUPS)}.")
        if self.dense_below is not None and self.dense_below < 0:
            raise UserError(f"sparq.dense_below={self.dense_below}: give a number of tokens from 0 up, or null.")
        if self.suffix not in SUFFIXES:
            raise UserError(f"sparq.suffix={self.suffix}: choose from {', '.join(SUFFIXES)}.")

    @property
    def window(self) -> int:
        """Latest valid tokens that are always attended to."""
        return self.k // 4 if self.local is None else self.local

    @property
    def dense_up_to(self) -> int:
        """The largest number of valid tokens that is attended to densely."""
        return max(self.k, (self.dense_below or 0) - 1)
