"""VQA accuracy: the official one (Antol et al. 2015; the VQA evaluation server) and its named variants.

    accuracy(p) = mean over the annotators i of min(1, #{j != i : answer_j = p} / 3)

    vqa_official      prediction and answers are normalised only if the answers are not all the same string
    vqa_always_norm   always normalised (OpenFlamingo, lmms-eval)
    textvqa_evalai    always normalised, by the EvalAI server's slightly different rules (TextVQA)
    min3              always normalised; min(1, matches / 3) over all answers, none left out
    okvqa_raw         vqa_official, against the annotators' own words: the field `raw_answer` of OK-VQA's files
    okvqa_stemmed     the same with every word of prediction and answers Porter-stemmed after normalising: OK-VQA (Marino et al.
                      2019) counts "dog" and "dogs" as one answer; against either field
    gqa_exact         exact match: 1 if the prediction is an answer, both in lower case without punctuation

OK-VQA's files also hold stemmed answers (`answer`). Their rules had to be guessed from the two fields by others (OpenFlamingo: a
tagger, WordNet and a list of exceptions); one published algorithm on both sides needs none of that. GQA gives one answer a
question.

Leaving one out goes by position. Going by equality drops every annotator who gave the same answer and biases the score low (a
majority predictor on VizWiz gets 67.06 instead of 94.11). Scores lie in [0, 1].
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache

from configs.errors import UserError
from eval.metrics import porter

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
"""The official code hands a flag to re.sub where the count belongs, so at most 32 periods go."""

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(n) for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}

# Bare words that get their apostrophe; the official table, reduced to where the apostrophe goes.
_WITH_NT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_WITH_VE = "could might must not should they we what where who would you"
_WITH_LL = "how it somebody someone something they what who why you"
_WITH_RE = "there they what why you"
_WITH_D = "he how it someone something there they where who you"
_WITH_S = "he how somebody someone that there what when where who why"
_D_AND_VE = "he it she somebody someone something there they we who you"
_NT_AND_VE = "could had might should would"


def _contractions() -> dict[str, str]:
    table = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "somebody'd": "somebodyd"}
    for stems, bare, marked in (
        (_WITH_NT, "nt", "n't"), (_WITH_VE, "ve", "'ve"), (_WITH_LL, "ll", "'ll"),
        (_WITH_RE, "re", "'re"), (_WITH_D, "d", "'d"), (_WITH_S, "s", "'s"),
    ):  # fmt: skip
        table |= {stem + bare: stem + marked for stem in stems.split()}
    for stems, first, marked in ((_D_AND_VE, "d", "'d"), (_NT_AND_VE, "nt", "n't")):
        for stem in stems.split():
            whole = f"{stem}{marked}'ve"
            table |= {f"{stem}{first}'ve": whole, f"{stem}{marked}ve": whole}
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return table


_CONTRACTIONS = _contractions()


def clean(text: str) -> str:
    """What happens to every prediction and answer, normalised or not: line ends and tabs to spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Punctuation as the official code treats it: a mark goes if it touches a space anywhere, or if the text holds digit,digit
    anywhere; else it becomes a space. Then the periods that do not stand before a digit go."""
    out = text
    number_with_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _MARKS:
        if mark in text:
            out = out.replace(mark, "" if number_with_comma or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def strip_words(text: str) -> str:
    """Lower case, number words to digits, articles dropped, contractions given their apostrophe; single spaces between
    words."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=200_000)
def normalise(text: str) -> str:
    """The whole official normalisation of an answer."""
    return strip_words(strip_punctuation(clean(text)))


@lru_cache(maxsize=200_000)
def normalise_evalai(text: str) -> str:
    """The EvalAI server's normalisation for TextVQA: commas and question marks go first, and 's is cut off as a word. Its
    expression for periods means to spare those after a digit, and spares none."""
    text = clean(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))
    out = text
    for mark in _MARKS:
        if mark in text:
            out = out.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    return strip_words(_PERIOD.sub("", out, count=_MAX_PERIODS))


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """mean_i min(1, matches among the others / 3), by position, of strings as they stand."""
    matches = sum(answer == prediction for answer in answers)
    # Seen from a matching annotator one match fewer is left; from any other, all of them.
    return (matches * min(1.0, (matches - 1) / 3) + (len(answers) - matches) * min(1.0, matches / 3)) / len(answers)


def _normalised(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """The official condition: as they stand, cleaned, where all annotators wrote the same; else normalised."""
    cleaned = [clean(answer) for answer in answers]
    if len(set(cleaned)) == 1:
        return clean(prediction), cleaned
    return normalise(prediction), [normalise(answer) for answer in cleaned]


def _official(prediction: str, answers: Sequence[str]) -> float:
    return leave_one_out(*_normalised(prediction, answers))


def stem_words(text: str) -> str:
    """Every word's Porter stem, in lower case, with single spaces between."""
    return " ".join(map(porter.stem, text.split()))


def _stemmed(prediction: str, answers: Sequence[str]) -> float:
    prediction, answers = _normalised(prediction, answers)
    return leave_one_out(stem_words(prediction), [stem_words(answer) for answer in answers])


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _exact(prediction: str, answers: Sequence[str]) -> float:
    prediction, *answers = (" ".join(text.lower().translate(_NO_PUNCTUATION).split()) for text in (prediction, *answers))
    return float(prediction in answers)


def _always(prediction: str, answers: Sequence[str]) -> float:
    return leave_one_out(normalise(prediction), [normalise(answer) for answer in answers])


def _evalai(prediction: str, answers: Sequence[str]) -> float:
    return leave_one_out(normalise_evalai(prediction), [normalise_evalai(answer) for answer in answers])


def _min3(prediction: str, answers: Sequence[str]) -> float:
    prediction = normalise(prediction)
    return min(1.0, sum(normalise(answer) == prediction for answer in answers) / 3)


VARIANTS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa_official": _official,
    "vqa_always_norm": _always,
    "textvqa_evalai": _evalai,
    "min3": _min3,
    "okvqa_raw": _official,
    "okvqa_stemmed": _stemmed,
    "gqa_exact": _exact,
}


FEWEST = {"min3": 3, "gqa_exact": 1}
"""Answers below which no prediction scores 1; of all others 4, since three must match besides the one left out."""


def check_answers(answers: Sequence[str], variant: str) -> None:
    """Raises UserError for answers that are no list, or too few for any prediction to be right by this variant."""
    if isinstance(answers, str) or not answers:
        raise UserError(f"VQA accuracy: answers must be a list of the annotators' strings (found {answers!r}).")
    if len(answers) < (fewest := FEWEST.get(variant, 4)):
        raise UserError(
            f"VQA accuracy: by {variant} no prediction scores 1 with {len(answers)} answers ({answers!r}); it wants {fewest} or "
            "more. Give every annotator's answer, equal ones too, or score by gqa_exact, which wants one."
        )


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "vqa_official") -> float:
    """One question's accuracy in [0, 1]. Raises UserError for an unknown variant, and as `check_answers` does."""
    if variant not in VARIANTS:
        raise UserError(f"VQA accuracy has no variant {variant!r}. Known: {', '.join(VARIANTS)}.")
    check_answers(answers, variant)
    return VARIANTS[variant](prediction, answers)
