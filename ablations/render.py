"""A Table as text: Markdown that also reads well in a terminal, and CSV in long form with every number unrounded."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from ablations.cells import Block, Cell, Resources, Row, Table

CSV_COLUMNS = [
    "task", "metric", "chance", "variant", "control", "seeds", "shots", "value", "se", "se_items", "se_seeds",
    "se_demonstrations", "n", "clusters",
    "compared_with", "difference", "difference_se", "ci_low", "ci_high", "p", "p_holm", "significant",
    "difference_error", "matched",
    "parameters_image_encoder", "parameters_connector", "parameters_decoder", "parameters_total", "parameters_trainable",
    "tokens_seen", "loss_tokens_seen", "images_seen", "steps", "flops", "seconds", "runs", "scale", "corpus", "plan",
]  # fmt: skip


def render_markdown(table: Table) -> str:
    """The mean over tasks, one table a task, what each variant took, and the notes."""
    variants = len(table.resources)
    title = f"# {table.resources[0].label}" + (f" and {variants - 1} variant{'s' * (variants > 2)}" if variants > 1 else "")
    parts = [f"{title} (scale {table.scale}, corpus {table.corpus})"]
    for block in table.blocks:
        heading = "## Mean over tasks" if block.task is None else f"## {block.task} ({block.metric})"
        parts.append(heading + (f", chance {block.chance:.1f}" if block.chance is not None else ""))
        parts.append(_scores(block, table.shots, many_seeds=any(len(r.seeds) > 1 for r in table.resources)))
    parts += ["## What each variant is and took", _resources(table.resources), "## Notes"]
    parts.append("\n".join(f"- {note}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _scores(block: Block, shots: Sequence[int], *, many_seeds: bool) -> str:
    compared = len(block.rows) > 1
    header = ["variant"]
    for k in shots:
        header += [f"{k}-shot", f"Δ {k}-shot"] if compared else [f"{k}-shot"]
    lines = []
    for row in block.rows:
        line = [_label(row)]
        for k in shots:
            line.append(_value(row.cells[k]))
            if compared:
                line.append(_difference(row.cells[k], many_seeds))
        lines.append(line)
    return aligned(header, lines)


def _label(row: Row) -> str:
    return f"↳ images {row.control}" if row.control else row.label + ("" if row.matched else " ≠")


def _value(cell: Cell) -> str:
    parts = (("s", cell.score.se_seeds), ("d", cell.score.se_demonstrations))
    kept_apart = ", ".join(f"{sign} {value:.1f}" for sign, value in parts if value is not None)
    return f"{cell.score.mean:.1f} ± {_number(cell.score.se)}" + (f" ({kept_apart})" if kept_apart else "")


def _number(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.1f}"


def _difference(cell: Cell, many_seeds: bool) -> str:
    d = cell.difference
    if d is None:
        return "baseline"
    level = " (items)" if many_seeds and not cell.difference_has_seeds else ""
    if math.isnan(d.se):
        return f"{d.value:+.1f} [?]{level}"
    return f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]{level}{' *' if cell.significant else ''}"


def _resources(resources: Sequence[Resources]) -> str:
    header = [
        "variant",
        "encoder",
        "connector",
        "decoder",
        "trainable",
        "tokens",
        "images",
        "steps",
        "FLOPs",
        "wall time",
        "seeds",
    ]
    lines = [
        [
            r.label + (" ≠" if r.mismatches else ""),
            *(si(r.parameters.get(key, 0)) for key in ("image_encoder", "connector", "decoder", "trainable")),
            si(r.tokens),
            si(r.images),
            f"{r.steps:.0f}",
            f"{r.flops:.2e}",
            duration(r.seconds),
            ", ".join(map(str, r.seeds)),
        ]
        for r in resources
    ]
    return aligned(header, lines)


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right, its columns of one width in the source as well."""
    widths = [max(3, *(len(line[i]) for line in [header, *lines])) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))) + " |"
        )

    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, lines)])


def si(value: float) -> str:
    """1234567 -> '1.23M'; whole numbers below a thousand as they are."""
    for limit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{sign}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """'43 s', '12 min 3 s', '5 h 20 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def render_csv(table: Table) -> str:
    """One line for each task (and "mean"), variant, control and number of shots; empty where there is no such number."""
    resources = {r.label: r for r in table.resources}
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for block in table.blocks:
        for row in block.rows:
            for shots, cell in row.cells.items():
                writer.writerow(_csv_line(table, block, row, shots, cell, resources[row.label]))
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
