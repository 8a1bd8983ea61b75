"""The shapes corpus: scenes drawn from a seed, with captions, pages, text and tasks, without any download.

    captions      a scene and its caption                                      train, val
    interleaved   charts, stories of changes, chains, questions, naming pages  train, val
    text          definitions, counting, descriptions                          train, val
    captions_shapes, vqa_shapes, binding_shapes                                support, query (tasks)

Some colour-and-shape pairs are held out: no training picture shows them and no training text names them, while each colour and
each shape is met often. The queries are about these pairs, so they ask whether the model composes what it learnt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError
from data_pipelines.corpora.binding import episode, names_for, naming_page
from data_pipelines.corpora.building import CorpusBuilder, Page, choice, demonstration_question, generator, sample
from data_pipelines.corpora.config import ShapesConfig
from data_pipelines.corpora.scenes import (
    COLOURS,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Pair,
    Scene,
    Thing,
    a,
    alone,
    beside,
    draw,
    questions,
    scene,
    thing,
)
from data_pipelines.shards import Manifest, Task, require_space

if TYPE_CHECKING:
    import numpy

SIDES = {
    "triangle": "three sides",
    "square": "four equal sides",
    "pentagon": "five sides",
    "star": "five points",
    "cross": "four arms",
}
BYTES_PER_PICTURE = 6_000


def held_out_pairs(config: ShapesConfig) -> list[Pair]:
    """A matching of colours and shapes (or several, shifted), so that every colour and every shape keeps most of its pairs."""
    if not 2 <= config.held_out_pairs <= len(COLOURS) * len(SHAPES) // 2:
        raise UserError(
            f"corpus.held_out_pairs={config.held_out_pairs}: between 2 (binding needs two) and {len(COLOURS) * len(SHAPES) // 2}."
        )
    rng = generator(config.seed, "held-out pairs")
    colours, shapes = sample(rng, list(COLOURS), len(COLOURS)), sample(rng, SHAPES, len(SHAPES))
    return [(colours[k % len(colours)], shapes[(k + k // len(colours)) % len(shapes)]) for k in range(config.held_out_pairs)]


def prepare(config: ShapesConfig, folder: Path) -> Manifest:
    """Draw and write the corpus; returns its manifest. The same settings give the same bytes on every machine with one Pillow."""
    for key in ("captions", "interleaved", "text", "validation", "queries", "support"):
        if getattr(config, key) < 1:
            raise UserError(f"corpus.{key}={getattr(config, key)}: at least 1.")
    held = held_out_pairs(config)
    known = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in held]
    pictures = config.captions + 7 * config.interleaved + 12 * config.queries + 1000
    require_space(folder, pictures * BYTES_PER_PICTURE, f"The corpus {folder.name}")
    builder = CorpusBuilder(folder)
    painter = partial(draw, size=config.image_size, quality=config.quality)

    write_captions(builder, config, known, painter)
    write_pages(builder, config, known, painter)
    write_text(builder, config, known)
    tasks = {
        "captions_shapes": caption_task(builder, config, known, held, painter),
        "vqa_shapes": question_task(builder, config, known, held, painter),
        "binding_shapes": binding_task(builder, config, known, held, painter),
    }
    return builder.finish(
        recipe="shapes",
        tasks=tasks,
        packages=[],
        settings={"config": asdict(config), "held_out_pairs": [" ".join(pair) for pair in held]},
        tokenizer=builder.tokenizer(config.vocab_size),
    )


Painter = Callable[[Scene], bytes]


def progress(count: int, what: str) -> range:
    from tqdm import tqdm

    return tqdm(range(count), desc=f"  {what}", unit="", leave=False, disable=None)


# -------------------------------------------------------------------------------------------------------------- sources


def said(rng: numpy.random.Generator, shown: Scene) -> str:
    """A caption of one of several lengths."""
    return shown.caption(size=rng.random() < 0.6, texture=rng.random() < 0.7)


def write_captions(builder: CorpusBuilder, config: ShapesConfig, known: Sequence[Pair], paint: Painter) -> None:
    for split, count in (("train", config.captions), ("val", config.validation)):
        for number in progress(count, f"captions {split}"):
            rng = generator(config.seed, "caption", split, number)
            shown = scene(rng, known)
            builder.caption(split, paint(shown), said(rng, shown))


def write_pages(builder: CorpusBuilder, config: ShapesConfig, known: Sequence[Pair], paint: Painter) -> None:
    kinds = (chain, question_page, story, chart, naming)
    for split, count in (("train", config.interleaved), ("val", config.validation)):
        for number in progress(count, f"pages {split}"):
            rng = generator(config.seed, "page", split, number)
            builder.page(split, kinds[number % len(kinds)](rng, known, paint))


def chain(rng: numpy.random.Generator, known: Sequence[Pair], paint: Painter) -> Page:
    """Pictures each followed by its caption: the form of few-shot captioning."""
    page = Page()
    for _ in range(int(rng.integers(3, 9))):
        shown = scene(rng, known)
        page.add(paint(shown), said(rng, shown) + "\n")
    return page


def question_page(rng: numpy.random.Generator, known: Sequence[Pair], paint: Painter) -> Page:
    """Pictures each followed by a question and its answer: the form of few-shot VQA."""
    page = Page()
    for _ in range(int(rng.integers(3, 9))):
        shown = scene(rng, known)
        question, answer, _ = questions(rng, shown, known)[0]
        page.add(paint(shown), demonstration_question(question, answer))
    return page


def story(rng: numpy.random.Generator, known: Sequence[Pair], paint: Painter) -> Page:
    """One thing changes from picture to picture; in the end it meets another."""
    now = thing(rng, known)
    page = Page().add("A story in pictures.\n", paint(alone(rng, now)), f"There is {a(now.noun(size=True, texture=True))}.\n")
    for _ in range(int(rng.integers(2, 5))):
        ways = [
            *[(replace(now, colour=c), f"Now it is {c}") for c, s in known if s == now.shape and c != now.colour],
            *[(replace(now, shape=s), f"It turns into {a(s)}") for c, s in known if c == now.colour and s != now.shape],
            *[(replace(now, size=size), "It grows" if size == "large" else "It shrinks") for size in SIZES if size != now.size]
            * 4,
            *[(replace(now, texture=t), f"Now it is {t}") for t in TEXTURES if t != now.texture],
        ]
        now, event = choice(rng, ways)
        page.add(paint(alone(rng, now)), f"{event}: {a(now.noun(size=True, texture=True))}.\n")
    other = thing(rng, [pair for pair in known if pair[0] != now.colour and pair[1] != now.shape])
    met = beside(rng, now, other, choice(rng, RELATIONS))
    return page.add(paint(met), f"It meets {a(other.noun())}: {met.caption()}.\n")


def chart(rng: numpy.random.Generator, known: Sequence[Pair], paint: Painter) -> Page:
    """Things of one colour or of one shape."""
    by_colour = rng.random() < 0.5
    topic = choice(rng, list(COLOURS) if by_colour else SHAPES)
    pairs = [pair for pair in known if topic in pair]
    page = Page().add(f"Things that are {topic}.\n" if by_colour else f"A chart of the {topic}, in many colors.\n")
    for pair in sample(rng, pairs, int(rng.integers(3, 8))):
        one = thing(rng, [pair])
        page.add(paint(alone(rng, one)), f"{a(one.noun(size=True, texture=True))}.\n")
    return page


def drawer(rng: numpy.random.Generator, concept: Thing, paint: Painter) -> Callable[[], bytes]:
    """Pictures of one concept (colour, shape and texture) in varying size and place."""
    return lambda: paint(alone(rng, replace(concept, size=choice(rng, list(SIZES)))))


def naming(rng: numpy.random.Generator, known: Sequence[Pair], paint: Painter) -> Page:
    """Two or three things under made-up names, each shown several times: the form of fast concept binding."""
    count = 2 if rng.random() < 0.75 else 3
    concepts = [thing(rng, [pair]) for pair in sample(rng, known, count)]
    return naming_page(
        rng, sample(rng, names_for("train"), count), [drawer(rng, c, paint) for c in concepts], 4 if count == 2 else 3
    )


def write_text(builder: CorpusBuilder, config: ShapesConfig, known: Sequence[Pair]) -> None:
    for split, count in (("train", config.text), ("val", config.validation)):
        for number in range(count):
            rng = generator(config.seed, "text", split, number)
            sentences = [
                choice(rng, (definition, counting, described, placed))(rng, known) for _ in range(int(rng.integers(5, 13)))
            ]
            builder.text(split, " ".join(sentences) + "\n")


def definition(rng: numpy.random.Generator, known: Sequence[Pair]) -> str:
    shape = choice(rng, list(SIDES))
    return choice(rng, [f"{a(shape).capitalize()} has {SIDES[shape]}.", f"Every {shape} has {SIDES[shape]}, whatever its color."])


def counting(rng: numpy.random.Generator, known: Sequence[Pair]) -> str:
    one = thing(rng, known)
    first, second = (int(n) for n in rng.integers(1, 5, size=2))
    name = [one.noun(plural=n > 1) for n in (first, second, first + second)]
    if rng.random() < 0.5:
        return (
            f"{NUMBERS[first].capitalize()} {name[0]} and {NUMBERS[second]} {name[1]} make {NUMBERS[first + second]} {name[2]}."
        )
    verb = "is" if second == 1 else "are"
    return f"Take {NUMBERS[first]} from {NUMBERS[first + second]} {name[2]}, and {NUMBERS[second]} {name[1]} {verb} left."


def described(rng: numpy.random.Generator, known: Sequence[Pair]) -> str:
    shown = scene(rng, known)
    return choice(rng, ["The picture shows {}.", "Here is a drawing of {}.", "Imagine {}."]).format(said(rng, shown))


def placed(rng: numpy.random.Generator, known: Sequence[Pair]) -> str:
    first = thing(rng, known)
    second = thing(rng, [pair for pair in known if pair[0] != first.colour and pair[1] != first.shape])
    relation = choice(rng, RELATIONS)
    one, other = first.noun(), second.noun()
    return f"The {one} is {relation} the {other}, so the {other} is {OPPOSITE[relation]} the {one}."


# ---------------------------------------------------------------------------------------------------------------- tasks

TASK_SPLITS = (("support", "support"), ("query", "queries"))


def caption_task(
    builder: CorpusBuilder, config: ShapesConfig, known: Sequence[Pair], held: Sequence[Pair], paint: Painter
) -> Task:
    for split, setting in TASK_SPLITS:
        for number in progress(getattr(config, setting), f"captions_shapes {split}"):
            rng = generator(config.seed, "captions_shapes", split, number)
            shown = scene(rng, known, held if split == "query" else ())
            described = {
                "id": f"captions_shapes-{split}-{number:05d}",
                "image_id": f"shapes/captions/{split}/{number}",
                "references": shown.references(),
                "concept": " ".join(shown.things[0].pair),
            }
            builder.task_sample("captions_shapes", split, described, {"webp": paint(shown)})
    what = f"describe scenes with a colour-and-shape pair never shown in training ({config.queries} pictures, {len(held)} pairs)"
    return Task("captioning", what, "captions_shapes/support", "captions_shapes/query")


def question_task(
    builder: CorpusBuilder, config: ShapesConfig, known: Sequence[Pair], held: Sequence[Pair], paint: Painter
) -> Task:
    answers: Counter[str] = Counter()
    for split, setting in TASK_SPLITS:
        for number in progress(getattr(config, setting), f"vqa_shapes {split}"):
            rng = generator(config.seed, "vqa_shapes", split, number)
            shown = scene(rng, known, held if split == "query" else ())
            question, answer, kind = questions(rng, shown, [*known, *held] if split == "query" else known)[0]
            described = {
                "id": f"vqa_shapes-{split}-{number:05d}",
                "image_id": f"shapes/vqa/{split}/{number}",
                "question": question,
                "answers": [answer] * 10,
                "question_type": kind,
            }
            builder.task_sample("vqa_shapes", split, described, {"webp": paint(shown)})
            if split == "query":
                answers[answer] += 1
    answer, count = answers.most_common(1)[0]
    what = f"{config.queries} questions on color, shape, texture, number and place in scenes with a held-out pair"
    what += f"; always answering {answer!r} scores {100 * count / config.queries:.1f} %"
    return Task("vqa", what, "vqa_shapes/support", "vqa_shapes/query")


def binding_task(
    builder: CorpusBuilder, config: ShapesConfig, known: Sequence[Pair], held: Sequence[Pair], paint: Painter
) -> Task:
    for split, count, pairs, whose in (
        ("support", min(50, config.support), known, "train"),
        ("query", config.queries, held, "query"),
    ):
        for number in progress(count, f"binding_shapes {split}"):
            rng = generator(config.seed, "binding_shapes", split, number)
            concepts = [thing(rng, [pair]) for pair in sample(rng, pairs, 2)]
            drawers = [drawer(rng, concept, paint) for concept in concepts]
            queries = [(f"shapes/binding/{split}/{number}/{i}", drawers[i]()) for i in range(2)]
            described, images = episode(rng, number, names_for(whose), drawers, queries)
            builder.task_sample("binding_shapes", split, described, images)
    what = (
        f"{config.queries} episodes: two held-out pairs under two made-up names never trained on; which name has the new picture?"
    )
    return Task("binding", what, "binding_shapes/support", "binding_shapes/query", chance=0.5)
