"""Attention among packed documents without an S x S mask: each document attends within itself, short ones together.

    document_ids (B, S) -> segments (1, 1, D, 3) int64: row, start, length   stands where the decoder expects its mask
                        -> buckets of documents of nearly equal length -> (n, heads, longest, width) -> causal SDPA -> back

A sequence of 512 tokens that packs 30 captions has 30 x 17^2 / 2 pairs of tokens that see each other, and a dense mask computes
512^2: sixty times as many. Documents of a bucket are filled up at their ends; causality keeps what was filled in from the
tokens before it, so no mask is needed at all, and the result is that of the dense mask.

The implementation is registered with transformers as `packed`, for attention and masks, so that any decoder that lets its
attention be chosen runs it; given an ordinary mask or none (generation) it is transformers' `sdpa`. On GPUs transformers'
`flex_attention` with the block mask made here does the same with static shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from configs.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "packed"
SLIDING = "sliding_attention"
"""What transformers calls a type of layer that has a window."""
FILL = 4 / 3
"""A bucket's longest document is at most this much longer than its shortest: at most FILL^2 of the pairs, in fewer calls."""


def documents_apart(document_ids: torch.Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """What a decoder of this configuration must be given as its mask to keep documents apart, under each implementation.

    Some decoders' layers see only the last `sliding_window` tokens. Where all do, the window is part of the mask; where some do,
    it is a dictionary of masks by type of layer, as transformers' models take it. Packed attention hears of it from the layers.
    """
    if config._attn_implementation == NAME:
        return document_segments(document_ids)
    window, types = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if window is None or window >= document_ids.shape[1] or (types and SLIDING not in types):
        return _mask(document_ids, config._attn_implementation, dtype, None)
    if not types:
        return _mask(document_ids, config._attn_implementation, dtype, window)
    return {kind: _mask(document_ids, config._attn_implementation, dtype, window if kind == SLIDING else None) for kind in types}


def _mask(document_ids: torch.Tensor, implementation: str, dtype: torch.dtype, window: int | None) -> Any:
    if implementation == "flex_attention":
        return document_block_mask(document_ids, window)
    mask = document_mask(document_ids, window)
    if implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)  # the others add it to the scores


def document_mask(document_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """(B, S) document ids -> boolean (B, 1, S, S): query i sees key j iff j <= i, both are of one document, and i - j < window.

    Padding (id 0) sees padding, so that no row is empty; nothing reads what it computes.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & causal_mask(document_ids.shape[1], window, document_ids.device))[:, None]


def causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean (length, length): query i sees key j iff j <= i and, with a window, i - j < window."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def document_block_mask(document_ids: torch.Tensor, window: int | None = None) -> Any:
    """The same as flex_attention's block mask: blocks of 128 x 128 in which no pair sees each other are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = document_ids.shape
    reach = length if window is None else window

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (q - k < reach) & (document_ids[b, q] == document_ids[b, k])

    return create_block_mask(sees, rows, None, length, length, device=document_ids.device.type)


def document_segments(document_ids: torch.Tensor) -> torch.Tensor:
    """(B, S) document ids -> int64 (1, 1, D, 3) on the CPU: row, start and length of each run of one id; padding (id 0) has none.

    Four dimensions, because a mask of four is what transformers hands to the attention as it is.
    """
    ids = document_ids.cpu()
    before = F.pad(ids, (1, 0), value=-1)[:, :-1]
    rows, starts = (ids != before).nonzero(as_tuple=True)
    flat = rows * ids.shape[1] + starts
    lengths = torch.diff(flat, append=torch.tensor([ids.numel()]))
    real = ids[rows, starts] > 0
    return torch.stack([rows, starts, lengths], dim=-1)[real][None, None]


@dataclass
class Plan:
    """How the tokens of all documents are put side by side, in buckets from the longest documents to the shortest.

    T = tokens in documents, P = places: T and what documents are filled up with
    """

    rows: torch.Tensor
    """int64 (P,): the batch row of the token that stands at each place."""
    columns: torch.Tensor
    """int64 (P,): its column; past a document's end its last token again."""
    real: torch.Tensor
    """int64 (T,): the places that are not filling."""
    buckets: list[tuple[int, int]]
    """(documents, their common length), one after the other: their products add up to P."""


def plan(segments: torch.Tensor, device: torch.device) -> Plan:
    """Kept with `segments`: every layer of a decoder asks for the same."""
    kept = getattr(segments, "plan", None)
    if kept is not None:
        return kept
    documents = segments[0, 0][segments[0, 0, :, 2].argsort(descending=True, stable=True)]
    lengths = documents[:, 2].tolist()
    rows, columns, real, sizes, first = [], [], [], [], 0
    for i in range(1, len(lengths) + 1):
        if i < len(lengths) and lengths[i] * FILL >= lengths[first]:
            continue
        row, start, length = documents[first:i].T[..., None]
        steps = torch.arange(lengths[first])
        columns.append((start + torch.minimum(steps, length - 1)).flatten())
        rows.append(row.expand(-1, lengths[first]).flatten())
        real.append((steps < length).flatten())
        sizes.append((i - first, lengths[first]))
        first = i
    places = torch.cat(real).nonzero()[:, 0]
    made = Plan(torch.cat(rows).to(device), torch.cat(columns).to(device), places.to(device), sizes)
    segments.plan = made  # type: ignore[attr-defined]
    return made


class _Take(torch.autograd.Function):
    """(B, heads, S, width) -> (P, heads, width). Each token's gradient comes from its one real place: nothing is added up."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan, ctx.shape = plan, states.shape
        return states.transpose(1, 2)[plan.rows, plan.columns]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _put(gradient, ctx.plan, ctx.shape[0], ctx.shape[2]).transpose(1, 2), None


class _Put(torch.autograd.Function):
    """(P, heads, width) -> (B, S, heads, width): the real places back to where they came from, zeros on padding."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, plan: Plan, batch: int, length: int) -> torch.Tensor:
        ctx.plan, ctx.places = plan, len(places)
        return _put(places, plan, batch, length)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        plan = ctx.plan
        out = gradient.new_zeros(ctx.places, *gradient.shape[2:])
        out[plan.real] = gradient[plan.rows[plan.real], plan.columns[plan.real]]
        return out, None, None, None


def _put(places: torch.Tensor, plan: Plan, batch: int, length: int) -> torch.Tensor:
    out = places.new_zeros(batch, length, *places.shape[1:])
    out[plan.rows[plan.real], plan.columns[plan.real]] = places[plan.real]
    return out


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: (B, heads, S, width) each -> (B, S, heads, width). Without segments as the mask it is `sdpa`.

    A layer with a sliding window names it by keyword, `sliding_window`.
    """
    if not is_segments(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    assert attention_mask is not None
    if any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        raise UserError(
            f"engine.attention=packed: {type(module).__name__} caps or biases its scores, which packed attention does not. "
            "Set engine.attention=dense."
        )
    if (
        not attention_mask.numel()
    ):  # Nothing but padding: zeros that still reach all three, for other ranks wait for their gradients.
        return query.transpose(1, 2) * 0 + (key.sum() + value.sum()) * 0, None
    layout = plan(attention_mask, query.device)
    taken = [_Take.apply(states, layout) for states in (query, key, value)]
    parts = [
        [t.unflatten(0, size) for t, size in zip(states.split([n * m for n, m in layout.buckets]), layout.buckets, strict=True)]
        for states in taken
    ]
    groups = query.shape[1] // key.shape[1]
    window, outputs = kwargs.get("sliding_window"), []
    for q, k, v in zip(*parts, strict=True):
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        if groups > 1:
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        banded = None if window is None or window >= q.shape[2] else causal_mask(q.shape[2], window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, banded, dropout, is_causal=banded is None, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _Put.apply(torch.cat(outputs), layout, query.shape[0], query.shape[2]), None


def is_segments(mask: Any) -> bool:
    """Whether a mask is what `document_segments` makes: no mask of pairs is of integers."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype == torch.int64


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
