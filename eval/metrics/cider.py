"""CIDEr-D (Vedantam et al. 2015, the -D variant of the COCO caption server), on PTB tokens.

For n = 1..4, with raw counts as term frequencies and

    df(g)  = images whose references hold g, over the evaluated set          idf(g) = log N - log max(1, df(g))
    vec(c) = count(g) * idf(g)

    CIDEr-D(c, refs) = 10 / 4 * sum_n mean_refs [ sum_g min(c_g, r_g) r_g / (|c| |r|) ] * exp(-delta^2 / (2 * 6^2))

delta is the difference of the two captions' *bigram* counts: that is what the official code measures as length, and what its
published numbers hold. The document frequencies come from the evaluated set itself; with one image every idf is 0 and so is
every score, which is why one image is refused here. Values are in the official unit (about 0 to 10); tables show them times
100.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from configs.errors import UserError
from eval.metrics.ptb import tokenize

ORDERS = 4
SIGMA = 6.0

Gram = tuple[str, ...]


def _grams(tokens: Sequence[str]) -> tuple[Counter[Gram], ...]:
    """Per order n = 1..4, how often each n-gram stands in the caption."""
    return tuple(Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, ORDERS + 1))


class _Vector:
    """One caption's tf-idf vectors, their norms and its length in bigrams."""

    __slots__ = ("bigrams", "norms", "weights")

    def __init__(self, grams: tuple[Counter[Gram], ...], idf: dict[Gram, float], unseen: float) -> None:
        self.weights = [{gram: count * idf.get(gram, unseen) for gram, count in order.items()} for order in grams]
        self.norms = [math.sqrt(math.fsum(w * w for w in order.values())) for order in self.weights]
        self.bigrams = sum(grams[1].values())


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Mean over n of the clipped cosine, with the length penalty; in [0, 1]."""
    total = 0.0
    for mine, theirs, a, b in zip(candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True):
        if a and b:
            total += math.fsum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs) / (a * b)
    delta = candidate.bigrams - reference.bigrams
    return total / ORDERS * math.exp(-(delta**2) / (2 * SIGMA**2))


@dataclass(frozen=True)
class Idf:
    """Document frequencies of one set of references: fixed, so that subsets and resamples of it are scored on one scale."""

    weights: dict[Gram, float]
    images: int

    @classmethod
    def of(cls, references: Iterable[Sequence[str]]) -> Idf:
        """`references`: for each image, its reference captions. Raises UserError for fewer than two images."""
        frequency: Counter[Gram] = Counter()
        images = 0
        for captions in references:
            images += 1
            frequency.update({gram for caption in captions for order in _grams(tokenize(caption)) for gram in order})
        if images < 2:
            raise UserError(
                f"CIDEr needs at least 2 images to weigh words by how rare they are; {images} given, every score would be 0. "
                "Evaluate more images in one call."
            )
        return cls({gram: math.log(images) - math.log(max(1, df)) for gram, df in frequency.items()}, images)

    @property
    def unseen(self) -> float:
        """The weight of an n-gram that no reference holds."""
        return math.log(self.images)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]], *, idf: Idf | None = None) -> list[float]:
    """CIDEr-D of every image, in the order given; their mean is the corpus score.

    `references[i]` are image i's captions. `idf` defaults to that of these references. Raises UserError for different lengths,
    an image without references, or fewer than two images.
    """
    if len(candidates) != len(references):
        raise UserError(f"CIDEr: {len(candidates)} candidates for {len(references)} images. Give one candidate for each image.")
    for position, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise UserError(f"CIDEr: image {position} has no list of reference captions (found {captions!r}). Give at least one.")
    idf = idf or Idf.of(references)
    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        mine = _Vector(_grams(tokenize(candidate)), idf.weights, idf.unseen)
        others = [_Vector(_grams(tokenize(caption)), idf.weights, idf.unseen) for caption in captions]
        scores.append(10.0 * math.fsum(_similarity(mine, other) for other in others) / len(others))
    return scores
