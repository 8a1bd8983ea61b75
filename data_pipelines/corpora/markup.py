"""Pages of manuals in HTML, Mallard or DocBook -> blocks of headings, text, code and images in reading order.

    blocks(page)        a walk over the body; navigation, scripts, tables of contents and permalinks are left out
    plain(blocks)       their text
    pieces(blocks)      a long page cut where its headings are, so that each piece is a document of its own

Only the standard library's parser is used: it never fails on real pages, and keeps to no scheme that a package could break.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Literal


def named(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


SKIPPED_TAGS = named(
    "script style nav head noscript svg button form iframe template select footer info credit indexterm keywordset remark "
    "revision textobject bookinfo articleinfo chapterinfo sect1info copyright links"
)
SKIPPED_CLASSES = named(
    "navheader navfooter navigationbar navbar nav-path navpath sidebar bd-sidebar bd-toc toc related sphinxsidebar footer "
    "headerlink sk-sidebar-wrapper prev-next-area toctree-wrapper sphx-glr-thumbcontainer sphx-glr-footer sphx-glr-timing "
    "sphx-glr-download-link-note sphx-glr-signature indexterm linenos lineno viewcode-link header-menu memproto memtitle "
    "summary dynheader dyncontent directory sphinxsidebarwrapper prev next pagination breadcrumbs sr-only permalink "
    "toc-mobile-screen hamburger sk-sidebar-toc search contents-local buildinfo edit-this-page bd-footer wy-breadcrumbs "
    "wy-nav-side wy-nav-top rst-versions rst-footer-buttons sphx-glr-thumbnails"
)
SKIPPED_IDS = named(
    "top titlearea main-nav side-nav nav-path MSearchSelectWindow MSearchResultsWindow navbar sk-sidebar-wrapper footer "
    "searchbox toc table-of-contents contents-section bd-toc-nav main-sidebar index-link"
)
VOID = named("area base br col embed hr img input link meta param source track wbr media imagedata")
HEADINGS = named("h1 h2 h3 h4 h5 h6")
BREAKS = named(
    "p div section article main table tr ul ol dl li dt dd blockquote figure figcaption hr aside center caption thead tbody "
    "para formalpara note tip warning important steps item list terms example mediaobject variablelist itemizedlist "
    "orderedlist listitem procedure step screenshot sect1 sect2 sect3 chapter"
)
PREFORMATTED = named("pre screen programlisting code-block")
IMAGE_ATTRIBUTES = {"img": "src", "media": "src", "imagedata": "fileref"}
LONGEST_CODE = 1500
"""Characters of a block of code; the rest of a longer one is left out, with a mark where."""
LONGEST_PIECE, FULL_PIECE, MOST_IMAGES = 8000, 3000, 8
"""A piece ends before LONGEST_PIECE characters, after MOST_IMAGES images, and at a heading once it has FULL_PIECE characters."""


@dataclass(frozen=True)
class Block:
    kind: Literal["heading", "text", "code", "image"]
    content: str
    """Text, or the reference of the image as it stands in the page."""


class _Walker(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._open: list[tuple[str, bool]] = []
        self._skipping = self._preformatted = self._heading = 0
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if tag not in VOID:
            classes = set(given.get("class", "").split())
            skipped = bool(
                tag in SKIPPED_TAGS
                or classes & SKIPPED_CLASSES
                or given.get("id") in SKIPPED_IDS
                or given.get("role") == "search"
            )
            if tag in BREAKS or tag in HEADINGS or tag in PREFORMATTED:
                self.flush()
            self._open.append((tag, skipped))
            self._skipping += skipped
            self._heading += tag in HEADINGS
            self._preformatted += tag in PREFORMATTED
        if self._skipping:
            return
        if tag in IMAGE_ATTRIBUTES and given.get(IMAGE_ATTRIBUTES[tag]):
            if "formula" in given.get("class", ""):  # drawn from LaTeX, which is its alternative text
                self._text.append(f" {given.get('alt', '')} ")
                return
            self.flush()
            self.blocks.append(Block("image", given[IMAGE_ATTRIBUTES[tag]]))
        elif tag == "br":
            self._text.append("\n")
        elif tag == "hr":
            self.flush()
        elif tag in ("li", "listitem", "item", "step"):
            self._text.append("- ")
        elif tag in ("td", "th", "entry"):
            self._text.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or all(tag != opened for opened, _ in self._open):
            return
        if tag in BREAKS or tag in HEADINGS or tag in PREFORMATTED:
            self.flush()
        while True:  # elements inside it that were never closed end with it
            opened, skipped = self._open.pop()
            self._skipping -= skipped
            self._heading -= opened in HEADINGS
            self._preformatted -= opened in PREFORMATTED
            if opened == tag:
                return

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def flush(self) -> None:
        text = "".join(self._text)
        self._text = []
        if self._preformatted:
            if text.strip():
                joined = self.blocks and self.blocks[-1].kind == "code"  # Doxygen: one element for each line
                before = self.blocks.pop().content + "\n" if joined else ""
                self.blocks.append(Block("code", before + text.strip("\n").rstrip()))
            return
        lines = [re.sub(r"\s+", " ", line).strip() for line in text.split("\n\n")] if self._heading else [_collapsed(text)]
        joined_text = " ".join(lines).strip()
        if joined_text and joined_text not in ("-", "¶"):
            self.blocks.append(Block("heading" if self._heading else "text", joined_text.replace("¶", "").strip()))


def _collapsed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def blocks(page: str, *, xml: bool = False) -> list[Block]:
    """The page's blocks in reading order. With `xml` (Mallard, DocBook): titles are headings, unknown entities their names."""
    if xml:
        page = re.sub(r"<(/?)title\b", r"<\1h2", page)  # in HTML that element is no part of the body
        page = re.sub(r"<code\b([^>]*\bmime=[^>]*)>(.*?)</code>", r"<pre\1>\2</pre>", page, flags=re.S)  # a block in Mallard
        page = re.sub(r"<!\[CDATA\[(.*?)\]\]>", lambda data: data[1].replace("&", "&amp;").replace("<", "&lt;"), page, flags=re.S)
        page = re.sub(r"&(?!(?:amp|lt|gt|quot|apos|nbsp);)([A-Za-z][\w.-]*);", r"\1", page)
    else:
        start = re.search(r"<body\b", page, re.I)
        page = page[start.start() :] if start else page
    walker = _Walker()
    walker.feed(page)
    walker.close()
    walker.flush()
    return walker.blocks


def rendered(block: Block) -> str:
    """A block as text, with the line breaks that set it off."""
    if block.kind == "heading":
        return f"\n{block.content}\n\n"
    if block.kind == "code":
        code = block.content
        if len(code) > LONGEST_CODE:
            code = code[:LONGEST_CODE].rpartition("\n")[0] + "\n..."
        return f"{code}\n\n"
    return f"{block.content}\n"


def plain(content: Sequence[Block]) -> str:
    return "".join(rendered(block) for block in content if block.kind != "image").strip("\n") + "\n"


def pieces(content: Sequence[Block]) -> Iterator[list[Block]]:
    """Cut a page into pieces of limited length, at headings where it can; a page that is short is one piece."""
    piece: list[Block] = []
    characters = images = 0
    for block in content:
        size = 0 if block.kind == "image" else len(rendered(block))
        full = characters + size > LONGEST_PIECE or (block.kind == "image" and images == MOST_IMAGES)
        if piece and (full or (block.kind == "heading" and characters >= FULL_PIECE)):
            carried = _heading_at_end(piece)
            yield piece[: len(piece) - len(carried)]
            piece = [*carried]
            characters, images = sum(len(rendered(one)) for one in piece), 0
        piece.append(block)
        characters += size
        images += block.kind == "image"
    if piece:
        yield piece


def _heading_at_end(piece: Sequence[Block]) -> list[Block]:
    """A heading that a cut would leave behind at the end of its piece belongs to the next one."""
    return [piece[-1]] if len(piece) > 1 and piece[-1].kind == "heading" else []
