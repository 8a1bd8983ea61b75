"""TextCore's files: MM1's text tasks (section 3) in the layouts they are published in -> the rows that lm-eval's prompts read.

    <datasets>/arc_easy/test.jsonl            one folder a task, one file a split: SPLIT.jsonl, SPLIT.json or SPLIT.parquet
    <datasets>/piqa/validation-00000-of-00001.parquet     or several: SPLIT-*.parquet, SPLIT-*.jsonl

Rows may be the Hub's or the publishers' own (ARC's nested question, PIQA's labels in a file beside, TriviaQA's Data,
WebQuestions' targetValue). docs/textcore.md has the table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.formats.rows import read_rows
from eval.tasks.shards import check_shards
from eval.tasks.texts import are_texts, is_text

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class TextTask:
    """`lm_eval`: the task there that makes prompts and scores; `folder`: where its file lies there. `chance` in points."""

    lm_eval: str
    folder: str
    metric: str
    queries: str
    demonstrations: str
    convert: Callable[[Row], Row]
    chance: float | None = None


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key} is {type(row[key]).__name__}, not text")
    if not is_text(row[key]):
        raise ValueError(f"{key} is {row[key]!r}, which holds half of a character")
    return row[key]


def _texts(values: Any, key: str) -> list[str]:
    if not are_texts(values):
        raise TypeError(f"{key} is {values!r}, not a list of texts")
    return values


def _choice(value: Any, key: str, choices: list[str]) -> str:
    if str(value) not in choices:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(choices)}")
    return str(value)


def arc(row: Row) -> Row:
    """The publisher nests stem and choices in `question`; the Hub has the choices as two lists."""
    question: Any = row["question"]
    choices: Any = row.get("choices")
    if isinstance(question, dict):
        question, choices = _text(question, "stem"), question["choices"]
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise TypeError(f"choices is {type(choices).__name__}, not a mapping with text and label")
    labels = _texts(choices["label"], "choices.label")
    return {
        "question": question,
        "choices": {"text": _texts(choices["text"], "choices.text"), "label": labels},
        "answerKey": _choice(row["answerKey"], "answerKey", labels),
    }


def piqa(row: Row) -> Row:
    label = int(_choice(row["label"], "label", ["0", "1"]))
    return {key: _text(row, key) for key in ("goal", "sol1", "sol2")} | {"label": label}


def lambada(row: Row) -> Row:
    if " " not in _text(row, "text"):
        raise ValueError("text has one word, so there is nothing to predict it from")
    return {"text": row["text"]}


def winogrande(row: Row) -> Row:
    if "_" not in _text(row, "sentence"):
        raise ValueError("sentence has no _ to fill")
    return {key: _text(row, key) for key in ("sentence", "option1", "option2")} | {
        "answer": _choice(row["answer"], "answer", ["1", "2"])
    }


def hellaswag(row: Row) -> Row:
    endings = _texts(row["endings"], "endings")
    label = _choice(row["label"], "label", [str(i) for i in range(len(endings))])
    return {key: _text(row, key) for key in ("activity_label", "ctx_a", "ctx_b")} | {"endings": endings, "label": label}


def sciq(row: Row) -> Row:
    keys = ("question", "correct_answer", "distractor1", "distractor2", "distractor3", "support")
    return {key: _text(row, key) for key in keys}


def triviaqa(row: Row) -> Row:
    """The publisher writes keys with capitals."""
    upper = "Question" in row
    answer = row["Answer" if upper else "answer"]
    aliases = _texts(answer["Aliases" if upper else "aliases"], "answer.aliases")
    return {"question": _text(row, "Question" if upper else "question"), "answer": {"aliases": aliases}}


_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()]*))\)')


def webqs(row: Row) -> Row:
    """The publisher writes answers as (list (description "Jamaican English") (description Patois))."""
    if "targetValue" in row:
        answers = [quoted.replace('\\"', '"') or plain for quoted, plain in _DESCRIPTION.findall(_text(row, "targetValue"))]
        return {"question": _text(row, "utterance"), "answers": _texts(answers, "targetValue")}
    return {"question": _text(row, "question"), "answers": _texts(row["answers"], "answers")}


TASKS: dict[str, TextTask] = {
    "arc_easy": TextTask("arc_easy", "arc", "acc", "test", "train", arc, 25.0),
    "arc_challenge": TextTask("arc_challenge", "arc", "acc", "test", "train", arc, 25.0),
    "piqa": TextTask("piqa", "piqa", "acc", "validation", "train", piqa, 50.0),
    "lambada": TextTask("lambada_openai", "lambada", "acc", "test", "test", lambada),
    "winogrande": TextTask("winogrande", "winogrande", "acc", "validation", "train", winogrande, 50.0),
    "hellaswag": TextTask("hellaswag", "hellaswag", "acc", "validation", "train", hellaswag, 25.0),
    "sciq": TextTask("sciq", "sciq", "acc", "test", "train", sciq, 25.0),
    "triviaqa": TextTask("triviaqa", "triviaqa", "exact_match", "validation", "train", triviaqa),
    "webqs": TextTask("webqs", "webqs", "exact_match", "test", "train", webqs),
}
EIGHT: tuple[tuple[str, ...], ...] = (("arc_easy", "arc_challenge"), *((name,) for name in TASKS if not name.startswith("arc")))
"""The paper's eight. It does not say which of ARC's two sets it means: here ARC is the mean of both."""


def splits_of(task: TextTask, shots: int) -> list[str]:
    """The splits needed; without demonstrations, the queries' alone."""
    return sorted({task.queries} | ({task.demonstrations} if shots else set()))


def find_files(datasets: Path, names: list[str], shots: list[int]) -> dict[str, dict[str, list[Path]]]:
    """task -> split -> its files. Raises UserError naming everything that is missing, a shard too, or a split that lies there in
    two ways."""
    found: dict[str, dict[str, list[Path]]] = {}
    missing = []
    for name in names:
        found[name] = {}
        for split in splits_of(TASKS[name], max(shots)):
            folder = datasets / name
            ways = {ending: [folder / (split + ending)] for ending in ENDINGS if (folder / (split + ending)).is_file()}
            ways |= {f"-*{end}": files for end in ENDINGS if (files := sorted(folder.glob(f"{split}-*{end}")))}
            if len(ways) > 1:
                raise UserError(
                    f"{folder}: split {split} lies there {len(ways)} times ({', '.join(split + way for way in ways)}). Keep one."
                )
            if ways:
                found[name][split] = next(iter(ways.values()))
                check_shards(found[name][split], name, split)
            else:
                missing.append(f"\n  {folder / split}.jsonl (or .json, .parquet, {split}-*.parquet)")
    if missing:
        raise UserError(
            f"datasets={datasets}: these files are missing:{''.join(missing)}\ndocs/textcore.md says where they are from."
        )
    return found


def fingerprint(files: dict[str, list[Path]], splits: list[str]) -> str:
    """16 hex digits over the files' bytes, labels beside them included."""
    digest = hashlib.blake2b(digest_size=8)
    for split in splits:
        digest.update(split.encode())
        for path in files[split]:
            for part in (path, _labels_of(path)):
                if part.is_file():
                    with open(part, "rb") as file:
                        while piece := file.read(1 << 20):
                            digest.update(piece)
    return digest.hexdigest()


def read_split(task: TextTask, files: list[Path]) -> list[Row]:
    """Every row, in order, with the columns that the prompts read. Raises UserError naming file, row and key of the first that is
    not as it should be."""
    rows = []
    for path in files:
        labels, number = _labels(path) if task.convert is piqa else None, -1
        for number, (place, row) in enumerate(_rows(path)):
            if isinstance(row, UserError):
                raise row
            if labels is not None and "label" not in row:
                if number >= len(labels):
                    raise UserError(
                        f"{_labels_of(path)}: {len(labels)} labels, fewer than rows in {path.name}. Bring both files."
                    )
                row["label"] = labels[number]
            try:
                rows.append(task.convert(row))
            except KeyError as error:
                raise UserError(f"{path}:{place}: no {error} ({task.lm_eval}); it has {', '.join(map(str, row))}.") from error
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}:{place}: {error} ({task.lm_eval}). Correct the row, or take it out.") from error
        if labels is not None and len(labels) > number + 1:
            raise UserError(
                f"{_labels_of(path)}: {len(labels)} labels, more than the {number + 1} rows of {path.name}. Bring the two files "
                "of one split."
            )
    if not rows:
        raise UserError(f"{files[0]}: holds no rows.")
    return rows


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row): of a JSON array, of an object that holds one under Data (TriviaQA), or one a line."""
    if path.suffix == ".json":
        text = _read(path, "utf-8-sig").lstrip()
        try:
            whole = json.loads(text)
        except RecursionError as error:
            raise UserError(f"{path}: no JSON ({error}). Bring the file again.") from error
        except json.JSONDecodeError as error:
            if not text.startswith("{") or error.msg != "Extra data":
                raise UserError(f"{path}: no JSON ({error}).") from error
            whole = None  # one object a line after all
        if isinstance(whole, dict) and isinstance(whole.get("Data"), list):
            whole = whole["Data"]
        if isinstance(whole, list):
            for number, row in zip(count(), whole):
                bad = UserError(f"{path}:item {number}: must be a JSON object, and is {type(row).__name__}.")
                yield f"item {number}", row if isinstance(row, dict) else bad
            return
    for place, row, _ in read_rows(path):
        yield place, row


def _labels_of(path: Path) -> Path:
    """PIQA's publisher keeps the answers apart: train.jsonl, train-labels.lst."""
    return path.with_name(f"{path.name.partition('.')[0]}-labels.lst")


def _labels(path: Path) -> list[str] | None:
    labels = _labels_of(path)
    return _read(labels, "utf-8").split() if labels.is_file() else None


def _read(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 ({error}). Write the file again in that encoding.") from error
