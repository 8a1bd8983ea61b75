"""The command that goes on with an evaluation, made of what its plan.json holds: with other settings it would start another one.

    plan, settings, control, dtype, sparq  ->  python -m eval.fewshot run=FOLDER tasks=[...] shots=[...] limit=... ...

Two things a plan does not hold, and the command names them in capitals: the folder of official files (datasets=FOLDER), and
another run by whose eyes the nearest images were found (nearest_by=RUN).
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eval.tasks.official.tasks import official_names
from eval.tasks.settings import METRICS, load_settings
from mm1.attention.settings import SparqSettings

if TYPE_CHECKING:
    from eval.saved import Saved


def command(saved: Saved) -> str:
    """For a shell, with every setting that the results' name depends on, but for those left at their defaults."""
    plan, run = saved.plan, saved.folder.parent.parent
    given: dict[str, object] = {"run": run, "tasks": f"[{','.join(plan.tasks)}]"}
    given |= _sources(saved, run)
    given |= {
        "shots": f"[{','.join(map(str, plan.shots))}]",
        "limit": "null" if plan.limit is None else plan.limit,
        "seed": plan.seed,
    }
    if plan.demonstration_seed is not None:
        given["demonstration_seed"] = plan.demonstration_seed
    if plan.mode != "per_query":
        given["demonstrations"] = plan.mode
    if plan.mode == "nearest" and not _by_itself(saved, run):
        given["nearest_by"] = "RUN"
    if saved.control is not None:
        given["images"] = saved.control
    if saved.dtype != "float32":
        given["dtype"] = saved.dtype
    if saved.sparq is not None:
        default = asdict(SparqSettings())
        given["attention"] = "sparq"
        given |= {
            f"sparq.{key}": "null" if value is None else value
            for key, value in asdict(saved.sparq).items()
            if value != default[key]
        }
    given |= _replaced(saved)
    return shlex.join(["python", "-m", "eval.fewshot", *(f"{key}={value}" for key, value in given.items())])


def _sources(saved: Saved, run: Path) -> dict[str, str]:
    """Where the tasks come from, as far as it is known: not said of a run's own corpus."""
    from mm1.run import Run

    plan = saved.plan
    known = official_names()
    official, (own, plus, _) = [name for name in plan.tasks if name in known], plan.corpus.partition("+")
    found = {"datasets": "FOLDER"} if official and (plus or len(official) == len(plan.tasks)) else {}
    recorded = Run(run).info.get("corpus")
    trained_on = str(recorded.get("name")) if isinstance(recorded, dict) else None
    if len(official) < len(plan.tasks) and (trained_on is None or Path(trained_on).name != own):
        found["task_corpus"] = own
    return found


def _by_itself(saved: Saved, run: Path) -> bool:
    """Whether the nearest images were found by the evaluated run's own image encoder."""
    from eval.nearest import EncoderFeatures

    own = EncoderFeatures(
        run, weights=saved.weights, corpus_fingerprint=saved.plan.corpus_fingerprint, folder=saved.folder.parent / "features"
    )
    return own.fingerprint == saved.plan.features


def _replaced(saved: Saved) -> dict[str, str]:
    """The prompts and the VQA metric, where they are not the tasks' own."""
    found = {}
    for task, used in saved.settings.items():
        kind = next((kind for kind, metrics in METRICS.items() if used.metric in metrics), "vqa")
        own = load_settings(task, kind)
        if used.prompts != own.prompts:
            found["prompts"] = used.prompts
        if used.metric != own.metric:
            found["vqa_metric"] = used.metric
    return found
