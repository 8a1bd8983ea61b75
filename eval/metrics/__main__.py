"""Score a file of predictions from the command line, without a model and without Java.

    python -m eval.metrics captions --references refs.json --candidates cands.json [--metrics cider_d,bleu_4,rouge_l]
    python -m eval.metrics vqa --variant vqa_official --answers answers.json --predictions predictions.json

refs.json: {id: [caption, ...]}, cands.json: {id: caption}, answers.json: {id: [answer, ...]}, predictions.json: {id: answer};
or, for all four, a JSON list of one entry an item. JSON on stdout, in the metric's own unit (CIDEr-D about 0 to 10, all others
0 to 1):

    one metric       {"metric", "n", "corpus", "standard_error", "items": {id: score}}
    several          {"n", "metrics": {name: {"corpus", "standard_error", "items": {id: score}}}}

docs/metrics.md says what each metric is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from configs.errors import UserError
from eval.metrics.captions import METRICS, Score, score_captions
from eval.metrics.vqa import VARIANTS, vqa_accuracy


def _read(path: Path, *, lists: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give a JSON file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}).") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    if isinstance(content, list):
        content = {str(position): entry for position, entry in enumerate(content)}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object {{id: ...}} or a list, found {type(content).__name__}.")
    for key, entry in content.items():
        good = isinstance(entry, list) and entry and all(isinstance(e, str) for e in entry) if lists else isinstance(entry, str)
        if not good:
            raise UserError(
                f"{path}: entry {key!r} must be {'a list of strings' if lists else 'a string'}, found {str(entry)[:80]}."
            )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of two equal keys in silence; here that is an error."""
    seen = dict(pairs)
    if len(seen) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"id {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return seen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m eval.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    captions = kinds.add_parser("captions", help="CIDEr-D, BLEU, ROUGE-L; METEOR and SPICE with Java")
    captions.add_argument("--references", type=Path, required=True)
    captions.add_argument("--candidates", type=Path, required=True)
    captions.add_argument("--metrics", default="cider_d", help=f"one or more, with commas between: {', '.join(METRICS)}")
    vqa = kinds.add_parser("vqa", help="VQA accuracy")
    vqa.add_argument("--variant", choices=list(VARIANTS), default="vqa_official")
    vqa.add_argument("--answers", type=Path, required=True)
    vqa.add_argument("--predictions", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        truth_path, given_path = (
            (chosen.references, chosen.candidates) if chosen.kind == "captions" else (chosen.answers, chosen.predictions)
        )
        truth, given = _read(truth_path, lists=True), _read(given_path, lists=False)
        if truth.keys() != given.keys():
            missing, extra = sorted(truth.keys() - given.keys()), sorted(given.keys() - truth.keys())
            raise UserError(
                f"{given_path} and {truth_path} name different ids: {len(missing)} without a prediction {missing[:5]}, "
                f"{len(extra)} unknown {extra[:5]}. Give exactly one prediction for each."
            )
        ids = list(truth)
        if not ids:
            raise UserError(f"{truth_path} is empty.")
        if chosen.kind == "captions":
            names = [name.strip() for name in chosen.metrics.split(",")]
            scores = score_captions(names, [given[i] for i in ids], [truth[i] for i in ids])
        else:
            scores = {chosen.variant: Score.mean([vqa_accuracy(given[i], truth[i], chosen.variant) for i in ids])}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reports = {
        name: {"corpus": score.corpus, "standard_error": score.standard_error, "items": dict(zip(ids, score.items, strict=True))}
        for name, score in scores.items()
    }
    report: dict[str, Any] = {"n": len(ids), "metrics": reports}
    if len(reports) == 1:
        name, only = reports.popitem()
        report = {"metric": name, "n": len(ids)} | only
    json.dump(report, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
