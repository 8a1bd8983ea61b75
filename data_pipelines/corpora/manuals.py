"""Interleaved pages from the illustrated manuals of Debian packages.

    MANUALS: package, pattern of its pages  ->  Manual: pieces of pages (text and references to figures), figures (Picture)

A figure is an image of a page that is no navigation icon (on more than a tenth of the package's pages), no diagram that a tool
drew of classes or calls, no thumbnail that only leads to another page, at least SMALLEST pixels a side and not a mere strip. A
piece of a page with a figure becomes an interleaved document, a piece without one a text; a page without figures is left out.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote

from data_pipelines.corpora.building import Page, digest, unit
from data_pipelines.corpora.debian_pictures import in_pixels
from data_pipelines.corpora.markup import Block, blocks, pieces, plain, rendered
from data_pipelines.corpora.pictures import TRAIN, VALIDATION, Picture
from data_pipelines.debian import Tree
from data_pipelines.images import MAX_PIXELS

SMALLEST, LONGEST_SHAPE = 32, 8
"""Pixels of the shorter side; how often the shorter side may go into the longer."""
ICON_SHARE, ICON_PAGES = 0.1, 6
"""An image on more than this share of a package's pages, and on at least so many, belongs to the pages' frame."""
LEAST_TEXT = 200
"""Characters a document must have: less is a picture without a text."""
IMAGE_FILE = re.compile(r"\.(png|jpe?g|gif|webp|svg)$", re.I)
DRAWN_BY_TOOL = re.compile(
    r"__(inherit|coll|incl|dep|cgraph|icgraph)|_[a-z]*cgraph|graph_legend|inherit_graph|form_\d+\.|_thumb\.|^(note|tip|warning|caution|important)\."
)
NO_CONTENT = re.compile(
    r"(^|/)(genindex|search|py-modindex|searchindex|changelog|whats_new|index-all|hierarchy)[\w.-]*\.html$|/v\d"
)

FRAME_BLOCKS = 4
"""How many blocks from a page's end a frame's closing lines may stand."""
NO_PROSE = re.compile(
    r"(Prev|Next) Tutorial: |Original author |Compatibility (OpenCV )?>|© |Last (changed|updated)[: ]|Main index \| |Accessed: |"
    r"Available at: .* source code|name: \S+ (type|pads): |image$"
)


@dataclass(frozen=True)
class ManualSource:
    names: tuple[str, ...]
    """The package, under every name that releases of Debian give it."""
    pages: str
    """Pattern of the names of its pages."""
    xml: bool = False
    """Mallard or DocBook instead of HTML."""


@dataclass
class Piece:
    """One document: text blocks, and images by the id of their figure."""

    key: str
    split: str
    content: list[Block]


@dataclass
class Manual:
    pieces: list[Piece] = field(default_factory=list)
    figures: dict[str, Picture] = field(default_factory=dict)
    """id (package/file) -> figure, not yet rendered."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What was met and left out, by reason."""


# -------------------------------------------------------------------------------------------------------------- reading


def read(tree: Tree, source: ManualSource, seed: int, validation: float) -> Manual:
    """All illustrated pages of one package, each with its split."""
    manual, package = Manual(), source.names[0]
    walked: dict[str, list[Block]] = {}
    for name in tree.files(source.pages):
        content = tree.read(name)
        if content and not NO_CONTENT.search(name):
            walked[name] = [_resolved(block, name, tree) for block in blocks(decoded(content), xml=source.xml)]
    icons = _on_many_pages(walked, "image")
    frame = _on_many_pages(walked, "text")
    judged: dict[str, bytes | None] = {}
    for name, whole in walked.items():
        kept = [
            block
            for block in _without_frame(whole, frame)
            if block.kind != "image" or _is_figure(block.content, tree, icons, judged, manual.left_out)
        ]
        if not any(block.kind == "image" for block in kept):
            manual.left_out["pages without a figure"] += 1
            continue
        split = VALIDATION if unit(seed, "page held out", package, name) < validation else TRAIN
        for number, piece in enumerate(pieces(kept)):
            manual.pieces.append(Piece(f"{package}/{name}#{number}", split, [_keyed(block, package) for block in piece]))
    for key in sorted({block.content for piece in manual.pieces for block in piece.content if block.kind == "image"}):
        figure = judged[key.removeprefix(f"{package}/")]
        assert figure is not None
        manual.figures[key] = Picture(key, package, key, key, [], in_pixels(figure), domain="figure")
    _settle_shared(manual)
    return manual


def decoded(content: bytes) -> str:
    """A page's text by its own word for its encoding, which older pages need: UTF-8 unless it says otherwise."""
    said = re.search(rb"(?:charset|encoding)=[\"']?([\w-]+)", content[:2000])
    try:
        return content.decode(said[1].decode() if said else "utf-8", "replace")
    except LookupError:
        return content.decode("utf-8", "replace")


def _resolved(block: Block, page: str, tree: Tree) -> Block:
    """An image by its file's name in the tree; "" for what is elsewhere: on the network, inside the page, outside the package."""
    if block.kind != "image":
        return block
    reference = unquote(block.content.split("#")[0].split("?")[0])
    local = not re.match(r"[a-z][a-z+.-]*:|//", block.content, re.I)
    return Block("image", (tree.beside(page, reference) or "") if local and reference else "")


def _on_many_pages(walked: dict[str, list[Block]], kind: str) -> set[str]:
    """Content of blocks of one kind that stand on so many pages that they belong to the pages' frame."""
    on_pages = Counter(one for content in walked.values() for one in {b.content for b in content if b.kind == kind})
    return {one for one, pages in on_pages.items() if pages >= ICON_PAGES and pages > ICON_SHARE * len(walked)}


def _without_frame(content: Sequence[Block], frame: set[str]) -> list[Block]:
    """A page without what its frame says above the first heading and at the end, and without lines of links and of settings."""
    first = next((number for number, block in enumerate(content) if block.kind == "heading"), 0)
    last = len(content) - FRAME_BLOCKS
    kept = [
        block
        for number, block in enumerate(content)
        if block.kind != "text"
        or not (NO_PROSE.match(block.content) or (block.content in frame and (number < first or number >= last)))
    ]
    while kept and kept[-1].kind == "heading":  # of something that was left out
        kept.pop()
    return kept


def _is_figure(file: str, tree: Tree, icons: set[str], known: dict[str, bytes | None], count: Counter[str]) -> bool:
    """Whether an image is a figure; its content is kept in `known`, where each file is read and judged once."""
    if file not in known:
        known[file] = None
        if not file or not IMAGE_FILE.search(file):
            count["images elsewhere or of another kind"] += 1
        elif file in icons:
            count["icons"] += 1
        elif DRAWN_BY_TOOL.search(PurePosixPath(file).name):
            count["diagrams drawn by a tool, thumbnails"] += 1
        elif (content := tree.read(file)) is None:
            count["images that are not there"] += 1
        elif not _large_enough(content):
            count["images too small or too narrow"] += 1
        else:
            known[file] = content
    return known[file] is not None


def _large_enough(content: bytes) -> bool:
    """By the header alone; what no decoder knows counts as too small, what has too many pixels too."""
    from PIL import Image

    if b"<svg" in content[:2000]:
        found = re.search(rb"<svg\b[^>]*>", content, re.S)
        stated = [re.search(rb'\b%s="([\d.]+)(px|pt|mm)?"' % side, found[0]) if found else None for side in (b"width", b"height")]
        width, height = (float(side[1]) if side else float(SMALLEST) for side in stated)
    else:
        try:
            with Image.open(io.BytesIO(content)) as picture:
                width, height = picture.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False
    small, large = min(width, height), max(width, height)
    return small >= SMALLEST and large <= LONGEST_SHAPE * small and width * height <= MAX_PIXELS


def _keyed(block: Block, package: str) -> Block:
    return Block("image", f"{package}/{block.content}") if block.kind == "image" else block


def _settle_shared(manual: Manual) -> None:
    """A figure of a training page is not shown on a page held out; each figure then belongs to one split."""
    trained = {
        block.content for piece in manual.pieces if piece.split == TRAIN for block in piece.content if block.kind == "image"
    }
    for piece in manual.pieces:
        if piece.split == VALIDATION:
            shared = [block for block in piece.content if block.kind == "image" and block.content in trained]
            manual.left_out["figures shared with a training page"] += len(shared)
            piece.content = [block for block in piece.content if block not in shared]
    for key, figure in manual.figures.items():
        figure.split = TRAIN if key in trained else VALIDATION


# -------------------------------------------------------------------------------------------------------------- writing


def documents(
    manuals: Sequence[Piece], figures: dict[str, Picture], count: Counter[str]
) -> tuple[list[tuple[str, Page]], list[tuple[str, str, str]]]:
    """(split, page) of pieces with a figure, and (key, split, text) of those without; figures that were dropped are gone.

    `figures`: id -> rendered picture with its final split. An image twice in a row is shown once.
    """
    pages: list[tuple[str, Page]] = []
    texts: list[tuple[str, str, str]] = []
    seen: set[int] = set()
    for piece in manuals:
        shown: list[Block] = []
        for block in piece.content:
            lost = block.kind == "image" and (block.content not in figures or figures[block.content].split != piece.split)
            if not lost and not (shown and block.kind == "image" and shown[-1] == block):
                shown.append(block)
        text = plain(shown)
        illustrated = any(block.kind == "image" for block in shown)
        if len(text) < LEAST_TEXT:
            count["documents with too little text"] += 1
        elif digest(text, *(b.content for b in shown if b.kind == "image")) in seen:
            count["documents that another one repeats"] += 1
        elif illustrated:
            page = Page()
            for block in shown:
                page.add(figures[block.content].image if block.kind == "image" else rendered(block))
            pages.append((piece.split, _trimmed(page)))
        else:
            texts.append((piece.key, piece.split, text))
        seen.add(digest(text, *(b.content for b in shown if b.kind == "image")))
    return pages, texts


def _trimmed(page: Page) -> Page:
    """Without empty lines at the page's ends."""
    if isinstance(page.parts[0], str):
        page.parts[0] = page.parts[0].lstrip("\n")
    if isinstance(page.parts[-1], str):
        page.parts[-1] = page.parts[-1].rstrip("\n") + "\n"
    page.parts = [part for part in page.parts if part]
    return page


MANUALS: tuple[ManualSource, ...] = (
    ManualSource(("gimp-help-en",), r"usr/share/gimp/[\d.]+/help/en/.*\.html"),
    ManualSource(("opencv-doc",), r".*/html/(.*/)?tutorial_\w+\.html"),
    ManualSource(("python-sklearn-doc",), r".*/html/(modules/[\w.]+|auto_examples/.*|tutorial/.*)\.html"),
    ManualSource(("qtbase5-doc-html",), r"usr/share/qt5/doc/(?!.*-(members|obsolete)\.html).*\.html"),
    ManualSource(("python-scipy-doc",), r".*/html/(tutorial|reference)/.*\.html"),
    ManualSource(("python-skimage-doc",), r".*/html/(auto_examples|user_guide|api)/.*\.html"),
    ManualSource(("grass-doc",), r"usr/share/doc/grass-doc/html/.*\.html"),
    ManualSource(("libvisp-doc",), r".*/html/(tutorial|mainpage)[\w-]*\.html"),
    ManualSource(("libgegl-doc",), r"usr/share/(doc/libgegl-dev|gtk-doc/html/gegl)/.*\.html"),
    ManualSource(("wireshark-doc",), r".*/ws[ud]g_html_chunked/.*\.html"),
    ManualSource(("freedombox-doc-en",), r"usr/share/freedombox/manual/en/.*\.part\.html"),
    ManualSource(("gnome-user-docs",), r"usr/share/help/C/.*\.(page|xml|docbook)", xml=True),
    ManualSource(("gnome-devel-docs",), r"usr/share/help/C/.*\.(page|xml|docbook)", xml=True),
    ManualSource(("kstars-data",), r"usr/share/doc/HTML/en/kstars/.*\.docbook", xml=True),
)
