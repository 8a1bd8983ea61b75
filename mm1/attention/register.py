"""SparQ attention in any transformers decoder.

    model = AutoModelForCausalLM.from_pretrained(...)
    cache = use_sparq(model, SparqSettings(r=32, k=128))
    model.generate(**inputs, past_key_values=cache)              # a cache serves one batch; ask for the next one

Two registrations under the name "sparq": the attention, and the *mask*. Without the second, transformers hands the attention no
mask at all, and padded rows are silently wrong.

An attention function is not given the cache. `SparqLayer.update` therefore returns keys that carry their layer, and the
attention finds it there: whichever cache a call brings is the one used, and several may be in use at a time.

What attends how (n new tokens on top of a cache):
  the first tokens, and more than 16 at once        densely: a prompt's prefill
  1 token                                           sparsely
  2 to 16 tokens, and any number on a branch        sparsely, each seeing what came before it; `suffix=dense`: densely
  a prompt whose ending is a question               the question sparsely, if `SparqCache.questions` said how long it is
Rows that `SparqSettings` calls short attend densely, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from configs.errors import UserError
from mm1.attention.cache import SparqCache, SparqLayer
from mm1.attention.segments import Prefix, dense_shared
from mm1.attention.sparq import SparqSettings, dense_decode, sparq_decode, sparq_shared

NAME = "sparq"
MOST_ROWS = 16
"""So many new tokens at once are still decoding (a short suffix, speculation); more are a prompt."""
_UNKNOWN = ("softcap", "position_bias", "s_aux", "sinks")


def use_sparq(model: Any, settings: SparqSettings | None = None, *, capacity: int = 0) -> SparqCache:
    """Switch a transformers model (or a model of this suite) to SparQ attention; returns the cache to pass as past_key_values.

    settings: default SparqSettings(). capacity: tokens to allocate at once. `model.set_attn_implementation("sdpa")` switches
    back. Raises UserError if the model has no layer that attends to everything.
    """
    decoder_of(model).set_attn_implementation(NAME)
    return make_cache(model, settings or SparqSettings(), capacity=capacity)


def attention_name(settings: SparqSettings | None) -> str:
    """What the decoder's `_attn_implementation` must be for a cache of `make_cache` with these settings."""
    return NAME


def make_cache(model: Any, settings: SparqSettings | None, batch: int | None = None, *, capacity: int = 0) -> SparqCache:
    """An empty cache for one batch.

    settings None: dense attention from the same kind of cache, with its shared prefixes. batch: its rows, checked where given.
    capacity: tokens to allocate at once. Raises UserError if the model has no layer that attends to everything.
    """
    config = decoder_of(model).config.get_text_config(decoder=True)
    types, arguments = get_layer_types_and_kwargs(config)
    if "full_attention" not in types:
        raise UserError(f"{config.model_type}: no layer attends to all tokens ({', '.join(sorted(set(types)))}); SparQ has none.")
    layers = [
        SparqLayer(settings, rows=batch, capacity=capacity)
        if kind == "full_attention"
        else DYNAMIC_LAYER_TYPE_MAPPING[kind](**more)
        for kind, more in zip(types, arguments, strict=True)
    ]
    return SparqCache(layers=layers)


def decoder_of(model: Any) -> Any:
    """The language model within a multimodal one (whose image encoder keeps its own attention), or the model itself."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    return inner if hasattr(inner, "set_attn_implementation") else model


@dataclass
class Extents:
    """Which of a row's own slots each of n query positions sees: start <= s < stop, int64 (B, n), `lengths` on the host too."""

    start: Tensor
    stop: Tensor
    host: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, n: int, length: int, prefix: Prefix | None, device: Any) -> Extents:
        """mask bool (B, 1, n, prefix + length). Raises UserError if it hides some of the prefix, or if a row's own visible tokens
        have gaps."""
        if mask is None:
            stops = list(range(length - n + 1, length + 1))
            stop = torch.arange(stops[0], length + 1, device=device).expand(batch, n)
            return cls(torch.zeros_like(stop), stop, [[(0, end) for end in stops] for _ in range(batch)])
        if prefix is not None:
            shown = mask[:, 0, :, : prefix.length]
            if bool(shown[..., : prefix.padding].any()) or not bool(shown[..., prefix.padding :].all()):
                raise UserError(f"attention={NAME}: the attention mask hides tokens of the prefix that all rows share.")
            mask = mask[..., prefix.length :]
        own = mask[:, 0].expand(batch, -1, -1)
        some = own.any(-1)
        start = own.to(torch.uint8).argmax(-1) * some
        stop = (length - own.flip(-1).to(torch.uint8).argmax(-1)) * some
        first, end, count = torch.stack([start, stop, own.sum(-1)]).tolist()
        for row, (a, b, c) in enumerate(zip(first, end, count, strict=True)):
            if any(y - x != z for x, y, z in zip(a, b, c, strict=True)):
                raise UserError(
                    f"attention={NAME}: row {row} of the attention mask has gaps between its tokens. Pad on the left, or on the "
                    "right of what comes last."
                )
        return cls(start, stop, [list(zip(a, b, strict=True)) for a, b in zip(first, end, strict=True)])


def sparq_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, Hq, n, d) -> (B, n, Hq, d).

    Without a cache, and in layers with a sliding window, it is transformers' SDPA. Raises UserError for a cache of another kind,
    for masks that are not boolean, and for what SparQ does not have (soft-capped scores, biases, sinks).
    """
    layer = getattr(key, "sparq_layer", None)
    for name in _UNKNOWN if layer is None else (*_UNKNOWN, "sliding_window"):
        if kwargs.get(name) is not None:
            raise UserError(f"{type(module).__name__} attends with {name}={kwargs[name]}, which attention={NAME} does not have.")
    if layer is None:
        if key.shape[2] > query.shape[2] and kwargs.get("sliding_window") is None:
            raise UserError(f"attention={NAME} decodes from a SparqCache: past_key_values=use_sparq(model, settings).")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1):
        raise UserError(f"attention={NAME} takes a boolean mask, the same for all heads, not {attention_mask.dtype}.")
    try:
        return _attend(module, layer, query, key, value, attention_mask, scaling), None
    finally:
        layer.attended()


def _attend(
    module: Any, layer: SparqLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    batch, _, n, d = query.shape
    scale = d**-0.5 if scaling is None else scaling
    prefix, settings = layer.prefix, layer.settings
    shared = 0 if prefix is None else prefix.length

    def extents_of(last: int) -> Extents:
        looked = None if mask is None else mask[:, :, n - last :]
        found: Extents = layer.latest.get(
            (mask, batch, n, last, layer.length, prefix, query.device),
            lambda: Extents.of(looked, batch, last, layer.length, prefix, query.device),
        )
        return found

    if n == 1:
        output = layer.attend_step(query, lambda: extents_of(1), mask, scale)
        if output is not None:
            return output
    layer.settle(None if mask is None else mask[:, 0, -1, shared:])
    sparse = sparse_tokens(layer, batch, n)
    last = max(sparse)
    if last == 0 and prefix is None and n > 1:
        return dense_attention(module, layer, query, key, value, mask, scale)

    extents = extents_of(max(last, 1))
    before = 0 if prefix is None else prefix.count
    lengths = [[end - first + before for first, end in row] for row in extents.host]
    if settings is None or last == 0 or max(map(max, lengths)) <= settings.dense_up_to:
        if n > 1 or prefix is not None:
            return dense_attention(module, layer, query, key, value, mask, scale)
        start, stop = extents.start[:, 0], extents.stop[:, 0]
        known = [row[0] for row in extents.host]
        output = dense_decode(query[:, :, 0], layer.keys, layer.values, start, stop, scale=scale, extents=known)
        return output[:, None]

    means = layer.means(last)
    outputs = []
    for i in range(last):
        start, stop = extents.start[:, i].contiguous(), extents.stop[:, i].contiguous()
        q, mean = query[:, :, n - last + i], means[:, :, i].contiguous()
        if prefix is None:
            outputs.append(sparq_decode(q, layer.keys, layer.keys_t, layer.values, start, stop, mean, settings, scale=scale))
        else:
            own = layer.segment(start, stop)
            outputs.append(sparq_shared(q, prefix.segment(batch), own, mean, settings, scale=scale))
    output = torch.stack(outputs, 1)
    chosen = [
        [last - i <= count and length > settings.dense_up_to for i, length in enumerate(row)]
        for count, row in zip(sparse, lengths, strict=True)
    ]
    if n == 1 or (n == last and all(map(all, chosen))):
        return output
    # beside them what is dense, as it would be without them
    result = dense_attention(module, layer, query, key, value, mask, scale).clone()
    result[:, n - last :] = torch.where(torch.tensor(chosen, device=query.device)[..., None, None], output, result[:, n - last :])
    return result


def sparse_tokens(layer: SparqLayer, batch: int, n: int) -> list[int]:
    """For each row, how many of the last of n new tokens attend sparsely; see the module's docstring."""
    settings, past = layer.settings, layer.get_seq_length() - n
    if settings is None:
        return [0] * batch
    if n > 1 and settings.suffix == "sparse" and layer.questions is not None:
        if len(layer.questions) != batch:
            raise UserError(f"questions: {len(layer.questions)} lengths for a batch of {batch}.")
        return [min(count, n) for count in layer.questions]
    is_suffix = settings.suffix == "sparse" and past > 0 and (n <= MOST_ROWS or layer.prefix is not None)
    return [n if n == 1 or is_suffix else 0] * batch


def dense_attention(
    module: Any, layer: SparqLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """All of what the mask shows: transformers' own SDPA, or over a shared prefix and the rows' own tokens."""
    if layer.prefix is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]
    batch, _, n, _ = query.shape
    length = layer.length
    if mask is not None:
        visible = mask[:, 0, :, layer.prefix.length :].expand(batch, -1, -1)
    else:
        slots = torch.arange(length, device=query.device)
        visible = (slots <= slots[length - n :, None]).expand(batch, -1, -1)
    empty = torch.zeros(batch, dtype=torch.int64, device=query.device)
    output = dense_shared(query, layer.prefix.segment(batch), layer.segment(empty, empty), visible, scale)
    return output.transpose(1, 2)


AttentionInterface.register(NAME, sparq_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
