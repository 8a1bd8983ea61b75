"""Whether a suite's evaluations can be done, asked before its cells are trained: a wrong name would else be said hours later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ablations.suites.composing import first_line
from ablations.suites.suite import EvaluationConfig
from configs.errors import UserError
from data_pipelines import paths


def check_evaluation(evaluation: EvaluationConfig, corpora: Iterable[str]) -> None:
    """As eval.fewshot and eval.textcore would refuse them: unknown tasks, more shots than demonstrations, a limit of 0.

    `corpora`: names or folders of those that the cells are trained on; one that is not prepared is left out. Raises UserError.
    """
    from eval.fewshot import check

    for overrides in evaluation.fewshot():
        config = _composed("eval.fewshot", overrides)
        for name in dict.fromkeys(config.task_corpus or name for name in corpora):
            folder = paths.corpus(name)
            if config.datasets is not None or (folder / "manifest.json").is_file():
                check(config, folder)
    if evaluation.textcore is not None:
        _composed("eval.textcore", evaluation.textcore)


def _composed(command: str, overrides: Sequence[str]) -> Any:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from configs.command import compose
    from eval.fewshot import EvalConfig
    from eval.textcore import TextcoreConfig

    try:
        if command == "eval.textcore":
            return compose("textcore", TextcoreConfig, ["run=RUN", *overrides])
        return compose("eval", EvalConfig, ["run=RUN", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"evaluation, as python -m {command} {' '.join(overrides)}: {first_line(error)}") from error
    except UserError as error:
        raise UserError(f"evaluation, as python -m {command} {' '.join(overrides)}: {error}") from error
