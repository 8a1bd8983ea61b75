"""easy-VQA 1.0: simple coloured shapes with questions, in its published train and test splits (github.com/vzhou842/easy-VQA)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.packages import Pinned, members

EASY_VQA = Pinned("pypi", "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", "MIT", 3_215_672)
PACKAGES = (EASY_VQA,)

SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class EasySplit:
    images: dict[int, bytes]
    """PNG of 64 x 64."""
    questions: list[tuple[str, str, int]]
    """(question, answer, image), as published."""

    def captions(self) -> dict[int, str]:
        """What the answers say of an image, where they say both shape and colour: "a red circle"."""
        seen: dict[int, dict[str, str]] = {}
        for question, answer, image in self.questions:
            if question_type(question, answer) == "shape":
                seen.setdefault(image, {})["shape"] = answer
            elif question_type(question, answer) == "color":
                seen.setdefault(image, {})["color"] = answer
        return {image: f"a {said['color']} {said['shape']}" for image, said in sorted(seen.items()) if len(said) == 2}


def load(archive: Path) -> dict[str, EasySplit]:
    """ "train" and "test"."""
    images: dict[str, dict[int, bytes]] = {"train": {}, "test": {}}
    questions: dict[str, list[tuple[str, str, int]]] = {}
    wanted = re.compile(r"easy_vqa/data/(train|test)/(?:images/(\d+)\.png|questions\.json)").fullmatch
    for name, content in members(archive, lambda n: wanted(n) is not None):
        match = wanted(name)
        assert match is not None
        if match[2]:
            images[match[1]][int(match[2])] = content
        else:
            questions[match[1]] = [(question, answer, image) for question, answer, image in json.loads(content)]
    return {split: EasySplit(images[split], questions[split]) for split in ("train", "test")}


def question_type(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"
