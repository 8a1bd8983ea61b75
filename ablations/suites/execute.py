"""One cell in one process: `python -m ablations.suites.execute JOB.json` trains it and then evaluates it, command by command.

A job is a list of commands with the log they write to and the record they report to. What is done is skipped, so a job can be
given again after any interruption. SIGTERM and Ctrl-C go on to the command that runs (training saves and stops); if this process
is killed, the kernel ends the command as well.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ablations.reading import read_object
from ablations.suites.record import FAILED, FINISHED, INTERRUPTED, RECORD_VERSION, RUNNING, has_textcore, update_record
from mm1.run import Run

STOPPED = 130
"""Exit status of a command that a signal stopped with everything saved."""
CLAIM = "MM1_CLAIM"
"""Environment: the descriptor that holds the claim on the run; handed on to the commands."""
LAST_WORDS = 12


def execute(job_path: Path) -> int:
    """Run what is not done of a job; returns the exit status of the command that failed, STOPPED, or 0."""
    job = read_object(job_path, RECORD_VERSION, "Start the suite again.")
    record, run = Path(job["record"]), Run(Path(job["run"]))
    child = _Child(job)
    try:
        return _commands(job, record, run, child)
    except Exception as error:  # the runner sees a process without words otherwise
        failures = int(read_object(record, RECORD_VERSION, "Delete that file.").get("failures", 0)) + 1 if record.is_file() else 1
        update_record(record, state=FAILED, failures=failures, error=f"{type(error).__name__}: {error}")
        return 1


def _commands(job: dict[str, Any], record: Path, run: Run, child: _Child) -> int:
    for command in job["commands"]:
        held = read_object(record, RECORD_VERSION, "Delete that file.") if record.is_file() else {}
        if _done(command, run, held):
            continue
        update_record(record, state=RUNNING, doing=command["kind"])
        began = time.monotonic()
        status = child.run(command["argv"])
        seconds = round(time.monotonic() - began, 1)
        if child.stopped or status == STOPPED:
            update_record(record, state=INTERRUPTED)
            return STOPPED
        if status:
            failures = int(held.get("failures", 0)) + 1
            update_record(record, state=FAILED, failures=failures, error=_error(command, status, Path(job["log"])))
            return status
        if command["kind"] != "train":
            folder = _results(command) if command["kind"] == "fewshot" else None
            held = read_object(record, RECORD_VERSION, "Delete that file.")
            update_record(record, evaluations=held.get("evaluations", {}) | {command["key"]: folder})
        update_record(record, seconds=held.get("seconds", {}) | {command.get("key", "train"): seconds})
    update_record(record, state=FINISHED, failures=0, error=None)
    return 0


def _done(command: dict[str, Any], run: Run, record: dict[str, Any]) -> bool:
    if command["kind"] == "train":
        return run.finished
    key = command["key"]
    if key not in record.get("evaluations", {}):
        return False
    folder = record["evaluations"][key]
    return has_textcore(run) if folder is None else (run.results / folder / "summary.json").is_file()


def _results(command: dict[str, Any]) -> str:
    """The name of the results folder that an evaluation has written."""
    from configs.command import compose
    from eval.fewshot import EvalConfig, prepare

    return prepare(compose("eval", EvalConfig, command["overrides"]))[1].hash


def _error(command: dict[str, Any], status: int, log: Path) -> str:
    how = f"ended by signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.strip() and not line.startswith("$ ")][-LAST_WORDS:]
    return f"{command['kind']}: {how}\n" + "\n".join(said)


class _Child:
    """Runs commands one after the other and passes signals on."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.log, self.environment = job["log"], {**os.environ, **job.get("environment", {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def run(self, argv: Sequence[str]) -> int:
        if self.stopped:
            return STOPPED
        claim = self.environment.get(CLAIM)
        with open(self.log, "ab") as log:
            log.write(f"$ {shlex.join(argv)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                pass_fds=(int(claim),) if claim else (),
                preexec_fn=end_with_parent,
            )
        if self.stopped:  # a signal that came before there was a process to pass it on to
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def end_with_parent() -> None:
    """In a new process: ask the kernel for a SIGTERM when its parent dies, however it dies (Linux; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    except (OSError, AttributeError):
        return


def main() -> None:
    sys.exit(execute(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
