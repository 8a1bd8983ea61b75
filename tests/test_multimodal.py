"""The model: documents apart, images where their marks are, transformers' own saving, loading and generating."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.errors import UserError
from data_pipelines.batch import IGNORE, PackedBatch
from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.lanes import LaneStream
from data_pipelines.loader import PackedLoader
from mm1.model.multimodal import MultimodalLM
from tests.corpus import tokenizer, write_corpus
from tests.models import AVGPOOL, IMAGE_SIZE, LLAMA, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    corpus = write_corpus(tmp_path_factory.mktemp("corpora") / "tiny")
    data = DataConfig(str(corpus), {name: SourceConfig(name, 0.5) for name in ("captions", "interleaved")})
    packing = PackingConfig(seq_len=96, max_images=6)
    stream = LaneStream(corpus, data, packing, tokenizer(), image_tokens=4, global_batch=4, seed=0)
    return next(islice(PackedLoader(stream, image_size=IMAGE_SIZE, micro_batch=4), 1))[0]


def inputs(batch: PackedBatch, *names: str) -> dict[str, Any]:
    names = names or ("input_ids", "images", "image_slots", "document_ids", "position_ids")
    return {name: getattr(batch, name) for name in names}


def hidden(model: MultimodalLM, batch: PackedBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(batch)).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_does_not_see_another(batch: PackedBatch, attention: str) -> None:
    """Change everything in document 1, text and pictures: not one bit of the logits elsewhere moves."""
    model = tiny_model().eval()
    assert model.decoder.config._attn_implementation == "sdpa"
    model.decoder.set_attn_implementation(attention)
    before = hidden(model, batch)
    changed = PackedBatch(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
    first = changed.document_ids == 1
    text = first & (changed.input_ids != model.config.image_token_id)
    changed.input_ids[text] = (changed.input_ids[text] + 7) % 250 + 3
    for number, (row, start, _) in enumerate(changed.image_slots.tolist()):
        if first[row, start]:
            changed.images[number] = 255 - changed.images[number]
    after = hidden(model, changed)
    others = changed.document_ids > 1
    assert others.sum() > 50
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[first], after[first])


def test_packed_documents_equal_documents_alone(batch: PackedBatch) -> None:
    model = tiny_model().eval().double()
    packed = hidden(model, batch)
    for row in range(2):
        for number in range(1, int(batch.document_ids[row].max()) + 1):
            where = (batch.document_ids[row] == number).nonzero()[:, 0]
            first, last = int(where[0]), int(where[-1])
            images = [n for n, (r, s, _) in enumerate(batch.image_slots.tolist()) if r == row and first <= s <= last]
            with torch.no_grad():
                alone = model(input_ids=batch.input_ids[row : row + 1, where], images=batch.images[images]).logits[0]
            torch.testing.assert_close(packed[row, where], alone, rtol=1e-9, atol=1e-9)


def test_image_tokens_land_where_the_marks_are(batch: PackedBatch) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        features = model.encode_images(batch.images)
        embedded = model.embed(batch.input_ids, features, batch.image_slots)
        words = model.get_input_embeddings()(batch.input_ids)
    marks = batch.input_ids == model.config.image_token_id
    assert torch.equal(embedded[marks], features.flatten(0, 1))
    assert torch.equal(embedded[~marks], words[~marks])
    with torch.no_grad():
        assert torch.equal(model.embed(batch.input_ids, features, None), embedded)


def test_marks_and_images_must_agree(batch: PackedBatch) -> None:
    with pytest.raises(UserError, match="<image> marks"):
        tiny_model()(input_ids=batch.input_ids, images=batch.images[1:])
    with pytest.raises(UserError, match="image slots"):
        tiny_model()(input_ids=batch.input_ids, images=batch.images[1:], image_slots=batch.image_slots)


def test_labelled_logits_equal_all_logits_picked(batch: PackedBatch) -> None:
    model = tiny_model().eval()
    everywhere = hidden(model, batch)
    with torch.no_grad():
        output = model(**inputs(batch), labels=batch.labels)
    labelled = batch.labels != IGNORE
    torch.testing.assert_close(output.logits, everywhere[labelled])
    expected = torch.nn.functional.cross_entropy(everywhere.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.token_z, torch.logsumexp(everywhere[labelled], -1) ** 2)


def test_a_batch_without_images_still_runs_the_tower(batch: PackedBatch) -> None:
    """Every parameter gets a gradient (zero), so that no rank leaves the others waiting."""
    model = tiny_model().train()
    text = {"input_ids": torch.full((1, 8), 9), "labels": torch.full((1, 8), 9)}
    model(**text, images=batch.images[:0], image_slots=batch.image_slots[:0]).loss.backward()
    for name, parameter in [*model.image_encoder.named_parameters(), *model.connector.named_parameters()]:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_parameter_learns(batch: PackedBatch) -> None:
    model = tiny_model().train()
    model(**inputs(batch), labels=batch.labels).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("connector", ["AveragePooling", "AttentionPooling", "CAbstractor"])
def test_save_and_load_are_transformers_own(batch: PackedBatch, connector: str, tmp_path: Path) -> None:
    model = tiny_model(connector=AVGPOOL | {"_target_": f"mm1.model.connector.{connector}"}).eval()
    model.save_pretrained(tmp_path / "export")
    for load in (MultimodalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path / "export").eval()
        # close, not equal: a convolution's memory layout may differ by a bit
        torch.testing.assert_close(hidden(again, batch), hidden(model, batch))
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_untied_and_other_decoders(batch: PackedBatch, tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512}
    gpt2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0}
    for decoder in (LLAMA | {"tie_word_embeddings": False}, LLAMA | {"model_type": "qwen2"}, gpt2):
        model = tiny_model(decoder=decoder).eval()
        model.save_pretrained(tmp_path / "export")
        again = MultimodalLM.from_pretrained(tmp_path / "export").eval()
        assert torch.equal(hidden(again, batch), hidden(model, batch))


def test_generate_equals_recomputing_every_step(batch: PackedBatch) -> None:
    """Left-padded prompts with images through transformers' generate, against a loop without a cache."""
    model = tiny_model().eval()
    mark, pad = model.config.image_token_id, tokenizer().pad_token_id
    prompts = [[mark] * 4 + [70, 80, 90], [60, 61] + [mark] * 4 + [65, 66, 67, 68, 69] + [mark] * 4 + [71]]
    images = batch.images[:3]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    together = model.generate(
        input_ids=ids,
        images=images,
        attention_mask=(ids != pad).long(),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=pad,
    )
    for row, (prompt, own) in enumerate(zip(prompts, (images[:1], images[1:]), strict=True)):
        sequence = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                sequence.append(int(model(input_ids=torch.tensor([sequence]), images=own).logits[0, -1].argmax()))
        assert together[row, width:].tolist() == sequence[len(prompt) :]


def test_a_checkpoint_cannot_name_any_callable(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.connector = {"_target_": "os.system", "num_tokens": 4}
    model.save_pretrained(tmp_path / "export")
    with pytest.raises(UserError, match=r"connector\._target_"):
        MultimodalLM.from_pretrained(tmp_path / "export")
