"""Pictures of runs: loss curves, scores with intervals, and what a model says about held-out images.

    metrics.jsonl ------------------> loss_curves     training loss a kind of data, smoothed; PNG and SVG
    Table (table.py) ---------------> score_bars      the mean over tasks and each task, with 95 % intervals; PNG and SVG
    results + images --------------> samples         the *first n items of the plan*, good and bad alike: nothing is picked; PNG

Smoothing fits a straight line to the neighbours of each step and takes its value there: a trailing mean would draw a falling loss
too high, a window that narrows at the end would show its noise. The colours are told apart by colour-blind eyes too (after Okabe
and Ito).
"""

from __future__ import annotations

import io
import string
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablations.results import Evaluation, Run
from ablations.statistics import t_quantile
from ablations.tables.building import build
from ablations.tables.cells import Block, Table
from ablations.tables.selection import select
from configs.command import command
from configs.errors import UserError
from data_pipelines import paths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eval.tasks.pool import TaskData

COLOURS = ("#2f6db3", "#d9722e", "#2e9e7b", "#b2569c", "#c9a11f", "#63b1dd", "#7a7f87")
INK, MUTED, GRID = "#22262b", "#6b727b", "#e6e8eb"
RIGHT, PARTLY, WRONG = "#22805f", "#96760c", "#b8441a"
LOSSES = {"loss": "all", "loss_captions": "captions", "loss_interleaved": "interleaved", "loss_text": "text"}


@contextmanager
def style() -> Iterator[Any]:
    """matplotlib.pyplot in the house style, without a display; the same input gives the same bytes."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("Pictures need matplotlib, which is not installed: pip install 'matplotlib>=3.9,<4'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": "#b9bec5",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": "white",
        "legend.frameon": False,
        "svg.hashsalt": "mm1-ablations",
    }
    with plt.rc_context(settings):
        yield plt


def _save(figure: Figure, path: Path, *suffixes: str) -> list[Path]:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name.removesuffix(".png").removesuffix(".svg") + suffix) for suffix in suffixes]
    for target in written:
        figure.savefig(target, dpi=160, metadata={"Date": None} if target.suffix == ".svg" else {"Software": None})
    plt.close(figure)
    return written


# ---------------------------------------------------------------------------------------------------------- loss curves


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """(n,) local straight-line fits over at most `window` neighbours; window 1 changes nothing, a straight line stays itself."""
    y, half = np.asarray(values, dtype=np.float64), max(0, window - 1) // 2
    out = y.copy()
    for i in range(len(y)) if half else ():
        near = y[max(0, i - half) : i + half + 1]
        x = np.arange(len(near)) - (len(near) - 1) / 2
        out[i] = near.mean() + (x @ near) / max(float(x @ x), 1e-9) * x[min(i, half)]
    return out


def logged(rows: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[int, float]]:
    """(step, nats a token) of one kind of data. A last row over fewer steps than the others, which is mostly noise, is no point
    of a curve."""
    if len(rows) > 2 and rows[-1]["step"] - rows[-2]["step"] < rows[1]["step"] - rows[0]["step"]:
        rows = rows[:-1]
    return [(row["step"], row[kind]) for row in rows if kind in row]


def loss_curves(runs: Sequence[Run], path: Path, *, window: int = 0, log_x: bool = False) -> list[Path]:
    """Training loss (nats a token) over steps: one panel a kind of data, one line a run; `window` logged steps of smoothing (0: a
    tenth of the run). Losses that are not finite are left out. Writes PATH.png and PATH.svg and returns them. Raises UserError
    if a run has logged nothing."""
    records = {run.label: run.metrics() for run in runs}
    for run in runs:
        if len(records[run.label]) < 2:
            raise UserError(f"{run.folder / 'metrics.jsonl'}: fewer than two logged steps; there is no curve to draw yet.")
    kinds = [kind for kind in LOSSES if any(kind in record for rows in records.values() for record in rows)]
    if len(kinds) == 2:
        kinds = kinds[1:]  # with one kind of data "all" is the same curve again
    labels = names(runs)
    with style() as plt:
        figure, panels = plt.subplots(1, len(kinds), figsize=(3.1 * len(kinds) + 0.5, 3.3), squeeze=False)
        for panel, kind in zip(panels[0], kinds, strict=True):
            low, high = np.inf, 0.0
            for number, run in enumerate(runs):
                points = [(step, loss) for step, loss in logged(records[run.label], kind) if np.isfinite(loss)]
                if not points:
                    continue
                steps, losses = zip(*points, strict=True)
                line = smooth(losses, window or len(losses) // 10)
                colour = COLOURS[number % len(COLOURS)]
                if len(runs) <= 3:
                    panel.plot(steps, losses, color=colour, alpha=0.18, linewidth=0.9)
                panel.plot(steps, line, color=colour, linewidth=1.9, label=labels[number])
                low, high = min(low, float(line.min())), max(high, float(line[max(1, len(line) // 50) :].max()))
            if np.isfinite(low):  # else all runs diverged at once
                high = max(high, low + 0.1)
                panel.set_ylim(max(0.0, low - 0.08 * (high - low)), high + 0.04 * (high - low))
            panel.set_title(LOSSES[kind])
            panel.set_xlabel("step")
            if log_x:
                panel.set_xscale("log")
            panel.margins(x=0.01)
        panels[0][0].set_ylabel("training loss, nats a token")
        _legend(figure, panels[0][0], len(runs))
        return _save(figure, path, ".png", ".svg")


def names(runs: Sequence[Run]) -> list[str]:
    """Run names, with as much of seed and hash as it takes to tell them apart."""
    plain = [run.name for run in runs]
    seeded = [f"{run.name}, seed {run.seed}" for run in runs]
    for candidate in (plain, seeded):
        if len(set(candidate)) == len(candidate):
            return candidate
    return [run.label for run in runs]


def _legend(figure: Figure, panel: Axes, entries: int) -> None:
    """One legend above all panels, left-aligned, in as few rows as fit."""
    handles, labels = panel.get_legend_handles_labels()
    columns = min(entries, max(1, int(figure.get_figwidth() * 10 // (max(map(len, labels)) + 6))))
    rows = -(-entries // columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 * rows / figure.get_figheight()), w_pad=2)
    figure.legend(
        handles, labels, loc="upper left", ncols=columns, bbox_to_anchor=(0.01, 1.0), handlelength=1.4, columnspacing=1.6
    )


# --------------------------------------------------------------------------------------------------------------- scores


def score_bars(table: Table, path: Path) -> list[Path]:
    """Scores in points with their 95 % intervals, a panel a block, a group a number of shots, a bar a variant; the dashed line is
    chance, hatched bars are controls. Writes PATH.png and PATH.svg and returns them."""
    with style() as plt:
        width = max(2.6, 0.8 + 0.25 * len(table.blocks[0].rows) * len(table.shots))
        columns = min(len(table.blocks), max(1, round(11 / width)))
        rows = -(-len(table.blocks) // columns)
        figure, panels = plt.subplots(rows, columns, figsize=(width * columns + 0.4, 3.1 * rows), squeeze=False)
        for panel in panels.flat[len(table.blocks) :]:
            panel.remove()
        for panel, block in zip(panels.flat, table.blocks, strict=False):
            _bars(panel, block, table.shots)
        for panel in panels[:, 0]:
            panel.set_ylabel("points, 95 % interval")
        _legend(figure, panels[0][0], len(table.blocks[0].rows))
        return _save(figure, path, ".png", ".svg")


def _bars(panel: Axes, block: Block, shots: Sequence[int]) -> None:
    variants = list(dict.fromkeys(row.label for row in block.rows))
    step = 0.84 / len(block.rows)
    for number, row in enumerate(block.rows):
        scores = [row.cells[k].score for k in shots]
        colour = COLOURS[variants.index(row.label) % len(COLOURS)]
        panel.bar(
            [i + (number - (len(block.rows) - 1) / 2) * step for i in range(len(shots))],
            [s.mean for s in scores],
            step * 0.88,
            yerr=[0.0 if np.isnan(s.se) else t_quantile(0.975, s.df) * s.se for s in scores],
            label=f"{row.label}, images {row.control}" if row.control else row.label,
            color="white" if row.control else colour,
            edgecolor=colour,
            hatch="////" if row.control else None,
            linewidth=0.8,
            error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 0},
        )
    if block.chance is not None:
        panel.axhline(block.chance, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
    panel.set_xticks(range(len(shots)), [f"{k}-shot" for k in shots])
    panel.set_title("mean over tasks" if block.task is None else block.task)
    panel.set_ylim(bottom=0)
    panel.grid(axis="x", visible=False)


# -------------------------------------------------------------------------------------------------------------- samples


def verdict(prediction: str, references: Sequence[str], score: float, kind: str) -> str:
    """'right': says what a reference says (case and punctuation apart), or a VQA score of 50 points and more; 'partly': any other
    score above 0; 'wrong': none."""

    def bare(text: str) -> str:
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    if bare(prediction) in map(bare, references) or (kind != "captioning" and score >= 50):
        return "right"
    return "partly" if score > 0 else "wrong"


def samples(
    run: Run,
    evaluation: Evaluation,
    task: str,
    path: Path,
    *,
    n: int = 8,
    shots: Sequence[int] = (),
    columns: int = 4,
    tasks: Mapping[str, TaskData] | None = None,
) -> list[Path]:
    """A grid of the first `n` items of the plan: image, question, reference, and what the model said at each number of shots.

    `tasks`: as evaluated_tasks gives them; None: those of the run's corpus. Writes PATH.png and returns it. Raises UserError for
    an unknown task, or if the corpus is not the one that was evaluated.
    """
    if task not in evaluation.tasks:
        raise UserError(f"task={task}: {evaluation.folder / 'summary.json'} has {', '.join(evaluation.tasks)}.")
    numbers = list(shots) or sorted({evaluation.shots[0], evaluation.shots[-1]})
    pool = (tasks or evaluated_tasks(run, evaluation))[task].queries
    lines = {k: {str(line["id"]): line for line in evaluation.items(task, k)} for k in numbers}
    chosen = [pool.example(identifier) for identifier in list(lines[numbers[0]])[:n]]
    kind, columns = evaluation.tasks[task].kind, min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    with style() as plt:
        from PIL import Image

        wraps = [[_text(example, lines, kind) for example in chosen[r * columns : (r + 1) * columns]] for r in range(rows)]
        side, gap = 2.3, 0.22

        def height(text: str) -> float:
            return 0.14 * (text.count("\n") + 1) + 0.04

        heights = [side + 0.1 + max(sum(height(text) for text, _ in cell) for cell in row) for row in wraps]
        width, total = columns * (side + gap) + gap, sum(heights) + gap * rows + 0.42
        figure = plt.figure(figsize=(width, total))
        mean = ", ".join(f"{k}-shot {evaluation.tasks[task].shots[k].mean:.1f}" for k in numbers)
        title = f"{run.name} on {task}: the first {len(chosen)} of {evaluation.tasks[task].shots[numbers[0]].n} held-out items"
        figure.text(gap / width, 1 - 0.2 / total, title, weight="bold", size=10, va="center")
        figure.text(1 - gap / width, 1 - 0.2 / total, f"whole task: {mean}", color=MUTED, size=8.5, va="center", ha="right")
        top = total - 0.42
        for r, row in enumerate(wraps):
            for c, cell in enumerate(row):
                left = gap + c * (side + gap)
                axes = figure.add_axes((left / width, (top - side) / total, side / width, side / total))
                axes.set_axis_off()
                picture = Image.open(io.BytesIO(chosen[r * columns + c].image)).convert("RGBA")
                paper = Image.new("RGBA", picture.size, "#f6f7f8")
                axes.imshow(Image.alpha_composite(paper, picture).convert("RGB"), interpolation="antialiased")
                y = top - side - 0.1
                for text, colour in cell:
                    figure.text(left / width, y / total, text, color=colour, size=8, va="top", linespacing=1.2)
                    y -= height(text)
            top -= heights[r] + gap
        return _save(figure, path, ".png")


def _text(example: Any, lines: dict[int, dict[str, dict[str, Any]]], kind: str) -> list[tuple[str, str]]:
    """(wrapped text, colour) for the lines under one image."""

    def wrap(text: str) -> str:
        return textwrap.fill(" ".join(text.split()), 38, max_lines=4, placeholder=" …").replace("$", r"\$")

    found = [(wrap(example.question), MUTED)] if example.question else []
    found.append((wrap(f"truth: {example.shown_answer}"), INK))
    for k, by_id in lines.items():
        line = by_id[example.id]
        said = verdict(str(line.get("prediction", "")), example.references, float(line["score"]), kind)
        mark, colour = {"right": ("✓", RIGHT), "partly": ("≈", PARTLY), "wrong": ("✗", WRONG)}[said]
        found.append((wrap(f"{mark} {k}-shot: {line.get('prediction') or '(nothing)'}"), colour))
    return found


def evaluated_tasks(
    run: Run, evaluation: Evaluation, *, datasets: str | None = None, files: Mapping[str, Any] | None = None
) -> dict[str, TaskData]:
    """The evaluation's tasks with their held-out items, from the corpus and, with `datasets`, from official files.

    Raises UserError naming what was looked at, if it has not the fingerprint of what was evaluated.
    """
    from eval.saved import corpora_of, corpus_fingerprint, find_tasks

    return find_tasks(
        list(evaluation.tasks),
        whose=run.label,
        fingerprint=corpus_fingerprint(evaluation.folder) or run.corpus_fingerprint,
        corpora=corpora_of(run.folder, run.corpus),
        datasets=datasets,
        files=files,
        shots=evaluation.shots[-1],
    )


# -------------------------------------------------------------------------------------------------------------- command


@dataclass
class PlotsConfig:
    """The options of `python -m ablations.plots`; main() describes them."""

    runs: list[str] = field(default_factory=list)
    baseline: str | None = None
    shots: list[int] = field(default_factory=list)
    evaluation: str | None = None
    output: str | None = None
    n: int = 8
    log_x: bool = False
    datasets: str | None = None
    files: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        if self.n < 1:
            raise UserError(f"n={self.n}: samples show at least 1 item.")


@command("plots", schema=PlotsConfig)
def main(config: PlotsConfig) -> None:
    """Pictures of trained and evaluated runs: losses, scores with intervals, answers to held-out images.

    runs=[base,connector_avgpool]  as in ablations.table, also baseline=, shots= and evaluation=.
    output=FOLDER                  gets loss.png, loss.svg, scores.png, scores.svg and samples_TASK.png of the baseline.
                                   None: <home>/tables.
    n=8                            how many items samples show: the first of the plan.
    log_x=true                     steps on a logarithmic axis.
    datasets=FOLDER                where official files lie, if tasks of the evaluation come from them, as in eval.fewshot; also
                                   +files.TASK.query.json.images=PATH.
    """
    folder = Path(config.output).expanduser() if config.output else paths.home() / "tables"
    selection = select(config.runs, baseline=config.baseline, evaluation=config.evaluation)
    first = selection.variants[0]
    run, evaluation = first.runs[0], first.evaluations[0]
    tasks = evaluated_tasks(run, evaluation, datasets=config.datasets, files=config.files)
    written = loss_curves([run for v in selection.variants for run in v.runs], folder / "loss", log_x=config.log_x)
    written += score_bars(build(selection, config.shots), folder / "scores")
    for task in evaluation.tasks:
        path = folder / f"samples_{task}"
        written += samples(run, evaluation, task, path, n=config.n, shots=config.shots, tasks=tasks)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
