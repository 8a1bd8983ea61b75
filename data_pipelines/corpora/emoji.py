"""Emoji in three styles (OpenMoji's outlines, Fluent 3D, Google's Noto), with names from each collection and from Unicode's CLDR.

The concept of an emoji is its code points without skin tone, hair, gender and presentation: all of "woman teacher, dark skin
tone" and "man teacher" in every style belong to one concept, and go to one side of a split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.corpora.building import digest
from data_pipelines.corpora.pictures import Picture
from data_pipelines.packages import Pinned, members

OPENMOJI = Pinned(
    "npm", "openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68", "CC-BY-SA-4.0", 4_339_458
)
FLUENT = Pinned(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
    15_792_027,
)
GOOGLE = Pinned(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "MIT",
    74_344_091,
)
CLDR = Pinned(
    "npm",
    "cldr-annotations-full",
    "48.2.0",
    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "Unicode-3.0",
    6_537_823,
)
PACKAGES = (OPENMOJI, FLUENT, GOOGLE, CLDR)

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
MODIFIERS = {*TONES, "fe0f", "200d", "1f9b0", "1f9b1", "1f9b2", "1f9b3", "2640", "2642"}
PEOPLE = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man, woman -> person

LEFT_OUT = {"component", "regional-indicator", "brand", "queer-symbols", "skin-tone", "hair-style", "ui-element"}
"""Subgroups that show letters, trademarks or swatches rather than things with a name."""

PLACES = ("country-flag", "subdivision-flag")
OF_NO_PLACE = re.compile(r"black|white|chequered|crossed|rainbow|transgender|pirate|triangular")
"""Flags named for how they look, not for whose they are."""


def key_of(code: str) -> str:
    """A file's code points -> the part that identifies the emoji in every collection (some write FE0F, some do not)."""
    parts = [part.lstrip("0") or "0" for part in code.lower().split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def concept_of(key: str) -> str:
    parts = [PEOPLE.get(part, part) for part in key.split("-") if part not in MODIFIERS]
    return "emoji:" + "-".join(parts or key.split("-"))


def tones_of(key: str) -> list[str]:
    return [TONES[part] for part in key.split("-") if part in TONES]


def plain(name: str, subgroup: str = "") -> str:
    """A collection's name as a caption: lower case, no colons or quotes, flags as "flag of ..."."""
    name = re.sub(r"[“”\"()]", "", name).replace("’", "'").strip().lower()
    flag = re.fullmatch(r"flag: (.+)", name) or (re.fullmatch(r"(.+) flag", name) if subgroup in PLACES else None)
    if flag and not OF_NO_PLACE.search(flag[1]):
        return f"flag of {flag[1]}"
    name = name.replace("keycap: ", "keycap ").replace("≊", "").replace(":", ",").replace("_", " ")
    return re.sub(r"\s+", " ", name).strip(" ,")


def load(archives: Mapping[str, Path], seed: int, skin_tones: int) -> list[Picture]:
    """Every emoji picture of the three collections, not yet rendered, in a fixed order."""
    named: dict[str, dict[str, str]] = {}
    facts: dict[str, tuple[str, str, list[str]]] = {}
    sources: dict[str, dict[str, bytes]] = {"openmoji": {}, "fluent": {}, "google": {}}

    for name, content in members(archives["openmoji"], lambda n: n == "data/openmoji.json" or n.startswith("color/svg/")):
        if name.endswith(".svg"):
            sources["openmoji"][key_of(Path(name).stem)] = content
            continue
        for entry in json.loads(content):
            key = key_of(entry["hexcode"])
            tags = [tag.strip() for tag in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
            facts[key] = (entry["group"], entry["subgroups"], [tag for tag in dict.fromkeys(tags) if tag])
            named.setdefault(key, {})["openmoji"] = plain(entry["annotation"], entry["subgroups"])

    for name, content in members(archives["@lobehub/fluent-emoji-3d"], lambda n: n.startswith("assets/") and n.endswith(".webp")):
        sources["fluent"].setdefault(key_of(Path(name).stem), content)  # the same picture lies there under several spellings

    wanted = re.compile(r"emoji\.json|img/google/64/.*\.png").fullmatch
    for name, content in members(archives["emoji-datasource-google"], lambda n: wanted(n) is not None):
        if name.endswith(".png"):
            sources["google"][key_of(Path(name).stem)] = content
            continue
        for entry in json.loads(content):
            own = plain(entry["name"] or entry["short_name"], "country-flag" if entry["category"] == "Flags" else "")
            for variant in [entry, *entry.get("skin_variations", {}).values()]:
                key = key_of(variant["unified"])
                tone = ", ".join(dict.fromkeys(f"{tone} skin tone" for tone in tones_of(key)))
                named.setdefault(key, {})["google"] = f"{own}, {tone}" if tone else own

    for _, content in members(archives["cldr-annotations-full"], lambda n: n == "annotations/en/annotations.json"):
        for emoji, annotation in json.loads(content)["annotations"]["annotations"].items():
            key = key_of("-".join(f"{ord(character):x}" for character in emoji))
            if "tts" in annotation and key in named:
                named[key]["cldr"] = plain(annotation["tts"][0])

    return [
        picture
        for style, files in sources.items()
        for key, content in sorted(files.items())
        if (picture := _picture(style, key, content, named.get(key, {}), facts, seed, skin_tones)) is not None
    ]


def _picture(
    style: str,
    key: str,
    content: bytes,
    names: dict[str, str],
    facts: dict[str, tuple[str, str, list[str]]],
    seed: int,
    skin_tones: int,
) -> Picture | None:
    base = "-".join(part for part in key.split("-") if part not in TONES)
    group, subgroup, tags = facts.get(key) or facts.get(base) or ("", "", [])
    if not names or subgroup in LEFT_OUT or group == "component":
        return None
    if style == "fluent" and group == "flags":  # these are Noto's flags, as in the Google collection: no second style
        return None
    tones = tones_of(key)
    if len(tones) > 1:  # two people of two tones: 25 pictures of one thing
        return None
    if tones:
        ranked = sorted(TONES.values(), key=lambda tone: digest(seed, "skin tones shown", style, base, tone))
        if tones[0] not in ranked[:skin_tones]:
            return None
    own = {"openmoji": "openmoji", "fluent": "cldr", "google": "google"}[style]
    references = list(dict.fromkeys(names[k] for k in (own, "openmoji", "cldr", "google") if names.get(k)))
    references = [reference for reference in references if len(reference) <= 80]
    if not references:
        return None
    return Picture(
        id=f"{style}/{key}",
        style=style,
        concept=concept_of(key),
        name=references[0],
        references=references,
        source=content,
        group=group,
        subgroup=subgroup,
        facts={"tone": tones[0]} if tones else {},
        about=", ".join(tag for tag in (tags or facts.get(base, ("", "", []))[2])[:6] if tag not in references[0]),
    )
