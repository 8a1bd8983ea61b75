"""Cross entropy at labelled positions: in one pass over the logits, or with the logits of few positions at a time.

    loss_t = log Z_t - logit_t[label_t]        Z_t = sum over the vocabulary of exp(logit_t); z-loss needs (log Z_t)^2 as well

T positions x V vocabulary is the largest tensor of a step (16,000 x 128,000 in float32: 8 GB). `token_losses` keeps the logits
once and makes their gradient in place; `chunked_losses` keeps the hidden states alone and computes each chunk's logits again in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V) and int64 (T,) -> losses (T,) in nats and log Z (T,), float32 (float64 for float64 logits)."""
    return _TokenLosses.apply(logits, labels)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exact = _exact(logits)
        log_partition = torch.logsumexp(exact, dim=-1)
        ctx.save_for_backward(logits, labels, log_partition)
        return log_partition - exact.gather(-1, labels[:, None])[:, 0], log_partition.clone()

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, of_partition: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        logits, labels, log_partition = ctx.saved_tensors
        gradient = (_exact(logits) - log_partition[:, None]).exp_().mul_((of_loss + of_partition)[:, None])
        gradient.scatter_add_(1, labels[:, None], -of_loss[:, None])
        return gradient.to(logits.dtype), None


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def chunked_losses(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor, chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_losses(head(hidden), labels)` for hidden (T, D), at most ceil(T / chunks) positions' logits in memory at any time.

    `chunks` must be equal on all ranks, for under ZeRO-3 each gathers the head's weights; with T below it some chunks are empty.
    """

    def one(part: torch.Tensor, its_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_losses(head(part), its_labels)

    pairs = zip(hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True)
    parts = [checkpoint(one, part, its_labels, use_reentrant=False) for part, its_labels in pairs]
    losses, log_partition = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(log_partition)
