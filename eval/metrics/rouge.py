"""ROUGE-L (Lin 2004) as the COCO caption server computes it, on PTB tokens.

    P = max_refs LCS(c, r) / |c|       R = max_refs LCS(c, r) / |r|       ROUGE-L = (1 + b^2) P R / (R + b^2 P),  b = 1.2

LCS is the length of the longest common subsequence of tokens. The best precision and the best recall may come from different
references: that is the official code's way, and what published numbers hold. The corpus value is the mean over the images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from eval.metrics.checks import check_lengths, check_references
from eval.metrics.ptb import tokenize

_BETA_SQUARED = 1.2**2


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by bits (Hyyrö 2004): bit i of `row` is 0 where the table's row rises at first[i], so that one addition
    carries a whole row of the table to the next."""
    places: defaultdict[str, int] = defaultdict(int)
    for position, token in enumerate(first):
        places[token] |= 1 << position
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & places[token]
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def _rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # The official code splits at single spaces: to it, an empty caption is one empty token.
    candidate = candidate or ("",)
    captions = [reference or ("",) for reference in references]
    common = [longest_common_subsequence(candidate, reference) for reference in captions]
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, captions, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of every image, in [0, 1], in the order given; their mean is the corpus score.

    `references[i]` are image i's captions. Raises UserError for different lengths, or an image without references.
    """
    check_lengths("ROUGE-L", candidates, references)
    check_references("ROUGE-L", references)
    return [
        _rouge_l(tokenize(candidate), [tokenize(caption) for caption in captions])
        for candidate, captions in zip(candidates, references, strict=True)
    ]
