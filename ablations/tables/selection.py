"""Which runs stand in one table: named or found, grouped into variants, and comparable or refused.

Rows of a table answered the same questions after the same demonstrations (one plan) and were trained from the same bytes (one
corpus). Named runs that break this are an error that says what to evaluate again; of runs found by themselves the largest
comparable group is taken, and what was left out is said in the table's notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ablations.results import Evaluation, Run, find_runs, read_run, run_folders
from configs.errors import UserError
from data_pipelines import paths


@dataclass
class Variant:
    """One row of a table: the runs of one configuration, one a training seed, each with its evaluation on the table's plan.

    `controls` maps the kind of control ("shuffled") to the seeds' control evaluations.
    """

    label: str
    runs: list[Run]
    evaluations: list[Evaluation]
    controls: dict[str, list[Evaluation]] = field(default_factory=dict)


@dataclass
class Selection:
    """Variants with the baseline first; `left_out` says which runs were found but not used, and why."""

    variants: list[Variant]
    plan: str
    left_out: list[str] = field(default_factory=list)


def select(
    selectors: Sequence[str] = (), *, baseline: str | None = None, evaluation: str | None = None, root: Path | None = None
) -> Selection:
    """Choose and check the runs; `evaluation` is the beginning of a plan's fingerprint or of a folder's name under results/."""
    chosen_baseline = find_runs([baseline], root) if baseline else []
    if selectors:
        runs = find_runs(selectors, root)
        runs = [r for r in chosen_baseline if r.folder not in {x.folder for x in runs}] + runs
        left_out: list[str] = []
        for run in runs:
            if run.status != "finished":
                raise UserError(f"{run.folder / 'run.json'}: status is {run.status!r}. Start the training again; it resumes.")
            if not _plain(run, evaluation):
                which = f" whose hash or plan begins with {evaluation!r}" if evaluation else ""
                raise UserError(f"{run.label} has no evaluation{which}. Evaluate it: python -m eval.fewshot run={run.label}")
        _one_corpus(runs)
        plan = _one_plan(runs, evaluation)
    else:
        runs, plan, left_out = _largest_group(evaluation, {r.folder for r in chosen_baseline}, root)
    variants = _variants(runs, plan, evaluation)
    first = {r.folder for r in chosen_baseline} or {r.folder for r in runs if not r.ablation}
    head = [v for v in variants if first & {r.folder for r in v.runs}]
    if baseline and len(head) > 1:
        raise UserError(f"baseline: {baseline!r} means several variants: {', '.join(v.label for v in head)}. Name one folder.")
    if head:
        variants.sort(key=lambda v: v is not head[0])
    return Selection(variants, plan, left_out)


def _plain(run: Run, evaluation: str | None) -> list[Evaluation]:
    """Those named by `evaluation`; by default the dense ones, and those of SparQ attention where there are no others."""
    plain = [e for e in run.evaluations if e.control is None]
    if not evaluation and any(not e.sparse for e in plain):
        plain = [e for e in plain if not e.sparse]
    return plain if not evaluation else [found for e in plain if (found := e.named(evaluation)) is not None]


def _one_corpus(runs: Sequence[Run]) -> None:
    if len({run.corpus_fingerprint for run in runs}) > 1:
        listed = "\n".join(f"  {run.label}: corpus {run.corpus} {run.corpus_fingerprint[:8]}" for run in runs)
        raise UserError(
            f"runs: these were trained on different corpora, so they cannot be compared:\n{listed}\nTrain them on one."
        )


def _one_plan(runs: Sequence[Run], evaluation: str | None) -> str:
    """The plan on which every run was evaluated."""
    held = {run.label: {e.protocol for e in _plain(run, evaluation)} for run in runs}
    common = set.intersection(*held.values())
    if len(common) == 1:
        return common.pop()
    listed = "\n".join(f"  {label}: plan {'; '.join(sorted(plans))}" for label, plans in held.items())
    if common:
        which = f"evaluation={min(common)[:8]}, another, or the name of a folder under results/"
        raise UserError(f"runs: they share several plans; choose one with {which}:\n{listed}")
    most = Counter(plan for plans in held.values() for plan in plans).most_common(1)[0][0]
    again = "\n".join(f"  python -m eval.fewshot run={label}" for label, plans in held.items() if most not in plans)
    raise UserError(
        f"runs: these were evaluated on different plans, so their items cannot be paired:\n{listed}\n"
        f"Evaluate with the tasks, shots, items, settings and seed of plan {most}:\n{again}"
    )


def _largest_group(evaluation: str | None, required: set[Path], root: Path | None) -> tuple[list[Run], str, list[str]]:
    """Of all finished, evaluated runs those of one scale, corpus and plan that are most (ties: evaluated last)."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    latest: dict[tuple[str, str, str], float] = {}
    runs = [read_run(folder) for folder in run_folders(root)]
    for run in runs:
        for e in _plain(run, evaluation) if run.status == "finished" else []:
            key = (run.scale, run.corpus_fingerprint, e.protocol)
            if run not in groups.setdefault(key, []):
                groups[key].append(run)
            latest[key] = max(latest.get(key, 0.0), (e.folder / "summary.json").stat().st_mtime)
    usable = {key: members for key, members in groups.items() if required <= {r.folder for r in members}}
    if not usable:
        where = root or paths.runs()
        raise UserError(
            f"No finished and evaluated run under {where}{' beside the baseline' if required else ''}. "
            "Train one (python -m mm1.train) and evaluate it (python -m eval.fewshot run=NAME)."
        )
    best = max(usable, key=lambda key: (len(usable[key]), latest[key]))
    left_out = []
    for run in runs:
        if run in usable[best]:
            continue
        if run.status != "finished":
            reason = f"status {run.status}"
        elif not _plain(run, evaluation):
            reason = "not evaluated"
        elif run.scale != best[0]:
            reason = f"scale {run.scale}"
        else:
            reason = "another corpus" if run.corpus_fingerprint != best[1] else "another plan"
        left_out.append(f"{run.label} ({reason})")
    return usable[best], best[2], left_out


def _variants(runs: Sequence[Run], plan: str, evaluation: str | None) -> list[Variant]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.variant, []).append(run)
    names = Counter(members[0].name for members in grouped.values())
    variants = []
    for members in grouped.values():
        members.sort(key=lambda run: run.seed)
        label = members[0].name if names[members[0].name] == 1 else members[0].label
        variant = Variant(label, members, [_only(run, plan, None, evaluation) for run in members])
        kinds = [{e.control for e in run.evaluations if e.control is not None and e.protocol == plan} for run in members]
        for kind in sorted(set.intersection(*kinds)):
            variant.controls[kind] = [_only(run, plan, kind, None) for run in members]
        variants.append(variant)
    return variants


def _only(run: Run, plan: str, control: str | None, evaluation: str | None) -> Evaluation:
    """The run's one evaluation of this plan and control; two (say, with other decoding) are refused, not chosen between."""
    held = _plain(run, evaluation) if control is None else [e for e in run.evaluations if e.control == control]
    held = [e for e in held if e.protocol == plan]
    if len(held) > 1:
        listed = ", ".join(e.hash for e in held)
        raise UserError(
            f"{run.label} has several evaluations{f' with {control} images' if control else ''} of plan {plan}: {listed}. "
            f"Choose one with evaluation={held[0].hash}, or move the others out of {run.folder / 'results'}."
        )
    return held[0]
