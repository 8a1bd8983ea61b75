"""Other people's evaluation harnesses running this suite's checkpoints: lm-eval (lm_eval.py) and lmms-eval (lmms_eval.py).

decoding.py holds what the two share and needs neither of them installed.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """The entry point of group `lmms_eval.models`: lmms-eval calls it while it collects its models, so it imports no torch."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mm1", simple_class_path="eval.adapters.lmms_eval.MM1")
