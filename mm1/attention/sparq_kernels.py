"""The GPU's part of SparQ attention in Triton: scores, selection, attention. sparq_triton.py launches them.

    score    (row, share of the tokens)   i1, tau, logits of all valid tokens, and each share's maximum and sum
    select   (row, chunk of the tokens)   each chunk's k best: candidates; again over the candidates while these are too many
    finish   (row)                        the k best of the last chunk or of the candidates; softmax, V, alpha, mean of V

A row is one key-value head of one batch row; the g query heads of its group are worked on together, so that every component,
key and value is read once for all of them. Lengths are read on the device. No kernel waits for another block and nothing has
to be zeroed beforehand, so the launches depend on shapes alone and repeat to the bit.

**Selection.** A chunk's scores stay in registers as unsigned integers of the same order (`_ordered`), 0 where there is no token.
The k-th largest is found bit by bit as in a radix sort with one bit a digit, with two short cuts (`_cut`): the search starts
between two bounds that are already known, the chunk's maximum and the least of the maxima of at least k groups of it, and ends as
soon as exactly k lie above. For random scores that leaves about log2 of (bounds' distance / gap between neighbours at the k-th),
some ten steps of one comparison a score, instead of 32. Histograms of 8 or 11 bits would need fewer passes, but each counts by
ballots (one a bit and score) and atomics in shared memory. Ties at the k-th go to the earliest tokens. Selected tokens find their
places by one prefix sum; they are not sorted.

The tournament (the best of the chunks' best) is exact: a token among the k best is among its chunk's k best.

**Vector loads.** Triton loads 16 bytes at a time only where masks are constant over them. Hence tiles are loaded whole up to the
capacity, and slots outside start <= s < stop are replaced afterwards: what stands there cannot show, be it NaN.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(score):
    """float32 other than -0.0 to uint32 in the same order, from 1 up (NaN too: first or last, but a token)."""
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) | -2147483648)  # positive: the sign bit set; negative: every bit flipped
    return tl.maximum(bits.to(tl.uint32, bitcast=True), 1)


@triton.jit
def _cut(keys, wanted, N: tl.constexpr, GROUPS: tl.constexpr):
    """(cut, number of keys > cut that are taken, number of keys == cut that are taken) for the `wanted` largest of uint32 (N,).

    0 <= wanted <= the number of keys other than 0; GROUPS >= wanted, or 1. Always: at least `wanted` keys lie at `low` or above,
    and fewer above `high`.
    """
    high = tl.max(keys, 0)
    low = tl.full((), 1, tl.uint32)
    if GROUPS > 1:
        low = tl.maximum(tl.min(tl.max(tl.reshape(keys, (N // GROUPS, GROUPS)), 0), 0), low)
    at_least = tl.sum((keys >= low).to(tl.int32), 0)
    low = tl.where(wanted == 0, high, low)
    while (low < high) & (at_least != wanted):
        middle = high - ((high - low) >> 1)
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = count >= wanted
        at_least = tl.where(enough, count, at_least)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = tl.sum((keys > low).to(tl.int32), 0)
    return low, above, wanted - above


@triton.jit
def _places(keys, wanted, N: tl.constexpr, GROUPS: tl.constexpr):
    """Of the `wanted` largest keys: (bool (N,) which, int32 (N,) its place among them from 0 up). N <= 16,384."""
    cut, above, ties = _cut(keys, wanted, N, GROUPS)
    over, equal = (keys > cut).to(tl.int32), (keys == cut).to(tl.int32)
    ranks = tl.cumsum(over + (equal << 16), 0)  # two prefix sums in one: each is below 2^15
    tie = ranks >> 16
    taken = (over != 0) | ((equal != 0) & (tie <= ties))
    return taken, tl.where(over != 0, (ranks & 0xFFFF) - 1, above + tie - 1)


@triton.jit
def _normaliser(maxima, sums, head, row, G: tl.constexpr, SHARES: tl.constexpr):
    """log2 of the sum of 2^logit over all valid tokens, for a scalar head or a column of heads (n, 1): scalar or (n,)."""
    share = tl.arange(0, SHARES)
    at = (row * G + head) * SHARES + share
    inside = (share < SHARES) & (head < G)
    peaks = tl.load(maxima + at, inside, other=float("-inf"))
    peak = tl.maximum(tl.max(peaks, -1, keep_dims=True), -3.0e38)  # a row of paddings has no maximum
    parts = tl.load(sums + at, inside, other=0.0) * tl.exp2(peaks - peak)
    return tl.sum(peak, -1) + tl.log2(tl.maximum(tl.sum(parts, -1), 1.0))  # the largest counts 1 itself


@triton.jit
def _chunk_keys(
    logits, maxima, sums, indices, row, first, begin, end, length,
    G: tl.constexpr, SHARES: tl.constexpr, N: tl.constexpr, SOFTMAX: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
):  # fmt: skip
    """(uint32 keys (N,), int32 tokens (N,)) of slots first <= s < first + N; 0 outside begin <= s < end.

    FROM_LOGITS: the group's score is formed from the logits (rows, G, length); SOFTMAX: the sum of softmaxes, which for one head
    has the order of its logits and is left to them (for several, what is below 1e-38 of all counts as equal). Otherwise slots are
    candidates: keys in `logits` (rows, length), tokens in `indices`.
    """
    slot = first + tl.arange(0, N)
    inside = slot < length
    if FROM_LOGITS:
        score = tl.zeros((N,), tl.float32)  # a sum that starts from 0.0 is never -0.0
        for head in tl.static_range(G):
            logit = tl.load(logits + (row * G + head) * length + slot, inside, other=0.0)
            if SOFTMAX and G > 1:
                logit = tl.exp2(logit - _normaliser(maxima, sums, head, row, G, SHARES))
            score += logit
        keys = tl.where((slot >= begin) & (slot < end), _ordered(score), 0)
        return keys, slot
    else:  # noqa: RET505  (Triton compiles one branch only)
        keys = tl.load(logits + row * length + slot, inside, other=0).to(tl.uint32, bitcast=True)
        return keys, tl.load(indices + row * length + slot, inside, other=0)


@triton.jit
def _group_weight(q, q_head, component, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """Sum of |q| over the heads of a group for components (N,), head by head: equal to the bit however they are laid out, without
    which a component could come before itself."""
    weight = tl.zeros((N,), tl.float32)
    for head in tl.static_range(G):
        weight += tl.abs(tl.load(q + head * q_head + component, component < D, other=0.0).to(tl.float32))
    return weight


@triton.jit
def score_kernel(
    q, keys_t, start, stop, logits, maxima, sums, scale,
    kt_batch, kt_head, kt_component, q_batch, q_head, capacity, logits_length, dense_up_to,
    KV_HEADS: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    R: tl.constexpr, R_PAD: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Steps 1 and 2. Writes logits float32 (rows, G, logits_length), in units of log2 (scale holds log2 e), and for each share
    and head the maximum and the sum of 2^(logit - maximum): float32 (rows, G, SHARES)."""
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = row // KV_HEADS, row % KV_HEADS
    begin, end = tl.load(start + batch).to(tl.int32), tl.load(stop + batch).to(tl.int32)
    if end - begin <= dense_up_to:
        return

    # Components: the rank of each is the number before it, ties to the lower; counted in steps, to be frugal with registers.
    head, component, chosen = tl.arange(0, G_PAD), tl.arange(0, D_PAD), tl.arange(0, R_PAD)
    q += batch * q_batch + kv_head * G * q_head
    heads = q + head[:, None] * q_head
    size = tl.abs(tl.load(heads + component[None, :], (head < G)[:, None] & (component < D)[None, :], other=0.0).to(tl.float32))
    weight = _group_weight(q, q_head, component, G, D, D_PAD)
    rank = tl.where(component < D, 0, D_PAD)
    for first in tl.range(0, D, 16):
        other = first + tl.arange(0, 16)
        rival = tl.where(other < D, _group_weight(q, q_head, other, G, D, 16), -1.0)[:, None]
        before = (rival > weight[None, :]) | ((rival == weight[None, :]) & (other[:, None] < component[None, :]))
        rank += tl.sum(before.to(tl.int32), 0)
    i1 = tl.minimum(tl.sum(tl.where(rank[None, :] == chosen[:, None], component[None, :], 0), 1), D - 1)  # also where q is NaN
    part = tl.load(heads + i1[None, :], (head < G)[:, None] & (chosen < R)[None, :], other=0.0)
    of_all = tl.sum(tl.abs(part.to(tl.float32)), 1)
    factor = scale * tl.sqrt(tl.sum(size, 1) / tl.where(of_all > 0, of_all, 1.0))  # no part in i1: every logit is 0

    # This share of the blocks that hold valid slots.
    block = begin // BLOCK
    blocks = tl.cdiv(end, BLOCK) - block
    each = tl.cdiv(blocks, SHARES)
    block += share * each
    peak = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    keys_t += batch * kt_batch + kv_head * kt_head
    logits += row * G * logits_length
    for b in tl.range(block, tl.minimum(block + each, tl.cdiv(end, BLOCK))):
        slot = b * BLOCK + tl.arange(0, BLOCK)
        places = i1[:, None] * kt_component + slot[None, :]
        components = tl.load(keys_t + places, (chosen < R)[:, None] & (slot < capacity)[None, :], other=0.0)
        logit = tl.dot(part.to(DOT), components.to(DOT), input_precision="ieee") * factor[:, None]
        logit = tl.where(((slot >= begin) & (slot < end))[None, :], logit, float("-inf"))
        tl.store(logits + head[:, None] * logits_length + slot[None, :], logit,
                 (head < G)[:, None] & (slot < logits_length)[None, :])  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        finite = tl.maximum(new_peak, -3.0e38)  # -inf - -inf is NaN
        total = total * tl.exp2(peak - finite) + tl.sum(tl.exp2(logit - finite[:, None]), 1)
        peak = new_peak
    at = (row * G + head) * SHARES + share
    tl.store(maxima + at, peak, head < G)
    tl.store(sums + at, total, head < G)


@triton.jit
def select_kernel(
    logits, maxima, sums, indices, start, stop, out_keys, out_indices, length, wanted, window, dense_up_to,
    KV_HEADS: tl.constexpr, G: tl.constexpr, SHARES: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, SOFTMAX: tl.constexpr, FROM_LOGITS: tl.constexpr, LATEST: tl.constexpr,
):  # fmt: skip
    """The `wanted` best of each chunk of N slots, the latest `window` tokens aside: keys and tokens (rows, chunks, width), both
    int32; where a chunk has fewer, key 0 and token -1. width is `wanted`, or with LATEST `wanted` + `window`: the latest
    tokens follow the best."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = row // KV_HEADS
    begin, end = tl.load(start + batch).to(tl.int32), tl.load(stop + batch).to(tl.int32)
    if end - begin <= dense_up_to:
        return
    width = wanted + window if LATEST else wanted
    latest = tl.minimum(window, tl.maximum(end - begin, 0)) if LATEST else 0
    at = (row * tl.num_programs(1) + chunk) * width
    keys, tokens = _chunk_keys(
        logits, maxima, sums, indices, row, chunk * N, begin, end - window, length, G, SHARES, N, SOFTMAX, FROM_LOGITS
    )
    found = tl.minimum(tl.sum((keys != 0).to(tl.int32), 0), wanted)
    taken, place = _places(keys, found, N, GROUPS)
    tl.store(out_keys + at + place, keys.to(tl.int32, bitcast=True), taken)
    tl.store(out_indices + at + place, tokens, taken)
    for done in tl.range(found, width, 128):
        rest = done + tl.arange(0, 128)
        token = tl.where(rest < found + latest, end - latest + (rest - found), -1)
        tl.store(out_keys + at + rest, tl.zeros((128,), tl.int32), rest < width)
        tl.store(out_indices + at + rest, token, rest < width)


@triton.jit
def finish_kernel(
    q, keys, values, logits, maxima, sums, ranked, indices, chosen, start, stop, mean, out, scale,
    k_batch, k_head, k_slot, v_batch, v_head, v_slot, q_batch, q_head, logits_length, ranked_length, k, window, dense_up_to,
    KV_HEADS: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SHARES: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, SOFTMAX: tl.constexpr,
    FROM_LOGITS: tl.constexpr, REALLOCATE: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Steps 3 to 5: the last selection (of `ranked`, (rows, ranked_length): see _chunk_keys), then attention to k tokens: the
    selected ones, kept in `chosen` int32 (rows, k - window), and the latest `window`. A row of at most dense_up_to valid tokens
    attends to all of them. SPARSE: whether the capacity allows of other rows."""
    row = tl.program_id(0).to(tl.int64)
    batch, kv_head = row // KV_HEADS, row % KV_HEADS
    begin, end = tl.load(start + batch).to(tl.int32), tl.load(stop + batch).to(tl.int32)
    sparse = end - begin > dense_up_to
    picked = k - window
    count = tl.maximum(end - begin, 0)
    listed = 0  # of the `count` tokens, how many are read from `chosen`
    head, component = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    level = tl.zeros((G_PAD,), tl.float32)
    if SPARSE:
        if sparse:
            candidates, tokens = _chunk_keys(
                ranked, maxima, sums, indices, row, 0, begin, end - window, ranked_length,
                G, SHARES, N, SOFTMAX, FROM_LOGITS,
            )  # fmt: skip
            taken, place = _places(candidates, picked, N, GROUPS)
            tl.store(chosen + row * picked + place, tokens, taken)
            count = k
            listed = picked
            if REALLOCATE:
                level = _normaliser(maxima, sums, head[:, None], row, G, SHARES)
        tl.debug_barrier()  # `chosen` is read below by other threads of the block than wrote it

    q += batch * q_batch + kv_head * G * q_head
    mask = (head < G)[:, None] & (component < D)[None, :]
    queries = tl.load(q + head[:, None] * q_head + component[None, :], mask, other=0.0)
    keys += batch * k_batch + kv_head * k_head
    values += batch * v_batch + kv_head * v_head
    logits += row * G * logits_length
    peak = tl.full((G_PAD,), -3.0e38, tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    alpha = tl.zeros((G_PAD,), tl.float32)
    output = tl.zeros((G_PAD, D_PAD), tl.float32)
    for first in tl.range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        token = begin + place
        if SPARSE:
            selected = tl.load(chosen + row * picked + place, place < listed, other=0)
            token = tl.where(place < listed, selected, end - count + place)  # dense: end - count is begin
        both = inside[:, None] & (component < D)[None, :]
        block_keys = tl.load(keys + token.to(tl.int64)[:, None] * k_slot + component[None, :], both, other=0.0)
        block_values = tl.load(values + token.to(tl.int64)[:, None] * v_slot + component[None, :], both, other=0.0)
        logit = tl.dot(queries.to(DOT), tl.trans(block_keys.to(DOT)), input_precision="ieee") * scale
        logit = tl.where(inside[None, :], logit, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(logit - new_peak[:, None])
        total = total * shrink + tl.sum(weight, 1)
        weight = weight.to(block_values.dtype).to(DOT)
        output = output * shrink[:, None] + tl.dot(weight, block_values.to(DOT), input_precision="ieee")
        peak = new_peak
        if SPARSE and REALLOCATE:
            scored = (place < tl.where(sparse, k, 0))[None, :] & (head < G)[:, None]
            score = tl.load(logits + head[:, None] * logits_length + token[None, :], scored, other=float("-inf"))
            alpha += tl.sum(tl.exp2(score - level[:, None]), 1)
    result = output / tl.where(total > 0, total, 1.0)[:, None]
    if SPARSE and REALLOCATE:  # noqa: SIM102  (decided by the compiler, unlike the next)
        if sparse:
            average = tl.load(mean + row * D + component, component < D, other=0.0)
            result = alpha[:, None] * result + (1.0 - alpha)[:, None] * average[None, :]
    out += (batch * KV_HEADS + kv_head) * G * D
    tl.store(out + head[:, None] * D + component[None, :], result.to(out.dtype.element_ty), mask)
