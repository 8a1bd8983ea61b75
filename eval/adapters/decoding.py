"""What both harnesses ask of a model: the log-probability of given tokens, and greedy text up to a stop.

    (context, continuation) ids -> equal inputs once, longest first -> left-padded batches -> one forward pass each -> sums

Padding is on the left and masked, positions count real tokens only, and logits are computed for the last positions alone: a batch
of contexts of 2,000 tokens with an answer of 3 needs 3 rows of the vocabulary, not 2,000. Sums are taken in float32 whatever the
model's dtype. Neither the batch size nor what shares a batch changes a result, beyond the last bits of floating-point sums.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from eval.device import pick_device

if TYPE_CHECKING:
    import torch

    from eval.features import ImageFeatures

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model ready for evaluation. `ours`: a MultimodalLM, whose text is encoded as training encodes it; otherwise a text-only
    causal language model, encoded as transformers would."""

    model: Any
    tokenizer: Any
    device: str
    ours: bool


def model_folder(name_or_path: str) -> Path:
    """The save_pretrained folder of a run (by name or folder) or of any model. Raises UserError if there is none."""
    from mm1.run import find_run

    path = Path(name_or_path).expanduser()
    for folder in (path, path / "export"):
        if (folder / "config.json").is_file():
            return folder
    run = find_run(name_or_path)
    if not (run.export / "config.json").is_file():
        raise UserError(f"{name_or_path}: {run.folder} has no exported model yet. Train the run to its end.")
    return run.export


def load(folder: Path, device: str | None = None, dtype: str = "float32") -> Loaded:
    """A model of this suite, or a text-only transformers causal LM, from its save_pretrained folder (safetensors only).

    Raises UserError for a dtype or a folder that cannot be used.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: choose from {', '.join(DTYPES)}.")
    device = pick_device(device)
    if device == "cpu":  # transformers' generate asks DeepSpeed, which otherwise prints that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'} is no model's configuration ({error!r}).") from error
    if kind == "mm1":
        from eval.generate import load_model

        model, tokenizer = load_model(folder, device, dtype)
        return Loaded(model, tokenizer, device, ours=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=getattr(torch, dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the model cannot be loaded ({error}).") from error
    return Loaded(model.eval().to(torch.device(device)), tokenizer, device, ours=False)


@dataclass(frozen=True)
class Scored:
    """A sequence to score. `ids`: context and continuation; the last `count` of them are the continuation. `images` stand at
    `starts`, the first position of each one's tokens."""

    ids: tuple[int, ...]
    count: int
    images: tuple[bytes, ...] = ()
    starts: tuple[int, ...] = ()


def log_likelihoods(
    model: Any,
    requests: Sequence[Scored],
    *,
    device: str,
    batch_size: int,
    pad_id: int,
    features: ImageFeatures | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """(summed natural-log probability of the continuation, whether it is the greedy one) of each request, in their order.

    Requests whose inputs are equal (the one-token answers of a multiple choice) share one row. `done` is told how many requests
    each batch answered. Images need `features`.
    """
    import torch

    same: dict[tuple[tuple[int, ...], tuple[bytes, ...]], list[int]] = {}
    for number, request in enumerate(requests):
        same.setdefault((request.ids[:-1], request.images), []).append(number)
    rows = sorted(same.values(), key=lambda numbers: (-len(requests[numbers[0]].ids), requests[numbers[0]].ids))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    with torch.inference_mode():
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            logprobs = _last_logprobs(
                model,
                [requests[numbers[0]] for numbers in batch],
                max(requests[number].count for numbers in batch for number in numbers),
                device,
                pad_id,
                features,
            )
            for row, numbers in zip(logprobs, batch, strict=True):
                for number in numbers:
                    wanted = torch.tensor(requests[number].ids[-requests[number].count :], device=row.device)
                    steps = row[-len(wanted) :]
                    total = float(steps.gather(1, wanted[:, None]).sum())
                    results[number] = (total, bool((steps.argmax(-1) == wanted).all()))
            done(sum(map(len, batch)))
    return results


def _last_logprobs(
    model: Any, requests: Sequence[Scored], count: int, device: str, pad_id: int, features: ImageFeatures | None
) -> torch.Tensor:
    """Float32 log-probabilities (B, count, V) of what follows each of the last `count` input positions."""
    import torch

    inputs = [request.ids[:-1] for request in requests]
    input_ids, mask = left_padded(inputs, pad_id, device)
    width = input_ids.shape[1]
    extra: dict[str, Any] = {}
    pictures = [image for request in requests for image in request.images]
    if pictures:
        assert features is not None
        length = model.config.num_image_tokens
        slots = [
            (row, width - len(ids) + start, length)
            for row, (ids, request) in enumerate(zip(inputs, requests, strict=True))
            for start in request.starts
        ]
        assert len(slots) == len(pictures), f"{len(slots)} image marks for {len(pictures)} images"
        extra = {"image_features": features.get(pictures), "image_slots": torch.tensor(slots, device=device)}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = count
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra).logits
    return logits[:, -count:].float().log_softmax(-1)


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64 (B, longest): padding on the left, mask 1 where a token is."""
    import torch

    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    device: str,
    pad_id: int,
    stop: Sequence[str],
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """One batch: each prompt's continuation, cut before its first stop string. `options` are transformers' own."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    input_ids, mask = left_padded(prompts, pad_id, device)
    width = input_ids.shape[1]

    class AtStop(StoppingCriteria):
        """Row by row, so that a finished row does not wait for the others with text nobody reads."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            texts = tokenizer.batch_decode(input_ids[:, width:], skip_special_tokens=True)
            return torch.tensor([any(s in text for s in stop) for text in texts], device=input_ids.device)

    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id,
            stopping_criteria=StoppingCriteriaList([AtStop()] if stop else []),
            **options,
        )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text[: min([text.find(s) for s in stop if s in text], default=len(text))] for text in texts]
