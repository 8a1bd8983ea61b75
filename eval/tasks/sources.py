"""Where an evaluation's tasks come from: the corpus the run was trained on, official files, or both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_pipelines.shards import Manifest
from eval.tasks.corpus import read_tasks
from eval.tasks.official.records import OfficialPool
from eval.tasks.official.tasks import official_names, read_official
from eval.tasks.pool import TaskData


def split_names(names: Sequence[str] | None, datasets: str | None) -> tuple[list[str], list[str] | None]:
    """(tasks from official files, tasks of the corpus; None: all of the corpus's).

    Raises UserError for `datasets` without names: an evaluation is never cut down to what happens to lie on a disk.
    """
    if datasets is None:
        return [], None if names is None else list(names)
    known = official_names()
    if not names:
        raise UserError(f"datasets={datasets}: say which tasks, tasks=[...]. From official files: {', '.join(known)}.")
    return [name for name in names if name in known], [name for name in names if name not in known]


def read_sources(
    names: Sequence[str] | None,
    *,
    corpus: Path,
    datasets: str | None,
    overrides: Mapping[str, Any] | None = None,
    shots: int = 0,
) -> tuple[list[TaskData], str, str]:
    """(the tasks in the order named, the name of what they come from, its fingerprint).

    Without official tasks name and fingerprint are the corpus's own. Official tasks add the contents of their annotation files.
    Raises UserError for names that neither knows, and all that the readers refuse.
    """
    official, own = split_names(names, datasets)
    if overrides and not official:
        raise UserError("files=...: only tasks from official files have them. Give datasets=FOLDER and tasks=[...].")
    if official and not own:
        manifest, tasks = None, []
    else:
        manifest = Manifest.load(corpus)
        _refuse_unknown(own or [], manifest, datasets)
        tasks = read_tasks(corpus, own)
    if datasets is None:
        assert manifest is not None
        return tasks, manifest.corpus, manifest.fingerprint
    if repeated := sorted({name for name in official if official.count(name) > 1}):
        raise UserError(f"tasks: {', '.join(repeated)} given twice. Name each task once.")
    folder = Path(datasets).expanduser().resolve()
    tasks += read_official(folder, official, overrides=overrides, shots=shots)
    found = {task.name: task for task in tasks}
    content = [manifest.fingerprint if manifest else None, {name: _fingerprints(found[name]) for name in official}]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return [found[name] for name in names or []], f"{manifest.corpus}+{folder.name}" if manifest else folder.name, digest


def _fingerprints(task: TaskData) -> list[str]:
    return [pool.fingerprint for pool in (task.queries, task.support) if isinstance(pool, OfficialPool)]


def _refuse_unknown(names: Sequence[str], manifest: Manifest, datasets: str | None) -> None:
    """Name both lists; read_tasks names the corpus's alone."""
    unknown = [name for name in names if name not in manifest.tasks]
    known = official_names()
    if not unknown or (datasets is None and not set(unknown) & set(known)):
        return
    there = ", ".join(manifest.tasks) or "none"
    add = "" if datasets is not None else " Those are read with datasets=FOLDER."
    raise UserError(
        f"tasks: {', '.join(unknown)}: not among the tasks of corpus {manifest.corpus!r} ({there}){', nor' if datasets else ';'} "
        f"from official files ({', '.join(known)}).{add}"
    )
