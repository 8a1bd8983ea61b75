"""lm-eval's own tasks on rows from local files, one at a time.

Prompts, filters and metrics stay lm-eval's: its task is built from its own file with only the source of the rows replaced. Two
tasks' demonstrations are mended where lm-eval 0.4.13 shows them wrongly; prompts without demonstrations stay as they are:

- WebQuestions stops with an assertion. Its targets are positions in the list of answers, and the code that writes a demonstration
  takes the first position for the answer's text. Here a demonstration answers with the first answer.
- LAMBADA has only a test split, so demonstrations come from the queries; the query is left out of its own only where a task names
  the split that its demonstrations come from, which lm-eval's file does not. Here it is named. And a demonstration's last word
  stands after two spaces, the delimiter's and its own; here after one, as in the query.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from eval.statistics import clustered_mean
from eval.tasks.textcore import TASKS, splits_of


def first_answer(doc: dict[str, Any]) -> str:
    """What a demonstration of WebQuestions answers: of the sorted answers the first, as lm-eval sorts them too."""
    return min(doc["answers"])


def build_task(name: str, rows: dict[str, list[dict[str, Any]]], *, shots: int, seed: int, mended: bool = True) -> Any:
    """lm-eval's own task on `rows` (split -> rows), with `shots` demonstrations drawn by `seed`. `mended` as the module docstring
    says; False leaves everything as lm-eval has it."""
    import datasets
    import lm_eval.tasks

    task = TASKS[name]
    changes: dict[str, Any] = {
        "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows[split]) for split in splits_of(task, shots)},
        "training_split": "train" if "train" in splits_of(task, shots) else None,
    }
    if task.queries == "test":
        changes["validation_split"] = None  # read for nothing
    if mended and task.demonstrations == task.queries:
        changes |= {"fewshot_split": task.queries, "fewshot_config": {"target_delimiter": ""}}
    if mended and name == "webqs":
        changes["fewshot_config"] = {"doc_to_target": first_answer}
    folder = Path(lm_eval.tasks.__file__).parent / task.folder
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    group = {"group": "textcore", "task": [{"task": task.lm_eval, **changes}]}
    built = next(iter(manager.load([group])["tasks"].values()))
    built.set_config(key="num_fewshot", value=shots)
    built.set_fewshot_seed(seed=seed)
    return built


def run_task(
    model: Any, name: str, rows: dict[str, list[dict[str, Any]]], *, shots: int, limit: int | None, seed: int
) -> dict[str, Any]:
    """One cell: mean and standard error in points, every query's score in 0..1, lm-eval's own metrics, and how many requests were
    cut because they were too long for the model (an MM1LM)."""
    import datasets
    import lm_eval.evaluator

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task = TASKS[name]
    built = build_task(name, rows, shots=shots, seed=seed)
    model.truncated = 0
    output = lm_eval.evaluator.evaluate(model, {"tasks": {task.lm_eval: built}}, limit=limit, bootstrap_iters=0)
    assert output is not None
    samples = sorted(output["samples"][task.lm_eval], key=lambda sample: sample["doc_id"])
    scores = [float(sample[task.metric]) for sample in samples]
    estimate = clustered_mean([100 * score for score in scores], list(range(len(scores))))
    measured = {
        key.partition(",")[0]: value
        for key, value in output["results"][task.lm_eval].items()
        if isinstance(value, float | int) and "," in key
    }
    return {
        "metric": task.metric,
        "mean": estimate.mean,
        "se": estimate.se,
        "n": estimate.n,
        "lm_eval": measured,
        "truncated": model.truncated,
        "scores": [round(score, 6) for score in scores],
    }
