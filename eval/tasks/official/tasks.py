"""The official tasks: configs/task/NAME.yaml with a `files:` section -> TaskData.

    files:
      kind: vqa                       captioning or vqa
      format: auto                    json, parquet, or auto: JSON where an annotation file is there, else parquet, for each side
      query:                          the split that is scored
        json: {_target_: eval.tasks.official.vqa.gqa, annotations: gqa/testdev_balanced_questions.json, images: gqa/images, ...}
        parquet: {folder: gqa/testdev_balanced_instructions, splits: [testdev], ...}
      support: {json: ..., parquet: ...}    the split demonstrations come from; or `query`: the scored one

Paths are relative to the folder of all datasets, or absolute. The command line changes any of them:
+files.gqa.query.json.images=PATH.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import CONFIG_DIR
from configs.errors import UserError
from eval.tasks.official import parquet
from eval.tasks.official.annotations import without_garbage_collection
from eval.tasks.official.records import OfficialPool, Records, Side
from eval.tasks.pool import TaskData
from eval.tasks.texts import are_texts

KINDS = ("captioning", "vqa")
FORMATS = ("auto", "json", "parquet")
_ANNOTATION_KEYS = ("annotations", "questions")
"""The settings of a JSON reader that are annotation files; `auto` asks whether one of them is there."""


def official_names() -> list[str]:
    """The tasks of configs/task that have a `files:` section, in the order of their names."""
    return [path.stem for path in sorted((CONFIG_DIR / "task").glob("*.yaml")) if "files" in _load(path)]


def read_official(
    datasets: Path, names: Iterable[str], *, overrides: Mapping[str, Any] | None = None, shots: int = 0
) -> list[TaskData]:
    """The tasks, read from the folder of all datasets. `overrides`: task -> what replaces parts of its `files:`. At 0 shots no
    support split is read: nothing is drawn from it.

    Raises UserError for a missing folder, file or key, files in another shape than the official ones, and overrides of tasks or
    keys that are not there.
    """
    names, overrides = list(names), overrides or {}
    if not datasets.is_dir():
        raise UserError(f"datasets={datasets}: no such folder. It holds one folder a dataset; docs/datasets.md says which files.")
    if unknown := sorted(set(overrides) - set(names)):
        raise UserError(f"files.{unknown[0]}: no such task is evaluated here. Evaluated from files: {', '.join(names)}.")
    return [_read_task(datasets, name, overrides.get(name, {}), shots) for name in names]


def _read_task(datasets: Path, name: str, override: Any, shots: int) -> TaskData:
    path = CONFIG_DIR / "task" / f"{name}.yaml"
    files = merged(_load(path)["files"], override, f"files.{name}")
    if files.get("kind") not in KINDS:
        raise UserError(f"{path}: files.kind is {files.get('kind')!r}. Choose from: {', '.join(KINDS)}.")
    if files.get("format") not in FORMATS:
        raise UserError(f"files.{name}.format={files.get('format')}: choose from {', '.join(FORMATS)}.")
    queries = OfficialPool(side := Side(name, "query", datasets), _read_side(side, files))
    if shots == 0 or files["support"] == "query":
        return TaskData(name, files["kind"], None, queries, queries)
    support = OfficialPool(side := Side(name, "support", datasets), _read_side(side, files))
    return TaskData(name, files["kind"], None, queries, support)


def _read_side(side: Side, files: dict[str, Any]) -> Records:
    section, chosen = files[side.name], files["format"]
    if not isinstance(section, dict):
        raise UserError(f"files.{side.task}.{side.name}={section}: give json: and parquet: settings (or, for support, query).")
    reader = dict(section.get("json") or {})
    hub = dict(section.get("parquet") or {})
    if chosen == "auto":
        annotations = [side.root / reader[key] for key in _ANNOTATION_KEYS if key in reader]
        chosen = "json" if any(path.is_file() for path in annotations) else "parquet"
        if chosen == "parquet" and not (hub and parquet.find(side.root, hub["folder"], hub["splits"])):
            raise UserError(_neither(side, annotations, hub))
    if not (reader if chosen == "json" else hub):
        raise UserError(f"files.{side.task}.format={chosen}: configs/task/{side.task}.yaml has no {side.name}.{chosen} settings.")
    if chosen == "parquet":
        return _call(parquet.rows, side, hub, "parquet")
    module, _, function = str(reader.pop("_target_")).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"files.{side.task}.{side.name}.json._target_: no reader {module}.{function} ({error}).") from error
    return _call(found, side, reader, "json")


def _neither(side: Side, annotations: Sequence[Path], hub: Mapping[str, Any]) -> str:
    wanted = " and ".join(str(path) for path in annotations)
    other = f", and no hub copy {parquet.looked_for(side.root, hub['folder'], hub['splits'])}" if hub else ""
    own = ""
    if side.name == "support":
        own = (
            f" Without a training split: +files.{side.task}.support=query draws demonstrations from the evaluated one; shots=[0]"
        )
        own += " needs none."
    return (
        f"Task {side.task}: no annotation file {wanted}{other}. Put one of them there (docs/datasets.md), or say where it is: "
        f"{side.key('annotations')}=PATH (under {side.root}, or absolute).{own}"
    )


def _call(reader: Any, side: Side, settings: dict[str, Any], kind: str) -> Records:
    try:
        inspect.signature(reader).bind(side, **settings)
    except TypeError as error:
        raise UserError(f"files.{side.task}.{side.name}.{kind}: {error}.") from error
    with without_garbage_collection():
        records: Records = reader(side, **settings)
    return records


def merged(base: Mapping[str, Any], override: Any, where: str) -> dict[str, Any]:
    """`base` with parts replaced. Raises UserError for a key that `base` does not have (an override never adds one), or a value
    of another type."""
    if not isinstance(override, Mapping):
        raise UserError(f"{where}={override}: replaces a whole section. Name one of its keys: {', '.join(base)}.")
    result = dict(base)
    for key, value in override.items():
        if key not in base:
            raise UserError(f"{where}.{key}: no such key. Known there: {', '.join(base)}.")
        old = base[key]
        if isinstance(old, dict) and not (key == "support" and value == "query"):
            result[key] = merged(old, value, f"{where}.{key}")
            continue
        result[key] = [value] if isinstance(old, list) and isinstance(value, str) else value
        if isinstance(old, str) and not isinstance(value, str):
            raise UserError(f"{where}.{key}={value}: give a text, such as {old}.")
        if isinstance(old, list) and not are_texts(result[key]):
            raise UserError(f"{where}.{key}={value}: give one or more names, such as [{','.join(map(str, old))}].")
    return result


def _load(path: Path) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
