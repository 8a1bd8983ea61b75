"""All caption metrics by name, with what a table needs of each: corpus value, its standard error, a value an image.

    cider_d               eval/metrics/cider.py    mean over images; about 0 to 10
    bleu_1 ... bleu_4     eval/metrics/bleu.py     from counts summed over images; 0 to 1
    rouge_l               eval/metrics/rouge.py    mean over images; 0 to 1
    meteor, spice         eval/metrics/java.py     need Java and the extra `java`; 0 to 1

Standard errors are over images. A mean has the textbook one; BLEU has the jackknife's. METEOR has none: its corpus value is made
inside the Java program from statistics that it does not give out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from configs.errors import UserError
from eval.metrics.bleu import Bleu, bleu
from eval.metrics.cider import cider
from eval.metrics.java import meteor, spice
from eval.metrics.rouge import rouge_l
from eval.statistics import clustered_mean

METRICS = ("cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "spice")


@dataclass(frozen=True)
class Score:
    """`items[i]` belongs to image i; `standard_error` is None where there is nothing to estimate it from."""

    corpus: float
    standard_error: float | None
    items: list[float]

    @classmethod
    def mean(cls, items: list[float]) -> Score:
        """A metric whose corpus value is the mean of its items."""
        estimate = clustered_mean(items, range(len(items)))
        return cls(estimate.mean, estimate.se, items)


def score_captions(metrics: Sequence[str], candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Every named metric of one candidate an image; `references[i]` are image i's captions.

    Raises UserError for a name that is unknown or stands there twice, before anything is computed, and for what the metric
    itself refuses.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UserError(f"No caption metric is called {unknown[0]!r}. Known: {', '.join(METRICS)}.")
    if len(set(metrics)) != len(metrics):
        raise UserError(f"Metrics {','.join(metrics)}: one is named twice. Name each once.")

    @cache
    def all_bleu() -> Bleu:
        return bleu(candidates, references)

    def score(name: str) -> Score:
        if name == "cider_d":
            return Score.mean(cider(candidates, references))
        if name == "rouge_l":
            return Score.mean(rouge_l(candidates, references))
        if name == "spice":
            return Score.mean(spice(candidates, references)[1])
        if name == "meteor":
            corpus, items = meteor(candidates, references)
            return Score(corpus, None, items)
        order = int(name.removeprefix("bleu_")) - 1
        return Score(all_bleu().corpus[order], all_bleu().standard_errors[order], all_bleu().items[order])

    return {name: score(name) for name in metrics}
