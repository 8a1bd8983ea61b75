"""How a task is evaluated, as data: configs/task/<task>.yaml, or configs/task/<kind>.yaml for a task without a file of its
own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from configs import CONFIG_DIR
from configs.errors import UserError
from eval.metrics.vqa import VARIANTS

METRICS = {"captioning": ("cider_d",), "vqa": tuple(VARIANTS), "binding": ("accuracy",)}
"""Kind of task -> the metrics that can score it."""


@dataclass(frozen=True)
class TaskSettings:
    """`prompts`: a set of eval/prompts.py. `stop`: strings that end an answer and are cut off with all that follows."""

    prompts: str
    metric: str
    max_new_tokens: int
    stop: tuple[str, ...]


def load_settings(task: str, kind: str, *, prompts: str | None = None, vqa_metric: str | None = None) -> TaskSettings:
    """The task's settings, with the two overrides of the command line. Raises UserError for a kind, key or value unknown
    here."""
    import yaml

    from eval.prompts import PROMPTS

    if kind not in METRICS:
        raise UserError(f"Task {task!r} is of kind {kind!r}; this suite evaluates {', '.join(METRICS)}.")
    own = CONFIG_DIR / "task" / f"{task}.yaml"
    path = own if own.is_file() else CONFIG_DIR / "task" / f"{kind}.yaml"
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw.pop("files", None)  # where official files lie: eval/tasks/official/tasks.py
    wanted = {field.name for field in fields(TaskSettings)}
    if raw.keys() != wanted:
        raise UserError(f"{path}: keys {sorted(raw)}; it must hold exactly {sorted(wanted)}, and files where it has some.")
    if prompts is not None:
        raw["prompts"] = prompts
    if vqa_metric is not None and vqa_metric not in METRICS["vqa"]:
        raise UserError(f"vqa_metric={vqa_metric}: no such VQA accuracy. Choose from: {', '.join(METRICS['vqa'])}.")
    if vqa_metric is not None and kind == "vqa":
        raw["metric"] = vqa_metric
    if raw["metric"] not in METRICS[kind]:
        raise UserError(f"{path}: metric {raw['metric']!r} cannot score a {kind} task. Choose from: {', '.join(METRICS[kind])}.")
    if raw["prompts"] not in PROMPTS:
        raise UserError(f"prompts={raw['prompts']}: no such set. Known: {', '.join(PROMPTS)}.")
    return TaskSettings(**raw | {"stop": tuple(raw["stop"])})
