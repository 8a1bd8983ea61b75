"""lmms-eval runs a checkpoint of this suite: the model `mm1`, found by the entry-point group `lmms_eval.models`.

    lmms-eval --model mm1 --model_args pretrained=runs/base-1a2b3c4d --tasks vqav2_val --batch_size 16

Decoding is eval/generate.py's, the one few-shot evaluation uses: greedy, every distinct image encoded once, batches that change
nothing. Pictures are what lmms-eval hands over, so their pixels are Pillow's.

Where pictures stand: a context with as many <image> marks as pictures has them at the marks; one without marks has them all
before the text, as captions and questions were trained on. Any other number is refused, and that is what becomes of few-shot
prompts with marks: lmms-eval 0.7.3 hands over the query's picture alone and loses the demonstrations'. Where a task's texts have
no marks the loss cannot be seen from here. Few-shot figures are eval.fewshot's to give.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from configs.errors import UserError
from data_pipelines.images import decode_image
from data_pipelines.tokens import IMAGE_TOKEN, encode_parts
from eval.adapters.decoding import Scored, load, log_likelihoods, model_folder
from eval.prompts import Part

MAX_NEW_TOKENS = 256
"""Tokens generated where a task names no number."""


class MM1(lmms):
    """pretrained: a run's name or folder, or its export folder."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
    ) -> None:
        """Raises UserError for a model that cannot be loaded or is not of this suite, and for a batch size that is no number."""
        from eval.features import ImageFeatures

        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: give a number from 1 up; sizes are not searched for.")
        self.batch_size = int(batch_size)
        self.loaded = load(model_folder(pretrained), device, dtype)
        if not self.loaded.ours:
            raise UserError(f"{pretrained} is a text-only model; lmms-eval's tasks have images. lm-eval can run it.")
        self.features = ImageFeatures(self.loaded.model, self.loaded.device)

    @property
    def device(self) -> str:
        return self.loaded.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy text of each request, up to its first stop string.

        Raises UserError for a task that asks for sampling or beams, and for a prompt longer than the decoder's positions.
        """
        from eval.generate import Generator, Request

        prompts = [self._parts(request.args[0], self._pictures(*request.args[2:6])) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(_decoding(request.args[1])), []).append(number)
        texts = [""] * len(requests)
        for settings, numbers in groups.items():
            stop, max_new_tokens = json.loads(settings)
            loaded = self.loaded
            made = Generator(loaded.model, loaded.tokenizer, self.features, stop=stop, max_new_tokens=max_new_tokens)
            for batch, answers in made.run([Request(prompts[number]) for number in numbers], self.batch_size):
                for place, answer in zip(batch, answers, strict=True):
                    texts[numbers[place]] = answer.text
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """(number, whether the continuation is the greedy one) of each request.

        lmms-eval reads the number in two ways: of a multiple choice it takes the *least* for the model's answer, so there it is
        the negative log-probability; of a plain likelihood it is the log-probability, as its documentation says.
        """
        tokenizer = self.loaded.tokenizer
        scored, signs = [], []
        for request in requests:
            context, continuation, *where = request.args
            signs.append(1.0 if callable(continuation) else -1.0)
            if callable(continuation):
                continuation = continuation(self.task_dict[where[2]][where[3]][where[1]])
            parts = self._parts(context, self._pictures(*where[:4]) if where else [])
            ids, starts = encode_parts(parts, tokenizer, self.loaded.model.config.num_image_tokens)
            more, _ = encode_parts([continuation], tokenizer, 0)
            whole = [*(ids or [tokenizer.eos_token_id]), *more]
            images = tuple(part for part in parts if isinstance(part, bytes))
            scored.append(Scored(tuple(whole), len(more), images, tuple(starts)))
        self._check(scored)
        found = log_likelihoods(
            self.loaded.model,
            scored,
            device=self.loaded.device,
            batch_size=self.batch_size,
            pad_id=tokenizer.eos_token_id,
            features=self.features,
        )
        # lmms-eval 0.7.3 turns a bare pair into the text "(-1.2, True)", which its own scoring cannot unpack; this wrapper, made
        # for generated text, hands on what it holds.
        pairs: list[Any] = [(sign * value, greedy) for sign, (value, greedy) in zip(signs, found, strict=True)]
        return [GenerationResult(pair) for pair in pairs]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("mm1 models hold no conversations: tasks of several rounds cannot be run.")

    def clean(self) -> None:
        """lmms-eval is done with the model."""
        del self.loaded, self.features
        super().clean()

    def _check(self, scored: Sequence[Scored]) -> None:
        config = self.loaded.model.config
        most = getattr(config.text_config, "max_position_embeddings", None)
        longest = max((len(request.ids) for request in scored), default=0)
        if most is not None and longest > most + 1:
            raise UserError(f"A context and its continuation have {longest} tokens; the decoder has {most} positions.")

    def _pictures(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[bytes]:
        """A document's pictures, encoded; none for tasks of text."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if callable(doc_to_visual) else doc_to_visual
        flat: list[Any] = []
        for visual in visuals or []:
            flat += visual if isinstance(visual, list | tuple) else [visual]
        return [self._square(visual, f"task {task}, document {doc_id}") for visual in flat]

    def _square(self, visual: Any, name: str) -> bytes:
        """A picture at the model's size as PNG: thousands of requests are held at once, and full-size pictures would not fit."""
        import numpy as np
        from PIL import Image

        if isinstance(visual, Image.Image):
            buffer = io.BytesIO()
            plain = visual if visual.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else visual.convert("RGB")
            plain.save(buffer, "PNG", compress_level=1)
            data = buffer.getvalue()
        elif isinstance(visual, bytes):
            data = visual
        elif isinstance(visual, str | Path) and Path(visual).is_file():
            data = Path(visual).read_bytes()
        else:
            raise UserError(f"{name}: a visual of type {type(visual).__name__}; this model takes pictures alone.")
        pixels = decode_image(data, self.loaded.model.config.image_size, name=name)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def _parts(self, context: str, pictures: list[bytes]) -> list[Part]:
        """Text and pictures in reading order; see the module docstring. Registers the pictures in the order of the requests."""
        for picture in pictures:
            self.features.register(picture)
        marks = context.count(IMAGE_TOKEN)
        if not marks:
            return [*pictures, context] if context else [*pictures]
        if marks != len(pictures):
            raise UserError(
                f"The context has {marks} {IMAGE_TOKEN} marks and lmms-eval handed over {len(pictures)} pictures. It loses those "
                "of few-shot demonstrations: run it with num_fewshot=0, and few-shot tasks with python -m eval.fewshot."
            )
        first, *rest = context.split(IMAGE_TOKEN)
        parts: list[Part] = [first, *(part for pair in zip(pictures, rest, strict=True) for part in pair)]
        return [part for part in parts if part != ""]


def _decoding(kwargs: dict[str, Any]) -> tuple[list[str], int]:
    """(stop strings, most new tokens) of a task's generation settings. Raises UserError for what is not greedy."""
    if kwargs.get("do_sample") or float(kwargs.get("temperature") or 0) > 0 or int(kwargs.get("num_beams") or 1) > 1:
        raise UserError(f"The task asks for {kwargs}; this model decodes greedily. Add gen_kwargs do_sample=False,temperature=0.")
    until = kwargs.get("until") or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    return stop, int(kwargs.get("max_new_tokens") or MAX_NEW_TOKENS)
