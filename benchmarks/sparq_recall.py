"""A corpus that teaches recall over hundreds of demonstrations, from a prepared one's captions: for benchmarks/sparq_scores.py.

    python -m benchmarks.sparq_recall data/starter data/recall
    python -m mm1.train name=long data=own data.corpus=recall ...        (docs/sparq.md has the whole command)

Every document is a many-shot prompt, `{image}{caption}` a line, of SHORTEST to LONGEST lines with a density of 1 / lines^2: each
octave of lengths holds as many tokens as any other. Two kinds:

    recall   captions of at most CHARACTERS dealt out anew to pictures, for this document alone; a line repeats an earlier picture
             and its caption with probability REPEATS. What a repeated picture is called stands in the context and nowhere else.
    plain    pictures under their own captions, none twice

The task `manyshot` has held-out pictures for queries and SUPPORT of the training's for demonstrations, more than any few-shot
task of the starter corpus has. Everything is a function of the seed.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError

if TYPE_CHECKING:
    import numpy

    from data_pipelines.corpora.building import CorpusBuilder

SHORTEST, LONGEST = 6, 256
REPEATS = 0.6
CHARACTERS = 14
RECALL = 0.8
"""Share of documents of the first kind."""
SUPPORT = 600
SIDE, QUALITY = 32, 90
Pair = tuple[bytes, str]


def length(rng: numpy.random.Generator) -> int:
    """SHORTEST to LONGEST, density 1 / n^2."""
    return int(SHORTEST / (1 - rng.random() * (1 - SHORTEST / LONGEST)))


def recall_lines(rng: numpy.random.Generator, pairs: Sequence[Pair], lines: int) -> list[Pair]:
    """Pictures under captions of other pictures, REPEATS of the lines after the first repeating an earlier one."""
    pictures, captions = (rng.permutation(len(pairs))[:lines] for _ in range(2))
    dealt = [(pairs[picture][0], pairs[caption][1]) for picture, caption in zip(pictures, captions, strict=True)]
    shown: list[Pair] = []
    new = 0
    for _ in range(lines):
        if new and rng.random() < REPEATS:
            shown.append(dealt[int(rng.integers(new))])
        else:
            shown.append(dealt[new])
            new += 1
    return shown


def plain_lines(rng: numpy.random.Generator, pairs: Sequence[Pair], lines: int) -> list[Pair]:
    return [pairs[i] for i in rng.permutation(len(pairs))[:lines]]


def write(builder: CorpusBuilder, split: str, lines: Sequence[Pair]) -> None:
    """One document in energon's layout; a picture shown twice lies in it once."""
    from data_pipelines.corpora.building import dumps

    names: dict[bytes, str] = {}
    images: list[str | None] = []
    texts: list[str | None] = []
    for picture, caption in lines:
        images += [names.setdefault(picture, f"{len(names):03d}.webp"), None]
        texts += [None, f"{caption}\n"]
    files = {name: picture for picture, name in names.items()}
    characters = sum(len(caption) + 1 for _, caption in lines)
    builder.sample(
        "interleaved",
        split,
        {"json": dumps({"images": images, "texts": texts}), **files},
        images=len(lines),
        characters=characters,
    )


def small(picture: bytes) -> bytes:
    from PIL import Image

    from data_pipelines.corpora.building import webp

    with Image.open(io.BytesIO(picture)) as image:
        return webp(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), QUALITY)


def make(source: Path, folder: Path, documents: int, seed: int) -> None:
    """Raises UserError if `source` has no captions or tasks to make it of."""
    import json
    import shutil

    from data_pipelines.corpora.building import CorpusBuilder, generator
    from data_pipelines.reader import read_all
    from data_pipelines.shards import Manifest, Task

    manifest = Manifest.load(source)
    pairs = [(small(members["webp"]), members["txt"].decode()) for members in read_all(source, "captions", "train")]
    pairs = [pair for pair in pairs if len(pair[1]) <= CHARACTERS]
    if len(pairs) < LONGEST + SUPPORT:
        raise UserError(f"{source}: {len(pairs)} captions of at most {CHARACTERS} characters; {LONGEST + SUPPORT} are needed.")
    with CorpusBuilder(folder) as builder:
        for split, count in (("train", documents), ("val", 64)):
            rng = generator(seed, "recall", split)
            for _ in range(count):
                kind = recall_lines if rng.random() < RECALL else plain_lines
                write(builder, split, kind(rng, pairs, length(rng)))
        for task in ("captions_known", "captions_new"):
            for members in read_all(source, task, "query"):
                description = json.loads(members["json"])
                builder.task_sample("manyshot", "query", description, {"webp": small(members["webp"])})
        for i in generator(seed, "manyshot support").permutation(len(pairs))[:SUPPORT]:
            picture, caption = pairs[i]
            description = {"id": f"manyshot-support-{i:05d}", "image_id": f"captions-train-{i:05d}", "references": [caption]}
            builder.task_sample("manyshot", "support", description, {"webp": picture})
        assert manifest.tokenizer is not None
        shutil.copytree(source / manifest.tokenizer, builder.partial / "tokenizer")
        about = "name a held-out picture after up to hundreds of training pictures and their names"
        builder.finish(
            recipe="recall",
            tasks={"manyshot": Task("captioning", about, "manyshot/support", "manyshot/query", None)},
            packages=[],
            settings={"source": manifest.fingerprint, "documents": documents, "seed": seed},
            tokenizer="tokenizer",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a prepared corpus with captions and captions_known, captions_new")
    parser.add_argument("folder", type=Path, help="the corpus to make")
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        make(chosen.source, chosen.folder, chosen.documents, chosen.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
