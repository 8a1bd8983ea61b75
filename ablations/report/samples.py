"""What the variants said to the same items: the first ones of the plan, good and bad alike, with their pictures.

Nothing is picked: the items are the first of the plan, the answers those of each variant's first training seed. What does not
fit into the bounds is left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.plots import evaluated_tasks, verdict
from ablations.report.svg import label_html
from ablations.results import Evaluation
from ablations.tables.selection import Selection
from configs.errors import UserError
from data_pipelines.html_text import safe

if TYPE_CHECKING:
    from eval.tasks.pool import TaskData

ITEMS = 4
PIXELS = 192
PICTURE_BYTES = 1_500_000
"""Of all pictures together, as written."""
LETTERS = 240
"""Of an answer; the rest is cut off and marked."""
MOST_VARIANTS = 60
SIGNS = {"right": "✓", "partly": "≈", "wrong": "✗"}


@dataclass
class Item:
    """`said`: label -> number of shots -> the record of its answer."""

    id: str
    question: str
    references: list[str]
    picture: str
    said: dict[str, dict[int, dict[str, Any]]]


def samples(selection: Selection, shots: Sequence[int]) -> str:
    """A part a task: its first items with every variant's answers at the smallest and the largest number of shots."""
    variants = selection.variants[:MOST_VARIANTS]
    first = variants[0]
    notes = []
    tasks: Mapping[str, TaskData] = {}
    try:
        tasks = evaluated_tasks(first.runs[0], first.evaluations[0])
    except UserError as error:
        notes.append(f"Without pictures and questions, for their data is not here: {error}")
    if len(selection.variants) > MOST_VARIANTS:
        notes.append(f"Answers of the first {MOST_VARIANTS} of {len(selection.variants)} variants.")
    numbers = sorted({shots[0], shots[-1]})
    left, parts = PICTURE_BYTES, []
    for task, summary in first.evaluations[0].tasks.items():
        items = first_items({v.label: v.evaluations[0] for v in variants}, task, numbers, ITEMS)
        cards = []
        for item in items:
            if task in tasks:
                left = _show(item, tasks[task], left)
            cards.append(_card(item, summary.kind, numbers))
        parts.append(f'<details class="task"><summary>{safe(task)}</summary><div class="cards">{"".join(cards)}</div></details>')
    if left < 0:
        notes.append(f"Some pictures are left out: those of a report may have {PICTURE_BYTES:,} bytes.")
    lead = f"The first {ITEMS} items of each task's plan, nothing is picked. Answers of the first training seed."
    return f'<p class="note">{lead}</p>' + "".join(f'<p class="note">{safe(n)}</p>' for n in notes) + "".join(parts)


def first_items(evaluations: Mapping[str, Evaluation], task: str, shots: Sequence[int], count: int) -> list[Item]:
    """The first `count` items as they stand in the first evaluation's file, and what each evaluation said to them."""
    lead = next(iter(evaluations.values()))
    wanted = [record["id"] for record in _read(lead.folder / f"{task}.{shots[0]}.jsonl", None, count)]
    items = {name: Item(str(name), "", [], "", {}) for name in wanted}
    for label, evaluation in evaluations.items():
        for k in shots:
            for record in _read(evaluation.folder / f"{task}.{k}.jsonl", set(wanted), count):
                item = items[record["id"]]
                item.said.setdefault(label, {})[k] = record
                item.references = item.references or _references(record)
    return list(items.values())


def _read(path: Path, wanted: set[str] | None, count: int) -> list[dict[str, Any]]:
    """The first `count` records, or the wanted ones. The table has read and checked these files before."""
    found: list[dict[str, Any]] = []
    with open(path, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            record = json.loads(line)
            if wanted is None or record["id"] in wanted:
                found.append(record)
            if len(found) == count:
                break
    return found


def _references(record: Mapping[str, Any]) -> list[str]:
    from eval.results import REFERENCES_KEY

    held: Any = next((record[key] for key in REFERENCES_KEY.values() if key in record), [])
    return list(dict.fromkeys(map(str, held if isinstance(held, list) else [held])))


def _show(item: Item, data: TaskData, left: int) -> int:
    """Give the item its question and, while the bound allows, its picture; what is left of the bound (negative: exceeded)."""
    from eval.browse_page import thumbnail

    example = data.queries.example(item.id)
    item.question, item.references = example.question or "", item.references or list(example.references)
    if left <= 0:
        return -1
    uri = thumbnail(example.image, PIXELS, f"item {item.id}")
    if len(uri) > left:
        return -1
    item.picture = uri
    return left - len(uri)


def _card(item: Item, kind: str, shots: Sequence[int]) -> str:
    picture = f'<img src="{item.picture}" alt="">' if item.picture else ""
    question = f'<p class="question">{safe(cut(item.question))}</p>' if item.question else ""
    truth = safe(cut(" / ".join(item.references[:3])))
    head = "".join(f"<th>{k}-shot</th>" for k in shots)
    lines = []
    for label, said in item.said.items():
        answers = "".join(_answer(said.get(k), item.references, kind) for k in shots)
        lines.append(f'<tr><th scope="row">{label_html(label)}</th>{answers}</tr>')
    return (
        f'<article>{picture}<div><p class="id">{safe(item.id)}</p>{question}<p class="truth">{truth}</p></div>'
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        "</article>"
    )


def _answer(record: Mapping[str, Any] | None, references: Sequence[str], kind: str) -> str:
    if record is None:
        return "<td></td>"
    text, score = str(record.get("prediction") or ""), float(record["score"])
    found = verdict(text, references, score, kind)
    shown = safe(cut(text)) if text else "<i>(nothing)</i>"
    return f'<td class="{found}"><span title="{score:.0f} points">{SIGNS[found]}</span> <bdi>{shown}</bdi></td>'


def cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[:LETTERS] + " …"
