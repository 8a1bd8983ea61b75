"""A preparation replaces corpora and nothing else: what it reads, and what others keep, stays where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.command import compose
from configs.errors import UserError
from data_pipelines.corpora.building import CorpusBuilder
from data_pipelines.corpora.config import ConvertConfig, CorpusConfig, ShapesConfig, TarsConfig
from data_pipelines.prepare import SCHEMAS, PrepareConfig, prepare
from tests.corpus import square, tokenizer, write_corpus
from tests.test_tars import caption, prose, write

SMALL = ShapesConfig(name="mine", captions=4, interleaved=2, text=4, validation=1, queries=2, support=2, held_out_pairs=2)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def refused(config: CorpusConfig, kept: Path, said: str, *, force: bool = False) -> None:
    before = contents(kept)
    with pytest.raises(UserError, match=said):
        prepare(config, force=force)
    assert before
    assert contents(kept) == before


@pytest.mark.parametrize("force", [False, True])
def test_shards_in_the_corpus_own_place_stay_there(home: Path, force: bool) -> None:
    write(home / "data/mine/a.tar", [caption(i) for i in range(4)])
    refused(TarsConfig(name="mine", captions=str(home / "data/mine/*.tar"), vocab_size=300), home, "mine.*no corpus", force=force)


def test_rows_in_the_corpus_own_place_stay_there(home: Path) -> None:
    rows = home / "data/books/a.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(json.dumps({"text": f"book {i}"}) + "\n" for i in range(4)))
    refused(ConvertConfig(name="books", text=str(rows), vocab_size=300), home, "books.*no corpus")


def test_a_folder_of_anything_else_is_no_place_for_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    refused(ShapesConfig(name=str(tmp_path / "thesis")), tmp_path, "thesis.*no corpus", force=True)
    (tmp_path / "file").write_text("a file")
    refused(ShapesConfig(name=str(tmp_path / "file")), tmp_path, "file.*no corpus", force=True)


@pytest.mark.parametrize("key", ["captions", "text", "tokenizer", "image_store"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_corpus_that_holds_an_input_is_not_replaced(home: Path, tmp_path: Path, key: str, linked: bool) -> None:
    folder = write_corpus(home / "data/mine")
    write(tmp_path / "cap.tar", [caption(i) for i in range(4)])
    write(tmp_path / "text.tar", [prose(i) for i in range(4)])
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(square("red"))
    places = {"captions": "captions-train-000000.tar", "text": "text-train-000000.tar"}
    place = folder / {**places, "tokenizer": "tokenizer", "image_store": "pictures"}[key]
    if linked:  # from outside into the corpus
        (tmp_path / f"link-{place.name}").symlink_to(place)
        place = tmp_path / f"link-{place.name}"
    settings = {"captions": str(tmp_path / "cap.tar"), "text": str(tmp_path / "text.tar"), key: str(place)}
    config = ConvertConfig(name="mine", vocab_size=300, **settings)
    refused(config, folder, f"corpus.{key}: .*{place.name} lies in", force=True)
    if key != "image_store":
        refused(TarsConfig(name="mine", vocab_size=300, **settings), folder, f"corpus.{key}: .*{place.name} lies in", force=True)


def test_a_corpus_and_an_empty_folder_are_replaced(home: Path) -> None:
    (home / "data/mine").mkdir(parents=True)
    folder = prepare(SMALL)
    made = contents(folder)
    (folder / "stray").write_text("of the corpus before")
    assert prepare(SMALL, force=True) == folder
    assert contents(folder) == made


def test_what_came_to_lie_there_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"late.*no corpus"), CorpusBuilder(tmp_path / "late") as builder:  # noqa: PT012
        builder.text("train", "a text")
        tokenizer().save_pretrained(builder.partial / "tokenizer")
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "notes").write_text("written while the preparation ran")
        builder.finish(recipe="tests", tasks={}, packages=[], settings={}, tokenizer="tokenizer")
    assert contents(tmp_path) == {tmp_path / "late" / "notes": b"written while the preparation ran"}


@pytest.mark.parametrize("name", ["", ".", ".."])
@pytest.mark.parametrize("recipe", [*SCHEMAS, "tars", "convert"])
def test_a_name_must_name_a_folder_of_its_own(recipe: str, name: str) -> None:
    with pytest.raises(UserError, match=f"corpus.name='{name}': names no folder"):
        compose(
            "prepare",
            PrepareConfig,
            [f"corpus={recipe}", f"corpus.name={name}", *(["corpus.text=a.tar"] * (recipe in ("tars", "convert")))],
        )
