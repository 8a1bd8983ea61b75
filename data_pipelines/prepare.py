"""Prepare a corpus: from packages, from a seed or from shards of your own to a folder with a manifest.

    python -m data_pipelines.prepare corpus=starter        downloads about 130 MB once
    python -m data_pipelines.prepare corpus=full           and about 1.1 GB more through apt-get, on Debian
    python -m data_pipelines.prepare corpus=shapes         needs no network
    python -m data_pipelines.prepare corpus=tars corpus.name=mine 'corpus.captions=/data/cc12m-{000..127}.tar'
    python -m data_pipelines.prepare corpus=convert corpus.name=mine 'corpus.text=/data/*.jsonl.zst'

Training calls `ensure_corpus`, so a first run prepares what it needs.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig

from configs import CONFIG_DIR
from configs.command import command, register
from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.corpora.building import refuse_foreign
from data_pipelines.corpora.config import (
    ConvertConfig,
    CorpusConfig,
    FullConfig,
    OwnConfig,
    ShapesConfig,
    StarterConfig,
    StarterSyntheticConfig,
    TarsConfig,
)
from data_pipelines.shards import MANIFEST, Manifest

SCHEMAS: dict[str, type[CorpusConfig]] = {
    "starter": StarterConfig,
    "starter_synthetic": StarterSyntheticConfig,
    "full": FullConfig,
    "shapes": ShapesConfig,
}
"""Recipes that need to be told nothing: training makes these corpora on the way."""
for _recipe, _schema in {**SCHEMAS, "tars": TarsConfig, "convert": ConvertConfig}.items():
    register(f"{_recipe}_schema", _schema, group="corpus")


@dataclass
class PrepareConfig:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    force: bool = False
    """Make the corpus again even if it is there."""

    def validate(self) -> None:
        self.corpus.validate()


@command("prepare", schema=PrepareConfig)
def main(config: PrepareConfig) -> None:
    """Prepare a corpus: shards with a manifest, tasks and a tokenizer. A corpus that is already there is left alone.

    python -m data_pipelines.prepare corpus=starter        downloads about 130 MB once
    python -m data_pipelines.prepare corpus=full           and about 1.1 GB more through apt-get, on Debian
    python -m data_pipelines.prepare corpus=shapes         needs no network

    Your own shards are checked and indexed where they lie, not copied. Quote the pattern, or the shell expands it:

    python -m data_pipelines.prepare corpus=tars corpus.name=mine 'corpus.captions=/data/cc12m-{000..127}.tar'
    python -m mm1.train data=own data.corpus=mine

    jsonl, jsonl.gz, jsonl.zst, parquet, and tars whose pictures should shrink, are written anew as shards:

    python -m data_pipelines.prepare corpus=convert corpus.name=mine 'corpus.interleaved=/data/obelics/*.parquet' \\
        corpus.image_store=/data/obelics-images corpus.image_size=512
    """
    refuse_repetition(HydraConfig.get().overrides.task)
    prepare(config.corpus, force=config.force)


def prepare(corpus: CorpusConfig, *, force: bool = False) -> Path:
    """Make the corpus unless it is finished already; returns its folder. Of several processes one works and the others wait.

    Raises UserError when a corpus of that name was made with other settings, so that nobody trains on what they did not ask for,
    and when anything but a corpus lies in its place.
    """
    folder = paths.corpus(corpus.name)
    with locked(folder):
        if (folder / MANIFEST).is_file() and not force:
            manifest = Manifest.load(folder)
            refuse_other_settings(manifest, corpus, folder)
            fingerprint = manifest.fingerprint[:12]
            print(f"Corpus {corpus.name!r} is there already: {folder} (fingerprint {fingerprint}). force=true makes it again.")
            return folder
        refuse_foreign(folder)
        print(f"Preparing the corpus {corpus.name!r} in {folder}", flush=True)
        started = time.monotonic()
        manifest = recipe(corpus, folder)
        print(summary(manifest, folder, time.monotonic() - started))
        if isinstance(corpus, OwnConfig):
            from data_pipelines.corpora.tars import next_step

            print(next_step(manifest, str(folder) if os.sep in corpus.name else corpus.name))
    return folder


RECIPES: dict[type[CorpusConfig], str] = {
    StarterConfig: "starter",
    StarterSyntheticConfig: "starter",
    FullConfig: "full",
    ShapesConfig: "shapes",
    TarsConfig: "tars",
    ConvertConfig: "convert",
}
"""A recipe's settings -> the module of data_pipelines.corpora that follows it."""


def recipe(corpus: CorpusConfig, folder: Path) -> Manifest:
    if type(corpus) not in RECIPES:
        raise UserError(f"corpus={corpus.recipe}: no such recipe. There are: {', '.join(RECIPES.values())}.")
    module = importlib.import_module(f"data_pipelines.corpora.{RECIPES[type(corpus)]}")
    downloads = (paths.downloads(),) if isinstance(corpus, StarterConfig) else ()
    return cast(Manifest, module.prepare(corpus, folder, *downloads))


def refuse_repetition(overrides: Sequence[str]) -> None:
    """Raises UserError for a key given twice: of a pattern the shell expanded, Hydra would silently keep the last shard only."""
    for key, count in Counter(override.partition("=")[0] for override in overrides).items():
        if count > 1:
            raise UserError(f"{key} is given {count} times. If it was one pattern, the shell expanded it; quote it: '{key}=...'.")


def ensure_corpus(name: str) -> Path:
    """The folder of corpus `name` (or of a path), prepared with its recipe's defaults if it is not there.

    Raises UserError when it is missing and no recipe has that name.
    """
    folder = paths.corpus(name)
    if (folder / MANIFEST).is_file():
        return folder
    if name not in SCHEMAS:
        raise UserError(
            f"No corpus at {folder} (there is no {MANIFEST}). Prepare one of that name from your own shards: "
            f"python -m data_pipelines.prepare corpus=tars corpus.name={name} corpus.captions=...; or a drawn one: corpus=shapes "
            f"corpus.name={name}; or use one that is made on the way: {', '.join(SCHEMAS)}."
        )
    print(f"The corpus {name!r} is not there yet; it is prepared first (once).", flush=True)
    return prepare(defaults(name))


def defaults(recipe: str) -> CorpusConfig:
    """A recipe's settings as its YAML file gives them. Without Hydra, which cannot compose inside the command that called us."""
    from omegaconf import OmegaConf

    written = OmegaConf.load(CONFIG_DIR / "corpus" / f"{recipe}.yaml")
    given = {key: value for key, value in written.items() if key != "defaults"}
    return cast(CorpusConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SCHEMAS[recipe]), given)))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the corpus's lock; it is the kernel's, so a killed process leaves none behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process is preparing {folder.name!r}; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def refuse_other_settings(manifest: Manifest, corpus: CorpusConfig, folder: Path) -> None:
    """What a manifest does not mention was not a setting yet when it was made, and had what is now its default."""
    made = asdict(SCHEMAS.get(corpus.recipe, type(corpus))()) | cast("dict[str, object]", manifest.settings.get("config", {}))
    harmless = {"name", "processes"}
    differing = {key: value for key, value in asdict(corpus).items() if key not in harmless and made[key] != value}
    if differing:
        listed = ", ".join(f"{key}={made[key]} (asked: {value})" for key, value in sorted(differing.items()))
        raise UserError(
            f"{folder} was prepared with {listed}. Add force=true to make it again, or corpus.name=... for one beside it."
        )


# -------------------------------------------------------------------------------------------------------------- summary


def summary(manifest: Manifest, folder: Path, seconds: float) -> str:
    """What was made, as a table."""
    rows = [("source", "split", "samples", "images", "MB")]
    for source, splits in manifest.splits.items():
        for name, split in splits.items():
            size = sum(shard.bytes for shard in split.shards) / 1e6
            rows.append((source, name, f"{split.samples:,}", f"{split.images:,}", f"{size:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    width = min(sum(widths) + 8, shutil.get_terminal_size().columns)
    lines = []
    for number, row in enumerate(rows):
        lines.append(
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        )
        if number == 0:
            lines.append("-" * width)
    total = sum(shard.bytes for splits in manifest.splits.values() for split in splits.values() for shard in split.shards)
    lines += ["-" * width, ""]
    if manifest.tasks:
        lines += [*(f"{name}: {task.description}" for name, task in manifest.tasks.items()), ""]
    lines += [f"{total / 1e6:.0f} MB in {seconds:.0f} s: {folder}", f"fingerprint {manifest.fingerprint[:12]}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
