"""Decoders that would let packed documents leak into each other, or lose a window, are refused before they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import UserError
from data_pipelines.config import PackingConfig
from mm1.model import isolation, packed_attention
from mm1.model.isolation import check_decoder
from tests.corpus import write_corpus
from tests.models import LLAMA
from tests.test_trainer import train

SMALL = LLAMA | {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TYPES = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
MISTRAL = SMALL | {"model_type": "mistral", "sliding_window": 4}
GEMMA = SMALL | {"model_type": "gemma3_text", "sliding_window": 4} | TYPES
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LFM2 = SMALL | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "conv_L_cache": 3}
MAMBA = {"model_type": "mamba", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
BLOOM = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
PACKING = PackingConfig(seq_len=32, max_images=2)


def decoder(architecture: dict[str, Any], implementation: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model.train()


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [(a, i) for a in (SMALL, MISTRAL, GEMMA) for i in ("sdpa", "eager", "packed", "flex_attention")] + [(GPT2, "packed")],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_decoders_that_attend_pass_and_stay_as_they_are(architecture: dict[str, Any], implementation: str) -> None:
    model = decoder(architecture, implementation)
    generator, settings = torch.get_rng_state(), model.config.to_dict()
    check_decoder(model, PACKING)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.config.to_dict() == settings
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (LFM2, r"Lfm2ForCausalLM.*what stands before a document's first token.*packing\.isolate_documents=false"),
        (MAMBA, r"MambaForCausalLM.*takes no mask.*Take a decoder that attends in every layer\.$"),
        (BLOOM, r"BloomForCausalLM.*takes no mask.*Take a decoder that attends in every layer\.$"),
    ],
    ids=["lfm2", "mamba", "bloom"],
)
def test_decoders_whose_documents_leak_are_refused_by_name(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_decoder(decoder(architecture), PACKING)


def test_a_convolution_across_borders_may_be_wanted() -> None:
    check_decoder(decoder(LFM2), PackingConfig(seq_len=32, max_images=2, isolate_documents=False))


@pytest.mark.parametrize("architecture", [MISTRAL, GEMMA], ids=lambda a: a["model_type"])
def test_a_window_that_would_be_lost_is_noticed(architecture: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a decoder whose layers do not tell their attention of it; a sequence within the window loses nothing."""
    monkeypatch.setattr(packed_attention, "causal_mask", lambda length, window, device: torch.ones(length, length).tril() > 0)
    with pytest.raises(UserError, match=r"some layers see 4 tokens back, and of packing\.seq_len=32 that would be lost"):
        check_decoder(decoder(architecture, "sdpa"), PACKING)
    check_decoder(decoder(architecture | {"sliding_window": 32}, "sdpa"), PACKING)


def test_what_packed_attention_alone_loses_is_left_to_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "document_segments", lambda ids: torch.zeros(1, 1, 0, 3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"packed attention.*Set engine\.attention=dense\.$"):
        check_decoder(decoder(SMALL, "packed"), PACKING)


def test_a_table_of_positions_that_is_too_short_names_both(home: Path) -> None:
    with pytest.raises(UserError, match=r"packing\.seq_len=65: decoder GPT2LMHeadModel has positions for 64 tokens"):
        check_decoder(decoder(GPT2), PackingConfig(seq_len=65, max_images=2))
    check_decoder(decoder(GPT2), PackingConfig(seq_len=64, max_images=2))
    check_decoder(decoder(SMALL | {"max_position_embeddings": 8}), PACKING)  # rotary: goes on


def test_a_training_starts_with_the_check(home: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    output = train(
        home, corpus, "decoder.architecture={model_type: lfm2}", "+decoder.architecture.layer_types=[conv,conv]", status=2
    )
    assert "Lfm2ForCausalLM" in output
    assert isolation.__name__ not in output  # a message, no traceback
