"""Answers and reference log-probabilities of one few-shot cell under many attentions, all after one dense prefill.

    prompts -> demonstrations read densely, once -> a copy of the cache a method -> the question -> the answer, and
                                                    the reference's log-probability (nats a token)

What differs between two methods of a cell is what question and answer attend to, and nothing else. `recall` puts a needle among
the demonstrations: their captions are dealt out anew (each picture gets its neighbour's), one of them at a drawn place is shown
with the query's own picture, and its caption is the reference. Two controls are answered densely: `absent`, where another caption
stands in its place and the query's picture nowhere, against which recall's gain is measured; and `unbound`, where the caption
stands there with the picture that the plan had for it: what it lacks against the needle is what the *picture* is good for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.sparq_rivals import Rival, elements, equal_budget, make_rival_cache, with_settings
from configs.errors import UserError
from eval.generate import Generator, Prompt, Request, State
from eval.plan import keyed_hash
from eval.prompter import Prompter
from eval.prompts import build_prompt
from eval.results import REFERENCES_KEY
from mm1.attention.sparq import SparqSettings

CONTROLS = ("absent", "unbound")
DENSE = ("dense", *CONTROLS)


@dataclass(frozen=True)
class Method:
    """A way to attend. family: one of DENSE, sparq, oracle, local, h2o. r: SparQ's, or for local and h2o the r whose bytes they
    may move. suffix: of SparQ, whether the question is sparse too."""

    family: str
    r: int = 0
    k: int = 0
    suffix: str = "sparse"
    sinks: int = 0
    reallocate: bool = True

    @property
    def name(self) -> str:
        if self.family in DENSE:
            return self.family
        size = f"k{self.k}" if self.family == "oracle" else f"r{self.r} k{self.k}"
        more = (", answer only" if self.suffix == "dense" else "") + (f", {self.sinks} sinks" if self.sinks else "")
        return f"{self.family} {size}{more}{'' if self.reallocate else ', no mean'}"

    def settings(self, tokens: float, d: int) -> SparqSettings | None:
        """None: dense. tokens: the mean number of valid tokens, which decides what equal bytes buy."""
        if self.family in DENSE:
            return None
        if self.family in ("sparq", "oracle"):
            r = self.r if self.family == "sparq" else d
            return SparqSettings(r=r, k=self.k, reallocate=self.reallocate, dense_below=1, suffix=self.suffix)
        budget = equal_budget(self.family, tokens, d, r=self.r, k=self.k)
        return Rival(k=budget, dense_below=1, method=self.family, sinks=self.sinks)

    def moved(self, tokens: float, d: int) -> float:
        """Elements of a step relative to dense attention's, for a row of `tokens` valid ones."""
        settings = self.settings(tokens, d)
        k = 0 if settings is None else settings.k
        family = "dense" if settings is None else self.family
        return elements(family, tokens, d, r=self.r, k=k) / elements("dense", tokens, d)


def methods(r: Sequence[int], k: int, *, recall: bool) -> list[Method]:
    """Dense, SparQ at each r (both set-ups; without step 5), rivals at the bytes of each r, and exact scores at several k."""
    found = [Method("dense"), *([Method(name) for name in CONTROLS] if recall else [])]
    found += [Method("sparq", one, k, suffix) for suffix in ("sparse", "dense") for one in r]
    found += [Method("sparq", one, k, reallocate=False) for one in r]
    found += [Method(family, one, k) for family in ("local", "h2o") for one in r]
    found += [Method("local", one, k, sinks=4) for one in r]
    return found + [Method("oracle", 0, size) for size in (k // 4, k // 2, k, 2 * k) if size]


@dataclass(frozen=True)
class Item:
    """A query, its prompt (and recall's controls), and the reference's tokens."""

    query: str
    prompt: Prompt
    controls: dict[str, Prompt]
    reference: str
    target: list[int]


class Probe:
    """One model's cells. `generator`: of the cell's task."""

    def __init__(self, generator: Generator, prompter: Prompter, *, recall: bool, seed: int) -> None:
        self.generator, self.prompter, self.recall, self.seed = generator, prompter, recall, seed
        self.d = head_size(generator.model)

    def items(self, shots: int) -> list[Item]:
        """Raises UserError for prompts without demonstrations, which leave nothing to prefill."""
        if shots < 1:
            raise UserError("shots: comparisons need demonstrations to attend to; give numbers from 1 up.")
        return [self._item(query, shots) for query in self.prompter.plan.queries]

    def _item(self, query: str, shots: int) -> Item:
        asked, shown = self.prompter.examples(query, shots)
        template = self.prompter.template
        controls = {}
        if self.recall:
            captions = [example.shown_answer for example in shown]
            shown = [replace(e, references=(c,)) for e, c in zip(shown, captions[1:] + captions[:1], strict=True)]
            controls["unbound"] = self._encoded(build_prompt(template, shown, asked))
            dealt = [example.shown_answer for example in shown]
            once = [at for at, caption in enumerate(dealt) if dealt.count(caption) == 1] or list(range(shots))
            place = once[keyed_hash(self.seed, "needle", query, shots) % len(once)]
            asked = replace(asked, references=shown[place].references)
            other = replace(shown[place], references=(self._caption_besides(query, captions),))
            controls["absent"] = self._encoded(build_prompt(template, [*shown[:place], other, *shown[place + 1 :]], asked))
            shown[place] = asked
        answer = asked.shown_answer
        target = self.generator.tokenizer.encode(template.answer.format(answer=answer), add_special_tokens=False)
        return Item(query, self._encoded(build_prompt(template, shown, asked)), controls, answer, target)

    def _caption_besides(self, query: str, captions: Collection[str]) -> str:
        """Of the support's captions one that is not among `captions`. Raises UserError if there is none."""
        support = self.prompter.task.support
        assert support is not None
        ids = sorted(support.ids, key=lambda name: keyed_hash(self.seed, "absent", query, name))
        found = next((c for c in (support.example(name).shown_answer for name in ids) if c not in captions), None)
        if found is None:
            raise UserError(
                f"Task {self.prompter.task.name}: its demonstrations have too few captions for recall. Lower shots=..."
            )
        return found

    def _encoded(self, parts: Sequence[Any]) -> Prompt:
        return self.generator.encode(Request(parts))

    def answer(
        self, items: Sequence[Item], batch_size: int, wanted: Sequence[Method], known: Collection[tuple[str, str]]
    ) -> Iterator[list[dict[str, Any]]]:
        """Records of each batch, but for the (method's name, query) in `known`. Batches hang on the items alone."""
        tokens = mean_tokens(items)
        order = sorted(range(len(items)), key=lambda i: (-len(items[i].prompt.ids), i))
        for at in range(0, len(order), batch_size):
            batch = [items[i] for i in order[at : at + batch_size]]
            missing = [m for m in wanted if any((m.name, item.query) not in known for item in batch)]
            records = self._batch(batch, missing, tokens) if missing else []
            yield [record for record in records if (record["method"], record["id"]) not in known]

    def _batch(self, batch: Sequence[Item], wanted: Sequence[Method], tokens: float) -> list[dict[str, Any]]:
        import torch

        records = []
        with torch.inference_mode():
            for control in (None, *CONTROLS):
                chosen = [method for method in wanted if (method.family if method.family in CONTROLS else None) == control]
                if not chosen:
                    continue
                prompts = [item.prompt if control is None else item.controls[control] for item in batch]
                begun, rest = self._prefill(prompts)
                for method in chosen:
                    state = self._asked(begun, rest, method.settings(tokens, self.d))
                    nothing = [self.generator._embed([])] * len(batch)
                    totals = self.generator._score(nothing, [item.target for item in batch], state.copy())
                    answers = self.generator._decode(state)
                    for item, total, said in zip(batch, totals, answers, strict=True):
                        records.append(self._record(item, method, total, said.text.strip()))
        return records

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[State, tuple[Any, Any, list[int]]]:
        """The rows after their demonstrations, read densely, and what is left of them: embeddings, which are real, lengths."""
        generator = self.generator
        queries = [len(prompt.ids) - prompt.split for prompt in prompts]
        embeddings, real = generator._padded([(prompt.ids, prompt.starts, prompt.images) for prompt in prompts])
        apart = max(queries)
        if min(len(prompt.ids) for prompt in prompts) <= apart:
            raise UserError("A prompt is no longer than another's question: raise shots=..., or lower batch_size=...")
        begun = generator._forward(embeddings[:, :-apart], real[:, :-apart], None)
        return begun, (embeddings[:, -apart:], real[:, -apart:], queries)

    def _asked(self, begun: State, rest: tuple[Any, Any, list[int]], settings: SparqSettings | None) -> State:
        """The rows after their questions; from here on each token attends as `settings` say."""
        embeddings, real, queries = rest
        state = State(with_settings(begun.cache, settings), begun.mask, begun.logprobs)
        state.cache.questions(queries)
        state = self.generator._forward(embeddings, real, state)
        if settings is not None and settings.suffix == "dense":  # that was the question; a reference of several tokens is answer
            for layer in state.cache.layers:
                layer.settings = replace(settings, suffix="sparse")
        return state

    def _record(self, item: Item, method: Method, total: float, said: str) -> dict[str, Any]:
        asked, _ = self.prompter.examples(item.query, 0)
        length = len(item.prompt.ids)
        references = [item.reference] if self.recall else list(asked.references)
        return {
            "method": method.name,
            "id": item.query,
            "cluster": asked.image_id,
            "prediction": said,
            REFERENCES_KEY[self.prompter.task.kind]: references,
            "logprob": round(total / len(item.target), 6),
            "tokens": length,
            "moved": round(method.moved(length, self.d), 6),
        }


def mean_tokens(items: Sequence[Item]) -> float:
    return sum(len(item.prompt.ids) for item in items) / len(items)


def head_size(model: Any) -> int:
    from mm1.attention.register import decoder_of

    config = decoder_of(model).config.get_text_config(decoder=True)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def probing_generator(worker: Any, task: str) -> Generator:
    """A Generator of a Worker's model whose caches all methods can go on from."""
    settings = worker.results.settings[task]
    return Generator(
        worker.model,
        worker.tokenizer,
        worker.features,
        stop=settings.stop,
        max_new_tokens=settings.max_new_tokens,
        new_cache=lambda: make_rival_cache(worker.model, SparqSettings()),
    )
