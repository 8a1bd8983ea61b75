"""The paper's base configuration, checked by shapes and counts on the meta device; the learning-rate law; the schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from configs.command import compose
from mm1.config import OptimConfig, TrainConfig
from mm1.flops import StepFlops
from mm1.model.decoder import build_decoder, parameters_without_embeddings
from mm1.model.image_encoder import build_image_encoder
from mm1.model.multimodal import MultimodalConfig, MultimodalLM
from mm1.optim import learning_rate, peak_learning_rate

SPECIAL = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}


def on_meta(config: TrainConfig, vocabulary: int = 32000) -> MultimodalLM:
    """The model of a configuration without weights or memory."""
    with torch.device("meta"):
        encoder = build_image_encoder(config.image_encoder.settings() | {"weights": None}, load_weights=False)
        decoder = build_decoder(config.decoder, vocabulary, SPECIAL)
        settings = MultimodalConfig(
            image_encoder=config.image_encoder.settings(),
            connector=config.connector.settings(encoder.grid),
            text_config=decoder.config,
            image_token_id=2,
        )
        return MultimodalLM(settings, image_encoder=encoder, decoder=decoder)


def test_the_papers_base_configuration() -> None:
    config = compose("train", TrainConfig, ["scale=mm1"])
    assert (config.packing.seq_len, config.train.global_batch, config.packing.max_images) == (4096, 512, 16)
    model = on_meta(config)
    assert model.image_encoder.grid == (24, 24)
    assert model.image_encoder.width == 1024
    assert sum(p.numel() for p in model.image_encoder.parameters()) == pytest.approx(304e6, rel=0.01)
    assert parameters_without_embeddings(model.decoder) == pytest.approx(1.2e9, rel=0.02)
    # Six RegNet blocks of 1,024 channels and the readout: connectors.md's arithmetic, 15.8M + 6.3M, and 0.6M of positions.
    assert sum(p.numel() for p in model.connector.parameters()) == pytest.approx(15.8e6 + 6.3e6 + 576 * 1024, rel=0.01)
    images = torch.zeros(2, 3, 336, 336, dtype=torch.uint8, device="meta")
    assert model.encode_images(images).shape == (2, 144, 2048)
    # One image: 382 GFLOPs of tower forward (open_clip's profile), thrice that to train it.
    forward = 382e9 + model.connector.flops_per_image()
    assert StepFlops(model, encoder_trains=True).per_image == pytest.approx(3 * forward, rel=0.02)


@pytest.mark.parametrize(("name", "parameters"), [("mm1_9m", 9e6), ("mm1_85m", 85e6), ("mm1_302m", 302e6), ("mm1_1b2", 1.2e9)])
def test_decoder_sizes_are_the_papers(name: str, parameters: float) -> None:
    config = compose("train", TrainConfig, [f"decoder={name}"])
    with torch.device("meta"):
        decoder = build_decoder(config.decoder, 32000, SPECIAL)
    assert parameters_without_embeddings(decoder) == pytest.approx(parameters, rel=0.025)


@pytest.mark.parametrize("scale", ["tiny", "small", "mm1"])
@pytest.mark.parametrize(
    "ablation",
    ["connector_avgpool", "connector_attnpool", "connector_cabstractor", "data_captions_only", "data_interleaved_only",
     "data_no_text", "resolution_high", "encoder_frozen"],
)  # fmt: skip
def test_every_ablation_composes_at_every_scale_and_changes_one_thing(scale: str, ablation: str) -> None:
    base = compose("train", TrainConfig, [f"scale={scale}"]).identity()
    changed = compose("train", TrainConfig, [f"scale={scale}", f"+ablation={ablation}"]).identity()
    sections = {key for key in base if base[key] != changed[key]}
    expected = {"connector": {"connector"}, "data": {"data"}, "resolution": {"image_encoder"}, "encoder": {"image_encoder"}}
    assert sections == (set() if ablation == "connector_cabstractor" else expected[ablation.partition("_")[0]])


@pytest.mark.parametrize(
    ("n", "rate"), [(9e6, 6.7e-4), (85e6, 2.6e-4), (302e6, 1.5e-4), (1.2e9, 8.6e-5), (3e9, 5.8e-5), (30e9, 2.2e-5)]
)
def test_the_learning_rate_law(n: float, rate: float) -> None:
    assert peak_learning_rate(int(n)) == pytest.approx(rate, rel=0.03)


def test_the_schedule_warms_up_and_ends_at_a_tenth() -> None:
    settings = OptimConfig(warmup_steps=10)
    rates = [learning_rate(step, 1.0, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(10, 1.0, 11, settings) == 1.0  # the only step after warming up
