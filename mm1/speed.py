"""What makes a step fast and changes nothing: chosen by the section `engine`, applied to a model before it trains.

    attention   packed documents without an S x S mask            mm1/model/packed_attention.py
    kernels     convolutions with their batch norm on a CPU       mm1/model/onednn.py, depthwise.py
    loss        fused; in chunks with engine.loss_chunk           mm1/model/loss.py
    memory      what is freed is kept; recomputed activations     engine.checkpointing, engine.checkpoint_encoder
    GPU         copies beside the computation, torch.compile, liger-kernel

Every choice depends on the configuration and the kind of processor alone, never on a measurement, so that a run that goes on does
so to the bit. Each is proven equal to the plain path in tests/test_train_step.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import UserError
from data_pipelines.batch import PackedBatch
from data_pipelines.loader import keep_freed_memory
from mm1.model import packed_attention
from mm1.model.isolation import check_decoder
from mm1.model.onednn import use_onednn

if TYPE_CHECKING:
    from data_pipelines.config import PackingConfig
    from mm1.config import EngineConfig
    from mm1.model.multimodal import MultimodalLM


def prepare(model: MultimodalLM, settings: EngineConfig, device: torch.device, packing: PackingConfig | None = None) -> None:
    """Call it before the optimiser is made and after FLOPs are counted (fused operations are not seen by torch's counter).

    `packing`: of the sequences to come. Raises UserError for a decoder that cannot take them (mm1/model/isolation.py).
    """
    _choose_attention(model, settings, device)
    if packing is not None:
        check_decoder(model.decoder, packing)
    if settings.liger:
        _liger(model, device)
    if device.type == "cpu" and settings.kernels == "auto":
        keep_freed_memory()
        if settings.precision == "fp32":
            use_onednn(model.image_encoder)
    model.loss_chunk = settings.loss_chunk
    if settings.checkpointing:
        model.decoder.gradient_checkpointing_enable()
    if settings.checkpoint_encoder:
        model.image_encoder.gradient_checkpointing()
    if settings.compile is not None:
        # A layer at a time: one graph serves all layers, and a document layout that changes breaks none.
        for layer in decoder_layers(model.decoder):
            layer.compile(backend=settings.compile, dynamic=False)
        model.image_encoder.compile(backend=settings.compile, dynamic=False)


def _choose_attention(model: MultimodalLM, settings: EngineConfig, device: torch.device) -> None:
    """Raises UserError where the decoder cannot do what was asked for; auto leaves such a decoder as it is."""
    decoder, asked = model.decoder, settings.attention
    if asked == "dense" or (asked == "auto" and device.type != "cpu"):
        return
    fits = decoder._supports_attention_backend and decoder.config._attn_implementation == "sdpa"
    if asked == "auto" and not fits:
        return
    if not fits:
        raise UserError(
            f"engine.attention={asked}: {type(decoder).__name__} does not let its attention be chosen. "
            "Set engine.attention=dense."
        )
    decoder.set_attn_implementation("flex_attention" if asked == "flex" else packed_attention.NAME)


def decoder_layers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's layers: the members of its longest list of modules."""
    return max((list(module) for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)), key=len, default=[])


def _liger(model: MultimodalLM, device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f"engine.liger=true: liger-kernel runs on GPUs, and this run is on {device.type}. Set engine.liger=false."
        )
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError("engine.liger=true: liger-kernel is not installed. pip install liger-kernel") from error
    # The loss stays ours: it is computed at labelled positions only.
    _apply_liger_kernel_to_instance(model=model.decoder, cross_entropy=False, fused_linear_cross_entropy=False)


def on_device(batches: list[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The micro-batches on the device. On a GPU each is copied while the one before it is computed, from pinned memory."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def start(batch: PackedBatch) -> PackedBatch:
        with torch.cuda.stream(stream):
            pinned: dict[str, Any] = {k: v.pin_memory() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
            return replace(batch, **pinned).to(device)

    ahead = start(batches[0])
    for i in range(len(batches)):
        torch.cuda.current_stream(device).wait_stream(stream)
        ready = ahead
        for tensor in vars(ready).values():
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(torch.cuda.current_stream(device))
        if i + 1 < len(batches):
            ahead = start(batches[i + 1])
        yield ready
