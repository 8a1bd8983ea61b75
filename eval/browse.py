"""Reading what a model said: a results folder -> one HTML page of its items, or two side by side.

RESULTS -> saved.py: plan, records -> the corpus or official files, by fingerprint -> browse_page.py -> browse.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.command import command
from configs.errors import UserError

CHOICES = ("sample", "worst")


@dataclass
class BrowseConfig:
    """The options of `python -m eval.browse`; main() describes them."""

    results: list[str] = field(default_factory=list)
    out: str = "browse.html"
    tasks: list[str] | None = None
    shots: list[int] | None = None
    items: int | None = 200
    choose: str = "sample"
    pixels: int = 224
    task_corpus: str | None = None
    datasets: str | None = None
    files: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        if len(self.results) not in (1, 2):
            given = ", ".join(self.results) or "none"
            raise UserError(
                f"results: give one evaluation, or two to compare: python -m eval.browse RESULTS [OTHER]. Given: {given}. "
                "Each is a results folder (RUN/results/HASH), or the folder or name of a run with one evaluation."
            )
        if self.items is not None and self.items < 1:
            raise UserError(f"items={self.items}: give a number of items a task from 1 up, or null for all of them.")
        if self.choose not in CHOICES:
            raise UserError(f"choose={self.choose}: choose from {', '.join(CHOICES)}.")
        if not 16 <= self.pixels <= 2048:
            raise UserError(f"pixels={self.pixels}: give a picture's longer side, 16 to 2048 pixels.")
        if not Path(self.out).expanduser().absolute().parent.is_dir():
            raise UserError(f"out={self.out}: there is no such folder.")
        if Path(self.out).expanduser().is_dir():
            raise UserError(f"out={self.out} is a folder. Name the file: out={Path(self.out) / 'browse.html'}")


def browse(config: BrowseConfig) -> tuple[Path, dict[str, Any]]:
    """Write the page; returns its path and what it holds (browse_page.content)."""
    from eval.saved import find_evaluation, open_tasks, read_saved

    saved = [read_saved(find_evaluation(name)) for name in config.results]
    if len({each.plan.corpus_fingerprint for each in saved}) > 1:
        listed = "; ".join(f"{each.folder}: {each.plan.corpus} {each.plan.corpus_fingerprint[:8]}" for each in saved)
        raise UserError(f"results: these are of different data, so that their items cannot be paired. {listed}.")
    if len(saved) == 2 and saved[0].folder == saved[1].folder:
        raise UserError(f"results: {saved[0].folder} is given twice. Give another one, or only one.")
    from eval.browse_page import Side, content, page

    sides = [
        Side(each, open_tasks(each, task_corpus=config.task_corpus, datasets=config.datasets, files=config.files))
        for each in saved
    ]
    held = content(
        sides,
        tasks=config.tasks,
        shots=config.shots,
        items=config.items,
        choose=config.choose,
        pixels=config.pixels,
        progress=lambda task: print(f"{task} ...", file=sys.stderr),
    )
    out = Path(config.out).expanduser().absolute()
    out.write_text(page(held), encoding="utf-8")
    return out, held


@command("browse", schema=BrowseConfig)
def _main(config: BrowseConfig) -> None:
    """Write one HTML page to read an evaluation in: queries, demonstrations, prompts, answers, references, scores.

    python -m eval.browse RESULTS          a results folder (RUN/results/HASH), or the folder or name of a run with one evaluation
    python -m eval.browse RESULTS OTHER    two side by side, with the difference of each item: OTHER minus RESULTS

    out=browse.html           the page: one file, opened from disk; it sorts, filters and searches, and asks no network
    tasks=[a,b] shots=[0,8]   which cells; default: every finished one
    items=200                 items a task, null: all. choose=sample (by keyed hash) or worst (the lowest scores)
    pixels=224                longer side of a query's picture
    task_corpus=FOLDER        where the corpus is, if neither the run nor its name says so
    datasets=FOLDER           where official files are, as in eval.fewshot; also +files.TASK.query.json.images=PATH
    """
    out, held = browse(config)
    for side in held["sides"]:
        if side["missing"]:
            print(f"{side['facts']['folder']}: not finished, and not on the page: {', '.join(side['missing'])}")
    shown = ", ".join(f"{name}: {len(task['items'])} of {task['of']} items" for name, task in held["tasks"].items())
    print(f"{shown}; {len(held['images'])} pictures, {out.stat().st_size / 1e6:.1f} MB\n{out}")


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """Arguments without a key are results: RESULTS OTHER out=x -> results=["RESULTS","OTHER"] out=x. Options of Hydra that take a
    value (--cfg job) keep it."""
    positional: list[str] = []
    rest: list[str] = []
    takes_value = False
    for argument in arguments:
        if takes_value or argument.startswith("-") or ("=" in argument and not Path(argument).expanduser().exists()):
            rest.append(argument)
        else:
            positional.append(argument)
        takes_value = argument in (
            "--cfg",
            "-c",
            "--package",
            "-p",
            "--config-name",
            "-cn",
            "--config-path",
            "-cp",
            "--info",
            "-i",
        )
    quoted = ",".join('"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in positional)
    return [f"results=[{quoted}]", *rest] if positional else rest


def main() -> None:
    sys.argv[1:] = as_overrides(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
