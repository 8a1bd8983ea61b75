"""`python -m benchmarks.packing --json`: how much of a sequence each packing policy fills, for each kind of data.

Documents of drawn lengths, packed to 4,096 tokens and 16 images of 144 tokens by the packer that training uses:

    captions       one image, 25 words on average
    interleaved    pages as in OBELICS: 1 to 30 images (4 on average), about 800 tokens of text, some very long
    text           about 1,000 tokens, log-normal: many short ones, a few of tens of thousands

ours: % of positions that hold a token; peer: one document a sequence; limit: what no packing can exceed, given the cap on images;
cut: % of documents that were cut in two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import numpy as np

from benchmarks.report import Row, arguments
from data_pipelines.config import POLICIES, PackingConfig
from data_pipelines.document import Image, Origin
from data_pipelines.packing import EncodedDocument, Feed, Packer

IMAGE_TOKENS, SEQ_LEN, MAX_IMAGES = 144, 4096, 16
SEQUENCES = 600
ORIGIN = Origin("drawn", "", "")


def drawn(kind: str, place: int) -> EncodedDocument:
    """The document at a place: its lengths depend on kind and place alone."""
    rng = np.random.default_rng([len(kind), place])
    if kind == "captions":
        images, words = 1, int(rng.integers(10, 41))
    elif kind == "interleaved":
        images = int(min(30, rng.geometric(0.25)))
        words = int(np.exp(rng.normal(6.2, 1.0)))
    else:
        images, words = 0, int(np.exp(rng.normal(6.4, 1.0)))
    gap = max(1, words // max(images, 1))
    starts = [number * (gap + IMAGE_TOKENS) for number in range(images)]
    ids = np.zeros(words + images * IMAGE_TOKENS + 1, np.int32)
    return EncodedDocument(ids, starts, tuple(Image(b"") for _ in starts), ORIGIN)


def packed(kind: str, policy: str, open_sequences: int) -> tuple[float, float]:
    """(share of positions that hold a token, share of documents that were cut)."""
    config = PackingConfig(SEQ_LEN, MAX_IMAGES, policy, open_sequences)
    feed = Feed(0, kind, lambda place: drawn(kind, place), IMAGE_TOKENS)
    packer = Packer(config, [feed])
    used = pieces = documents = 0
    for _ in range(SEQUENCES):
        for piece, document in packer.pop():
            used += piece.tokens
            pieces += 1
            documents += piece.stop == len(document.ids)
    return used / (SEQUENCES * SEQ_LEN), max(0.0, 1 - documents / pieces) if pieces else 0.0


def limit(kind: str) -> float:
    """With the images of a sequence used up, its text alone cannot fill it: tokens for 16 images, or 1."""
    documents = [drawn(kind, place) for place in range(4000)]
    images = sum(len(document.starts) for document in documents)
    tokens = sum(len(document.ids) for document in documents)
    return min(1.0, tokens / images * MAX_IMAGES / SEQ_LEN) if images else 1.0


def rows(kind: str) -> Iterator[tuple[Row, float]]:
    alone, _ = packed(kind, "single", 1)
    bound = limit(kind)
    variants: list[tuple[str, str, int]] = [(policy, policy, 8) for policy in POLICIES]
    variants[1:1] = [("first_fit_32", "first_fit", 32)]
    variants += [("best_fit_256", "best_fit", 256)]
    for name, policy, open_sequences in variants:
        filled, cut = packed(kind, policy, open_sequences)
        case = f"{kind}_{name}"
        numbers = (100 * filled, 100 * alone, filled / alone, 100 * bound)
        yield Row(case, *numbers, "% of positions used", "one document a sequence", "the cap on images"), 100 * cut


CASES = {kind: partial(rows, kind) for kind in ("captions", "interleaved", "text")}


def main() -> None:
    chosen = arguments(__doc__ or "", CASES)
    if not chosen.json:
        print(f"{'case':<26}{'padding %':>10}{'least %':>9}{'cut %':>8}")
    for case, run in CASES.items():
        if chosen.case and case not in chosen.case:
            continue
        for row, cut in run():
            if chosen.json:
                values = asdict(row) | {"cut": cut}
                print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)
            else:
                print(f"{row.case:<26}{100 - row.ours:>10.1f}{100 - row.limit:>9.1f}{cut:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
