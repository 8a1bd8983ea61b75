"""Floating-point operations of a training step, and the machine's peak: model FLOPs utilisation with the vision tower counted.

    decoder     2 N tokens + 4 L W pairs + 2 D V labels     N parameters without embeddings, L layers, W attention width, pairs =
                                                            query-key pairs that may see each other (causal, within documents),
                                                            V vocabulary
    encoder, connector                                      their own flops_per_image()
    training    3 x forward (one for the forward, two for the backward pass), 1 x for a frozen encoder

Only useful work counts: padding is in no term, recomputation neither. A run's FLOPs do not depend on what other runs have left
behind: a frozen encoder's pass counts for every image, also where its features are read from disk (mm1/features.py). Utilisation
is what the processor does: there it counts for the images that are encoded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mm1.model.decoder import parameters_without_embeddings

if TYPE_CHECKING:
    from data_pipelines.batch import PackedBatch
    from mm1.model.multimodal import MultimodalLM

# Dense peak of the matrix units in FLOP/s, from NVIDIA's data sheets (without sparsity): (bf16, TF32).
GPU_PEAKS = {
    "H100": (989e12, 495e12),
    "H200": (989e12, 495e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "B200": (2250e12, 1125e12),
}


class StepFlops:
    """Counts the FLOPs of training steps of one model."""

    def __init__(self, model: MultimodalLM, encoder_trains: bool) -> None:
        text = model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.per_token = 2 * parameters_without_embeddings(model.decoder)
        self.per_pair = 4 * text.num_hidden_layers * text.num_attention_heads * head_dim
        self.per_label = 2 * text.hidden_size * text.vocab_size
        self.encoder_forward = model.image_encoder.flops_per_image()
        """Of one image: what a frozen encoder's kept features save."""
        encoder = (3 if encoder_trains else 1) * self.encoder_forward
        self.per_image = encoder + 3 * model.connector.flops_per_image()

    def __call__(self, batch: PackedBatch) -> int:
        """Forward and backward FLOPs of one micro-batch."""
        real = batch.document_ids > 0
        positions = batch.position_ids[real]
        pairs = int((positions + 1).sum())  # position p of a document sees p + 1 keys
        text = self.per_token * int(real.sum()) + self.per_pair * pairs + self.per_label * batch.loss_tokens
        return 3 * text + self.per_image * len(batch.image_slots)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s the device could do at most: a GPU's data sheet, None for one not listed; a CPU is timed on one large product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peaks[0 if precision == "bf16" else 1] for key, peaks in GPU_PEAKS.items() if key in name), None)
    size = 1024
    generator = torch.Generator().manual_seed(0)  # its own: what trains next draws from torch's
    a, b = torch.randn(2, size, size, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
