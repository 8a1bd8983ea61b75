"""Models of a few thousand parameters, built on the spot."""

from __future__ import annotations

from typing import Any

import torch

from data_pipelines.tokens import image_token_id
from mm1.config import DecoderConfig
from mm1.model.decoder import build_decoder
from mm1.model.image_encoder import build_image_encoder
from mm1.model.multimodal import MultimodalConfig, MultimodalLM
from tests.corpus import tokenizer

IMAGE_SIZE = 16
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "image_size": IMAGE_SIZE,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ENCODER: dict[str, Any] = {"kind": "transformers", "config": VIT, "image_size": IMAGE_SIZE}
AVGPOOL: dict[str, Any] = {"_target_": "mm1.model.connector.AveragePooling", "num_tokens": 4}


def tiny_model(seed: int = 0, connector: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None) -> MultimodalLM:
    torch.manual_seed(seed)
    encoder = build_image_encoder(ENCODER, load_weights=False)
    special = {name: getattr(tokenizer(), name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    language_model = build_decoder(DecoderConfig(architecture=decoder or LLAMA), len(tokenizer()), special)
    config = MultimodalConfig(
        image_encoder=encoder.settings(),
        connector=connector or AVGPOOL,
        text_config=language_model.config,
        image_token_id=image_token_id(tokenizer()),
    )
    return MultimodalLM(config, image_encoder=encoder, decoder=language_model)


TRAIN_OVERRIDES = [
    "image_encoder=vit_tiny",
    "image_encoder.image_size=16",
    "image_encoder.patch_size=4",
    "image_encoder.config.patch_size=4",
    "image_encoder.config.hidden_size=16",
    "image_encoder.config.intermediate_size=32",
    "image_encoder.config.num_hidden_layers=1",
    "image_encoder.config.num_attention_heads=2",
    "connector=avgpool",
    "connector.num_tokens=4",
    "decoder.architecture.hidden_size=32",
    "decoder.architecture.intermediate_size=64",
    "decoder.architecture.num_hidden_layers=2",
    "packing.seq_len=96",
    "packing.max_images=4",
    "train.steps=12",
    "train.global_batch=8",
    "train.log_every=2",
    "train.checkpoint_every=6",
    "train.validation_sequences=0",
    "optim.warmup_steps=2",
    "engine.micro_batch=4",
    "engine.threads=1",
    "engine.workers=0",
]
"""A whole training run of a few seconds."""
