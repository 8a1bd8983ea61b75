"""How SparQ attention's kernels (sparq_kernels.py) are cut for a shape: plain numbers, without Triton or a GPU.

    default_plan   by reasoning: blocks enough for all processors, scores few enough for a block's registers
    variations     what `sparq_triton.warm_up` tries by the clock
    tournament     the selections between the scores and the last kernel

What the numbers rest on was read from the code that Triton compiles for sm_90 (registers, spills, width of loads); none has been
measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from configs.errors import UserError
from mm1.attention.sparq import SparqSettings

LARGEST_CHUNK = 16384  # scores that a block can keep in registers; sparq_kernels._places counts no further


def power_of_2(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below either."""
    return 1 << (max(number, least) - 1).bit_length()


@dataclass(frozen=True)
class Shape:
    """What a Plan is made for. heads are the query heads, capacity is C of keys (B, Hkv, C, d)."""

    batch: int
    heads: int
    kv_heads: int
    head_size: int
    capacity: int
    dtype: torch.dtype
    settings: SparqSettings

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        return self.batch * self.kv_heads

    @property
    def picked(self) -> int:
        """Tokens that are selected by score, beside the latest."""
        return self.settings.k - self.settings.window

    @property
    def sparse(self) -> bool:
        """Whether the capacity allows of rows that leave tokens out."""
        return self.capacity > self.settings.dense_up_to

    def shape_class(self) -> tuple[object, ...]:
        """Shapes of one class share a plan: capacities up to the same power of two, settings that cost the same."""
        s = self.settings
        costs = (s.r, s.k, s.window, s.reallocate, s.group, s.dense_up_to)
        return (self.rows, self.group, self.head_size, power_of_2(self.capacity), self.dtype, *costs)


@dataclass(frozen=True)
class Plan:
    """All powers of two but the stages. shares: blocks a row for its scores; score_block: tokens of one of their steps; chunk:
    scores to select from in one block; finish_block: tokens of a step of the attention; warps and pipeline stages a kernel."""

    shares: int
    score_block: int
    score_warps: int
    score_stages: int
    chunk: int
    select_warps: int
    finish_block: int
    finish_warps: int
    finish_stages: int


def default_plan(shape: Shape, processors: int) -> Plan:
    """Four blocks a processor for the scores; one chunk a row where there are rows enough, otherwise chunks until there are.

    Raises UserError where k is too large to select.
    """
    size, d, r = shape.dtype.itemsize, power_of_2(shape.head_size, 16), power_of_2(min(shape.settings.r, shape.head_size), 16)
    score_block, score_stages = _fitting(min(256, power_of_2(shape.capacity, 16)), 4, r * size)
    finish_block, finish_stages = _fitting(64, 2, 2 * d * size)
    blocks = -(-shape.capacity // score_block)
    shares = min(power_of_2(blocks), max(1, power_of_2(4 * processors // shape.rows + 1) // 2))
    chunk = min(LARGEST_CHUNK // 2, power_of_2(shape.capacity, 16))  # see warps_for
    while chunk > 2048 and shape.rows * -(-shape.capacity // chunk) < processors:
        chunk //= 2
    return Plan(
        shares=shares,
        score_block=score_block,
        score_warps=4,
        score_stages=score_stages,
        chunk=chunk_for(shape, chunk),
        select_warps=4,
        finish_block=finish_block,
        finish_warps=4,
        finish_stages=finish_stages,
    )


def _fitting(block: int, stages: int, bytes_a_token: int) -> tuple[int, int]:
    """The block of tokens, and its stages, made smaller until they take 96 KiB of shared memory, so that two blocks fit a
    processor of 228 KiB."""
    while block > 16 and block * stages * bytes_a_token > 96 << 10:
        block //= 2
    while stages > 1 and block * stages * bytes_a_token > 96 << 10:
        stages -= 1
    return block, stages


def chunk_for(shape: Shape, chunk: int) -> int:
    """`chunk`, or the smallest that at least halves what it selects from: otherwise candidates would never get fewer."""
    if not shape.sparse:
        return chunk
    if 2 * shape.picked > LARGEST_CHUNK:
        raise UserError(
            f"sparq.k={shape.settings.k}: a GPU's block selects at most {LARGEST_CHUNK // 2} tokens beside the "
            f"{shape.settings.window} latest; give a smaller sparq.k."
        )
    return max(chunk, power_of_2(2 * shape.picked, 16))


def tournament(shape: Shape, plan: Plan) -> list[tuple[int, int]]:
    """(size of a chunk, number of chunks) of each selection before the last kernel, which takes LARGEST_CHUNK candidates at most;
    none where a chunk holds the capacity."""
    rounds: list[tuple[int, int]] = []
    size = chunk_for(shape, plan.chunk)
    length, most = shape.capacity, size
    while length > most:
        rounds.append((size, -(-length // size)))
        length = rounds[-1][1] * max(1, shape.picked)
        size = most = LARGEST_CHUNK
    return rounds


def warps_for(scores: int, least: int) -> int:
    """Warps so that a thread keeps 16 scores (some 120 registers on sm_90; 32 take 220, and spill where 16 warps share)."""
    return max(least, min(16, scores // 512))


def groups_for(wanted: int, scores: int) -> int:
    """Groups whose maxima bound the search from below (sparq_kernels._cut); 1 where they would be too small to help."""
    groups = power_of_2(wanted)
    return groups if 1 < groups <= scores // 2 else 1


def variations(plan: Plan, shape: Shape) -> Iterator[tuple[str, list[int]]]:
    """Each field of a plan with the values worth trying, in the order of what they are expected to matter."""
    largest = min(LARGEST_CHUNK, power_of_2(shape.capacity, 16))
    chunks = [size for size in (2048, 4096, 8192, LARGEST_CHUNK) if chunk_for(shape, size) == size <= largest]
    yield "chunk", chunks or [plan.chunk]
    yield "shares", [shares for shares in (plan.shares // 4, plan.shares // 2, plan.shares, plan.shares * 2) if shares]
    yield "score_block", [size for size in (64, 128, 256, 512) if size <= largest]
    yield "score_stages", [2, 3, 4, 5]
    yield "score_warps", [2, 4, 8]
    yield "finish_warps", [2, 4, 8, 16]
    yield "finish_block", [16, 32, 64, 128]
    yield "finish_stages", [1, 2, 3]
    yield "select_warps", [4, 8, 16]


def varied(plan: Plan, field: str, value: int) -> Plan:
    return replace(plan, **{field: value})
