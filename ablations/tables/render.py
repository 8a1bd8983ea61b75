"""A Table as text: Markdown that also reads well in a terminal, and CSV in long form with every number unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from ablations.tables.cells import Block, Cell, Resources, Row, Table
from ablations.tables.sections import Section, duration, si, table_sections

__all__ = ["CSV_COLUMNS", "aligned", "duration", "markdown", "render_csv", "render_markdown", "si"]

CSV_COLUMNS = [
    "task", "metric", "chance", "variant", "control", "seeds", "shots", "value", "se", "se_items", "se_seeds",
    "se_demonstrations", "n", "clusters",
    "compared_with", "difference", "difference_se", "ci_low", "ci_high", "p", "p_holm", "significant",
    "difference_error", "matched",
    "parameters_image_encoder", "parameters_connector", "parameters_decoder", "parameters_total", "parameters_trainable",
    "tokens_seen", "loss_tokens_seen", "images_seen", "steps", "flops", "seconds", "runs", "scale", "corpus", "plan",
]  # fmt: skip


def title_of(table: Table) -> str:
    variants = len(table.resources)
    title = table.resources[0].label + (f" and {variants - 1} variant{'s' * (variants > 2)}" if variants > 1 else "")
    return f"{title} (scale {table.scale}, corpus {table.corpus})"


def render_markdown(table: Table) -> str:
    """The mean over tasks, one table a task, what each variant took, and the notes."""
    return markdown(title_of(table), "", table_sections(table), table.notes)


def markdown(title: str, about: str, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """A heading, each section with its own notes below it, and the notes of all."""
    parts = [f"# {title}", *([about] if about else [])]
    for section in sections:
        parts += [f"## {section.title}", aligned(section.header, section.lines, section.text), *section.notes]
    parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]], text: int = 1) -> str:
    """A Markdown table, the first `text` columns to the left and the others to the right, its columns of one width in the source
    as well."""
    held = [[cell.replace("|", "\\|") for cell in line] for line in [header, *lines]]
    widths = [max(3, *map(len, column)) for column in zip(*held, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = (c.ljust(w) if i < text else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(placed) + " |"

    rule = "| " + " | ".join("-" * w if i < text else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(held[0]), rule, *map(line, held[1:])])


def render_csv(
    table: Table, columns: Sequence[str] = CSV_COLUMNS, more: Callable[[Row, int, bool], dict[str, Any]] | None = None
) -> str:
    """One line for each task (and "mean"), variant, control and number of shots; empty where there is no such number.

    `more(row, shots, of the mean)`: values of further `columns`.
    """
    resources = {r.label: r for r in table.resources}
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for block in table.blocks:
        for row in block.rows:
            for shots, cell in row.cells.items():
                line = _csv_line(table, block, row, shots, cell, resources[row.label])
                writer.writerow(line | (more(row, shots, block is table.blocks[0]) if more else {}))
    return text.getvalue()


def _csv_line(table: Table, block: Block, row: Row, shots: int, cell: Cell, r: Resources) -> dict[str, object]:
    d = cell.difference
    return {
        "task": block.task or "mean",
        "metric": block.metric,
        "chance": block.chance,
        "variant": row.label,
        "control": row.control,
        "seeds": " ".join(map(str, row.seeds)),
        "shots": shots,
        "value": cell.score.mean,
        "se": cell.score.se,
        "se_items": cell.score.se_items,
        "se_seeds": cell.score.se_seeds,
        "se_demonstrations": cell.score.se_demonstrations,
        "n": cell.score.n,
        "clusters": cell.score.clusters,
        "compared_with": None if d is None else row.label if row.control else table.resources[0].label,
        "difference": d and d.value,
        "difference_se": d and d.se,
        "ci_low": d and d.low,
        "ci_high": d and d.high,
        "p": d and d.p,
        "p_holm": cell.p_holm,
        "significant": None if d is None else int(cell.significant),
        "difference_error": None if d is None else "items and seeds" if cell.difference_has_seeds else "item-level only",
        "matched": int(row.matched),
        **{f"parameters_{key}": r.parameters.get(key) for key in ("image_encoder", "connector", "decoder", "total", "trainable")},
        "tokens_seen": r.tokens,
        "loss_tokens_seen": r.loss_tokens,
        "images_seen": r.images,
        "steps": r.steps,
        "flops": r.flops,
        "seconds": r.seconds,
        "runs": " ".join(r.runs),
        "scale": table.scale,
        "corpus": table.corpus,
        "plan": table.plan,
    }
