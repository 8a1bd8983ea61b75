"""Text from Debian packages: dictionaries, manuals without figures, manual pages.

    SOURCES: package -> reader(tree) -> (key, text), a few thousand characters each

The key up to "#" names what a text was cut from; a split takes all of it or nothing.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from configs.errors import UserError
from data_pipelines.corpora.manuals import NO_CONTENT, decoded
from data_pipelines.corpora.markup import Block, blocks, pieces, plain
from data_pipelines.corpora.prose import ABUSE
from data_pipelines.debian import Tree

Reader = Callable[[Tree], Iterator[tuple[str, str]]]
ENTRIES_LONG = 2000
"""Characters after which a document of dictionary entries ends."""
LEAST_TEXT = 200
"""Characters below which a text is left out: a heading without its section."""


@dataclass(frozen=True)
class TextSource:
    names: tuple[str, ...]
    """The package, under every name that releases of Debian give it."""
    read: Reader


# --------------------------------------------------------------------------------------------------------- dictionaries

DIGITS = {letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def number(text: str) -> int:
    """A position as dictd writes it: base 64, most significant digit first."""
    value = 0
    for letter in text:
        value = value * 64 + DIGITS[letter]
    return value


def dictionary(tree: Tree, *, name: str, clean: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """A dictd dictionary in its own order: NAME.index has word, offset, length of each entry in NAME.dict.dz, which is gzip."""
    folder = "usr/share/dictd"
    index, packed = tree.read(f"{folder}/{name}.index"), tree.read(f"{folder}/{name}.dict.dz")
    if index is None or packed is None:
        raise UserError(f"The package of the dictionary {name} holds no {folder}/{name}.index and .dict.dz. Leave it out.")
    try:
        content = gzip.decompress(packed)
        places: set[tuple[int, int]] = set()
        for line in index.decode("utf-8", "replace").splitlines():
            word, start_of, length_of = line.split("\t")[:3]
            if not word.startswith("00-database"):
                places.add((number(start_of), number(length_of)))
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}/{name}: a damaged dictionary ({error}). Delete the archive, and it is downloaded again."
        ) from error
    collected, start = "", 0
    for offset, length in sorted(places):
        entry = clean(content[offset : offset + length].decode("utf-8", "replace"))
        if not entry or ABUSE.search(entry):
            continue
        start, collected = (offset, entry) if not collected else (start, f"{collected}\n{entry}")
        if len(collected) > ENTRIES_LONG:
            yield f"{name}/{start}", collected
            collected = ""
    if collected:
        yield f"{name}/{start}", collected


ACCENTED = re.compile(
    r"""\[[=^"'`~.,:-]+([A-Za-z]{1,2})\]|\[([A-Za-z]{1,2})[=^"'`~.,:-]+\]|\[([aeiou])(?:um|cr|sl|hook|grave|acute|circ|dot)\]"""
)
"""How GCIDE writes a letter with a mark: [=o], [o^], ["u], [aum]."""
ETYMOLOGY = re.compile(r"\[(L|F|OE|AS|Gr|NL|LL|Of|Cf|See|From|G|D|It|Sp|OF|Fr|Perh|Prob|Etym|Pref|Through)\b\.?[^\]]*\]\s*")


def gcide_entry(entry: str) -> str:
    """Without sources, pronunciations, etymologies and marks of cross references: the word, its kind, its meanings."""
    entry = re.sub(r"\[(1913 Webster|PJC|WordNet[^\]]*|Century[^\]]*|[^\]]{1,12}\+[^\]]*PJC)\]", "", entry)
    entry = ACCENTED.sub(lambda letter: letter[1] or letter[2] or letter[3], entry)
    entry = re.sub(r"\\[^\\\n]+\\(\s*\([^)]*\))?", "", entry, count=1)
    entry = ETYMOLOGY.sub("", entry, count=1)
    return unwrapped(re.sub(r"[{}]", "", entry))


def foldoc_entry(entry: str) -> str:
    """Without marks of cross references and the date of the last change."""
    entry = re.sub(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*$", "\n", entry.rstrip() + "\n")
    return unwrapped(re.sub(r"[{}]", "", entry))


def unwrapped(entry: str) -> str:
    """Lines of a paragraph joined; the headword stands on its own line."""
    paragraphs = [re.sub(r"\s*\n\s*", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", entry.strip("\n"))]
    text = "\n".join(re.sub(r" +([,;.])", r"\1", re.sub(r"  +", " ", p)) for p in paragraphs if p)
    return f"{text}\n" if text else ""


# -------------------------------------------------------------------------------------------------------------- manuals


def pages(tree: Tree, *, pattern: str) -> Iterator[tuple[str, str]]:
    """HTML pages without their images, in pieces."""
    for file in tree.files(pattern):
        content = tree.read(file)
        if content and not NO_CONTENT.search(file):
            page = [block for block in blocks(decoded(content)) if block.kind != "image"]
            for piece_number, piece in enumerate(pieces(page)):
                yield f"{file}#{piece_number}", plain(piece)


def pods(tree: Tree) -> Iterator[tuple[str, str]]:
    """Perl's own documentation, in its plain old format."""
    for file in tree.files(r"usr/share/perl/.*\.pod"):
        for piece_number, piece in enumerate(pieces(pod_blocks((tree.read(file) or b"").decode("utf-8", "replace")))):
            yield f"{file}#{piece_number}", plain(piece)


POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}


def pod_blocks(pod: str) -> list[Block]:
    """Commands begin with "=", code is indented, all else is paragraphs; =begin ... =end is for other formats."""
    found: list[Block] = []
    pod = re.sub(r"^=(begin|for)\b.*?^=end\b[^\n]*$|^=for\b[^\n]*$", "", pod, flags=re.S | re.M)
    for paragraph in re.split(r"\n[ \t]*\n", pod):
        if command := re.match(r"=(\w+)\s*(.*)", paragraph.strip(), re.S):
            if command[1].startswith("head"):
                found.append(Block("heading", pod_text(command[2])))
            elif command[1] == "item" and command[2].strip("* \n"):
                found.append(Block("text", f"- {pod_text(command[2]).removeprefix('* ')}"))
        elif paragraph[:1] in (" ", "\t") and paragraph.strip():
            found.append(Block("code", paragraph.strip("\n").rstrip()))
        elif paragraph.strip():
            found.append(Block("text", pod_text(paragraph)))
    return found


def pod_text(text: str) -> str:
    """A paragraph without formatting codes: C<code>, C<< code >>, L<shown|target>, E<lt>; X<> and Z<> say nothing."""
    for _ in range(4):  # codes nest
        text = re.sub(r"E<(\w+)>", lambda code: POD_ESCAPES.get(code[1], ""), text)
        text = re.sub(r"[XZ]<[^<>]*>", "", text)
        text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda link: link[1] or link[2].strip('"/').replace('/"', ", "), text)
        text = re.sub(r"[BCFIS]<<+ (.*?) >>+", r"\1", text, flags=re.S)
        text = re.sub(r"[BCFIS]<([^<>]*)>", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def manual_pages(tree: Tree) -> Iterator[tuple[str, str]]:
    """Sections of the Linux manual, English, written in roff."""
    for file in tree.files(r"usr/share/man/man\d/.*\.gz"):
        try:
            roff = gzip.decompress(tree.read(file) or b"").decode("utf-8", "replace")
        except (OSError, EOFError, zlib.error):
            continue
        for piece_number, piece in enumerate(pieces(roff_blocks(roff))):
            yield f"{PurePosixPath(file).name}#{piece_number}", plain(piece)


def roff_blocks(roff: str) -> list[Block]:
    """man(7) macros as blocks; tables and equations, which only a typesetter makes readable, are left out."""
    roff = re.sub(r"^\.(TS|EQ|ig).*?^\.(TE|EN|\.)[^\n]*$", "", roff, flags=re.S | re.M)
    found: list[Block] = []
    words: list[str] = []
    code: list[str] | None = None

    def close() -> None:
        if words:
            found.append(Block("text", re.sub(r"\s+", " ", " ".join(words)).strip()))
            words.clear()

    for line in roff.splitlines():
        macro = re.match(r"[.'](\w+|\\\")\s*(.*)", line)
        text = roff_text(macro[2] if macro else line)
        if macro is None:
            if code is not None:
                code.append(text)
            elif text.strip():
                words.append(text)
        elif macro[1] in ("SH", "SS"):
            close()
            found.append(Block("heading", text.replace('"', "")))
        elif macro[1] in ("EX", "nf"):
            close()
            code = []
        elif macro[1] in ("EE", "fi"):
            if code:
                found.append(Block("code", "\n".join(code).strip("\n")))
            code = None
        elif macro[1] in ("PP", "P", "LP", "TP", "IP", "TQ", "RS", "RE"):
            close()
            if macro[1] == "IP" and re.search(r"\w", text):
                words.append(text.split('"')[1] if '"' in text else text.split()[0])
        elif macro[1] in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB", "UR", "MT"):
            spoken = re.findall(r'"([^"]*)"|(\S+)', text)
            joined = ("" if len(macro[1]) == 2 and macro[1] != "SM" else " ").join(quoted or bare for quoted, bare in spoken)
            (words if code is None else code).append(joined)
    close()
    return [block for block in found if block.content]


ROFF_CHARACTERS = {"aq": "'", "dq": '"', "ha": "^", "ti": "~", "mc": "µ", "bu": "-", "lq": '"', "rq": '"', "oq": "'", "cq": "'"}


def roff_text(line: str) -> str:
    line = re.sub(r'\\".*', "", line)
    line = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\s[+-]?\d|\\[&/,|^:%!]", "", line)
    line = re.sub(r"\\\[(\w+)\]|\\\((\w\w)", lambda name: ROFF_CHARACTERS.get(name[1] or name[2], ""), line)
    return line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\(en", "-").replace("\\~", " ")


SOURCES: tuple[TextSource, ...] = (
    TextSource(("dict-gcide",), partial(dictionary, name="gcide", clean=gcide_entry)),
    TextSource(("dict-foldoc",), partial(dictionary, name="foldoc", clean=foldoc_entry)),
    TextSource(
        ("python3.11-doc", "python3.13-doc", "python3.12-doc", "python3.14-doc"),
        partial(pages, pattern=r"usr/share/doc/python3\.\d+/html/(?!_static|_sources).*\.html"),
    ),
    TextSource(("perl-doc",), pods),
    TextSource(("debian-policy",), partial(pages, pattern=r"usr/share/doc/debian-policy/[\w.-]+\.html/(?!index).*\.html")),
    TextSource(("debian-reference-en",), partial(pages, pattern=r"usr/share/debian-reference/.*\.en\.html")),
    TextSource(("manpages",), manual_pages),
    TextSource(
        ("linux-doc-6.1", "linux-doc-6.12"),
        partial(pages, pattern=r"usr/share/doc/linux-doc[\w.-]*/html/(?!_static|_sources|translations).*\.html"),
    ),
)
