"""Flags of all countries with what is known of each: capital, region, languages, neighbours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.corpora.pictures import Picture
from data_pipelines.packages import Pinned, members

FLAG_ICONS = Pinned(
    "npm", "flag-icons", "7.5.0", "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518", "MIT", 1_119_924
)
COUNTRIES = Pinned(
    "npm", "world-countries", "5.1.0", "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495", "ODbL-1.0", 5_771_113
)
PACKAGES = (FLAG_ICONS, COUNTRIES)


@dataclass(frozen=True)
class Country:
    code: str
    name: str
    region: str
    subregion: str
    capital: str
    languages: tuple[str, ...]
    borders: tuple[str, ...]
    landlocked: bool

    def prose(self) -> str:
        """Two or three sentences for a country page."""
        sentences = [f"The capital of {self.name} is {self.capital}." if self.capital else f"{self.name} has no capital."]
        if self.languages:
            sentences.append(f"People speak {listed(self.languages[:3])}.")
        if self.borders:
            sentences.append(f"It borders {listed(self.borders[:4])}.")
        elif not self.landlocked:
            sentences.append("It has no land border.")
        return " ".join(sentences)


def listed(items: tuple[str, ...] | list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def load(archives: Mapping[str, Path]) -> tuple[list[Picture], dict[str, Country]]:
    """Flag pictures (not yet rendered), and the countries by two-letter code."""
    entries = next(json.loads(content) for _, content in members(archives["world-countries"], lambda n: n == "countries.json"))
    by_cca3 = {entry["cca3"]: entry["name"]["common"] for entry in entries}
    countries = {
        entry["cca2"].lower(): Country(
            code=entry["cca2"].lower(),
            name=entry["name"]["common"],
            region=entry["region"],
            subregion=entry["subregion"] or entry["region"],
            capital=entry["capital"][0] if entry["capital"] else "",
            languages=tuple(entry["languages"].values()),
            borders=tuple(by_cca3[code] for code in entry["borders"] if code in by_cca3),
            landlocked=bool(entry["landlocked"]),
        )
        for entry in entries
    }
    pictures = []
    for name, content in sorted(members(archives["flag-icons"], lambda n: n.startswith("flags/4x3/") and n.endswith(".svg"))):
        country = countries.get(Path(name).stem)
        if country is not None:
            caption = f"flag of {country.name.lower()}"
            pictures.append(
                Picture(
                    id=f"flag-icons/{country.code}",
                    style="flag-icons",
                    concept=emoji_concept(country.code),
                    name=caption,
                    references=[caption],
                    source=content,
                    domain="flag",
                    group="flags",
                    subgroup="country-flag",
                    facts=facts(country),
                    about=country.prose(),
                )
            )
    return pictures, countries


def emoji_concept(code: str) -> str:
    """The concept of the country's flag emoji, which is its two letters as regional indicators."""
    return "emoji:" + "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code)


def facts(country: Country) -> dict[str, object]:
    return {"country": country.name, "region": country.region, "code": country.code}
