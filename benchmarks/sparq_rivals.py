"""What SparQ attention is measured by at equal bytes: other selections of tokens, from the same cache, on the same decode path.

    local   the latest k tokens, with `sinks` of them the first ones instead (StreamingLLM, arXiv 2309.17453; positions stay)
    h2o     heavy hitters (arXiv 2306.14048): k // 2 latest tokens and those of the others that have had the most attention so
            far, summed over all queries since the prompt's beginning; what is evicted never comes back
    oracle  SparQ with r = d: exact scores, so the k tokens that have the most weight, and exact mass for step 5. It reads every
            key to know them: the bound at equal reads of values, not a method that saves anything like it

Elements a step moves for each key-value head, S valid tokens, head size d (`elements`):

    dense   2 S d + 2 d
    sparq   S r + 2 k d + 4 d
    oracle  S d + k d + 4 d           the keys are there already when the k are known
    local   2 k d + 2 d
    h2o     2 k d + 2 d + 2 k         and a sum of attention for each token kept, read and written

In a group of query heads (GQA) all heads share one choice, as in SparQ; H2O then sums attention over the group. H2O needs what
prompts attended to, so its cache (`make_rival_cache`) adds up the columns of attention while it reads them, whatever the settings
are: caches for other methods can be copied from it (`with_settings`), and one prefill serves all of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from configs.errors import UserError
from mm1.attention.cache import SparqCache, SparqLayer
from mm1.attention.register import decoder_of, dense_attention, sparq_attention, sparse_tokens
from mm1.attention.sparq import SparqSettings

NAME = "sparq_rivals"
METHODS = ("local", "h2o")
QUERIES_AT_ONCE = 256


@dataclass(unsafe_hash=True)
class Rival(SparqSettings):
    """k: tokens attended to, the current one included. r, local and reallocate have no meaning here. sinks: of `local`."""

    method: str = "local"
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise UserError(f"method={self.method}: choose from {', '.join(METHODS)}.")
        if not 0 <= self.sinks < self.k:
            raise UserError(f"sinks={self.sinks}: the first tokens count among the k={self.k}; give 0 to {self.k - 1}.")


def elements(method: str, tokens: float, d: int, *, r: int = 0, k: int = 0) -> float:
    """Elements of one step's reads and writes for a key-value head, by the module's formulas."""
    return {
        "dense": 2 * tokens * d + 2 * d,
        "sparq": tokens * r + 2 * k * d + 4 * d,
        "oracle": tokens * d + k * d + 4 * d,
        "local": 2 * k * d + 2 * d,
        "h2o": 2 * k * d + 2 * d + 2 * k,
    }[method]


def equal_budget(method: str, tokens: float, d: int, *, r: int, k: int) -> int:
    """The largest k of `local` or `h2o` that moves no more than SparQ's r and k do."""
    room = elements("sparq", tokens, d, r=r, k=k) - 2 * d
    return int(room // (2 * d if method == "local" else 2 * d + 2))


class RivalLayer(SparqLayer):
    """A SparqLayer that also has, for each of its tokens, `mass` float32 (B, Hkv, length): attention received so far, and `kept`
    bool (B, Hkv, length): not yet evicted."""

    mass: Tensor | None = None
    kept: Tensor | None = None

    def records(self) -> tuple[Tensor, Tensor]:
        """mass and kept, grown to `length`: new tokens have had no attention and are kept."""
        shape = (*self.keys.shape[:2], self.length)
        if self.mass is None or self.kept is None:
            exact = torch.float64 if self.dtype == torch.float64 else torch.float32
            self.mass = torch.zeros(shape, dtype=exact, device=self.keys.device)
            self.kept = torch.ones(shape, dtype=torch.bool, device=self.keys.device)
        more = self.length - self.mass.shape[2]
        if more:
            self.mass = torch.nn.functional.pad(self.mass, (0, more))
            self.kept = torch.nn.functional.pad(self.kept, (0, more), value=True)
        return self.mass, self.kept

    def _rows(self, choose: Any) -> None:
        super()._rows(choose)
        if self.mass is not None and self.kept is not None:
            self.mass, self.kept = choose(self.mass), choose(self.kept)

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("Tokens cannot be taken off this cache: what they had attended to is summed up.")


def make_rival_cache(model: Any, settings: SparqSettings | None) -> SparqCache:
    """An empty cache, and the model's attention set to go with it. Raises UserError for sliding windows, which have no rivals."""
    decoder = decoder_of(model)
    config = decoder.config.get_text_config(decoder=True)
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise UserError(f"{config.model_type}: only decoders whose layers all attend to everything can be compared.")
    decoder.set_attn_implementation(NAME)
    return SparqCache(layers=[RivalLayer(settings or SparqSettings()) for _ in range(config.num_hidden_layers)])


def with_settings(cache: SparqCache, settings: SparqSettings | None) -> SparqCache:
    """A copy that goes on under other settings (None: densely), of a cache whose tokens were read densely so far."""
    copied = copy.deepcopy(cache)
    for layer in copied.layers:
        assert isinstance(layer, SparqLayer)
        layer.settings = settings
    return copied


def rival_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, Hq, n, d) -> (B, n, Hq, d). Dense and SparQ steps are register.py's own."""
    layer = getattr(key, "sparq_layer", None)
    if not isinstance(layer, RivalLayer):
        return sparq_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = visible_to(query.shape[2], layer.length, len(query), attention_mask, query.device)
    sparse = sparse_tokens(layer, len(query), query.shape[2])
    if not isinstance(layer.settings, Rival):
        if max(sparse) == 0 and query.shape[2] > 1:
            add_mass(layer, query, visible, scale)
        return sparq_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    try:
        layer.settle(None if attention_mask is None else attention_mask[:, 0, -1])
        return _attend(module, layer, query, key, value, attention_mask, visible, sparse, scale), None
    finally:
        layer.attended()


def visible_to(n: int, length: int, batch: int, mask: Tensor | None, device: Any) -> Tensor:
    """bool (B, n, length): what each of the last n positions sees."""
    if mask is not None:
        return mask[:, 0].expand(batch, -1, -1)
    slots = torch.arange(length, device=device)
    return (slots <= slots[length - n :, None]).expand(batch, -1, -1)


def _attend(
    module: Any,
    layer: RivalLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    visible: Tensor,
    sparse: list[int],
    scale: float,
) -> Tensor:
    n = query.shape[2]
    settings = layer.settings
    assert isinstance(settings, Rival)
    first = n - torch.tensor(sparse, device=query.device)  # each row's first sparse position
    dense = torch.arange(n, device=query.device) < first[:, None]
    output = torch.zeros_like(query).transpose(1, 2)
    if bool(dense.any()):
        output = dense_attention(module, layer, query, key, value, mask, scale).clone()
        add_mass(layer, query, visible & dense[..., None], scale)
    for i in range(int(first.min()), n):
        seen = visible[:, i]
        step = step_h2o if settings.method == "h2o" else step_local
        y = step(layer, query[:, :, i], seen, i >= first, settings, scale)
        output[:, i] = torch.where((i >= first)[:, None, None], y, output[:, i])
    return output


def step_local(layer: RivalLayer, q: Tensor, seen: Tensor, active: Tensor, settings: Rival, scale: float) -> Tensor:
    """q (B, Hq, d), seen bool (B, length) -> (B, Hq, d)."""
    chosen = latest(seen, settings.k - settings.sinks) | (seen & (seen.cumsum(-1) <= settings.sinks))
    chosen = torch.where(short(seen, settings), seen, chosen)
    return _output(layer, probabilities(layer, q, chosen[:, None], scale))


def step_h2o(layer: RivalLayer, q: Tensor, seen: Tensor, active: Tensor, settings: Rival, scale: float) -> Tensor:
    """As `step_local`. In the rows `active` (B,), tokens beyond the budget are evicted and the step's attention is added up."""
    mass, kept = layer.records()
    candidates = kept & seen[:, None]
    recent = latest(seen, max(1, settings.k // 2))[:, None].expand_as(candidates)
    heavy = settings.k - max(1, settings.k // 2)
    order = mass.masked_fill(~candidates | recent, -1.0)
    rank = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    chosen = candidates & (recent | (rank < heavy))
    chosen = torch.where(short(seen, settings)[:, None], candidates, chosen)
    weights = probabilities(layer, q, chosen, scale)
    now = active[:, None, None]
    layer.kept = torch.where(now, chosen | ~seen[:, None], kept)
    layer.mass = mass + weights.sum(2) * now
    return _output(layer, weights)


def latest(seen: Tensor, count: int) -> Tensor:
    """The last `count` of what is seen, bool (B, length)."""
    after = seen.sum(-1, keepdim=True) - seen.cumsum(-1)
    return seen & (after < count)


def short(seen: Tensor, settings: SparqSettings) -> Tensor:
    """bool (B, 1): rows that attend to all they see."""
    return seen.sum(-1, keepdim=True) <= settings.dense_up_to


def probabilities(layer: SparqLayer, q: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Softmax over the tokens `chosen` (B, Hkv or 1, length): (B, Hkv, g, length). A row that chooses nothing has zeros."""
    keys = layer.keys[:, :, : layer.length]
    x = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = x.to(exact) @ keys.to(exact).transpose(-1, -2) * scale
    return scores.masked_fill(~chosen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)


def _output(layer: SparqLayer, weights: Tensor) -> Tensor:
    y = weights @ layer.values[:, :, : layer.length].to(weights.dtype)
    return y.reshape(len(y), -1, y.shape[-1]).to(layer.dtype)


def add_mass(layer: RivalLayer, query: Tensor, visible: Tensor, scale: float) -> None:
    """Add to the layer's `mass` what the positions of `query` (B, Hq, n, d) attend to among what is `visible` (B, n, length)."""
    mass, _ = layer.records()
    batch, _, n, d = query.shape
    keys = layer.keys[:, :, : layer.length]
    x = query.reshape(batch, keys.shape[1], -1, n, d).to(mass.dtype)
    for at in range(0, n, QUERIES_AT_ONCE):
        part = slice(at, at + QUERIES_AT_ONCE)
        end = layer.length if at + QUERIES_AT_ONCE >= n else layer.length - n + at + QUERIES_AT_ONCE  # later ones are not visible
        scores = x[:, :, :, part] @ keys[:, :, None, :end].to(mass.dtype).transpose(-1, -2) * scale
        hidden = ~visible[:, None, None, part, :end]
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)
        mass[:, :, :end] += weights.sum((2, 3))


AttentionInterface.register(NAME, rival_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
