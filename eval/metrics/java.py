"""METEOR (Denkowski and Lavie 2014, version 1.5) and SPICE (Anderson et al. 2016): the official Java programs, through
pycocoevalcap.

Both are kept apart because they need what nothing else here does: Java, and the extra `java` (pycocoevalcap, 104 MB). Captions
are PTB-tokenised before, as the official scorer does. METEOR's corpus value comes from statistics summed over the images inside
the Java program; SPICE's is the mean over the images.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.errors import UserError
from eval.metrics.checks import check_lengths, check_references
from eval.metrics.ptb import tokenize

_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def _load(metric: str, module: str) -> Any:
    """pycocoevalcap's module. Raises UserError without Java or without the package."""
    if shutil.which("java") is None:
        raise UserError(
            f"{metric} is a Java program and there is no `java` on the PATH. Install a Java runtime (Debian: "
            "apt-get install default-jre-headless), or leave this metric out."
        )
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UserError(
            f"{metric} needs the package pycocoevalcap ({error}). Install the extra: pip install 'mm1-ablations[java]', "
            "or leave this metric out."
        ) from error


def _inputs(
    metric: str, candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """(references, candidates) in pycocoevalcap's form: position -> tokenised captions."""
    check_lengths(metric, candidates, references)
    check_references(metric, references)
    truth = {i: [" ".join(tokenize(caption)) for caption in captions] for i, captions in enumerate(references)}
    return truth, {i: [" ".join(tokenize(candidate))] for i, candidate in enumerate(candidates)}


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """(corpus METEOR, METEOR of every image), in [0, 1].

    Raises UserError without Java or pycocoevalcap, or when the Java program ends before it has answered.
    """
    truth, given = _inputs("METEOR", candidates, references)
    program = _load("METEOR", "meteor.meteor").Meteor()
    try:
        corpus, items = program.compute_score(truth, given)
    except (OSError, ValueError) as error:
        # The scorer holds its lock across a failure, and its destructor would wait for it for ever.
        program.lock.release()
        program.meteor_p.kill()
        with suppress(OSError):
            program.meteor_p.stdin.close()
        said = program.meteor_p.stderr.read().decode(errors="replace").strip()
        raise UserError(f"METEOR's Java program ended early ({error}): {said[-300:]}. It needs 2 GB of memory.") from error
    return float(corpus), [float(item) for item in items]


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """(mean SPICE, SPICE of every image), in [0, 1].

    Raises UserError without Java, pycocoevalcap or the Stanford models, when the Java program fails, or when it finds no
    statement at all in an image's captions.
    """
    truth, given = _inputs("SPICE", candidates, references)
    module = _load("SPICE", "spice.spice")
    libraries = Path(module.__file__).parent / "lib"
    if missing := [name for name in _SPICE_MODELS if not (libraries / name).is_file()]:
        raise UserError(
            f"SPICE needs {' and '.join(missing)} in {libraries}. With a network, "
            "`python -c 'from pycocoevalcap.spice.spice import Spice; Spice()'` fetches them from Stanford (about 400 MB), once."
        )
    try:
        with _stdout_to_stderr():
            mean, scores = module.Spice().compute_score(truth, given)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"SPICE's Java program failed ({error}). It was written for Java 8, takes 8 GB of memory and writes into "
            f"{libraries.parent}."
        ) from error
    items = [float(score["All"]["f"]) for score in scores]
    if undefined := [position for position, item in enumerate(items) if math.isnan(item)]:
        raise UserError(f"SPICE finds nothing to compare in the captions of image(s) {undefined[:5]}. Leave them out.")
    return float(mean), items


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What a child process prints stays out of this process's standard output, which may be JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
