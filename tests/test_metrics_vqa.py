"""VQA accuracy equals the official code on recorded vectors, and its variants differ where their definitions say."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from eval.metrics.porter import stem
from eval.metrics.vqa import (
    VARIANTS,
    clean,
    leave_one_out,
    normalise,
    normalise_evalai,
    strip_punctuation,
    strip_words,
    vqa_accuracy,
)
from tests.recorded import vectors


def test_vqa_normaliser_equals_the_official_one() -> None:
    recorded = vectors("vqa_normaliser")
    punctuation = {text: strip_punctuation(clean(text)) for text in recorded}
    assert punctuation == {text: half for text, (half, _) in recorded.items()}
    assert {text: strip_words(half) for text, half in punctuation.items()} == {
        text: whole for text, (_, whole) in recorded.items()
    }


def test_vqa_accuracy_equals_the_official_scores_on_vizwiz() -> None:
    recorded = vectors("vqa_official_vizwiz_val")
    for column, (predictor, overall) in enumerate(recorded["overall"].items(), start=1):
        total = 0.0
        for item in recorded["items"]:
            answers = item[0]
            majority = Counter(answers).most_common(1)[0][0]
            prediction = {
                "annot0": answers[0],
                "majority": majority,
                "majority_cap_dot": majority.capitalize() + ".",
                "the_majority": "the " + majority,
            }[predictor]
            score = 100 * vqa_accuracy(prediction, answers)
            assert score == pytest.approx(item[column], abs=0.006), (predictor, answers)
            total += score
        assert round(total / len(recorded["items"]), 2) == overall


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=10), st.sampled_from("abc"))
def test_leave_one_out_goes_by_position(answers: list[str], prediction: str) -> None:
    by_hand = sum(
        min(1.0, sum(other == prediction for j, other in enumerate(answers) if j != i) / 3) for i in range(len(answers))
    ) / len(answers)
    assert leave_one_out(prediction, answers) == pytest.approx(by_hand)


def test_official_vqa_normalises_only_where_annotators_differ() -> None:
    assert vqa_accuracy("Red.", ["red"] * 10, "vqa_official") == 0.0
    assert vqa_accuracy("Red.", ["red"] * 10, "vqa_always_norm") == 1.0
    assert vqa_accuracy("Red.", ["red"] * 9 + ["blue"], "vqa_official") == 1.0
    assert vqa_accuracy("two", ["2"] * 3 + ["3"] * 7, "min3") == 1.0
    assert vqa_accuracy("two", ["2"] * 3 + ["3"] * 7, "vqa_official") == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("said", "normalised"),
    [("2016.", "2016"), ("No. 7.", "no 7"), ("3.5", "3.5"), (".5", ".5"), ("5.a", "5a"), ("St. John's", "st john 's"),
     ("1,000", "1000"), ("What? Two!", "what 2"), ("the t-shirt", "t shirt"), ("." * 33, "."), ("Dont", "don't")],
)  # fmt: skip
def test_textvqas_server_by_hand(said: str, normalised: str) -> None:
    """By the rules of mmf/utils/m4c_evaluators.py (facebookresearch/mmf)."""
    assert normalise_evalai(said) == normalised


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_vqa_variant_gives_one_to_a_unanimous_answer(variant: str) -> None:
    assert vqa_accuracy("cat", ["cat"] * 10, variant) == 1.0


@pytest.mark.parametrize(("variant", "fewest"), [(v, {"min3": 3, "gqa_exact": 1}.get(v, 4)) for v in VARIANTS])
def test_too_few_answers_for_any_prediction_to_be_right_are_refused(variant: str, fewest: int) -> None:
    assert vqa_accuracy("cat", ["cat"] * fewest, variant) == 1.0
    for number in range(1, fewest):
        with pytest.raises(
            UserError, match=rf"by {variant} no prediction .* with {number} answers .* wants {fewest} .*gqa_exact"
        ):
            vqa_accuracy("cat", ["cat"] * number, variant)


def test_vqa_errors_name_what_is_known() -> None:
    with pytest.raises(UserError, match="vqa_official"):
        vqa_accuracy("a", ["a"], "oficial")
    with pytest.raises(UserError, match="list"):
        vqa_accuracy("a", "aaa")


@given(st.text(max_size=30))
def test_normalising_never_fails_and_leaves_single_spaces(text: str) -> None:
    assert "  " not in normalise(text)


def test_porter_stems_every_recorded_word_as_its_author_does() -> None:
    recorded = vectors("porter")
    assert {word: stem(word) for word in recorded} == recorded


@pytest.mark.parametrize(
    ("word", "expected"),
    [("Ponies", "poni"), ("pony", "poni"), ("hopping", "hop"), ("hoping", "hope"), ("falling", "fall"), ("agreed", "agre"),
     ("is", "is"), ("relational", "relat"), ("possibly", "possibl"), ("psychology", "psycholog"), ("adoption", "adopt"),
     ("controlling", "control")],
)  # fmt: skip
def test_porter_by_hand(word: str, expected: str) -> None:
    assert stem(word) == expected


@given(st.text("abeilnosty'", max_size=12))
def test_porter_takes_any_word_and_never_makes_it_longer(word: str) -> None:
    assert len(stem(word)) <= len(word)


def test_okvqa_stems_prediction_and_answers_and_raw_does_not() -> None:
    answers = ["hot dogs"] * 4 + ["eating"] * 6
    assert vqa_accuracy("Hot dog.", answers, "okvqa_raw") == 0.0
    assert vqa_accuracy("Hot dog.", answers, "okvqa_stemmed") == 1.0
    assert vqa_accuracy("the eats", answers, "okvqa_stemmed") == 1.0
    # answers that differ by their form only: annotators who count as one after stemming
    assert vqa_accuracy("ponies", ["pony"] * 2 + ["ponies"] * 2 + ["horse"] * 6, "okvqa_stemmed") == 1.0
    # where all ten are equal nothing is normalised, as in vqa_official
    assert vqa_accuracy("the dogs", ["dog"] * 10, "okvqa_stemmed") == 0.0
    assert vqa_accuracy("dogs", ["dog"] * 10, "okvqa_stemmed") == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [("Yes.", "yes", 1.0), ("  t-shirt ", "tshirt", 1.0), ("black  and white", "black and white", 1.0), ("a dog", "dog", 0.0),
     ("2", "two", 0.0), ("dog cat", "dog", 0.0)],
)  # fmt: skip
def test_gqa_is_exact_but_for_case_and_punctuation(prediction: str, answer: str, score: float) -> None:
    assert vqa_accuracy(prediction, [answer], "gqa_exact") == score
