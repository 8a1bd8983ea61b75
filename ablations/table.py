"""`python -m ablations.table`: what each variant scores, how sure that is, and how it differs from the baseline.

runs=[...]      runs + results -> Selection -> Table (tables/building.py) -> Markdown, CSV (render.py), LaTeX (latex.py)
suite=NAME      a suite's folder -> SuiteTable (tables/suite_table.py) -> the same with axes (suite_text.py), and report.html
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ablations.tables.building import build
from ablations.tables.selection import select
from configs.command import command
from configs.errors import UserError
from data_pipelines import paths
from mm1.run import write_atomically

FILES = ("table.md", "table.csv", "table.tex")


@dataclass
class TableConfig:
    """The options of `python -m ablations.table`; _main() describes them."""

    suite_name: str | None = None
    scale_name: str = "tiny"
    folder: str | None = None
    steps: int | None = None
    runs: list[str] = field(default_factory=list)
    baseline: str | None = None
    shots: list[int] = field(default_factory=list)
    evaluation: str | None = None
    output: str | None = None
    interval: str = "t"
    match_within: float = 0.01

    def validate(self) -> None:
        if self.suite_name is not None and (self.runs or self.baseline):
            raise UserError(f"suite={self.suite_name} has its rows and its baseline; leave runs= and baseline= out.")
        if self.suite_name is None and (self.folder or self.steps is not None):
            raise UserError("folder= and steps= are of a suite: add suite=NAME.")
        if self.interval not in ("t", "bootstrap"):
            raise UserError(f"interval={self.interval}: must be t or bootstrap.")
        if not 0 <= self.match_within < 1:
            raise UserError(f"match_within={self.match_within}: must be a share in [0, 1), such as 0.01 for one per cent.")


_EXTRA: list[str] = []
"""Overrides that the suite was started with; `main` fills it, for Hydra's grammar has no place for them."""


@command("table", schema=TableConfig)
def _main(config: TableConfig) -> None:
    """Tables of few-shot results with error bars: Markdown on the screen; Markdown, CSV and LaTeX in a folder.

    runs=[base,connector_avgpool]  names, beginnings of run folders' names, or paths. None: all finished and evaluated runs of the
                                   largest group that share scale, corpus and plan.
    baseline=base                  the row that the others are compared with. None: the run without ablations, else the first.

    suite=connector scale=tiny     in place of runs: the finished cells of a suite, with what each axis does and the paper's
                                   values, and an HTML report. Settings of all cells as ablations.run was given them:
                                   steps=100 data=shapes.
    folder=NAME_OR_PATH            of the suite, where it was started with one

    shots=[0,4,8]                  columns. None: all that the baseline was evaluated with.
    evaluation=1a2b                where runs have several: the beginning of a plan's fingerprint or of a folder under results/.
    output=FOLDER                  where table.md, table.csv, table.tex go. None: <home>/tables, or tables/ in the suite's folder.
    interval=t                     t, or bootstrap: percentiles of resampled images (one training seed only).
    match_within=0.01              rows whose tokens, images or steps (of a suite: what it matches) differ from the baseline's by
                                   a larger share are marked ≠.
    """
    if config.suite_name is not None:
        _suite(config)
    else:
        _runs(config)


def _runs(config: TableConfig) -> None:
    from ablations.tables.latex import render_latex
    from ablations.tables.render import render_csv, render_markdown, title_of
    from ablations.tables.sections import table_sections

    selection = select(config.runs, baseline=config.baseline, evaluation=config.evaluation)
    table = build(selection, config.shots, interval=config.interval, match_within=config.match_within)
    folder = Path(config.output).expanduser() if config.output else paths.home() / "tables"
    text = render_markdown(table)
    latex = render_latex(title_of(table), table_sections(table), table.notes)
    _write(folder, {"table.md": text, "table.csv": render_csv(table), "table.tex": latex})
    print(text, end="")
    print(f"\nWritten: {', '.join(str(folder / name) for name in FILES)}", file=sys.stderr)


def _suite(config: TableConfig) -> None:
    from ablations.report.write import write_report
    from ablations.suites.composing import step_overrides
    from ablations.suites.planning import suite_folder
    from ablations.tables.suite_table import suite_table
    from ablations.tables.suite_text import render_suite_csv, render_suite_latex, render_suite_markdown

    assert config.suite_name is not None
    extra = [*_EXTRA, *step_overrides(config.scale_name, config.steps, _EXTRA)]
    found = suite_table(
        config.suite_name,
        config.scale_name,
        extra=extra,
        folder=config.folder,
        shots=config.shots,
        evaluation=config.evaluation,
        interval=config.interval,
        match_within=config.match_within,
    )
    place = suite_folder(config.suite_name, config.scale_name, extra, config.folder).folder
    folder = Path(config.output).expanduser() if config.output else place / "tables"
    text = render_suite_markdown(found)
    _write(folder, {"table.md": text, "table.csv": render_suite_csv(found), "table.tex": render_suite_latex(found)})
    write_report(found, folder / "report.html")
    written = [folder / name for name in (*FILES, "report.html")]
    print(text, end="")
    print(f"\nWritten: {', '.join(map(str, written))}", file=sys.stderr)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text)


def main() -> None:
    own, _EXTRA[:] = gathered(sys.argv[1:])
    sys.argv[1:] = own
    _main()


def gathered(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of this command, overrides of a suite's cells). What only ablations.run knows is dropped, and that is said."""
    if not any(argument.startswith("suite=") for argument in arguments):
        return list(arguments), []
    from ablations.run import RunConfig
    from ablations.suites.composing import named

    mine = {f.name for f in fields(TableConfig)}
    others = {f.name for f in fields(RunConfig)} - mine
    own, cells, dropped = [], [], []
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+~")
        if key in ("suite", "scale"):
            own += named([argument], ["suite", "scale"])
        elif argument.startswith("-") or key in mine or key.partition(".")[0] == "hydra":
            own.append(argument)
        elif key.partition(".")[0] in {*others, "evaluation", "suite"}:
            dropped.append(argument)
        else:
            cells.append(argument)
    if dropped:
        print(f"No setting of a table, left out: {' '.join(dropped)}", file=sys.stderr)
    return own, cells


if __name__ == "__main__":
    main()
