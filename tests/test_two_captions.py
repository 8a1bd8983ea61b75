"""A second source of captions: what the synthetic ones say, which pictures have them, how own shards bring some, its loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.command import compose
from configs.errors import UserError
from data_pipelines.corpora import starter
from data_pipelines.corpora.building import CorpusBuilder
from data_pipelines.corpora.config import ConvertConfig, ShapesConfig, StarterConfig, StarterSyntheticConfig, TarsConfig
from data_pipelines.corpora.pictures import DROPPED, KNOWN, TRAIN, VALIDATION, Picture
from data_pipelines.corpora.synthetic import LEAST_SHARE, MEDIA, TEMPLATES, colours_of, describe
from data_pipelines.document import Image, Origin
from data_pipelines.formats import read_document
from data_pipelines.prepare import prepare, refuse_other_settings
from data_pipelines.reader import read_all
from data_pipelines.shards import Manifest, SplitWriter
from mm1.config import TrainConfig
from tests.corpus import COLOURS, square, tokenizer, write_corpus
from tests.models import TRAIN_OVERRIDES, tiny_model


def picture(number: int, split: str = TRAIN, **more: object) -> Picture:
    made = Picture(f"google/{number}", "google", f"c{number}", f"thing {number}", [f"thing {number}"], b"", split=split)
    made.image = square(COLOURS[number % len(COLOURS)])
    return replace(made, **more)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- what they say


def test_a_description_has_the_name_the_medium_the_colours_and_what_is_known() -> None:
    told = picture(1, name="fire engine", colours={"red": 0.6, "black": 0.2, "blue": LEAST_SHARE / 2}, about="a large truck")
    for seed in range(8):
        text = describe(told, seed).lower()
        assert "fire engine" in text
        assert MEDIA["google"] in text
        assert text.endswith("it is mostly red and black. a large truck.")
        assert text == describe(told, seed).lower()
    assert len({describe(told, seed) for seed in range(20)}) == len(TEMPLATES)


def test_a_description_invents_nothing_and_ends_no_sentence_twice() -> None:
    bare = describe(picture(1, style="never heard of", name="A little rabbit."), 0)
    assert "colour" not in bare
    assert "a picture" in bare.lower()
    assert ".." not in bare
    assert describe(picture(2, about="The capital is Paris."), 0).endswith(" The capital is Paris.")
    assert "Its main colour is blue." in describe(picture(3, colours={"blue": 0.5}), 0)


def test_colours_are_named_by_their_share() -> None:
    shares = {"red": 0.2, "yellow": 0.4, "green": 0.2, "blue": 0.13, "black": 0.0}
    assert colours_of(picture(1, colours=shares)) == ["yellow", "green", "red"]


def test_each_pictures_description_is_on_the_pictures_own_side(tmp_path: Path) -> None:
    sides = [TRAIN] * 9 + [VALIDATION] * 3 + [KNOWN, DROPPED]
    pictures = [picture(number, split) for number, split in enumerate(sides)]
    builder = CorpusBuilder(tmp_path / "made")
    config = StarterConfig(vocab_size=300)
    starter.write_captions(builder, config, {"train": [(p.image, p.name) for p in pictures[:9]], "val": []})
    starter.write_synthetic_captions(builder, config, pictures)
    manifest = builder.finish(recipe="starter", tasks={}, packages=[], settings={}, tokenizer=builder.tokenizer(300))
    assert manifest.split("captions", "train").samples == manifest.split("captions_synthetic", "train").samples == 9
    for split in (TRAIN, VALIDATION):
        found = {members["txt"].decode(): members["webp"] for members in read_all(tmp_path / "made", "captions_synthetic", split)}
        assert found == {describe(p, config.seed): p.image for p in pictures if p.split == split}


# ------------------------------------------------------------------------------------------------------------- own shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("plain", "rewritten"):
        writer = SplitWriter(folder, name, "train", format="img2dataset", shard_bytes=900)
        for number in range(30):
            writer.write({"png": square(COLOURS[number % 8], 17), "txt": f"{name} caption {number}"}, images=1)
        assert len(writer.close().shards) > 1
    return folder


@pytest.mark.parametrize("recipe", [TarsConfig, ConvertConfig])
def test_own_shards_may_bring_a_second_source(
    recipe: type[TarsConfig | ConvertConfig], shards: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = recipe(
        recipe=recipe().recipe,
        name="mine",
        captions=f"{shards}/plain-*.tar",
        captions_synthetic=f"{shards}/rewritten-*.tar",
        vocab_size=300,
        val_share=0.1,
    )
    folder = prepare(both)
    for members in read_all(folder, "captions_synthetic", "train"):
        image, text = read_document("img2dataset", members, Origin("captions_synthetic", members.shard, members.key)).parts
        assert isinstance(image, Image)
        assert isinstance(text, str)
        assert "rewritten" in text
    advice = capsys.readouterr().out.rsplit("mm1.train ", 1)[1].split()
    data = compose("train", TrainConfig, advice).data
    ratios = {name: source.ratio for name, source in data.sources.items()}
    assert ratios == {"captions": 1.0, "captions_synthetic": 0.0, "interleaved": 0.0, "text": 0.0}
    prepare(replace(both, captions=None, name="rewritten"))
    advice = capsys.readouterr().out.rsplit("mm1.train ", 1)[1].split()
    assert compose("train", TrainConfig, advice).data.sources["captions_synthetic"].ratio == 1.0


def test_a_corpus_made_before_there_was_a_second_source_is_not_taken_for_one_that_has_it(tmp_path: Path) -> None:
    old = Manifest("starter", "starter", settings={"config": {"recipe": "starter", "seed": 0}})
    refuse_other_settings(old, StarterConfig(), tmp_path)
    with pytest.raises(UserError, match=r"synthetic_captions=False \(asked: True\)"):
        refuse_other_settings(old, StarterSyntheticConfig(), tmp_path)
    with pytest.raises(UserError, match=r"recipe=starter \(asked: shapes\)"):
        refuse_other_settings(old, ShapesConfig(), tmp_path)


# ---------------------------------------------------------------------------------------------------------- held-out loss


def test_each_source_has_a_held_out_loss_of_its_own(tmp_path: Path) -> None:
    """Of two sources of captions as of one alone, whatever their ratios: a mean over both would hide what one does."""
    from mm1.train import validation_batches
    from mm1.trainer import validation_losses

    corpus = write_corpus(tmp_path / "corpus")
    manifest = Manifest.load(corpus)
    for split in ("train", "val"):
        writer = SplitWriter(corpus, "captions_synthetic", split, format="img2dataset")
        for number in range(12):
            writer.write({"png": square(COLOURS[number % 8]), "txt": f"zebra zebra {number} zebra"}, images=1)
        manifest.splits.setdefault("captions_synthetic", {})[split] = writer.close()
    manifest.save(corpus)
    given = [*TRAIN_OVERRIDES, f"data.corpus={corpus}", "train.validation_sequences=4"]
    both = validation_batches(compose("train", TrainConfig, ["data=two_captions", *given]), corpus, tokenizer())
    assert set(both) == {"captions", "captions_synthetic", "interleaved", "text"}
    model = tiny_model()
    losses = validation_losses(model, both, torch.device("cpu"))
    assert set(losses) == {f"loss_{name}" for name in both} | {
        "loss_captions_shuffled_images",
        "loss_captions_synthetic_shuffled_images",
    }
    alone = validation_losses(model, {"captions_synthetic": both["captions_synthetic"]}, torch.device("cpu"))
    assert alone["loss_captions_synthetic"] == losses["loss_captions_synthetic"] != losses["loss_captions"]
    without = validation_batches(compose("train", TrainConfig, given), corpus, tokenizer())
    assert validation_losses(model, without, torch.device("cpu"))["loss_captions"] == losses["loss_captions"]
