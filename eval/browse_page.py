"""The page of `python -m eval.browse`: one evaluation, or two side by side -> one HTML file that needs nothing else.

    Saved + tasks -> content: what the page's script reads, as plain values
                       images    data URIs, each picture once however many items show it
                       examples  the demonstrations, each once
                       tasks     items, and per number of shots each side's answers, means and histogram
    content + browse.css + browse_cards.js + browse.js -> page

The script builds every element with textContent; nothing that a model or a corpus says is ever parsed as HTML. The data lies in
the page as JSON in which <, > and & are escaped, and the page's own policy (Content-Security-Policy) admits the one script and
the one style of these hashes, data: images, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.html_text import safe
from data_pipelines.images import decode_rgb
from eval.plan import sample_queries
from eval.prompter import Prompter
from eval.prompts import build_prompt
from eval.results import REFERENCES_KEY
from eval.saved import Record, Saved, sparq_words
from eval.statistics import clustered_mean
from eval.tasks.example import Example
from eval.tasks.pool import TaskData

BINS = 20
QUALITY = 72
"""Of WebP. A picture as rough as a photograph (noise of a 1/f spectrum) takes 12 kB at 224 pixels and 3 kB at 112."""
DEMONSTRATION = 112
"""Pixels of a demonstration's longer side; it is shown at half of them, sharp on fine screens."""
KNOWN = ("id", "cluster", "prediction", "score", "logprob", "demonstrations", *REFERENCES_KEY.values())
"""Fields of a record with a place of their own on the page; all others are listed under their names."""


@dataclass
class Gallery:
    """Thumbnails as data URIs; the same bytes at the same size are one, a picture smaller than both sizes is one at both."""

    uris: list[str] = field(default_factory=list)
    _known: dict[tuple[bytes, int | str], int] = field(default_factory=dict)

    def add(self, image: bytes, pixels: int, name: str) -> int:
        """The picture's number. On white, as the model sees it. Raises UserError naming a picture that cannot be decoded."""
        digest = hashlib.blake2b(image, digest_size=16).digest()
        if (digest, pixels) not in self._known:
            uri = thumbnail(image, pixels, name)
            if (digest, uri) not in self._known:
                self._known[digest, uri] = len(self.uris)
                self.uris.append(uri)
            self._known[digest, pixels] = self._known[digest, uri]
        return self._known[digest, pixels]


def thumbnail(image: bytes, pixels: int, name: str) -> str:
    from PIL import Image

    picture = Image.fromarray(decode_rgb(image, name))
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Side:
    """One evaluation with its tasks opened."""

    saved: Saved
    tasks: Mapping[str, TaskData]


def content(
    sides: Sequence[Side],
    *,
    tasks: Sequence[str] | None = None,
    shots: Sequence[int] | None = None,
    items: int | None = 200,
    choose: str = "sample",
    pixels: int = 224,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What the page holds. Of two sides the cells that both have, and the items that both were asked.

    `items` a task: a sample by keyed hash, or with choose="worst" those of the lowest mean score (of two sides: of the largest
    fall from the first to the second). Means and histograms are over all items whatever is shown. Raises UserError for tasks or
    shots that are not there, or if two sides have nothing in common.
    """
    cells = [cell for cell in sides[0].saved.cells if all(cell in side.saved.cells for side in sides)]
    where = " and ".join(str(side.saved.folder) for side in sides)
    if not cells:
        held = "; ".join(f"{s.saved.folder}: " + ", ".join(f"{t} {k}-shot" for t, k in s.saved.cells) for s in sides)
        raise UserError(f"results: these have no task and number of shots in common. {held}.")
    for key, wanted, there in (("tasks", tasks, {t for t, _ in cells}), ("shots", shots, {k for _, k in cells})):
        if unknown := [value for value in wanted or [] if value not in there]:
            listed = ", ".join(map(str, sorted(there)))
            raise UserError(f"{key}: {', '.join(map(str, unknown))} not among the finished ones of {where}: {listed}.")
    cells = [(t, k) for t, k in cells if (not tasks or t in tasks) and (not shots or k in shots)]
    if not cells:
        raise UserError(f"{where}: no finished cell is of both tasks={list(tasks or [])} and shots={list(shots or [])}.")
    gallery, examples = Gallery(), Examples()
    shown = {}
    for task in dict.fromkeys(task for task, _ in cells):
        progress(task)
        writer = TaskWriter(task, sides, gallery, examples, pixels)
        shown[task] = writer.write([k for t, k in cells if t == task], items, choose)
    return {
        "sides": [facts(side.saved) for side in sides],
        "tasks": shown,
        "images": gallery.uris,
        "examples": examples.listed,
    }


def facts(saved: Saved) -> dict[str, Any]:
    """What the head of the page says of an evaluation."""
    plan = saved.plan
    seed = f"{plan.seed}" if plan.demonstration_seed is None else f"{plan.seed}, demonstrations {plan.demonstration_seed}"
    known = {
        "folder": str(saved.folder),
        "plan": plan.fingerprint,
        "seed": seed,
        "demonstrations": plan.mode,
        "sample": "all queries" if plan.limit is None else f"at most {plan.limit} queries a task",
        "images": saved.control or "true",
        "prompts": ", ".join(sorted({task.prompts for task in saved.settings.values()})),
        "attention": "dense" if saved.sparq is None else sparq_words(asdict(saved.sparq)),
        "number format": saved.dtype,
        "weights": saved.weights,
        "corpus": f"{plan.corpus}, {plan.corpus_fingerprint[:12]}",
    }
    missing = [
        f"{task} {shots}-shot ({done} of {len(plan.tasks[task].queries)} items)" for (task, shots), done in saved.missing.items()
    ]
    return {"label": saved.label, "control": saved.control, "facts": known, "missing": missing}


@dataclass
class Examples:
    """Demonstrations as they are shown, each once."""

    listed: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def add(self, task: str, example: Example, image: int) -> int:
        key = (task, example.id, image)
        if key not in self._known:
            self._known[key] = len(self.listed)
            self.listed.append({"id": example.id, "image": image, "question": example.question, "answer": example.shown_answer})
        return self._known[key]


class TaskWriter:
    """One task of the page."""

    def __init__(self, name: str, sides: Sequence[Side], gallery: Gallery, examples: Examples, pixels: int) -> None:
        self.name, self.sides, self.gallery, self.examples, self.pixels = name, sides, gallery, examples, pixels
        self.data = [side.tasks[name] for side in sides]
        self.prompters = [Prompter(side.saved.results(side.tasks), data) for side, data in zip(sides, self.data, strict=True)]

    def write(self, shots: Sequence[int], items: int | None, choose: str) -> dict[str, Any]:
        """{kind, metric, chance, items, of, shots: {k: cell}}"""
        settings = [side.saved.settings[self.name] for side in self.sides]
        if len({task.metric for task in settings}) > 1:
            raise UserError(
                f"Task {self.name}: scored by {settings[0].metric} in {self.sides[0].saved.folder}, by {settings[1].metric} in "
                f"{self.sides[1].saved.folder}: their scores have no difference. Leave the task out with tasks=[...]."
            )
        records = {k: [{r["id"]: r for r in side.saved.cells[self.name, k]} for side in self.sides] for k in shots}
        common = [name for name in records[shots[0]][0] if all(name in held for k in shots for held in records[k])]
        if not common:
            raise UserError(f"Task {self.name}: the two evaluations asked no item in common. Evaluate with one seed and limit.")
        chosen = self.choose(common, records, items, choose)
        return {
            "kind": self.data[0].kind,
            "metric": settings[0].metric,
            "prompts": [task.prompts for task in settings],
            "chance": self.data[0].chance,
            "of": len(common),
            "items": [self.item(name) for name in chosen],
            "shots": {str(k): self.cell(k, records[k], common, chosen) for k in shots},
        }

    def choose(
        self, common: Sequence[str], records: Mapping[int, Sequence[Mapping[str, Record]]], items: int | None, choose: str
    ) -> list[str]:
        if choose == "sample":
            return sample_queries(common, task=self.name, seed=self.sides[0].saved.plan.seed, limit=items)

        def worth(name: str) -> float:
            own = math.fsum(held[-1][name]["score"] for held in records.values())
            return own - (math.fsum(held[0][name]["score"] for held in records.values()) if len(self.sides) > 1 else 0.0)

        kept = set(sorted(common, key=worth)[:items])
        return [name for name in common if name in kept]

    def item(self, name: str) -> dict[str, Any]:
        """What does not depend on the number of shots. `references`: [text, how often], in the order of the files."""
        own = self.data[0].queries.example(name)
        references = [[text, count] for text, count in Counter(own.references).items()]
        image = self.gallery.add(own.image, self.pixels, f"task {self.name}, item {name}")
        return {"id": name, "question": own.question, "image": image, "references": references}

    def cell(
        self, shots: int, records: Sequence[Mapping[str, Record]], common: Sequence[str], chosen: Sequence[str]
    ) -> dict[str, Any]:
        """{sides: [{mean, se, n, clusters, answers}], difference: {mean, se} or None, histogram}"""
        clusters = [records[0][name]["cluster"] for name in common]
        scores = [[float(held[name]["score"]) for name in common] for held in records]
        sides: list[dict[str, Any]] = []
        for number, held in enumerate(records):
            estimate = clustered_mean(scores[number], clusters)
            answers = [self.answer(number, shots, held[name]) for name in chosen]
            if number == 1:
                answers = [_without(answer, first) for answer, first in zip(answers, sides[0]["answers"], strict=True)]
            sides.append(
                {"mean": estimate.mean, "se": estimate.se, "n": estimate.n, "clusters": estimate.clusters, "answers": answers}
            )
        if len(scores) == 1:
            return {"sides": sides, "difference": None, "histogram": histogram(scores[0])}
        differences = [b - a for a, b in zip(*scores, strict=True)]
        change = clustered_mean(differences, clusters)
        return {"sides": sides, "difference": {"mean": change.mean, "se": change.se}, "histogram": histogram(differences)}

    def answer(self, side: int, shots: int, record: Record) -> dict[str, Any]:
        """`image`: what was shown, another one than the item's own under images=shuffled, None under images=none."""
        prompter, name = self.prompters[side], record["id"]
        asked, demonstrations = prompter.examples(name, shots)
        visible = prompter.control != "none"
        where = f"task {self.name}, item {name}"
        numbers = [self.gallery.add(d.image, DEMONSTRATION, f"{where}, demonstration {d.id}") for d in demonstrations]
        parts = build_prompt(prompter.template, demonstrations, asked, with_images=visible)
        return {
            "prediction": record["prediction"],
            "score": record["score"],
            "logprob": _plain(record.get("logprob")),
            "image": self.gallery.add(asked.image, self.pixels, where) if visible else None,
            "demonstrations": [self.examples.add(self.name, d, n) for d, n in zip(demonstrations, numbers, strict=True)],
            "prompt": [part if isinstance(part, str) else None for part in parts],
            "more": {key: _plain(value) for key, value in record.items() if key not in KNOWN},
        }


def _plain(value: Any) -> Any:
    """Infinities and NaN as words: JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _without(answer: dict[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """The second side's answer without what it shares with the first's: the same demonstrations and prompt are written once."""
    return {key: value for key, value in answer.items() if key not in ("demonstrations", "prompt") or value != first[key]}


def histogram(values: list[float]) -> dict[str, Any]:
    """{edges: n + 1, counts: n, zeros: values that are 0}: bins of one width, none of which straddles zero. A value on an edge
    counts to the right of it, the largest edge to its left; differences get as many bins below zero as above."""
    largest = max((abs(value) for value in values), default=0.0)
    width = _round_up(largest / BINS) if largest else 5.0
    bins = max(1, math.ceil(largest / width - 1e-9))
    start = -bins if min(values, default=0.0) < 0 else 0
    counts = [0] * (bins - start)
    for value in values:
        counts[min(math.floor(value / width + 1e-9) - start, len(counts) - 1)] += 1
    return {"edges": [round(width * i, 9) for i in range(start, bins + 1)], "counts": counts, "zeros": values.count(0)}


def _round_up(width: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten: edges that read well."""
    power = 10 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= width * (1 - 1e-9))


# ---------------------------------------------------------------------------------------------------------------- HTML


def page(held: Mapping[str, Any]) -> str:
    folder = Path(__file__).parent
    style = f"\n{(folder / 'browse.css').read_text(encoding='utf-8')}"
    script = "".join(f"\n{(folder / name).read_text(encoding='utf-8')}" for name in ("browse_cards.js", "browse.js"))
    title = " and ".join(side["label"] for side in held["sides"])
    allowed = f"img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{safe(title)}: few-shot answers</title>
<style>{style}</style>
</head>
<body>
<noscript>This page sorts and filters with a script of its own, which this browser does not run.</noscript>
<script type="application/json" id="data">{as_data(held)}</script>
<script>{script}</script>
</body>
</html>
"""


def as_data(held: Any) -> str:
    """JSON that no HTML parser can see an end or a beginning in."""
    text = json.dumps(held, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
