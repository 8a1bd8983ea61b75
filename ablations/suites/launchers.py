"""Where cells run: processes on this machine, jobs of a scheduler through submitit, or all hosts of a DeepSpeed hostfile in turn.

A launcher starts a cell's job (execute.py) and gives a handle: `poll()` its exit status or None, `stop()` gently, `kill()`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ablations.suites.execute import CLAIM, end_with_parent
from configs.command import register
from configs.errors import UserError

KINDS = ("local", "submitit", "hostfile")


@dataclass
class LauncherConfig:
    kind: str = "local"
    cluster: str | None = None
    """submitit: slurm, local (its own processes) or debug (in this process); null: slurm where there is an srun."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """submitit: of its executor, as it names them (timeout_min, nodes, gpus_per_node, slurm_partition, slurm_account, ...)."""
    hostfile: str | None = None
    """hostfile: DeepSpeed's, a line `host slots=8` each."""
    options: list[str] = field(default_factory=list)
    """hostfile: further options of the deepspeed launcher, such as --master_port=29501."""

    def validate(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"launcher.kind={self.kind}: must be one of {', '.join(KINDS)}.")
        if self.kind == "hostfile":
            if self.hostfile is None:
                raise UserError("launcher=hostfile needs launcher.hostfile=FILE, a line `host slots=8` each.")
            if not Path(self.hostfile).expanduser().is_file():
                raise UserError(f"launcher.hostfile={self.hostfile}: there is no such file.")


register("launcher_schema", LauncherConfig, group="launcher")


class Handle(Protocol):
    def poll(self) -> int | None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    parallel: int | None
    """The most cells it may be given at once; None: as many as the runner likes."""
    train: list[str]
    """How it starts `-m mm1.train`; empty: as a process of its own."""

    def start(self, job: Path, name: str, claim: int, slot: int) -> Handle:
        """`claim`: a descriptor the job's processes keep open; `slot`: 0, 1, ... among those running now."""


class Process:
    """A job in a process group of its own, so that Ctrl-C in the terminal reaches it through the runner alone."""

    def __init__(self, command: list[str], environment: dict[str, str], claim: int) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment | {CLAIM: str(claim)},
            pass_fds=(claim,),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


class LocalLauncher:
    def __init__(self, gpus: int = 0) -> None:
        self.parallel: int | None = None
        self.train: list[str] = []
        self.gpus = gpus

    def start(self, job: Path, name: str, claim: int, slot: int) -> Handle:
        environment = dict(os.environ)
        if self.gpus:
            chosen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = chosen[slot % len(chosen)] if chosen != [""] else str(slot % self.gpus)
        return Process([sys.executable, "-m", "ablations.suites.execute", str(job)], environment, claim)


class HostfileLauncher(LocalLauncher):
    """Every cell trains on all hosts; DeepSpeed starts the processes by ssh. Evaluation runs on this host."""

    def __init__(self, config: LauncherConfig) -> None:
        super().__init__()
        self.parallel = 1
        assert config.hostfile is not None
        deepspeed = Path(sys.executable).with_name("deepspeed")
        if not deepspeed.is_file():
            raise UserError(f"launcher=hostfile: there is no {deepspeed}. Install the project's requirements there.")
        hosts = str(Path(config.hostfile).expanduser().resolve())
        self.train = [str(deepspeed), "--hostfile", hosts, "--no_local_rank", *config.options, "--module", "mm1.train"]


class Submission:
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        if error is not None:
            return 1
        return int(self.job.result())

    def stop(self) -> None:
        self.job.cancel(check=False)

    kill = stop


class SubmititLauncher:
    """Jobs that outlive the runner: started again, it finds those that still wait or run by the ids it wrote down."""

    def __init__(self, config: LauncherConfig, folder: Path) -> None:
        self.parallel: int | None = None
        self.train: list[str] = []
        self.executor = submitit_executor(config, folder)
        self.folder = folder

    def start(self, job: Path, name: str, claim: int, slot: int) -> Handle:
        from ablations.suites.execute import execute

        noted = job.with_suffix(".submitted")
        if noted.is_file():
            known = self.executor._executor.job_class(folder=self.folder, job_id=noted.read_text().strip())
            if not known.done():
                return Submission(known)
        self.executor.update_parameters(name=name)
        submitted = self.executor.submit(execute, job)
        noted.write_text(str(submitted.job_id))
        return Submission(submitted)


def submitit_executor(config: LauncherConfig, folder: Path) -> Any:
    """submitit's executor with the parameters given. Raises UserError where submitit is missing or refuses a parameter."""
    try:
        import submitit
    except ImportError:
        raise UserError("launcher=submitit needs the package submitit: pip install 'mm1-ablations[cluster]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster)
        if config.parameters:
            executor.update_parameters(**config.parameters)
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"launcher.parameters={config.parameters}, launcher.cluster={config.cluster}: {error}") from error
    return executor


def make_launcher(config: LauncherConfig, folder: Path, gpus: int) -> Launcher:
    if config.kind == "submitit":
        return SubmititLauncher(config, folder / "submitit")
    return HostfileLauncher(config) if config.kind == "hostfile" else LocalLauncher(gpus)
