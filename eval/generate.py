"""Answers from a model: batched greedy decoding with a KV cache, what many prompts begin with computed once.

    prompts -> ids, split before the query's own image -> batches of one beginning, or of similar length, left-padded
    beginning (its demonstrations) -> cache -> query -> one token a step for the rows still going -> text up to a stop

A row is done at end-of-text, at a stop string or at its token limit. Padding is masked and positions count real tokens only, so a
prompt's answer does not depend on which others it shares a batch with. With the answer come three numbers (nats): its
length-normalised log-probability, the mean entropy of the distributions its tokens were taken from, and its image gain: how much
less likely the same answer is, per token, once the query's image is taken out of the prompt.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines.tokens import Encoder, load_tokenizer
from eval.features import ImageFeatures
from eval.prompts import Part

if TYPE_CHECKING:
    import torch

    from mm1.attention.settings import SparqSettings


@dataclass(frozen=True)
class Request:
    """A prompt, its images as bytes or as their numbers in ImageFeatures; and the continuations to compare (binding), if any."""

    parts: Sequence[Part]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """`text`: cut at the stop, stripped. `logprob`: mean natural-log probability of the tokens generated, the ending one
    included; `entropy`: mean entropy of their distributions; `image_gain`: mean log-probability less that without the query's
    image (None for a prompt without images); all in nats. `options`: summed log-probability of each of the request's
    continuations."""

    text: str
    logprob: float
    entropy: float
    image_gain: float | None
    options: tuple[float, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A request as token ids (T,), with the first position of each image's tokens, split into `ids[:split]`, which it may share
    with others, and the rest."""

    ids: list[int]
    starts: list[int]
    images: list[int]
    options: tuple[str, ...]

    @property
    def split(self) -> int:
        """Where the query's own image begins: the last one."""
        return self.starts[-1] if self.starts else 0

    @property
    def beginning(self) -> bytes:
        """Equal for prompts that begin alike."""
        return hashlib.blake2b(repr((self.ids[: self.split], self.images[:-1])).encode(), digest_size=16).digest()


@dataclass
class State:
    """Rows in the midst of decoding: their cache, which of its slots are real (B, n), and the float32 log-probabilities of the
    next token (B, V)."""

    cache: Any
    mask: torch.Tensor
    logprobs: torch.Tensor

    def copy(self) -> State:
        return State(copy.deepcopy(self.cache), self.mask, self.logprobs)

    def branch(self, rows: int) -> State:
        """`rows` rows that go on from this single one, which stays; a cache that can branch stores it once for all."""
        if hasattr(self.cache, "branch"):
            cache = self.cache.branch(rows)
        else:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(rows)
        return State(cache, self.mask.expand(rows, -1), self.logprobs.expand(rows, -1))


@dataclass
class Reading:
    """A batch before its answers: `state`, all rows having read their prompts. For the image gain, `begun`: the rows at a point
    before their queries' images (None for prompts without images), and `contexts`: embeddings (n, D) of what follows that point
    in each row, its query's image left out."""

    state: State
    begun: State | None
    contexts: list[torch.Tensor]


@dataclass
class _Greedy:
    """A row's greedy continuation so far."""

    tokens: list[int]
    text: str = ""
    logprob: float = 0.0
    entropy: float = 0.0


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


def caches(model: Any, settings: SparqSettings | None = None) -> Callable[[], Any]:
    """What makes the model's caches, and its decoder's attention set to go with them: SparQ's with `settings`; without, dense
    attention from the same cache, whose rows can share a beginning. A decoder that does not attend to everything everywhere keeps
    its own attention and transformers' cache; with `settings` that is a UserError."""
    from transformers import DynamicCache
    from transformers.cache_utils import get_layer_types_and_kwargs

    from mm1.attention.register import attention_name, decoder_of, make_cache

    decoder = decoder_of(model)
    types, _ = get_layer_types_and_kwargs(decoder.config.get_text_config(decoder=True))
    if settings is None and set(types) != {"full_attention"}:
        return DynamicCache
    decoder.set_attn_implementation(attention_name(settings))
    return partial(make_cache, model, settings)


class Generator:
    """Greedy decoding of requests that share stops and a token limit."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        features: ImageFeatures,
        *,
        stop: Sequence[str],
        max_new_tokens: int,
        new_cache: Callable[[], Any] | None = None,
    ) -> None:
        """`new_cache` makes an empty cache for a batch; by default `caches(model)`."""
        import torch

        self.model, self.tokenizer, self.features = model, tokenizer, features
        self.stop, self.max_new_tokens = tuple(stop), max_new_tokens
        self.device = features.device
        self.new_cache = new_cache or caches(model)
        self._encoder = Encoder(tokenizer, model.config.num_image_tokens)
        # What the tokeniser cannot say, and image and padding marks, are no answer.
        width = model.get_output_embeddings().weight.shape[0]
        self._impossible = torch.arange(width, device=self.device) >= len(tokenizer)
        never = {tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id} - {tokenizer.eos_token_id, None}
        self._impossible[sorted(never)] = True
        self._beginning: tuple[bytes, State] | None = None

    def encode(self, request: Request | Prompt) -> Prompt:
        """An empty prompt (0-shot without images) is a document's beginning: end-of-text."""
        if isinstance(request, Prompt):
            return request
        ids, starts = self._encoder(request.parts)
        shown = [part for part in request.parts if not isinstance(part, str)]
        images = [part if isinstance(part, int) else self.features.register(part) for part in shown]
        assert len(starts) == len(images), f"{len(starts)} image marks for {len(images)} images"
        return Prompt(ids or [self.tokenizer.eos_token_id], starts, images, request.options)

    def batches(self, requests: Sequence[Request | Prompt], batch_size: int) -> list[list[int]]:
        """Positions of `requests` in batches: first those whose beginning nobody shares, the longest first, so that what does not
        fit in memory fails at once; then those of one beginning together."""
        prompts = [self.encode(request) for request in requests]
        beginnings = [prompt.beginning if prompt.split else b"" for prompt in prompts]
        shared = {key for key, count in Counter(beginnings).items() if key and count > 1}
        groups: dict[bytes, list[int]] = {b"": []}
        for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i)):
            groups.setdefault(beginnings[i] if beginnings[i] in shared else b"", []).append(i)
        return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]

    def run(self, requests: Sequence[Request | Prompt], batch_size: int) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yield (positions, their answers) batch by batch."""
        prompts = [self.encode(request) for request in requests]
        for batch in self.batches(prompts, batch_size):
            yield batch, self.answer([prompts[i] for i in batch])

    def answer(self, requests: Sequence[Request | Prompt]) -> list[Answer]:
        """One batch. Raises UserError if a prompt is longer than the decoder's positions."""
        import torch

        prompts = [self.encode(request) for request in requests]
        self._check_length(max(len(prompt.ids) for prompt in prompts))
        answers: dict[int, Answer] = {}
        with torch.inference_mode():
            for rows in self._alike(prompts):
                answers |= zip(rows, self._answer([prompts[row] for row in rows]), strict=True)
        return [answers[row] for row in range(len(prompts))]

    @staticmethod
    def _alike(prompts: list[Prompt]) -> list[list[int]]:
        """Rows that `_read` can read together: those with the same kind of beginning; of different beginnings, such as keep some
        of theirs when as many tokens are set apart of each as the longest query has."""
        with_images = [row for row, prompt in enumerate(prompts) if prompt.split]
        groups = [
            [row for row, prompt in enumerate(prompts) if not prompt.images],
            [row for row, prompt in enumerate(prompts) if prompt.images and not prompt.split],
        ]
        if len({prompts[row].beginning for row in with_images}) == 1:
            groups.append(with_images)
        else:
            for row in with_images:
                joined = [*groups[-1], row]
                most = max(len(prompts[i].ids) - prompts[i].split for i in joined)
                if len(groups) == 2 or min(len(prompts[i].ids) for i in joined) <= most:
                    groups.append([])
                groups[-1].append(row)
        return [group for group in groups if group]

    def _answer(self, prompts: list[Prompt]) -> list[Answer]:
        reading = self._read(prompts)
        nothing = [self._embed([])] * len(prompts)
        compared = self._compare([prompt.options for prompt in prompts], reading.state, nothing)
        answers = self._decode(reading.state)
        gains: list[float | None] = [None] * len(prompts)
        if reading.begun is not None:
            blind = self._score(reading.contexts, [row.tokens for row in answers], reading.begun)
            gains = [(row.logprob - total) / len(row.tokens) for row, total in zip(answers, blind, strict=True)]
        return [
            Answer(row.text.strip(), row.logprob / len(row.tokens), row.entropy / len(row.tokens), gain, scores)
            for row, gain, scores in zip(answers, gains, compared, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------------ reading

    def _read(self, prompts: list[Prompt]) -> Reading:
        """One batch read up to its answers. One beginning that all rows share is computed once and kept for the next batch."""
        import torch

        if not all(prompt.images for prompt in prompts):
            whole = [(prompt.ids, prompt.starts, prompt.images) for prompt in prompts]
            return Reading(self._forward(*self._padded(whole), None), None, [])
        queries = [len(prompt.ids) - prompt.split for prompt in prompts]
        shared = len({prompt.beginning for prompt in prompts}) == 1
        if shared:
            rows = [(prompt.ids[prompt.split :], [0], prompt.images[-1:]) for prompt in prompts]
            embeddings, real = self._padded(rows)
            begun = self._shared(prompts[0]).branch(len(prompts))
            # 0-shot prompts begin with nothing; without its image, too, such a prompt begins as a document does.
            state = self._forward(embeddings, real, begun.copy() if prompts[0].split else None)
        else:
            # The same number of tokens of each row is set apart, so that no padding comes to stand between the two halves.
            embeddings, real = self._padded([(prompt.ids, prompt.starts, prompt.images) for prompt in prompts])
            apart = max(queries)
            begun = self._forward(embeddings[:, :-apart], real[:, :-apart], None)
            embeddings, state = embeddings[:, -apart:], begun.copy()
            self._all_sparse(state, queries)
            state = self._forward(embeddings, real[:, -apart:], state)
        length = self.model.config.num_image_tokens
        contexts = []
        for row, query in zip(embeddings, queries, strict=True):
            image = len(row) - query
            contexts.append(torch.cat([row[: 0 if shared else image], row[image + length :]]))
        return Reading(state, begun, contexts)

    def _shared(self, prompt: Prompt) -> State:
        """A single row after the prompt's beginning, or at a document's."""
        key = prompt.beginning
        if self._beginning is None or self._beginning[0] != key:
            self._beginning = None  # freed before the next one is made
            row = (prompt.ids[: prompt.split], prompt.starts[:-1], prompt.images[:-1])
            rows = self._padded([row if prompt.split else ([self.tokenizer.eos_token_id], [], [])])
            self._beginning = (key, self._forward(*rows, None))
        return self._beginning[1]

    def _embed(self, ids: list[int]) -> torch.Tensor:
        import torch

        return self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64, device=self.device))

    def _padded(self, rows: list[tuple[list[int], list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, n, D) of rows (ids, where images start, the images' numbers), padded on the left; and which are real."""
        import torch

        width = max(len(ids) for ids, _, _ in rows)
        length = self.model.config.num_image_tokens
        input_ids = torch.full((len(rows), width), self.tokenizer.eos_token_id, dtype=torch.int64)
        real = torch.zeros((len(rows), width), dtype=torch.int64)
        slots: list[tuple[int, int, int]] = []
        images: list[int] = []
        for row, (ids, starts, shown) in enumerate(rows):
            pad = width - len(ids)
            input_ids[row, pad:] = torch.tensor(ids)
            real[row, pad:] = 1
            slots += [(row, pad + start, length) for start in starts]
            images += shown
        places = torch.tensor(slots, dtype=torch.int64, device=self.device) if slots else None
        return self.model.embed(input_ids.to(self.device), self.features.get(images), places), real.to(self.device)

    def _forward(self, embeddings: torch.Tensor, real: torch.Tensor, state: State | None) -> State:
        """The rows after new tokens (B, n, D), of which `real` (B, n) are no padding; `state`, where they were, is taken over."""
        import torch

        mask = real if state is None else torch.cat([state.mask, real], 1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        output = self.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions if state is None else state.mask.sum(1, keepdim=True) + positions,
            past_key_values=self.new_cache() if state is None else state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return State(output.past_key_values, mask, self._logprobs(output.logits[:, -1]))

    @staticmethod
    def _all_sparse(state: State, lengths: list[int]) -> None:
        """SparQ: of each row's next tokens the last `lengths` attend sparsely, however many the longest row has."""
        if hasattr(state.cache, "questions"):
            state.cache.questions(lengths)

    def _check_length(self, width: int) -> None:
        decoder = getattr(self.model.config, "text_config", None) or self.model.config
        most = getattr(decoder, "max_position_embeddings", None)
        if most is not None and width + self.max_new_tokens > most:
            raise UserError(
                f"A prompt of {width} tokens and {self.max_new_tokens} for the answer exceed the decoder's {most} positions. "
                "Evaluate with fewer shots, or train with a longer decoder or fewer image tokens."
            )

    def _logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., V) -> float32 log-probabilities of what can be said."""
        return logits.float().masked_fill(self._impossible, float("-inf")).log_softmax(-1)

    # ------------------------------------------------------------------------------------------------------------ scoring

    def _score(self, contexts: list[torch.Tensor], targets: list[list[int]], state: State) -> list[float]:
        """Summed log-probability of each row's target ids after its context (n, D) on top of `state`, which is taken over."""
        import torch

        rows = [torch.cat([context, self._embed(ids[:-1])]) for context, ids in zip(contexts, targets, strict=True)]
        longest = max(map(len, rows))
        steps = state.logprobs[:, None]
        if longest:
            embeddings = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
            self._all_sparse(state, [longest] * len(rows))
            output = self.model(
                inputs_embeds=embeddings,
                attention_mask=torch.cat([state.mask, real], 1),
                position_ids=state.mask.sum(1, keepdim=True) + torch.arange(longest, device=self.device),
                past_key_values=state.cache,
                use_cache=True,
            )
            steps = torch.cat([steps, self._logprobs(output.logits)], 1)
        totals = []
        for row, (context, ids) in enumerate(zip(contexts, targets, strict=True)):
            places = torch.arange(len(context), len(context) + len(ids), device=self.device)
            totals.append(steps[row, places, torch.tensor(ids, device=self.device)].sum())
        return torch.stack(totals).tolist()

    def _compare(self, options: list[tuple[str, ...]], state: State, nothing: list[torch.Tensor]) -> list[tuple[float, ...]]:
        """Summed log-probability of each row's options after its prompt; rows must all have the same number of them."""
        assert len({len(row) for row in options}) == 1
        totals: list[list[float]] = []
        for number in range(len(options[0])):
            tokens = [self.tokenizer.encode(row[number], add_special_tokens=False) for row in options]
            totals.append(self._score(nothing, tokens, state.copy()))
        return [tuple(total[row] for total in totals) for row in range(len(options))]

    # ----------------------------------------------------------------------------------------------------------- decoding

    def _decode(self, state: State) -> list[_Greedy]:
        """Greedy continuation of every row; takes the state over."""
        import torch

        rows = [_Greedy([]) for _ in range(len(state.mask))]
        places = list(range(len(rows)))  # which row each place of the batch is
        going = set(places)
        for step in range(self.max_new_tokens):
            best, chosen = state.logprobs.max(-1)
            entropy = torch.special.entr(state.logprobs.exp()).sum(-1)
            for row, value, token, spread in zip(places, best.tolist(), chosen.tolist(), entropy.tolist(), strict=True):
                if row in going and self._ended(rows[row], token, value, spread):
                    going.discard(row)
            if not going or step == self.max_new_tokens - 1:
                break
            if 2 * len(going) <= len(places):  # what has ended leaves, but not at every step: the whole cache is copied
                kept = torch.tensor([place for place, row in enumerate(places) if row in going], device=self.device)
                state.cache.batch_select_indices(kept)
                state.mask, chosen = state.mask[kept], chosen[kept]
                places = [row for row in places if row in going]
            embeddings = self.model.get_input_embeddings()(chosen[:, None])
            state = self._forward(embeddings, state.mask.new_ones(len(places), 1), state)
        return rows

    def _ended(self, row: _Greedy, token: int, logprob: float, entropy: float) -> bool:
        """Takes the token; is the answer complete?"""
        row.tokens.append(token)
        row.logprob += logprob
        row.entropy += entropy
        if token == self.tokenizer.eos_token_id:
            return True
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stops = [at for at in map(text.find, self.stop) if at >= 0]
        row.text = text[: min(stops)] if stops else text
        return bool(stops)
