"""The optimiser's laws: peak learning rate, weight decay, schedule, parameter groups.

eta(N) = exp(-0.4214 ln N - 0.5535)      N = decoder parameters without embeddings (MM1, section 3.1; searched at 9M to 1.2B)
lambda = 0.1 eta                         decoupled weight decay; torch's AdamW multiplies by the learning rate itself, so it
                                         is told 0.1
lr(t)  = eta * t / warmup                while warming up, then a cosine from eta to final_lr * eta at the last step
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mm1.config import OptimConfig, TrainConfig
    from mm1.model.multimodal import MultimodalLM


MM1_LAW = (-0.4214, -0.5535)


def peak_learning_rate(decoder_parameters: int, law: tuple[float, float] = MM1_LAW) -> float:
    """exp(a ln N + b), by default MM1's; `decoder_parameters` counts no embeddings. 9M: 6.7e-4, 1.2B: 8.6e-5."""
    return math.exp(law[0] * math.log(decoder_parameters) + law[1])


def learning_rate(step: int, peak: float, total_steps: int, settings: OptimConfig) -> float:
    """Of step 0, 1, ... total_steps - 1. The first step already moves (1 / warmup of the peak); the last one is at the floor,
    unless it is the only one after the warm-up: that is at the peak."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total_steps - 1 - settings.warmup_steps)
    return peak * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def parameter_groups(model: MultimodalLM, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW; each carries `lr_scale`, which the trainer multiplies into the schedule's rate.

    Frozen parts have their gradients switched off here. Vectors (biases, norms, layer scales) and the decoder's token embeddings,
    with output embeddings tied to them, are not decayed. Everything else of two or more dimensions is: matrices, kernels, output
    embeddings of their own, and also tables of positions, class tokens and a connector's latents.
    """
    parts = {
        "image_encoder": (model.image_encoder, config.image_encoder.train, config.image_encoder.lr_scale),
        "connector": (model.connector, "full", 1.0),
        "decoder": (model.decoder, config.decoder.train, config.decoder.lr_scale),
    }
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    groups: list[dict[str, Any]] = []
    for name, (module, train, scale) in parts.items():
        module.requires_grad_(train == "full")
        if train == "frozen":
            continue
        decayed: list[torch.nn.Parameter] = []
        plain: list[torch.nn.Parameter] = []
        for parameter in module.parameters():
            (plain if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
        for label, members, decay in (("decayed", decayed, config.optim.weight_decay), ("plain", plain, 0.0)):
            if members:
                groups.append({"name": f"{name}.{label}", "params": members, "weight_decay": decay, "lr_scale": scale})
    return groups
