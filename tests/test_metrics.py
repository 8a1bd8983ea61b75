"""Metrics equal their official code on recorded vectors, and keep the invariants their definitions promise."""

from __future__ import annotations

import json
import lzma
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from eval.metrics.cider import References, cider
from eval.metrics.ptb import tokenize
from eval.metrics.vqa import VARIANTS, clean, leave_one_out, normalise, strip_punctuation, strip_words, vqa_accuracy
from eval.statistics import clustered_mean, mean_over_tasks

VECTORS = Path(__file__).parent / "vectors"


def vectors(name: str) -> Any:
    return json.loads(lzma.decompress((VECTORS / f"{name}.json.xz").read_bytes()))


# ------------------------------------------------------------------------------------------------------------------ PTB


def test_ptb_agrees_with_the_stanford_tokeniser_on_every_recorded_caption() -> None:
    differing = [caption for caption, tokens in vectors("ptb_tokenizer") if " ".join(tokenize(caption)) != tokens]
    assert differing == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("He can't; they cannot.", "he ca n't they can not"),
        ("A (red) dog", "a -lrb- red -rrb- dog"),
        ("the U.S. flag, St. Mary etc.", "the u.s. flag st. mary etc."),
        ("a fridge/freezer at 5:55 - side-by-side", "a fridge/freezer at 5:55 side-by-side"),
    ],
)
def test_ptb_quirks(caption: str, tokens: str) -> None:
    assert " ".join(tokenize(caption)) == tokens


@pytest.mark.parametrize("space", ["\r", "\v", "\f", "\u2028", "\u00a0", "  \n "])
def test_ptb_takes_every_unicode_space_for_a_space(space: str) -> None:
    assert tokenize(f"a red{space}dog") == ("a", "red", "dog")


# ---------------------------------------------------------------------------------------------------------------- CIDEr


@pytest.mark.parametrize(
    ("name", "corpus"), [("coco_official_example_1000", 0.5997905185184199), ("aac_example_2", 2.4431794637144257)]
)
def test_cider_equals_the_official_values(name: str, corpus: float) -> None:
    items = vectors(name)["items"]
    scores = cider([item["cand"] for item in items], [item["refs"] for item in items])
    assert max(abs(score - item["cider"]) for score, item in zip(scores, items, strict=True)) < 1e-9
    assert math.fsum(scores) / len(scores) == pytest.approx(corpus, abs=1e-12)


REFERENCES = [["a red circle", "one red circle"], ["two blue squares on a table"], ["a dog runs over the green grass", "a dog"]]


def test_cider_does_not_depend_on_the_order_of_images_or_references() -> None:
    candidates = ["a red circle", "a blue table", "the dog runs"]
    plain = cider(candidates, REFERENCES)
    turned = cider(candidates[::-1], [captions[::-1] for captions in REFERENCES[::-1]])
    assert turned[::-1] == pytest.approx(plain, abs=1e-12)


def test_cider_is_highest_for_the_reference_itself_and_zero_without_overlap() -> None:
    truth = [[captions[0]] for captions in REFERENCES]
    scores = cider([captions[0] for captions in truth], truth)
    assert scores[1] == pytest.approx(10.0)  # the others are shorter than four words, or share all words
    assert cider(["", "zebra", "?"], REFERENCES) == [0.0, 0.0, 0.0]


def test_cider_of_a_subset_is_that_subset_of_the_whole() -> None:
    candidates = ["a red circle", "a blue table", "the dog runs"]
    whole = cider(candidates, REFERENCES)
    images = [2, 0, 2]
    scores = References(REFERENCES).score([candidates[i] for i in images], images=images)
    assert scores == pytest.approx([whole[i] for i in images], abs=1e-12)


def test_cider_refuses_what_it_cannot_score() -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        cider(["a"], [["a"]])
    with pytest.raises(UserError, match="image 1 has no list"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="1 candidates for 2 images"):
        cider(["a"], [["a"], ["b"]])


# ------------------------------------------------------------------------------------------------------------------ VQA


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_vqa_variant_gives_one_to_a_unanimous_answer(variant: str) -> None:
    assert vqa_accuracy("cat", ["cat"] * 10, variant) == 1.0


def test_vqa_errors_name_what_is_known() -> None:
    with pytest.raises(UserError, match="vqa_official"):
        vqa_accuracy("a", ["a"], "oficial")
    with pytest.raises(UserError, match="list"):
        vqa_accuracy("a", "aaa")


@given(st.text(max_size=30))
def test_normalising_never_fails_and_leaves_single_spaces(text: str) -> None:
    assert "  " not in normalise(text)


# ----------------------------------------------------------------------------------------------------------- statistics


def test_clusters_of_one_give_the_textbook_error_and_repeats_do_not_shrink_it() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    single = clustered_mean(values, range(5))
    assert single.se == pytest.approx(math.sqrt(0.3 / 5))  # sample variance 0.3
    repeated = clustered_mean(values * 7, list(range(5)) * 7)
    assert repeated.se == pytest.approx(single.se)
    assert clustered_mean([1.0, 0.0], ["x", "x"]).se is None


def test_mean_over_tasks_weighs_tasks_equally() -> None:
    a, b = clustered_mean([1.0, 0.0], "xy"), clustered_mean([1.0] * 50, range(50))
    mean, se = mean_over_tasks([a, b])
    assert mean == 0.75
    assert a.se is not None
    assert se == pytest.approx(a.se / 2)


# --------------------------------------------------------------------------------------------------------- command line


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "eval.metrics", *arguments], capture_output=True, text=True, check=False)


def test_command_line_scores_files_and_names_mistakes(tmp_path: Path) -> None:
    for name, content in {
        "answers": {"q1": ["red"] * 10, "q2": ["2"] * 5 + ["3"] * 5},
        "predictions": {"q1": "red", "q2": "two"},
        "short": {"q1": "red"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "twice.json").write_text('{"q1": "red", "q1": "blue"}')
    answers = str(tmp_path / "answers.json")
    done = run_cli("vqa", "--answers", answers, "--predictions", str(tmp_path / "predictions.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"] == {"q1": 1.0, "q2": 1.0}
    short = run_cli("vqa", "--answers", answers, "--predictions", str(tmp_path / "short.json"))
    assert short.returncode == 2
    assert "'q2'" in short.stderr
    twice = run_cli("vqa", "--answers", answers, "--predictions", str(tmp_path / "twice.json"))
    assert twice.returncode == 2
    assert "'q1' stands there twice" in twice.stderr
