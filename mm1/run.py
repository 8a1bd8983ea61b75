"""A run's folder: everything one training leaves behind, found again by name.

    <home>/runs/<name>-<hash>/
        config.yaml        the resolved configuration
        run.json           status, parameters, tokens and images seen, corpus fingerprint: what tables print beside a score
        metrics.jsonl      one object a logged step; the source of every curve
        tensorboard/       the same for TensorBoard
        checkpoints/       step-000100/ ...: to go on from
        export/            save_pretrained folder with the tokeniser: to evaluate, share, or load with from_pretrained
        results/           few-shot results (eval/)

The hash covers what changes the weights and nothing else, so starting the same training again finds it: finished, it is not
repeated; interrupted, it goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines import paths

if TYPE_CHECKING:
    from mm1.config import TrainConfig

RUN_VERSION = 1


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a kill at any moment, sees the old content or the new, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@dataclass
class Run:
    folder: Path

    @property
    def name(self) -> str:
        return str(self.info.get("name", self.folder.name))

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def info(self) -> dict[str, Any]:
        """run.json; empty for a run that has not started."""
        path = self.folder / "run.json"
        if not path.is_file():
            return {}
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise UserError(f"{path} is damaged ({error}). Delete the run's folder to train it again.") from error
        if info.get("version") != RUN_VERSION:
            raise UserError(f"{path}: version is {info.get('version')!r}, this suite reads {RUN_VERSION}. Train the run again.")
        return info

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain values."""
        from omegaconf import OmegaConf

        path = self.folder / "config.yaml"
        if not path.is_file():
            raise UserError(f"{self.folder} is not a run's folder: it has no config.yaml.")
        loaded = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(loaded, dict)
        return loaded  # type: ignore[return-value]

    @property
    def corpus(self) -> Path:
        return paths.corpus(self.config["data"]["corpus"])

    @property
    def finished(self) -> bool:
        return self.info.get("status") == "finished" and (self.export / "config.json").is_file()

    def update(self, **values: Any) -> None:
        """Merge values into run.json."""
        info = {"version": RUN_VERSION} | self.info | values
        write_atomically(self.folder / "run.json", json.dumps(info, indent=1) + "\n")

    def create(self, config: TrainConfig, corpus_fingerprint: str) -> None:
        """Make the folder, or check that the one there is of this very configuration.

        Raises UserError listing each key that differs, with both values.
        """
        from omegaconf import OmegaConf

        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "config.yaml").is_file():
            there = self.info
            differences = config_differences(there.get("identity", {}), config.identity())
            if there.get("corpus", {}).get("fingerprint", corpus_fingerprint) != corpus_fingerprint:
                differences.append("the corpus itself (it was prepared anew with other content)")
            if differences:
                raise UserError(
                    f"{self.folder} holds a run of another configuration. What differs: {'; '.join(differences)}. "
                    "Give this run another name=..., or delete that folder."
                )
            self.update(status="running")  # it was stopped, and goes on
            return
        self.update(
            name=config.run_name,
            ablation=config.ablation,
            scale=config.scale,
            seed=config.seed,
            hash=config.hash(corpus_fingerprint),
            identity=config.identity(),
            status="running",
            corpus={"name": config.data.corpus, "fingerprint": corpus_fingerprint},
        )
        # Last: a folder with a config.yaml has its run.json, also after a kill between the two.
        write_atomically(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the process that trains: a second one on the same folder is refused instead of writing over it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder}: another process is training this run. Wait for it or stop it.") from None
            yield


def run_for(config: TrainConfig, corpus_fingerprint: str) -> Run:
    """Where this configuration's run lives, whether or not it exists yet."""
    return Run(paths.runs() / f"{config.run_name}-{config.hash(corpus_fingerprint)}")


def find_run(name_or_path: str) -> Run:
    """A run by folder path, by folder name, or by name alone where only one finished run has it.

    Raises UserError that lists the runs there are.
    """
    direct = Path(name_or_path).expanduser()
    if os.sep in name_or_path or (direct / "run.json").is_file():
        if not (direct / "run.json").is_file():
            raise UserError(f"run={name_or_path}: no run.json there, so it is no run's folder.")
        return Run(direct.resolve())
    folders = sorted(path.parent for path in paths.runs().glob("*/run.json"))
    exact = [folder for folder in folders if folder.name == name_or_path]
    named = exact or [folder for folder in folders if folder.name.rpartition("-")[0] == name_or_path]
    finished = [folder for folder in named if Run(folder).finished] or named
    if len(finished) == 1:
        return Run(finished[0])
    listed = [f"\n  {folder.name}  ({Run(folder).info.get('status', '?')})" for folder in finished or folders]
    listing = "".join(listed) or " none yet"
    problem = f"no run named {name_or_path!r}"
    if finished:
        problem = f"run={name_or_path} fits {len(finished)} runs; give the whole name"
    raise UserError(f"{problem}. In {paths.runs()}:{listing}")


def config_differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in [*old, *(n for n in new if n not in old)]
            for difference in config_differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if old == new else [f"{key}: {old} -> {new}"]
