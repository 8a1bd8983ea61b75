"""Answers from a model: batched greedy decoding with a KV cache, every distinct image encoded once.

    prompts -> ids, sorted by length -> left-padded batches -> prefill -> one token a step for the rows still going -> text up
    to a stop

A row is done at end-of-text, at a stop string or at its token limit, and then leaves the batch, its cache with it. Padding is
masked and positions count real tokens only, so a prompt's answer does not depend on which others it shares a batch with.

Images are encoded in fixed groups, in the order in which they were registered, and kept up to a memory budget. Were they
encoded as batches happen to need them, a resumed evaluation would group them differently and floating-point sums could differ
in the last bit.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines.images import decode_image
from data_pipelines.tokens import encode_parts, load_tokenizer
from eval.prompts import Part

if TYPE_CHECKING:
    import torch

IMAGE_GROUP = 8
FEATURE_BUDGET = 2_000_000_000
"""Bytes of image tokens kept on the device."""


@dataclass(frozen=True)
class Request:
    """A prompt, and the continuations to compare (binding) where there are any."""

    parts: list[Part]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """`text`: cut at the stop, stripped. `logprob`: mean natural-log probability of the tokens generated, the ending one
    included. `options`: summed log-probability of each of the request's continuations."""

    text: str
    logprob: float
    options: tuple[float, ...] = ()


def load_model(export: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokeniser) from a save_pretrained folder. Raises UserError if the folder is not one of this suite's models."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from mm1.model.multimodal import MultimodalLM

    if not (export / "config.json").is_file():
        raise UserError(
            f"{export} holds no model (no config.json). Train the run to its end, or export it: python -m mm1.train ..."
        )
    logging.disable_progress_bar()  # it counts tensors, within a second
    try:
        config = AutoConfig.from_pretrained(str(export), local_files_only=True)
        if config.model_type != MultimodalLM.config_class.model_type:
            raise UserError(f"{export}: model_type is {config.model_type!r}; few-shot evaluation wants a model of this suite.")
        model = MultimodalLM.from_pretrained(str(export), local_files_only=True, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"{export}: the model cannot be loaded ({error}).") from error
    return model.eval().to(torch.device(device)), load_tokenizer(export)


class ImageFeatures:
    """Image tokens (M, D) by content; see the module docstring for why groups are fixed."""

    def __init__(self, model: Any, device: str, budget: int = FEATURE_BUDGET) -> None:
        self.model, self.device, self.budget = model, device, budget
        self.encoded = 0
        """Images encoded so far; equals the distinct ones unless the budget is too small for them."""
        self._number: dict[bytes, int] = {}
        self._group_of: list[int] = []
        self._groups: list[list[tuple[int, bytes, str]]] = []
        self._sealed = 0
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def register(self, image: bytes, name: str = "image") -> int:
        """Give an image its place in the fixed order; the same bytes keep the place they have."""
        digest = hashlib.blake2b(image, digest_size=16).digest()
        if digest not in self._number:
            number = self._number[digest] = len(self._group_of)
            # A group that was encoded is closed: what comes later must not make it a different one.
            if len(self._groups) == self._sealed or len(self._groups[-1]) == IMAGE_GROUP:
                self._groups.append([])
            self._groups[-1].append((number, image, name))
            self._group_of.append(len(self._groups) - 1)
        return self._number[digest]

    def get(self, images: Sequence[bytes]) -> torch.Tensor | None:
        """(N, M, D) on the device, or None for no images."""
        import torch

        if not images:
            return None
        return torch.stack([self._one(number) for number in [self.register(image) for image in images]])

    def _one(self, number: int) -> torch.Tensor:
        import torch

        if number not in self._kept:
            place = self._group_of[number]
            self._sealed = max(self._sealed, place + 1)
            group = self._groups[place]
            size = self.model.config.image_size
            pixels = torch.stack([decode_image(data, size, name=name) for _, data, name in group])
            features = self.model.encode_images(pixels.to(self.device))
            self.encoded += len(group)
            self._kept |= {member: feature.clone() for (member, _, _), feature in zip(group, features, strict=True)}
            most = max(IMAGE_GROUP, self.budget // (features[0].numel() * features.element_size()))
            while len(self._kept) > most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


class Generator:
    """Greedy decoding of requests that share stops and a token limit."""

    def __init__(self, model: Any, tokenizer: Any, features: ImageFeatures, *, stop: Sequence[str], max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.features = model, tokenizer, features
        self.stop, self.max_new_tokens = tuple(stop), max_new_tokens
        self.device = features.device
        vocabulary = len(tokenizer)
        never = {tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id} - {tokenizer.eos_token_id, None}
        self._never = sorted(never)
        self._vocabulary = vocabulary

    def encode(self, request: Request) -> tuple[list[int], list[int]]:
        """(ids, first position of each image's tokens); an empty prompt (0-shot without images) is a document's beginning:
        end-of-text."""
        ids, starts = encode_parts(request.parts, self.tokenizer, self.model.config.num_image_tokens)
        return ids or [self.tokenizer.eos_token_id], starts

    def batches(self, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
        """Positions of `requests` in batches of similar length, longest first: what does not fit in memory fails at once."""
        lengths = [len(self.encode(request)[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (-lengths[i], i))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def run(self, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yield (positions, their answers) batch by batch."""
        for batch in self.batches(requests, batch_size):
            yield batch, self.answer([requests[i] for i in batch])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One batch. Raises UserError if a prompt is longer than the decoder's positions."""
        import torch

        with torch.inference_mode():
            return self._answer(requests)

    def _answer(self, requests: Sequence[Request]) -> list[Answer]:
        import torch

        encoded = [self.encode(request) for request in requests]
        width = max(len(ids) for ids, _ in encoded)
        self._check_length(width)
        image_length = self.model.config.num_image_tokens
        input_ids = torch.full((len(requests), width), self.tokenizer.eos_token_id, dtype=torch.int64)
        mask = torch.zeros((len(requests), width), dtype=torch.int64)
        slots: list[tuple[int, int, int]] = []
        images: list[bytes] = []
        for row, ((ids, starts), request) in enumerate(zip(encoded, requests, strict=True)):
            pad = width - len(ids)
            input_ids[row, pad:] = torch.tensor(ids)
            mask[row, pad:] = 1
            slots += [(row, pad + start, image_length) for start in starts]
            images += [part for part in request.parts if not isinstance(part, str)]
        assert len(slots) == len(images), f"{len(slots)} image marks for {len(images)} images"
        mask = mask.to(self.device)
        output = self.model(
            input_ids=input_ids.to(self.device),
            image_features=self.features.get(images),
            image_slots=torch.tensor(slots, dtype=torch.int64, device=self.device) if slots else None,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        logprobs, cache = self._logprobs(output.logits[:, -1]), output.past_key_values
        compared = self._compare([request.options for request in requests], logprobs, mask, cache)
        texts, means = self._decode(logprobs, mask, cache)
        return [Answer(text, mean, scores) for text, mean, scores in zip(texts, means, compared, strict=True)]

    def _check_length(self, width: int) -> None:
        decoder = getattr(self.model.config, "text_config", None) or self.model.config
        most = getattr(decoder, "max_position_embeddings", None)
        if most is not None and width + self.max_new_tokens > most:
            raise UserError(
                f"A prompt of {width} tokens and {self.max_new_tokens} for the answer exceed the decoder's {most} positions. "
                "Evaluate with fewer shots, or train with a longer decoder or fewer image tokens."
            )

    def _logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., V) -> float32 log-probabilities; what the tokeniser cannot say, and image and padding marks, are impossible."""
        import torch

        ids = torch.arange(logits.shape[-1], device=logits.device)
        impossible = (ids >= self._vocabulary) | torch.isin(ids, torch.tensor(self._never, device=logits.device))
        return logits.float().masked_fill(impossible, float("-inf")).log_softmax(-1)

    def _compare(
        self, options: list[tuple[str, ...]], logprobs: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> list[tuple[float, ...]]:
        """Summed log-probability of each row's options after its prompt; rows must all have the same number of them."""
        import torch

        count = len(options[0])
        assert all(len(row) == count for row in options)
        totals: list[list[float]] = [[] for _ in options]
        for number in range(count):
            tokens = [self.tokenizer.encode(row[number], add_special_tokens=False) for row in options]
            longest = max(map(len, tokens))
            ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in tokens], device=self.device)
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens], device=self.device)
            steps = logprobs[:, None]
            if longest > 1:
                # The prompt's cache serves every option and the greedy answer: each gets a copy, whatever kind of cache it is.
                output = self.model(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([mask, real[:, :-1]], 1),
                    position_ids=mask.sum(1, keepdim=True) + torch.arange(longest - 1, device=self.device),
                    past_key_values=copy.deepcopy(cache),
                    use_cache=True,
                )
                steps = torch.cat([steps, self._logprobs(output.logits)], 1)
            chosen = steps.gather(2, ids[:, :, None])[:, :, 0]
            for row, total in enumerate(chosen.masked_fill(real == 0, 0.0).sum(1).tolist()):
                totals[row].append(total)
        return [tuple(row) for row in totals]

    def _decode(self, logprobs: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[list[str], list[float]]:
        """Greedy continuation of every row: (texts, mean log-probabilities)."""
        import torch

        rows = len(logprobs)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        texts, totals = [""] * rows, [0.0] * rows
        alive = list(range(rows))
        for _ in range(self.max_new_tokens):
            best, chosen = logprobs.max(-1)
            going = []
            for place, (row, value, token) in enumerate(zip(alive, best.tolist(), chosen.tolist(), strict=True)):
                tokens[row].append(token)
                totals[row] += value
                ended = token == self.tokenizer.eos_token_id
                if not ended:
                    text = self.tokenizer.decode(tokens[row], skip_special_tokens=False, clean_up_tokenization_spaces=False)
                    stops = [at for at in map(text.find, self.stop) if at >= 0]
                    texts[row] = text[: min(stops)] if stops else text
                    ended = bool(stops)
                if not ended:
                    going.append(place)
            if not going or len(tokens[alive[going[0]]]) == self.max_new_tokens:
                break
            if len(going) < len(alive):
                kept = torch.tensor(going, device=self.device)
                cache.batch_select_indices(kept)
                mask, chosen = mask[kept], chosen[kept]
                alive = [alive[place] for place in going]
            position = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            output = self.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logprobs = self._logprobs(output.logits[:, -1])
        return [text.strip() for text in texts], [total / max(1, len(row)) for total, row in zip(totals, tokens, strict=True)]
