"""`python -m benchmarks.cider --json`: CIDEr-D against pycocoevalcap's on the official example, 1,000 images x 5 references.

    cider              references and candidates from nothing to scores; images a second on one core
    cider_cached       new candidates against references kept from before (`eval.metrics.cider.References`)
    cider_captions     the same from captions as a model writes them, with our PTB tokenisation of each in the time

The peer is `pycocoevalcap.cider.cider.Cider().compute_score` in all three. It keeps nothing between calls, and its own
tokeniser (a Java process) is left out everywhere: it gets strings of tokens already made, and so do ours in the first two cases,
split at spaces in the time as the peer does. Scores are compared before anything is timed. The limit is what splitting the same
strings takes.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Row, arguments, best_rate, print_rows
from eval.metrics.cider import References
from eval.metrics.ptb import tokenize

EXAMPLE = Path(__file__).parents[1] / "tests" / "vectors" / "coco_official_example_1000.json.xz"


def _peer(references: list[list[str]], candidates: list[str]) -> tuple[str, Callable[[], list[float]] | None]:
    """(its name, scoring as pycocoevalcap does it); None where it is not installed."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return "pycocoevalcap is not installed: pip install 'mm1-ablations[java]'", None
    truth, given = dict(enumerate(references)), {i: [candidate] for i, candidate in enumerate(candidates)}
    return "pycocoevalcap", lambda: list(map(float, Cider().compute_score(truth, given)[1]))


def cider_rows(repeats: int, cases: list[str] | None = None) -> list[Row]:
    """The rows of the cases named in the module's docstring, or of `cases` of them. Without the peer, `peer` and `ratio` are
    nan and `peer_name` says what to install."""
    items = json.loads(lzma.decompress(EXAMPLE.read_bytes()))["items"]
    raw = [item["cand"] for item in items]
    candidates = [" ".join(tokenize(caption)) for caption in raw]
    references = [[" ".join(tokenize(caption)) for caption in item["refs"]] for item in items]
    peer_name, peer = _peer(references, candidates)

    def split_candidates() -> list[list[str]]:
        return [candidate.split() for candidate in candidates]

    def split_all() -> tuple[list[list[list[str]]], list[list[str]]]:
        return [[caption.split() for caption in captions] for captions in references], split_candidates()

    def whole() -> list[float]:
        truth, given = split_all()
        return References.of_tokens(truth).score_tokens(given)

    kept = References.of_tokens(split_all()[0])

    def from_captions() -> list[float]:
        tokenize.cache_clear()
        return kept.score(raw)

    ours: dict[str, tuple[Callable[[], list[float]], Callable[[], object]]] = {
        "cider": (whole, split_all),
        "cider_cached": (lambda: kept.score_tokens(split_candidates()), split_candidates),
        "cider_captions": (from_captions, split_candidates),
    }
    if peer:
        official = peer()
        for name, (work, _) in ours.items():
            if max(abs(a - b) for a, b in zip(work(), official, strict=True)) > 1e-9:
                raise AssertionError(f"{name}: our CIDEr-D is not pycocoevalcap's; nothing to compare")
    peer_rate = best_rate(len(items), peer, repeats) if peer else math.nan
    rows = []
    for name, (work, least) in ours.items():
        if cases is None or name in cases:
            rate, limit = best_rate(len(items), work, repeats), best_rate(len(items), least, repeats)
            rows.append(Row(name, rate, peer_rate, rate / peer_rate, limit, "images/s", peer_name, "splitting the strings"))
    return rows


def main() -> None:
    chosen = arguments(__doc__ or "", ["cider", "cider_cached", "cider_captions"])
    print_rows(cider_rows(chosen.repeats, chosen.case), chosen.json)


if __name__ == "__main__":
    main()
