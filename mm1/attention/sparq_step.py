"""A decoding step of one SparqLayer on the CPU for one new token a row, in two calls of sparq_cpu.cpp.

    append   the token's key and value go into the cache                                  (SparqLayer.update)
    attend   it is settled, into the mean of V or cleared where it is padding; then attention, sparse or dense by the row's length

The same step in tensor operations takes 30 microseconds of dispatch, as long as dense attention over a hundred tokens; this one a
third of it. A layer makes a Step for its buffers when a token first comes, and another when the buffers are no longer these.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm1.attention import sparq, sparq_cpu

if TYPE_CHECKING:
    from mm1.attention.cache import SparqLayer

_POINTERS = "keys keys_t values new_keys new_values total count valid fresh"
_NUMBERS = """rows kv_heads d capacity slot new_keys_row new_keys_head new_values_row new_values_head fresh_row"""


class _Step(ctypes.Structure):
    """sparq_cpu.cpp's Step."""

    _fields_ = sparq_cpu.fields(_POINTERS, _NUMBERS)


class Step:
    """Bound to a layer's buffers: it holds their addresses, so it must be dropped when `fits` says no."""

    @staticmethod
    def of(layer: SparqLayer, key: Tensor, value: Tensor) -> Step | None:
        """The layer's Step for a token's key and value (B, Hkv, 1, d); None where tensor operations have to do it."""
        old = layer.step
        if old is None or not old.fits(layer):
            old = layer.step = Step(layer) if Step.possible(layer) else None
        dtype = layer.dtype
        same = key.dtype == dtype and value.dtype == dtype and key.shape == value.shape
        return old if same and key.stride(3) == 1 and value.stride(3) == 1 and key.is_cpu else None

    @staticmethod
    def possible(layer: SparqLayer) -> bool:
        """For float32 and bfloat16 on a CPU where the kernel works, and values as wide as keys."""
        buffers = [tensor for tensor in _buffers(layer) if tensor is not None]
        return (
            sparq.backend_for(layer.keys) is not None
            and layer.keys.shape == layer.values.shape
            and all(tensor.is_contiguous() for tensor in buffers)
        )

    def __init__(self, layer: SparqLayer) -> None:
        keys, keys_t, values, valid, total, count = self._tensors = _buffers(layer)
        batch, heads, capacity, d = keys.shape
        kernel, dtype, settings = sparq_cpu.load(), keys.dtype, layer.settings
        self._append, self._attend = kernel.append[dtype], kernel.step[dtype]
        self._settings = settings
        self._mean = torch.empty(batch, heads, d)
        step, job = self._step, self._job = _Step(), sparq_cpu.Job()
        self._at, self._where = ctypes.byref(step), ctypes.byref(job)
        step.keys = job.keys = keys.data_ptr()
        step.keys_t = job.keys_t = 0 if keys_t is None else keys_t.data_ptr()
        step.values = job.values = values.data_ptr()
        step.total, step.count, step.valid = total.data_ptr(), count.data_ptr(), valid.data_ptr()
        step.rows, step.kv_heads, step.d, step.capacity = batch, heads, d, capacity
        job.mean = self._mean.data_ptr()
        job.rows, job.kv_heads, job.d = batch, heads, d
        job.dense_up_to = sparq_cpu.ALL if settings is None else sparq_cpu.dense_up_to(settings, dtype)
        if settings is not None:
            job.r, job.k, job.local, job.reallocate, job.rank_logits = sparq_cpu.method(settings, d)
        row, head, slot = keys.stride()[:3]
        job.keys_row, job.keys_head, job.keys_slot = job.values_row, job.values_head, job.values_slot = row, head, slot
        job.keys_t_row, job.keys_t_head, job.keys_t_channel = row, head, capacity
        job.mean_row, job.mean_head = heads * d, d

    def fits(self, layer: SparqLayer) -> bool:
        """Whether the layer's buffers and settings are still those."""
        keys, keys_t, values, valid, total, count = self._tensors
        return (
            layer.keys is keys
            and layer.values is values
            and layer.keys_t is keys_t
            and layer.valid is valid
            and layer.total is total
            and layer.count is count
            and layer.settings is self._settings
        )

    def append(self, key: Tensor, value: Tensor, slot: int) -> None:
        """key, value (B, Hkv, 1, d) into `slot` of every row."""
        step = self._step
        step.new_keys, step.new_values, step.slot = key.data_ptr(), value.data_ptr(), slot
        step.new_keys_row, step.new_keys_head = key.stride()[:2]
        step.new_values_row, step.new_values_head = value.stride()[:2]
        self._append(self._at)

    def attend(self, query: Tensor, length: int, seen: tuple[Tensor, Tensor, Tensor] | None, scale: float) -> Tensor:
        """query (B, Hq, 1, d), its last dimension dense, over the first `length` slots: (B, 1, Hq, d).

        seen: start and stop int64 (B,), and which rows' tokens are valid, bool (B,) or expanded to it; None: all slots of all.
        """
        step, job = self._step, self._job
        batch, heads, _, d = query.shape
        output = torch.empty((batch, 1, heads, d), dtype=query.dtype)
        job.q, job.out = query.data_ptr(), output.data_ptr()
        job.q_row, job.q_head = query.stride()[:2]
        job.group, job.length, job.scale, job.threads = heads // job.kv_heads, length, scale, torch.get_num_threads()
        if seen is None:
            job.start = job.stop = step.fresh = None
        else:
            start, stop, fresh = seen
            job.start, job.stop, step.fresh, step.fresh_row = start.data_ptr(), stop.data_ptr(), fresh.data_ptr(), fresh.stride(0)
        sparq_cpu.check(self._attend(self._at, self._where), self._tensors[0])
        return output

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copied layer has buffers of its own


def _buffers(layer: SparqLayer) -> tuple[Any, ...]:
    return layer.keys, layer.keys_t, layer.values, layer.valid, layer.total, layer.count
