"""Pictures with captions from Debian packages: stamps, clip art, illustrated words, furniture, game art, maps.

    SOURCES: package -> reader(tree, words) -> Picture (not yet rendered)

Only the stamps have captions written as such, a sentence each. The others are named by a file, a title or a table; of clip art
only what an English dictionary (`words`) knows is kept, for its titles are of many languages and hands.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from data_pipelines.corpora.building import digest
from data_pipelines.corpora.pictures import Picture
from data_pipelines.corpora.questions import article
from data_pipelines.debian import Tree

MOST_ALIKE = 12
"""Pictures of one collection under one caption: 40 sofas called "sofa" teach no more than a dozen."""
COLLECTION_TITLE = 8
"""A title that more clip-art files share names their collection and not what they show."""

Reader = Callable[[Tree, Collection[str]], Iterator[Picture]]


@dataclass(frozen=True)
class PictureSource:
    names: tuple[str, ...]
    """The package, under every name that releases of Debian give it."""
    read: Reader


def picture(source: str, file: str, caption: str, content: bytes, group: str = "") -> Picture:
    return Picture(
        id=f"{source}/{file}",
        style=source,
        concept=f"debian:{caption.lower().rstrip('.')}",
        name=caption,
        references=[caption],
        source=in_pixels(content),
        domain="debian",
        group=group,
    )


UNITS = {b"pt": 1.25, b"pc": 15.0, b"mm": 90 / 25.4, b"cm": 90 / 2.54, b"in": 90.0}
"""Pixels, at the 90 to the inch that the drawing programs of that time counted."""


def in_pixels(svg: bytes) -> bytes:
    """An SVG whose width and height are given in pixels: resvg refuses other units. Other pictures as they are."""
    head = re.search(rb"<svg\b[^>]*>", svg, re.S) if b"<svg" in svg[:2000] else None
    if head is None:
        return svg

    def pixels(side: re.Match[bytes]) -> bytes:
        return b'%s="%.3f"' % (side[1], float(side[2]) * UNITS[side[3]])

    plain = re.sub(rb'\b(width|height)="\s*(\d+\.?\d*)\s*(pt|pc|mm|cm|in)"', pixels, head[0])
    return svg[: head.start()] + plain + svg[head.end() :]


def at_most_alike(pictures: Sequence[Picture]) -> list[Picture]:
    """At most MOST_ALIKE pictures of each caption, chosen by their names' hashes; the order is kept."""
    alike: dict[str, list[Picture]] = defaultdict(list)
    for one in pictures:
        alike[one.concept].append(one)
    kept = {
        one.id for many in alike.values() for one in sorted(many, key=lambda one: digest("kept of many", one.id))[:MOST_ALIKE]
    }
    return [one for one in pictures if one.id in kept]


# -------------------------------------------------------------------------------------------------------------- readers


def stamps(tree: Tree, words: Collection[str]) -> Iterator[Picture]:
    """Tux Paint: NAME.txt holds the English sentence, then one line for each language; NAME.png or NAME.svg is the picture."""
    for file in tree.files(r"usr/share/tuxpaint/stamps/.*\.txt"):
        lines = (tree.read(file) or b"").decode("utf-8", "replace").splitlines()
        caption = re.sub(r"\s+", " ", lines[0]).strip() if lines else ""
        stem = file.removesuffix(".txt")
        content = tree.read(f"{stem}.png") or tree.read(f"{stem}.svg")
        if caption and "=" not in caption and content:
            yield picture("tuxpaint", stem.removeprefix("usr/share/tuxpaint/stamps/"), caption, content)


def named_by_file(
    tree: Tree, words: Collection[str], *, source: str, pattern: str, captions: Mapping[str, str] | None = None
) -> Iterator[Picture]:
    """Files whose name is the caption: `pattern` has a group `name`; with `captions`, only names that these give a caption."""
    for file in tree.files(pattern):
        match = re.fullmatch(pattern, file)
        assert match is not None
        name = re.sub(r"[\s_-]+", " ", match["name"]).strip().lower()
        caption = name if captions is None else captions.get(name, "")
        if caption and (content := tree.read(file)):
            yield picture(source, PurePosixPath(file).stem, caption, content)


LANDSCAPES = {
    "badlands": "a landscape of badlands",
    "beach": "a beach",
    "canyon": "a canyon",
    "city": "a city",
    "desert": "a desert",
    "dune": "sand dunes",
    "fields": "fields",
    "fog": "a landscape in fog",
    "forest": "a forest",
    "hills": "hills",
    "lava": "lava",
    "mountain": "mountains",
    "sea": "the sea",
    "sky": "the sky",
    "snow": "a landscape in snow",
    "valley": "a valley",
    "water": "water",
}


def furniture(tree: Tree, words: Collection[str]) -> Iterator[Picture]:
    """Sweet Home 3D: zip archives with a table of numbered properties (name#7=Sofa, icon#7=/path/sofa.png)."""
    for file in tree.files(r"usr/share/sweethome3d/furniture/.*\.sh3f"):
        with zipfile.ZipFile(io.BytesIO(tree.read(file) or b"")) as catalogue:
            there = set(catalogue.namelist())
            table = catalogue.read("PluginFurnitureCatalog.properties").decode("latin-1")
            rows: dict[str, dict[str, str]] = defaultdict(dict)
            for key, number, value in re.findall(r"^(name|icon|category)#(\d+)=(.*)$", table, re.M):
                rows[number][key] = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), value).strip()
            for number, row in rows.items():
                icon = row.get("icon", "").lstrip("/")
                if row.get("name") and icon in there:
                    where = f"{PurePosixPath(file).stem}-{number}"
                    caption = re.sub(r"\s+\d+$", "", row["name"]).lower()
                    yield picture("sweethome3d", where, caption, catalogue.read(icon), row.get("category", ""))


def units(tree: Tree, words: Collection[str]) -> Iterator[Picture]:
    """The Battle for Wesnoth: each unit's drawing under its name, and its portrait; one that units share, under the first's."""
    shown: set[str] = set()
    for file in tree.files(r"usr/share/games/wesnoth/[\d.]+/data/core/units/.*\.cfg"):
        unit = (tree.read(file) or b"").decode("utf-8", "replace").partition("[attack]")[0]
        named = re.search(r'^\s*name= *_ *"([^"]+)"', unit, re.M)
        images = f"{file.partition('/data/core/')[0]}/data/core/images/"
        for key, form in (("image", "{}"), ("profile", "portrait of {}")):
            path = re.search(rf'^\s*{key}="?([\w/.-]+)', unit, re.M)
            if named and path and path[1] not in shown and (content := tree.read(images + path[1])):
                shown.add(path[1])
                name = named[1].rpartition("^")[2].lower()  # before the ^ stands a note to translators
                yield picture("wesnoth", path[1], form.format(article(name) if key == "profile" else name), content)


def maps(tree: Tree, words: Collection[str]) -> Iterator[Picture]:
    """KGeography: a table NAME.kgm says what the map shows and what its coloured parts are called."""
    for file in tree.files(r"usr/share/kgeography/.*\.kgm"):
        head = (tree.read(file) or b"").decode("utf-8", "replace").partition("<division>")[0]
        fields = dict(re.findall(r"<(\w+)>([^<]+)</\1>", head))
        content = tree.read(f"{PurePosixPath(file).parent}/{fields.get('mapFile', '').strip()}")
        if content and fields.get("name"):
            parts = fields.get("divisionsName", "").strip().lower()
            name = re.sub(r"\s*\([^)]*\)", "", fields["name"]).strip()
            caption = f"map of {name.lower()}" + (f", divided into {parts}" if parts else "")
            yield picture("kgeography", PurePosixPath(file).stem, caption, content)


# -------------------------------------------------------------------------------------------------------------- clip art

NOT_USED = re.compile(
    r"shapes/(stars|callouts|jigsaw|flowchart)|special/|duplicates/|icons/|logos/|games/cards/|/flags/|/led/|buttons/|stickmen"
)
"""Folders of patterns, icon themes, playing cards all titled "card", and flags, which the starter corpus draws and holds out."""
NO_NAME = re.compile(r"clipart|cliparts|iconset|submission|collection|hash\(|untitled|unknown|gramastar|^\W*$", re.I)
SMALL_WORDS = frozenset({"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"})


def clip_art(tree: Tree, words: Collection[str]) -> Iterator[Picture]:
    """Open Clip Art: the drawing's own title, or its file's name where the title is a collection's."""
    root = "usr/share/openclipart/svg/"
    files = [file for file in tree.files(rf"{root}.*\.svg") if not NOT_USED.search(file)]
    drawings = {file: tree.read(file) or b"" for file in files}
    titles = {file: title_of(content) for file, content in drawings.items()}
    shared = Counter(titles.values())
    for file, content in drawings.items():
        title = titles[file]
        if shared[title] > COLLECTION_TITLE or NO_NAME.search(title):
            title = PurePosixPath(file).stem
        if caption := known_name(title, words):
            yield picture("openclipart", file.removeprefix(root).removesuffix(".svg"), caption, content)


def title_of(svg: bytes) -> str:
    text = svg.decode("utf-8", "replace")
    match = re.search(r"<dc:title>\s*([^<]*?)\s*</dc:title>", text) or re.search(r"<title[^>]*>\s*([^<]*?)\s*</title>", text)
    return match[1] if match else ""


def known_name(title: str, words: Collection[str]) -> str:
    """A title or file name as a caption, or "" unless every word of it is an English one."""
    title = re.sub(r"\(b ?(and|&) ?w\)", " black and white", title.lower().replace("&amp;", "&"))
    title = re.sub(r" - rpg map elements|^aiga[_ ]", "", title)
    title = re.sub(r"[\s_\-.,()/]+", " ", re.sub(r"\d+[a-z]?\b", " ", title)).strip()
    parts = title.split()
    if not parts or len(parts) > 8 or not all(is_known(part, words) for part in parts) or len(max(parts, key=len)) < 3:
        return ""
    return title


def is_known(word: str, words: Collection[str]) -> bool:
    stems = (word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("'s"), word.removesuffix("ing"))
    return word in SMALL_WORDS or (len(word) > 1 and any(stem in words for stem in stems))


SOURCES: tuple[PictureSource, ...] = (
    PictureSource(("tuxpaint-stamps-default",), stamps),
    PictureSource(("openclipart-svg",), clip_art),
    PictureSource(
        ("pysiogame",),
        partial(named_by_file, source="pysiogame", pattern=r".*/images/art4apps/(?!.*\bno_?image)\w+/(?P<name>[^/]+)\.jpg"),
    ),
    PictureSource(("sweethome3d-furniture",), furniture),
    PictureSource(("wesnoth-1.16-data", "wesnoth-1.18-data", "wesnoth-1.20-data"), units),
    PictureSource(("kgeography-data",), maps),
    PictureSource(
        ("endless-sky-data",),
        partial(
            named_by_file,
            source="endless-sky",
            pattern=r".*/images/land/(?P<name>[a-z]+)\d+(-\w+)?\.jpg",
            captions=LANDSCAPES,
        ),
    ),
)
