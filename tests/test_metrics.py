"""Caption metrics equal their official code on recorded vectors, and keep the invariants their definitions promise."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cider import cider_rows
from configs.errors import UserError
from eval.metrics.bleu import bleu
from eval.metrics.captions import METRICS, score_captions
from eval.metrics.cider import References, cider
from eval.metrics.java import meteor, spice
from eval.metrics.ptb import scan, tokenize
from eval.metrics.rouge import longest_common_subsequence, rouge_l
from eval.statistics import clustered_mean, mean_over_tasks
from tests.recorded import vectors

RECORDED = ("coco_official_example_1000", "aac_example_2")


def captions(name: str) -> tuple[list[str], list[list[str]], dict[str, Any], list[dict[str, Any]]]:
    """(candidates, references, recorded corpus values, recorded items)."""
    recorded = vectors(name)
    items = recorded["items"]
    return [item["cand"] for item in items], [item["refs"] for item in items], recorded["corpus"], items


# ---------------------------------------------------------------------------------------------------------------------------- PTB


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


@given(st.lists(st.sampled_from(["a", "Dog", "St", "etc", "cannot", "Gonna", ".", "\t", "\u00a0", " "]), max_size=6).map("".join))
def test_ptb_takes_the_short_way_only_where_it_changes_nothing(caption: str) -> None:
    assert tokenize(caption) == scan(caption)


# -------------------------------------------------------------------------------------------------------------------------- CIDEr


@pytest.mark.parametrize(
    ("name", "corpus"), [("coco_official_example_1000", 0.5997905185184199), ("aac_example_2", 2.4431794637144257)]
)
def test_cider_equals_the_official_values(name: str, corpus: float) -> None:
    candidates, references, _, items = captions(name)
    scores = cider(candidates, references)
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


def test_kept_references_score_each_candidate_set_as_a_fresh_call_does() -> None:
    kept = References(REFERENCES)
    tokens = References.of_tokens([[tokenize(caption) for caption in captions] for captions in REFERENCES])
    for candidates in (
        ["a red circle", "a blue table", "the dog runs"],
        ["two", "blue blue squares", "a zebra zebra dog"],
        ["", "", ""],
    ):
        fresh = References(REFERENCES).score(candidates)
        assert kept.score(candidates) == fresh
        assert cider(candidates, REFERENCES) == fresh
        assert tokens.score_tokens([tokenize(candidate) for candidate in candidates]) == fresh


def by_definition(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D straight from its formula, with dictionaries."""

    def grams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    def vector(tokens: list[str], n: int) -> dict[tuple[str, ...], float]:
        weights = {}
        for gram in set(grams(tokens, n)):
            holding = sum(any(gram in grams(caption, n) for caption in image) for image in references)
            weights[gram] = grams(tokens, n).count(gram) * (math.log(len(references)) - math.log(max(1, holding)))
        return weights

    def cosine(mine: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
        dot = sum(min(mine[g], theirs[g]) * theirs[g] for g in mine if g in theirs)
        scale = math.sqrt(sum(w * w for w in mine.values()) * sum(w * w for w in theirs.values()))
        return dot / scale if scale else 0.0

    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        total = 0.0
        for reference in captions:
            delta = len(grams(candidate, 2)) - len(grams(reference, 2))
            total += sum(cosine(vector(candidate, n), vector(reference, n)) for n in (1, 2, 3, 4)) * math.exp(-(delta**2) / 72)
        scores.append(10 / 4 * total / len(captions))
    return scores


words = st.lists(st.sampled_from("abcd"), max_size=6)


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcdxy"), max_size=6), st.lists(words, min_size=1, max_size=3)),
        min_size=2,
        max_size=4,
    )
)
def test_cider_is_its_formula(images: list[tuple[list[str], list[list[str]]]]) -> None:
    """Also for what real captions seldom hold: empty ones, repeated words that no reference knows, lengths below four."""
    candidates, references = [image[0] for image in images], [image[1] for image in images]
    scores = References.of_tokens(references).score_tokens(candidates)
    assert scores == pytest.approx(by_definition(candidates, references), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------------ BLEU, ROUGE-L


@pytest.mark.parametrize("name", RECORDED)
def test_bleu_equals_the_official_values(name: str) -> None:
    candidates, references, corpus, items = captions(name)
    found = bleu(candidates, references)
    assert found.corpus == pytest.approx(corpus["Bleu"], abs=1e-12)
    for order in range(4):
        assert found.items[order] == pytest.approx([item["bleu"][order] for item in items], abs=1e-12)


def test_bleu_takes_the_closest_reference_length_and_the_shorter_at_a_tie() -> None:
    assert bleu(["a b c"], [["a b c d e", "a b"]]).corpus[0] == pytest.approx(1.0)  # 2 is closer to 3 than 5 is
    assert bleu(["a b c"], [["a b c d", "a b"]]).corpus[0] == pytest.approx(1.0)  # both 1 away
    assert bleu(["a b c"], [["a b c d e"]]).corpus[0] == pytest.approx(math.exp(1 - 5 / 3))


def test_bleu_clips_a_repeated_word_at_its_highest_count_in_one_reference() -> None:
    assert bleu(["a a a a"], [["a b a c", "a"]]).corpus[0] == pytest.approx(0.5)


def test_bleu_of_the_corpus_sums_counts_and_its_error_is_the_jackknife() -> None:
    candidates, references = ["a red dog", "the cat", "b"], [["a red dog runs"], ["the cat"], ["c"]]
    found = bleu(candidates, references)
    assert found.corpus[0] == pytest.approx(5 / 6 * math.exp(1 - 7 / 6))
    without = [
        bleu([c for j, c in enumerate(candidates) if j != i], [r for j, r in enumerate(references) if j != i]).corpus[0]
        for i in range(3)
    ]
    mean = sum(without) / 3
    assert found.standard_errors[0] == pytest.approx(math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in without)))
    assert bleu(candidates[:1], references[:1]).standard_errors == [None] * 4


@pytest.mark.parametrize("name", RECORDED)
def test_rouge_l_equals_the_official_values(name: str) -> None:
    candidates, references, corpus, items = captions(name)
    scores = rouge_l(candidates, references)
    assert scores == pytest.approx([item["rouge_l"] for item in items], abs=1e-12)
    assert math.fsum(scores) / len(scores) == pytest.approx(corpus["ROUGE_L"], abs=1e-12)


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    # best precision 1 (first), best recall 1 (second): 1, where either reference alone gives less
    assert rouge_l(["a b"], [["a b c d e f", "a"]]) == pytest.approx([1.0])
    assert rouge_l(["a b"], [["a b c d e f"]])[0] < 0.6
    assert rouge_l(["", ""], [["a"], [""]]) == [0.0, 1.0]  # the official code's empty token


@given(st.text("abc", max_size=70), st.text("abc", max_size=70))
def test_the_longest_common_subsequence_is_the_tables(first: str, second: str) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider, meteor])
def test_caption_metrics_refuse_what_they_cannot_score(metric: Any) -> None:
    with pytest.raises(UserError, match="1 candidates for 2 images"):
        metric(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="image 1 has no list"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="image 0 has no list"):
        metric(["a", "b"], ["a", ["b"]])
    with pytest.raises(UserError, match="no images given"):
        metric([], [])


# --------------------------------------------------------------------------------------------------------------- METEOR and SPICE


@pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None, reason="needs Java and the extra `java`"
)
def test_meteor_equals_the_official_values() -> None:
    candidates, references, _, items = captions("coco_official_example_1000")
    recorded = [item["meteor"] for item in items if "meteor" in item]
    assert len(recorded) == 40
    _, scores = meteor(candidates[:40], references[:40])
    assert scores == pytest.approx(recorded, abs=1e-9)


def test_without_java_or_its_package_meteor_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for metric in (meteor, spice):
        with pytest.raises(UserError, match="default-jre-headless"):
            metric(["a"], [["a"]])
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'mm1-ablations\[java\]'"):
        meteor(["a"], [["a"]])


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="needs the extra `java`")
def test_a_java_that_fails_is_named_and_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no room for the heap' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="no room for the heap"):
        meteor(["a"], [["a"]])


# ----------------------------------------------------------------------------------------------------------- all of them, by name


def test_every_metric_by_name_is_the_metric_itself() -> None:
    candidates, references, corpus, _ = captions("coco_official_example_1000")
    names = [name for name in METRICS if name not in ("meteor", "spice")]
    scores = score_captions(names, candidates, references)
    assert list(scores) == names
    official = [corpus["CIDEr"], *corpus["Bleu"], corpus["ROUGE_L"]]
    assert [score.corpus for score in scores.values()] == pytest.approx(official, abs=1e-12)
    deviation = math.sqrt(sum((x - corpus["CIDEr"]) ** 2 for x in scores["cider_d"].items) / 999)
    assert scores["cider_d"].standard_error == pytest.approx(deviation / math.sqrt(1000))
    assert scores["bleu_4"].standard_error == pytest.approx(bleu(candidates, references).standard_errors[3])


def test_the_benchmark_without_its_peer_says_so_and_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)  # as if it were not installed
    rows = cider_rows(1)
    assert [row.case for row in rows] == ["cider", "cider_cached", "cider_captions"]
    for row in rows:
        assert row.ours > 0
        assert math.isnan(row.peer)
        assert "mm1-ablations[java]" in row.peer_name


def test_metrics_are_checked_by_name_before_anything_is_computed() -> None:
    with pytest.raises(UserError, match=r"'bleu'.*bleu_4"):
        score_captions(["bleu"], [], [])
    with pytest.raises(UserError, match="named twice"):
        score_captions(["rouge_l", "rouge_l"], [], [])


# --------------------------------------------------------------------------------------------------------------------- statistics


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
