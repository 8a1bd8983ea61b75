"""BLEU-1 to BLEU-4 (Papineni et al. 2002) as the COCO caption server computes them, on PTB tokens.

    p_n    = (sum_images clipped matches of n-grams + 1e-15) / (sum_images n-grams of the candidate + 1e-9)
    BLEU-n = (p_1 ... p_n)^(1/n) * exp(1 - 1/ratio) where ratio = candidate length / reference length is below 1

A match is clipped at the highest count in any one reference. The reference length of an image is the one closest to the
candidate's, the shorter one at a tie. The two constants are the official code's; they keep an item without a match a little
above zero. The corpus value comes from counts summed over the images, so it is *not* the mean of the items; its standard error
is the jackknife's, over images: SE^2 = (N - 1) / N * sum_i (BLEU without i - their mean)^2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.metrics.checks import check_lengths, check_references
from eval.metrics.ptb import tokenize

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bleu:
    """BLEU-1 to -4: `corpus[n - 1]`, its `standard_errors[n - 1]` (None for one image), and `items[n - 1][image]`."""

    corpus: list[float]
    standard_errors: list[float] | list[None]
    items: list[list[float]]


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def _counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """[matches of order 1 .. 4, n-grams of order 1 .. 4, candidate length, reference length]."""
    highest: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        highest |= _ngrams(reference)
    matches = [0] * ORDERS
    for gram, count in _ngrams(candidate).items():
        matches[len(gram) - 1] += min(count, highest[gram])
    length = len(candidate)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return [*matches, *(max(0, length - n) for n in range(ORDERS)), length, closest]


def _bleu(counts: NDArray[np.int64]) -> Floats:
    """Counts (..., 10) as `_counts` gives them, or sums of such -> BLEU-1 to -4 (..., 4)."""
    matches, grams, length, reference = counts[..., :ORDERS], counts[..., ORDERS:-2], counts[..., -2:-1], counts[..., -1:]
    precisions = np.cumprod((matches + _TINY) / (grams + _SMALL), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference + _SMALL)
    return precisions * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Bleu:
    """BLEU of one candidate an image; `references[i]` are image i's captions.

    Raises UserError for different lengths, or an image without references.
    """
    check_lengths("BLEU", candidates, references)
    check_references("BLEU", references)
    counts = np.array(
        [
            _counts(tokenize(candidate), [tokenize(caption) for caption in captions])
            for candidate, captions in zip(candidates, references, strict=True)
        ]
    )
    total = counts.sum(axis=0)
    images = len(counts)
    errors: list[float] | list[None] = [None] * ORDERS
    if images > 1:
        without = _bleu(total - counts)
        errors = [math.sqrt((images - 1) / images * float(np.sum((order - order.mean()) ** 2))) for order in without.T]
    return Bleu(_bleu(total).tolist(), errors, _bleu(counts).T.tolist())
