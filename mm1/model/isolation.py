"""Whether a decoder makes of packed documents what it makes of each alone: tried on a dozen tokens before it trains.

    [document 1 | document 2] -> logits of document 2      must not move when document 1 does,
    [document 2]              -> logits                    and must be these

A mask keeps documents apart where layers attend. It does nothing in a convolution or a recurrence, some decoders take no mask of
pairs at all, and a window that is lost between transformers and the attention shows in no loss curve. No list of model types
says which: the decoder itself does. Nothing is drawn from torch's generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import UserError
from mm1.model.packed_attention import NAME, documents_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from data_pipelines.config import PackingConfig

FIRST, SECOND = 7, 9
"""Tokens of the two documents."""
LEAK, ROUNDING = 1e-5, 1e-4
"""Of the largest logit. The leak is 0 but for experts, whose products change their shape with the other document's tokens; the
narrow convolution of an untrained LFM2 of width 32 moves its logits by 2e-4."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""How transformers' configurations and layers name how far back a layer sees."""


def check_decoder(decoder: PreTrainedModel, packing: PackingConfig) -> None:
    """Raises UserError naming the decoder, the key and what to set where it cannot train on such sequences.

    The decoder is on the CPU, in float32, with the attention it will train with; a few passes over at most 16 tokens.
    """
    training, implementation = decoder.training, decoder.config._attn_implementation
    decoder.eval()
    try:
        # First: what rotary positions keep of a long sequence goes with the short ones that follow.
        _check_positions(decoder, packing.seq_len)
        if implementation == "flex_attention":
            decoder.set_attn_implementation("sdpa")  # the same pairs without a compilation
        problem = _problem(decoder, packing.seq_len, packing.isolate_documents)
        if not problem:
            return
        remedy = "Take a decoder that attends in every layer"
        if packing.isolate_documents and not _problem(decoder, packing.seq_len, isolated=False):
            remedy += ", or set packing.isolate_documents=false, which trains across documents' borders"
        if implementation == NAME:
            decoder.set_attn_implementation("sdpa")
            if not _problem(decoder, packing.seq_len, packing.isolate_documents):
                remedy = "Set engine.attention=dense"
        isolate = str(packing.isolate_documents).lower()
        raise UserError(
            f"decoder {type(decoder).__name__}, with packing.isolate_documents={isolate} and {implementation} attention: "
            f"{problem}. {remedy}."
        )
    finally:
        if decoder.config._attn_implementation != implementation:
            decoder.set_attn_implementation(implementation)
        decoder.train(training)


def _problem(decoder: PreTrainedModel, length: int, isolated: bool) -> str:
    """What goes wrong in sequences of `length` tokens; an empty string: nothing."""
    documents = torch.tensor([[1] * FIRST + [2 if isolated else 1] * SECOND])
    with _windows(decoder, FIRST + SECOND):
        problem = _difference(decoder, documents)
    window = min((size for size in map(decoder.config.__dict__.get, WINDOWS) if size), default=length)
    if problem or window >= length:
        return problem
    with _windows(decoder, SECOND // 3):
        lost = _difference(decoder, documents)
    return lost and f"some layers see {window} tokens back, and of packing.seq_len={length} that would be lost ({lost})"


@torch.no_grad()
def _check_positions(decoder: PreTrainedModel, length: int) -> None:
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is None or limit >= length:
        return
    # Rotary positions go on past the number in the configuration; a table of learned ones ends there.
    try:
        decoder(inputs_embeds=_embed(decoder, 1), position_ids=torch.tensor([[length - 1]]), use_cache=False)
    except (IndexError, RuntimeError) as error:
        raise UserError(
            f"packing.seq_len={length}: decoder {type(decoder).__name__} has positions for {limit} tokens "
            f"(max_position_embeddings) and no more. Set packing.seq_len to at most {limit}, or take a decoder with more."
        ) from error


@torch.no_grad()
def _difference(decoder: PreTrainedModel, documents: torch.Tensor) -> str:
    """What is wrong with the last document's logits beside others and alone; nothing: an empty string.

    documents: int64 (1, FIRST + SECOND), ids of one or two documents
    """
    states = _embed(decoder, documents.shape[1])
    _, lengths = documents.unique_consecutive(return_counts=True)
    start = 0 if len(lengths) == 1 else int(lengths[0])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]

    def packed(embedded: torch.Tensor) -> torch.Tensor:
        mask = documents_apart(documents, decoder.config, embedded.dtype)
        return decoder(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, start:]

    try:
        beside = packed(states)
        moved = packed(torch.cat([states[:, :start].flip(1), states[:, start:]], dim=1))
        alone = decoder(inputs_embeds=states[:, start:], use_cache=False).logits
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code meets on a mask it does not know
        reason = " ".join(str(error).split())[:200]
        return f"it takes no mask that says which tokens belong to one document ({type(error).__name__}: {reason})"
    scale = float(alone.abs().max())
    if float((moved - beside).abs().max()) > LEAK * scale:
        return "what stands before a document's first token changes what it makes of the document"
    if float((beside - alone).abs().max()) > ROUNDING * scale:
        return "it makes something else of a document that is packed than of the document alone"
    return ""


def _embed(decoder: PreTrainedModel, length: int) -> torch.Tensor:
    """Embeddings (1, length, D) of tokens spread over the vocabulary."""
    embeddings: Any = decoder.get_input_embeddings()
    ids = torch.arange(1, length + 1) * max(1, embeddings.num_embeddings // (length + 1)) % embeddings.num_embeddings
    return embeddings(ids[None])


@contextmanager
def _windows(decoder: PreTrainedModel, size: int) -> Iterator[None]:
    """Every window of the decoder made so small that a few tokens show it."""
    owners = {id(owner): owner for module in decoder.modules() for owner in (module, getattr(module, "config", None)) if owner}
    before = [(owner, name, owner.__dict__[name]) for owner in owners.values() for name in WINDOWS if owner.__dict__.get(name)]
    for owner, name, _ in before:
        setattr(owner, name, size)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
