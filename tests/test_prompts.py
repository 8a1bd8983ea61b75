"""Prompts of references as they come, white space at their ends and all."""

from __future__ import annotations

import pytest

from eval.prompts import PROMPTS, build_prompt
from eval.tasks.example import Example


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("kind", ["captioning", "vqa", "binding"])
def test_white_space_at_a_references_ends_changes_no_prompt(prompts: str, kind: str) -> None:
    asked = Example("q", "q", b"Q", "which?", ("green",))
    clean, ragged = (Example("d", "d", b"D", "which?", (text,)) for text in ("A cat.", " A cat.\r\n"))
    template = PROMPTS[prompts][kind]
    assert build_prompt(template, [ragged], asked) == build_prompt(template, [clean], asked)
    assert ragged.references == (" A cat.\r\n",), "scored as it stands in the file"
