"""The decoder: any transformers causal language model, built from a configuration or loaded from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mm1.config import DecoderConfig


def decoder_architecture(settings: DecoderConfig) -> PretrainedConfig:
    """The transformers configuration the settings name. Raises UserError for an unknown model type or an unreadable path."""
    from transformers import AutoConfig

    if settings.path is not None:
        if not (Path(settings.path) / "config.json").is_file():
            raise UserError(f"decoder.path={settings.path}: no config.json there. Give a folder written by save_pretrained.")
        return AutoConfig.from_pretrained(settings.path, local_files_only=True)
    architecture: dict[str, Any] = dict(settings.architecture)
    model_type = architecture.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **architecture)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"decoder.architecture (model_type={model_type}): {str(error).splitlines()[0][:300]}") from error


def build_decoder(settings: DecoderConfig, vocab_size: int, special: dict[str, int | None]) -> PreTrainedModel:
    """A decoder whose vocabulary holds the tokeniser's, in float32 on the CPU.

    `special`: token ids by name (eos_token_id, bos_token_id, pad_token_id). New weights come from torch's global generator, which
    the caller has seeded; weights from `decoder.path` are read from safetensors only, their vocabulary is enlarged if need be.
    """
    from transformers import AutoModelForCausalLM

    architecture = decoder_architecture(settings)
    if settings.path is not None:
        import torch

        decoder = AutoModelForCausalLM.from_pretrained(
            settings.path, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        embeddings: Any = decoder.get_input_embeddings()
        if embeddings.num_embeddings < vocab_size:
            decoder.resize_token_embeddings(vocab_size)
    else:
        architecture.vocab_size = vocab_size
        decoder = AutoModelForCausalLM.from_config(architecture)
    for name, value in special.items():
        setattr(decoder.config, name, value)
    return decoder


def parameters_without_embeddings(decoder: PreTrainedModel) -> int:
    """N of the learning-rate law: all parameters but the input and output embeddings."""
    ends = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    embeddings = {id(p) for module in ends if module for p in module.parameters()}
    return sum(p.numel() for p in decoder.parameters() if id(p) not in embeddings)
