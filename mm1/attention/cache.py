"""The cache SparQ attention decodes from: a transformers `Cache` whose layers keep keys in both layouts and the mean of V.

    SparqLayer, one a decoder layer
      prefix   (1, Hkv, P, d)          shared by all rows, stored once, never written (`SparqCache.branch`)
      keys     (B, Hkv, C, d)          each row's own tokens; room for C, doubled when full; `length` slots are in use
      keys_t   (B, Hkv, d, C)          the same keys, component by component: half as much memory again; from the length on at
                                       which rows may attend sparsely
      values   (B, Hkv, C, d)
      total, count                     running sum (float64) and number of the valid values, so that the mean stays right through
                                       every operation

transformers gives the attention mask to the attention function, not to the cache, so a new token's validity is settled there
(register.py): `SparqLayer.settle` adds valid values to the sum and clears padding, whose keys and values may be anything.
Sums in float64 make taking tokens off again (`crop`) as good as never having added them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from configs.errors import UserError
from mm1.attention.segments import Prefix, Segment
from mm1.attention.sparq import SparqSettings
from mm1.attention.sparq_step import Step

STEP = 64
"""Slots are allocated in multiples of this."""
_TENSORS = ("keys", "keys_t", "values", "valid", "total", "count")


class Latest:
    """The last thing worked out and what from: every layer of a forward pass asks for the same about the same mask."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        same = len(key) == len(self._key) and all(
            old is new or not (isinstance(old, Tensor) or old != new) for old, new in zip(self._key, key, strict=True)
        )
        if not same:
            self._key, self._value = key, make()
        return self._value

    def __deepcopy__(self, memo: Any) -> Latest:
        return Latest()


class SparqLayer(CacheLayerMixin):
    """settings None: dense attention from the same cache (keys once)."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    keys: Any
    values: Any
    keys_t: Any

    def __init__(
        self, settings: SparqSettings | None, *, rows: int | None = None, capacity: int = 0, prefix: Prefix | None = None
    ) -> None:
        super().__init__()
        self.settings, self.prefix, self._planned, self._room = settings, prefix, rows, capacity
        self.latest = Latest()
        self.questions: list[int] | None = None
        self.step: Step | None = None
        self.keys_t = None
        self.length = 0
        self.settled = 0
        """Slots whose values are in `total` where they are valid."""
        self._lent = 0
        self._busy = self._offload_after = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = value_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            self.keys = key_states.new_empty(batch, heads, 0, key_states.shape[3])
            self.values = value_states.new_empty(batch, heads, 0, width)
            self.valid = torch.empty(batch, 0, dtype=torch.bool, device=self.device)
            self.total = torch.zeros(batch, heads, width, dtype=torch.float64, device=self.device)
            self.count = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    @property
    def capacity(self) -> int:
        """Slots allocated."""
        return self.keys.shape[2] if self.keys is not None else 0

    def _resize(self, capacity: int) -> None:
        """New buffers of `capacity` slots with what is in use copied and 0 in the rest: dense attention multiplies what its mask
        hides by 0, and what nobody wrote may be NaN."""
        used = slice(0, self.length)
        with torch.inference_mode(False), torch.no_grad():
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                new[:, :, used], new[:, :, self.length :] = old[:, :, used], 0
                setattr(self, name, new)
            if self.keys_t is not None:
                new = self.keys_t.new_empty(*self.keys_t.shape[:3], capacity)
                new[..., used], new[..., self.length :] = self.keys_t[..., used], 0
                self.keys_t = new
            valid = self.valid.new_zeros(len(self.valid), capacity)
            valid[:, used] = self.valid[:, used]
            self.valid = valid
        self._lent = 0

    def _lay_out_components(self) -> None:
        """Make `keys_t`. Until a row can be long enough to attend sparsely nothing reads it, and a token's components, each in a
        line of memory of its own, take longer to write than short rows take to attend."""
        with torch.inference_mode(False), torch.no_grad():
            self.keys_t = self.keys.new_empty(*self.keys.shape[:2], self.keys.shape[3], self.capacity)
            self.keys_t.copy_(self.keys.transpose(-1, -2))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, n, d); returns views of the row's own keys and values, `keys.sparq_layer` being this layer.

        Raises UserError under autograd: what is written in place cannot be differentiated.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UserError("A SparqCache is for inference: call the model under torch.no_grad() or torch.inference_mode().")
        if not self.is_initialized:
            if self._planned not in (None, len(key_states)):
                raise UserError(f"A cache made for {self._planned} rows got a batch of {len(key_states)}.")
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.keys):
            raise UserError(f"A cache of {len(self.keys)} rows got a batch of {len(key_states)}. Make a cache for each batch.")
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            room = max(self._room, 2 * self.capacity, end if self.capacity else end + 2 * STEP)
            self._resize(-(-room // STEP) * STEP)
        if self.settings is not None and self.keys_t is None and (self.prefix is not None or end > self.settings.dense_up_to):
            self._lay_out_components()
        step = Step.of(self, key_states, value_states) if end == self.length + 1 else None
        if step is not None:
            step.append(key_states, value_states, self.length)
        else:
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
            if self.keys_t is not None:
                self.keys_t[..., self.length : end] = key_states.transpose(-1, -2)
        self.length, self._busy = end, True
        keys: Any = self.keys.narrow(2, 0, end)
        keys.sparq_layer = self
        return keys, self.values.narrow(2, 0, end)

    def settle(self, valid: Tensor | None) -> None:
        """Take the new slots into the mean. valid bool (B, length): None says all of the new are."""
        fresh = slice(self.settled, self.length)
        if valid is None:
            self.valid[:, fresh] = True
            self.count += self.length - self.settled
        else:
            new = valid[:, fresh]
            self.valid[:, fresh] = new
            self.count += new.sum(1)
            padding = ~new[:, None, :, None]
            self.keys[:, :, fresh].masked_fill_(padding, 0)
            self.values[:, :, fresh].masked_fill_(padding, 0)
            if self.keys_t is not None:
                self.keys_t[..., fresh].masked_fill_(~new[:, None, None], 0)
        self.total += self.values[:, :, fresh].sum(2, dtype=torch.float64)
        self.settled = self.length

    def attend_step(self, query: Tensor, extents: Any, mask: Tensor | None, scale: float) -> Tensor | None:
        """`settle` and the attention of one new token, query (B, Hq, 1, d) -> (B, 1, Hq, d), in one call where there is a Step;
        None where there is none, or a prefix. extents: a function that makes register.py's Extents of the mask."""
        step = self.step
        if step is None or self.prefix is not None or self.settled != self.length - 1 or not step.fits(self):
            return None
        if query.dtype != self.dtype or query.stride(3) != 1 or (query.requires_grad and torch.is_grad_enabled()):
            return None
        seen = None
        if mask is not None:
            rows = extents()
            seen = rows.start.select(1, 0), rows.stop.select(1, 0), mask[:, 0, 0, self.length - 1].expand(len(query))
        output = step.attend(query, self.length, seen, scale)
        self.settled = self.length
        return output

    def attended(self) -> None:
        """The attention over what `update` appended is done; an `offload` asked for in between happens now."""
        self._busy, self.questions = False, None
        if self._offload_after:
            self._offload_after = False
            self.offload()

    def means(self, positions: int) -> Tensor:
        """Mean of the valid values that each of the last `positions` tokens sees, itself included: (B, Hkv, positions, d) in
        float32 (float64 values: float64)."""
        last = slice(self.length - positions, self.length)
        total, count = self.total[:, :, None], self.count[:, None]
        if positions > 1:  # what comes after a position is taken off again
            values = self.values[:, :, last].double() * self.valid[:, None, last, None]
            total = total - (values.flip(2).cumsum(2).flip(2) - values)
            seen = self.valid[:, last].long()
            count = count - (seen.flip(1).cumsum(1).flip(1) - seen)
        if self.prefix is not None:
            total, count = total + self.prefix.total[:, :, None], count + self.prefix.count
        mean = total / count.clamp(min=1)[:, None, :, None]
        return mean if self.dtype == torch.float64 else mean.float()

    def segment(self, start: Tensor, stop: Tensor) -> Segment:
        """A row's own tokens, of which start[b] <= s < stop[b] are looked at."""
        return Segment(self.keys, self.keys_t, self.values, start, stop)

    def lend(self) -> Prefix:
        """What is in the cache, to be shared by the rows of a branch. Writes to it are kept off from then on."""
        if self.prefix is not None or not self.is_initialized or len(self.keys) != 1:
            rows = "a branch" if self.prefix is not None else f"{len(self.keys) if self.is_initialized else 'no'} rows"
            raise UserError(f"branch: the shared prefix must be one row, filled by one forward pass; this cache is of {rows}.")
        assert self.settled == self.length, "lent before its attention was computed"
        used = slice(0, self.length)
        self._lent = self.length
        if self.settings is not None and self.keys_t is None:
            self._lay_out_components()
        keys_t = None if self.keys_t is None else self.keys_t[..., used]
        count = int(self.count)
        if not bool(self.valid[0, self.length - count : self.length].all()):
            raise UserError("branch: the shared prefix has padding inside; only padding on its left can be shared.")
        return Prefix(self.keys[:, :, used], keys_t, self.values[:, :, used], self.length - count, self.total.clone(), count)

    def get_seq_length(self) -> int:
        return self.length + (self.prefix.length if self.prefix is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens off (a negative number, as everywhere in transformers)."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(f"crop({tokens_to_remove}): give a number from {-self.length} to 0.")
        if tokens_to_remove == 0:
            return
        length = self.length + tokens_to_remove
        off = slice(length, self.settled)
        self.total -= (self.values[:, :, off].double() * self.valid[:, None, off, None]).sum(2)
        self.count -= self.valid[:, off].sum(1)
        self.length, self.settled = length, min(self.settled, length)
        if length < self._lent:
            self._resize(self.capacity)  # what a branch reads must not be written over

    def reset(self) -> None:
        """Empty, without a prefix."""
        self.keys = self.keys_t = self.values = self.prefix = self.step = None
        self.length = self.settled = self._lent = 0
        self.is_initialized = self._busy = self._offload_after = False

    def _rows(self, choose: Any) -> None:
        if self.is_initialized:
            for name in _TENSORS:
                tensor = getattr(self, name)
                if tensor is not None:
                    with torch.inference_mode(False), torch.no_grad():
                        setattr(self, name, choose(tensor))
            self._lent = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _move(self, device: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name in _TENSORS:
                tensor = getattr(self, name)
                if tensor is not None:
                    setattr(self, name, tensor.to(device, non_blocking=True))
        if self.prefix is not None:
            self.prefix = self.prefix.to(device)

    def offload(self) -> None:
        if self._busy:  # transformers offloads between `update` and the attention, which still needs this layer
            self._offload_after = True
        elif self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized and self.keys.device != self.device:
            self._move(self.device)


class SparqCache(Cache):
    """`layers`: SparqLayer where the decoder attends to everything, transformers' own layers elsewhere (sliding windows)."""

    def __init__(self, layers: list[Any], **kwargs: Any) -> None:
        super().__init__(layers=layers, **kwargs)
        latest = Latest()
        for layer in layers:
            if isinstance(layer, SparqLayer):
                layer.latest = latest

    def branch(self, rows: int) -> SparqCache:
        """A cache of `rows` rows that continue what is in this one (a single row), which is stored once and copied for none.

        This cache may go on, be cropped or dropped; its branches keep what they saw. Raises UserError if it has several rows, is
        empty, or has layers of another kind.
        """
        if rows < 1:
            raise UserError(f"branch({rows}): give a number of rows from 1 up.")
        layers: list[Any] = []
        for layer in self.layers:
            if not isinstance(layer, SparqLayer):
                raise UserError(f"branch: a {type(layer).__name__} (sliding window) cannot be shared between rows.")
            layers.append(SparqLayer(layer.settings, rows=rows, prefix=layer.lend()))
        return SparqCache(layers=layers)

    def questions(self, lengths: Sequence[int]) -> None:
        """Of the next forward pass's tokens the last lengths[b] of row b are a question, to attend sparsely (unless the settings
        say `suffix=dense`); those before them, demonstrations, attend densely. So a row's result does not hang on the others'."""
        for layer in self.layers:
            if isinstance(layer, SparqLayer):
                layer.questions = list(lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, a shared prefix included."""
        tensors: list[Tensor | None] = []
        layers: list[Any] = list(self.layers)
        for layer in layers:
            tensors += [layer.keys, layer.values, getattr(layer, "keys_t", None)]
            prefix = getattr(layer, "prefix", None)
            if prefix is not None:
                tensors += [prefix.keys, prefix.values, prefix.keys_t]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
