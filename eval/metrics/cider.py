"""CIDEr-D (Vedantam et al. 2015, the -D variant of the COCO caption server), on PTB tokens.

For n = 1..4, with raw counts as term frequencies and

    df(g)  = images whose references hold g, over the evaluated set          idf(g) = log N - log max(1, df(g))
    vec(c) = count(g) * idf(g)

    CIDEr-D(c, refs) = 10 / 4 * sum_n mean_refs [ sum_g min(c_g, r_g) r_g / (|c| |r|) ] * exp(-delta^2 / (2 * 6^2))

delta is the difference of the two captions' *bigram* counts: that is what the official code measures as length, and what its
published numbers hold. The document frequencies come from the evaluated set itself; with one image every idf is 0 and so is
every score, which is why one image is refused here. Values are in the official unit (about 0 to 10); tables show them times
100.

How it is computed: n-grams are numbers, one order from the last, and all captions go through each step at once,

    tokens -> word ids -> n-gram id = rank of (id of its first n - 1 words, last word) -> counts a caption -> weights

so that what depends on the references alone (ids, idf, weights, norms) is made once, in `References`, and a candidate set costs
a few binary searches in sorted arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from eval.metrics.checks import check_lengths, check_references
from eval.metrics.ptb import tokenize

ORDERS = 4
SIGMA = 6.0

Tokens = Sequence[str]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def _windows(words: Ints, owners: Ints) -> Iterator[tuple[Ints, Ints]]:
    """For n = 2..4: where among the (n-1)-grams those stand that can be made longer by a word of the same caption, and the word.

    `words` (T,): the captions' word ids, end to end; `owners` (T,): which caption each belongs to.
    """
    starts = np.arange(len(words))
    for n in range(2, ORDERS + 1):
        inside = np.flatnonzero(starts + n - 1 < len(words))
        inside = inside[owners[starts[inside]] == owners[starts[inside] + n - 1]]
        starts = starts[inside]
        yield inside, words[starts + n - 1]


def _counts(owners: Ints, grams: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """The distinct (owner, n-gram) pairs in sorted order, and how often each stands there; ids are below `size`."""
    pairs, counts = np.unique(owners * size + grams, return_counts=True)
    return pairs // size, pairs % size, counts


def _ranges(first: Ints, times: Ints) -> Ints:
    """first[0], first[0] + 1, ... (times[0] of them), first[1], ...: the concatenated index ranges."""
    return np.repeat(first - np.cumsum(times) + times, times) + np.arange(times.sum())


@dataclass(frozen=True)
class _Order:
    """The references' n-grams of one order; E entries, one for each n-gram of each caption, sorted by `key`.

    The last of the G ids stands for every n-gram that no reference holds: its df is 0, so its idf is log N.
    """

    codes: Ints
    """(G,) sorted: id of the first n - 1 words * vocabulary + last word; an n-gram's place here is its id."""
    idf: Floats
    """(G,)"""
    key: Ints
    """(E,) image * G + n-gram id."""
    caption: Ints
    """(E,)"""
    weight: Floats
    """(E,) count * idf"""
    norms: Floats
    """(captions,)"""

    @classmethod
    def of(cls, codes: Ints, grams: Ints, owners: Ints, image_of: Ints, images: int) -> _Order:
        """`grams`, `owners` (T_n,): the id and the caption of every n-gram in the text; `image_of` (captions,)."""
        codes = np.append(codes, np.iinfo(np.int64).max)
        caption, gram, counts = _counts(owners, grams, len(codes))
        key = image_of[caption] * len(codes) + gram
        order = np.argsort(key, kind="stable")
        key, caption, gram, counts = key[order], caption[order], gram[order], counts[order]
        first_of_image = np.diff(key, prepend=-1) > 0
        frequency = np.bincount(gram[first_of_image], minlength=len(codes))
        idf = np.log(images) - np.log(np.maximum(1, frequency))
        weight = counts * idf[gram]
        norms = np.sqrt(np.bincount(caption, weight * weight, minlength=len(image_of)))
        return cls(codes, idf, key, caption, weight, norms)


class References:
    """The references of a set of images, ready to score any number of candidate sets against.

    `references[i]` are image i's captions, as strings. Raises UserError for an image without references, or fewer than two
    images.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        check_references("CIDEr", references)
        self._build([[tokenize(caption) for caption in captions] for captions in references])

    @classmethod
    def of_tokens(cls, references: Sequence[Sequence[Tokens]]) -> References:
        """The same from captions that are tokenised already: `references[i][j]` are the tokens of image i's caption j."""
        check_references("CIDEr", references)
        made = cls.__new__(cls)
        made._build(references)
        return made

    def _build(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._images = len(references)
        if self._images < 2:
            raise UserError(
                f"CIDEr needs at least 2 images to weigh words by how rare they are; {self._images} given, every score would be "
                "0. Evaluate more images in one call."
            )
        captions = [tokens for captions in references for tokens in captions]
        self._vocabulary: dict[str, int] = {}
        add = self._vocabulary.setdefault
        words = np.array([add(word, len(self._vocabulary)) for tokens in captions for word in tokens], dtype=np.int64)
        lengths = np.array([len(tokens) for tokens in captions])
        self._bigrams = np.maximum(lengths - 1, 0)  # (captions,)
        self._per_image = np.array([len(captions) for captions in references])  # (images,)
        self._first = np.cumsum(self._per_image) - self._per_image  # (images,) each image's first caption
        image_of = np.repeat(np.arange(self._images), self._per_image)
        owners = np.repeat(np.arange(len(captions)), lengths)

        size = len(self._vocabulary)
        grams = words
        self._orders = [_Order.of(np.arange(size), grams, owners, image_of, self._images)]
        held_by = owners
        for longer, last in _windows(words, owners):
            codes, grams = np.unique(grams[longer] * size + last, return_inverse=True)
            held_by = held_by[longer]
            self._orders.append(_Order.of(codes, grams, held_by, image_of, self._images))

    def __len__(self) -> int:
        return self._images

    def score(self, candidates: Sequence[str], *, images: Sequence[int] | None = None) -> list[float]:
        """CIDEr-D of every image, in the order given.

        `images`: score candidates for these images only (positions, repeats allowed), at the document frequencies of the whole
        set. Raises UserError unless there is one candidate for each image.
        """
        return self.score_tokens([tokenize(candidate) for candidate in candidates], images=images)

    def score_tokens(self, candidates: Sequence[Tokens], *, images: Sequence[int] | None = None) -> list[float]:
        """The same for candidates that are tokenised already."""
        chosen = np.arange(self._images) if images is None else np.asarray(images, dtype=np.int64)
        check_lengths("CIDEr", candidates, chosen)
        # A slot for each (candidate, reference) pair.
        per_candidate = self._per_image[chosen]
        first_slot = np.cumsum(per_candidate) - per_candidate
        candidate_of = np.repeat(np.arange(len(chosen)), per_candidate)  # (slots,)
        caption_of = _ranges(self._first[chosen], per_candidate)  # (slots,)

        total = np.zeros(len(candidate_of))
        for order, (owners, grams, counts) in zip(self._orders, self._candidate_grams(candidates), strict=True):
            weight = counts * order.idf[grams]
            norms = np.sqrt(np.bincount(owners, weight * weight, minlength=len(chosen)))
            key = chosen[owners] * len(order.codes) + grams
            begin = np.searchsorted(order.key, key, "left")
            times = np.searchsorted(order.key, key, "right") - begin
            entries = _ranges(begin, times)
            owner, mine, theirs = np.repeat(owners, times), np.repeat(weight, times), order.weight[entries]
            slots = first_slot[owner] + order.caption[entries] - self._first[chosen[owner]]
            products = np.bincount(slots, np.minimum(mine, theirs) * theirs, minlength=len(total))
            scale = norms[candidate_of] * order.norms[caption_of]
            total += np.divide(products, scale, out=np.zeros_like(total), where=scale > 0)

        bigrams = np.maximum(np.array([len(tokens) for tokens in candidates]) - 1, 0)
        delta = bigrams[candidate_of] - self._bigrams[caption_of]
        similarity = total / ORDERS * np.exp(-(delta**2) / (2 * SIGMA**2))
        return (10.0 * np.bincount(candidate_of, similarity) / per_candidate).tolist()

    def _candidate_grams(self, candidates: Sequence[Tokens]) -> Iterator[tuple[Ints, Ints, Ints]]:
        """For n = 1..4, each candidate's distinct n-grams: (candidate, the references' id of it, count)."""
        size = len(self._vocabulary)
        get = self._vocabulary.get
        fresh: dict[str, int] = {}  # words that no reference holds; told apart, because a repeated one counts as repeated
        words = np.array(
            [
                known if (known := get(word)) is not None else fresh.setdefault(word, size + len(fresh))
                for tokens in candidates
                for word in tokens
            ],
            dtype=np.int64,
        )
        owners = np.repeat(np.arange(len(candidates)), [len(tokens) for tokens in candidates])
        # `grams`: ids among the candidates' own n-grams; `ids[own]`: the references' id of each.
        wide = max(1, size + len(fresh))
        grams, ids = words, np.minimum(np.arange(wide), size)
        caption, own, counts = _counts(owners, grams, wide)
        yield caption, ids[own], counts
        for order, (longer, last) in zip(self._orders[1:], _windows(words, owners), strict=True):
            pairs, grams = np.unique(grams[longer] * wide + last, return_inverse=True)
            first, last = ids[pairs // wide], pairs % wide
            # An unseen first part has the highest id, above every real one's, so its code is in no list.
            code = np.where(last < size, first * size + last, -1)
            place = np.searchsorted(order.codes, code)
            ids = np.where(order.codes[place] == code, place, len(order.codes) - 1)
            owners = owners[longer]
            caption, own, counts = _counts(owners, grams, max(len(ids), 1))
            yield caption, ids[own], counts


@lru_cache(maxsize=1)
def _kept(references: tuple[tuple[str, ...], ...]) -> References:
    return References(references)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every image, in the order given; their mean is the corpus score.

    `references[i]` are image i's captions. The references of the last call are kept: one task at several numbers of shots
    prepares them once. Raises UserError for different lengths, an image without references, or fewer than two images.
    """
    check_lengths("CIDEr", candidates, references)
    check_references("CIDEr", references)
    return _kept(tuple(map(tuple, references))).score(candidates)
