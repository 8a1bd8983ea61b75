"""From a plan to prompts and records: what each query is shown with, and what is kept of its answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from eval.controls import Show, show_blindly, show_plainly, show_shuffled
from eval.prompts import PROMPTS, build_prompt, options
from eval.results import REFERENCES_KEY, Results
from eval.tasks.example import Example
from eval.tasks.pool import Pool, TaskData

if TYPE_CHECKING:
    from eval.generate import Answer, Request

Register = Callable[[bytes, str, Callable[[], bytes]], int]
"""ImageFeatures.register: (image, its name, what brings it again) -> its number."""


class Prompter:
    """Builds a task's requests as the plan and the control say.

    With `register`, images are registered and stand in prompts as their numbers: a thousand prompts of eight demonstrations hold
    no picture more than once, and none for longer than it takes to register it.
    """

    def __init__(self, results: Results, task: TaskData, register: Register | None = None) -> None:
        self.task, self.plan, self.control = task, results.plan.tasks[task.name], results.control
        self.run, self.dtype = results.run["name"], results.dtype
        self.most = results.plan.shots[-1]
        self.template = PROMPTS[results.settings[task.name].prompts][task.kind]
        self.register = register
        self._read: Show = show_plainly
        if self.control == "shuffled":
            self._read = show_shuffled(task, results.plan.seed)
        elif self.control == "none" and register is not None:  # without, a page of the evaluation wants to show them
            self._read = show_blindly
        self._shown: dict[tuple[Pool, str], Example] = {}

    def _show(self, pool: Pool, name: str) -> Example:
        known = self._shown.get((pool, name))
        if known is None:
            known = self._read(pool, name)
            if self.register is not None:
                known = self._registered(pool, name, known)
                self._shown[pool, name] = known
        return known

    def _registered(self, pool: Pool, name: str, example: Example) -> Example:
        """The example with numbers in place of images."""
        assert self.register is not None
        if self.control == "none":
            return replace(example, image=b"", demonstrations=tuple(replace(d, image=b"") for d in example.demonstrations))

        def again(number: int | None) -> bytes:
            shown = self._read(pool, name)
            return shown.image if number is None else shown.demonstrations[number].image

        numbers = [
            self.register(demonstration.image, f"task {self.task.name}, demonstration {demonstration.id}", partial(again, at))
            for at, demonstration in enumerate(example.demonstrations)
        ]
        own = self.register(example.image, f"task {self.task.name}, item {example.id}", partial(again, None))
        demonstrations = zip(example.demonstrations, numbers, strict=True)
        shown = tuple(replace(d, image=b"", number=number) for d, number in demonstrations)
        return replace(example, image=b"", number=own, demonstrations=shown)

    def examples(self, query: str, shots: int) -> tuple[Example, list[Example]]:
        """(the query, its `shots` demonstrations) as shown."""
        asked = self._show(self.task.queries, query)
        if self.task.support is None:
            return asked, list(asked.demonstrations[:shots])
        support: Pool = self.task.support
        return asked, [self._show(support, name) for name in self.plan.shown(query, shots)]

    def register_images(self) -> None:
        """Register every image of the task's plan, in an order that the plan alone decides."""
        for query in self.plan.queries:
            self.examples(query, self.most)

    def request(self, query: str, shots: int) -> Request:
        from eval.generate import Request

        asked, demonstrations = self.examples(query, shots)
        parts = build_prompt(self.template, demonstrations, asked, with_images=self.control != "none")
        return Request(parts, options(self.template, asked.names))

    def record(self, query: str, shots: int, answer: Answer) -> dict[str, Any]:
        """One line of the results, still without its score. Raises UserError for an answer whose numbers are not finite."""
        measured = {"logprob": answer.logprob, "entropy": answer.entropy, "image_gain": answer.image_gain or 0.0}
        measured |= {f"option {number}": value for number, value in enumerate(answer.options)}
        if wrong := [f"{key} {value}" for key, value in measured.items() if not math.isfinite(value)]:
            raise UserError(
                f"run {self.run}, task {self.task.name}, {shots}-shot, item {query!r}: {', '.join(wrong)}. The model's "
                "probabilities are no numbers, and it gives no answer: its weights are not finite (did its training diverge?) "
                f"or too large for dtype={self.dtype}. Evaluate with dtype=float32, or another checkpoint."
            )
        asked = self._show(self.task.queries, query)
        record: dict[str, Any] = {"id": query, "cluster": asked.image_id, "prediction": answer.text}
        record[REFERENCES_KEY[self.task.kind]] = list(asked.references)
        if asked.names:
            record["options"] = {name: round(value, 6) for name, value in zip(asked.names, answer.options, strict=True)}
        record |= {"demonstrations": self.plan.shown(query, shots), "logprob": round(answer.logprob, 6)}
        record["entropy"] = round(answer.entropy, 6)
        if answer.image_gain is not None:
            record["image_gain"] = round(answer.image_gain, 6)
        return record
