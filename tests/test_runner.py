"""The runner with cells that only sleep, fail or are killed, and one real suite of two tiny cells from plan to results."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ablations.suites import execute
from ablations.suites import record as records
from ablations.suites.launchers import LauncherConfig, LocalLauncher, SubmititLauncher, make_launcher, submitit_executor
from ablations.suites.record import RECORD_VERSION, SuiteCell, SuiteFolder, claim, state_of, suites_folder, update_record
from ablations.suites.runner import Runner
from configs.errors import UserError
from data_pipelines import paths
from mm1.run import Run, write_atomically
from tests.models import TRAIN_OVERRIDES

ROOT = Path(__file__).resolve().parent.parent
TRAIN = """
import json, os, pathlib, sys, time
run, behaviour, beats = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
run.mkdir(parents=True, exist_ok=True)
beats.mkdir(parents=True, exist_ok=True)
beat = beats / f"{run.name}.{len(list(beats.glob(run.name + '.*')))}"
beat.write_text(json.dumps([time.time(), os.getpid()]))
steps = json.loads((run / "run.json").read_text())["steps"] if (run / "run.json").exists() else 0
def write(**more):
    (run / "run.json").write_text(json.dumps({"version": 1, "hash": run.name.rpartition("-")[2], "steps": steps, **more}))
if behaviour == "fails" or (behaviour == "fails once" and beat.name.endswith(".0")):
    print("the disk is made of cheese")
    sys.exit(3)
if behaviour == "dies once" and beat.name.endswith(".0"):
    steps = 7; write(status="running")
    os.kill(os.getpid(), 9)
if behaviour == "kills its cell once" and beat.name.endswith(".0"):
    os.kill(os.getppid(), 9)
    time.sleep(60)
if behaviour == "hangs once" and beat.name.endswith(".0"):
    steps = 5; write(status="running")
    time.sleep(60)
while behaviour == "waits" and not (beats / "release").exists():
    time.sleep(0.02)
time.sleep(float(behaviour) if behaviour[0].isdigit() else 0)
steps += 1
write(status="finished", resumed_from=steps - 1)
(run / "export").mkdir(exist_ok=True)
(run / "export" / "config.json").write_text("{}")
beat.write_text(json.dumps([*json.loads(beat.read_text()), time.time()]))
"""


class Fake:
    """A suite whose cells are little programs in place of training; each start leaves a file with its beginning and end."""

    def __init__(self, home: Path, behaviours: list[str], suite: str = "fake") -> None:
        self.beats = home / "beats"
        self.script = home / "train.py"
        self.script.parent.mkdir(parents=True, exist_ok=True)
        self.script.write_text(TRAIN)
        self.place = SuiteFolder(suites_folder() / f"{suite}-tiny")
        self.behaviours = {f"{i:08x}": behaviour for i, behaviour in enumerate(behaviours)}
        self.cells = [
            SuiteCell(
                suite, f"v{key[-1]}", {"axis": f"v{key[-1]}"}, 0, key == "00000000", key, paths.runs() / f"run-{key}", (), 1
            )
            for key in self.behaviours
        ]
        self.place.save({"name": suite}, "tiny", [], self.cells)

    def job(self, cell: SuiteCell) -> Path:
        argv = [sys.executable, str(self.script), str(cell.folder), self.behaviours[cell.hash], str(self.beats)]
        job = {
            "version": RECORD_VERSION,
            "run": str(cell.folder),
            "record": str(self.place.record_path(cell)),
            "log": str(self.place.log_path(cell)),
            "commands": [{"kind": "train", "argv": argv}],
        }
        write_atomically(self.place.job_path(cell), json.dumps(job))
        return self.place.job_path(cell)

    def runner(self, parallel: int = 2, retries: int = 1, **more: Any) -> Runner:
        self.out = io.StringIO()
        options: dict[str, Any] = {"evaluations": [], "parallel": parallel, "retries": retries, "poll": 0.02, "out": self.out}
        return Runner(self.place, self.cells, more.pop("launcher", LocalLauncher()), self.job, **options, **more)

    def started(self, number: int) -> list[Path]:
        return sorted(self.beats.glob(f"run-{number:08x}.*"))


def states(final: dict[str, records.State]) -> list[str]:
    return [state.name for state in final.values()]


def test_a_failing_cell_is_tried_again_reported_and_blocks_no_other(home: Path) -> None:
    fake = Fake(home, ["fails", "0", "fails once", "0", "dies once"])
    final = fake.runner(parallel=2, retries=1).run()
    assert states(final) == ["failed", "finished", "finished", "finished", "finished"]
    assert [len(fake.started(i)) for i in range(5)] == [2, 1, 2, 1, 2]
    assert "the disk is made of cheese" in final["00000000"].note
    assert "exit status 3" in final["00000000"].note
    assert "made of cheese" in fake.place.log_path(fake.cells[0]).read_text()
    assert "failed: v0.seed0: the disk is made of cheese" in fake.out.getvalue()
    assert fake.cells[4].run.info["resumed_from"] == 7  # went on from what the killed process had saved


def test_a_cell_whose_process_is_killed_is_tried_again_when_all_of_it_is_gone(home: Path) -> None:
    fake = Fake(home, ["kills its cell once"])
    assert states(fake.runner(retries=1).run()) == ["finished"]
    assert len(fake.started(0)) == 2
    assert "ended with status -9 and no word" in fake.out.getvalue()
    assert not alive(json.loads(fake.started(0)[0].read_text())[1])


def test_a_second_start_skips_what_is_finished_and_tries_what_failed(home: Path) -> None:
    fake = Fake(home, ["fails", "0"])
    fake.runner(retries=0).run()
    fake.behaviours["00000000"] = "0"
    assert states(fake.runner(retries=0).run()) == ["finished", "finished"]
    assert [len(fake.started(i)) for i in range(2)] == [2, 1]


def test_all_variants_are_trained_once_before_any_is_trained_again(home: Path) -> None:
    fake = Fake(home, ["0"] * 6)
    fake.cells = [replace(cell, seed=number % 3) for number, cell in enumerate(fake.cells)]
    fake.runner(parallel=1).run()
    began = {number: json.loads(fake.started(number)[0].read_text())[0] for number in range(6)}
    assert sorted(began, key=lambda number: began[number]) == [0, 3, 1, 4, 2, 5]


def test_as_many_at_once_as_asked_and_no_more(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(home, ["waits"] * 5)
    runner, seen = fake.runner(parallel=2), [0]

    def watch() -> None:
        under_way = [path for path in fake.beats.glob("run-*") if len(json.loads(path.read_text() or "[0]")) == 2]
        seen.append(len(under_way))
        if seen[-1] == 2:
            (fake.beats / "release").touch()

    each_turn(monkeypatch, watch)
    assert states(runner.run()) == ["finished"] * 5
    assert max(seen) == 2


def test_a_killed_runner_leaves_nothing_running_and_the_next_goes_on(home: Path) -> None:
    fake = Fake(home, ["hangs once", "0"])
    program = (
        "import sys; from pathlib import Path; from tests.test_runner import Fake\n"
        "fake = Fake(Path(sys.argv[1]), ['hangs once', '0']); fake.runner(parallel=1).run()"
    )
    runner = subprocess.Popen([sys.executable, "-c", program, str(home)], cwd=ROOT)
    wait_for(lambda: bool(fake.started(0)) and Run(fake.cells[0].folder).info.get("steps") == 5)
    with pytest.raises(UserError, match="another runner works on this suite"):
        fake.runner().run()
    assert state_of(fake.place, fake.cells[0], [], 0).name == "running"
    runner.kill()
    runner.wait()
    pid = json.loads(fake.started(0)[0].read_text())[1]
    wait_for(lambda: not alive(pid))
    wait_for(lambda: state_of(fake.place, fake.cells[0], [], 0).name == "interrupted")
    assert states(fake.runner(parallel=1).run()) == ["finished", "finished"]
    assert fake.cells[0].run.info["resumed_from"] == 5


def test_ctrl_c_stops_the_cells_and_does_not_count_as_a_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(home, ["hangs once", "hangs once"])
    runner = fake.runner(parallel=1)

    def interrupt() -> None:
        if fake.cells[0].run.info.get("steps") == 5 and not runner.stopping:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    each_turn(monkeypatch, interrupt)
    final = runner.run()
    assert len(fake.started(0)) == 1
    assert not fake.started(1)
    assert not alive(json.loads(fake.started(0)[0].read_text())[1])
    assert fake.place.record(fake.cells[0]).get("failures", 0) == 0
    assert states(final) == ["interrupted", "waiting"]
    assert signal.getsignal(signal.SIGINT) is before


def test_two_suites_that_share_a_run_train_it_once(home: Path) -> None:
    one, other = Fake(home, ["0"]), Fake(home, ["0", "0"], suite="other")
    one.runner().run()
    assert states(other.runner().run()) == ["finished", "finished"]
    assert len(one.started(0)) == 1


def test_a_run_that_another_process_trains_is_waited_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(home, ["0", "0"])
    held = claim("00000000")
    assert held is not None
    assert claim("00000000") is None
    begun: list[bool] = []

    def release() -> None:
        if fake.cells[1].trained and not begun:
            begun.append(bool(fake.started(0)))
            os.close(held)

    each_turn(monkeypatch, release)
    assert states(fake.runner().run()) == ["finished", "finished"]
    assert begun == [False]


def test_a_folder_of_another_suite_and_half_written_files_are_named_and_left_alone(home: Path) -> None:
    fake = Fake(home, ["0", "0"])
    plan = fake.place.plan_path.read_bytes()
    with pytest.raises(UserError, match=r"holds suite fake, scale tiny, not other, tiny.*folder="):
        fake.place.save({"name": "other"}, "tiny", [], fake.cells)
    assert fake.place.plan_path.read_bytes() == plan
    mine = home / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else than a suite"):
        SuiteFolder(mine).save({"name": "fake"}, "tiny", [], fake.cells)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]

    update_record(fake.place.record_path(fake.cells[1]), suite="fake", hash="00000001")
    whole = fake.place.record_path(fake.cells[1]).read_text()
    fake.place.record_path(fake.cells[1]).write_text(whole[:-5])
    final = fake.runner().run()
    assert states(final) == ["finished", "damaged"]
    assert "half-written" in final["00000001"].note
    assert fake.place.record_path(fake.cells[1]).read_text() == whole[:-5]
    fake.place.plan_path.write_bytes(plan[:-9])
    with pytest.raises(UserError, match=r"plan\.json is half-written"):
        fake.place.cells()


def test_a_half_written_result_is_damage_and_not_evaluated_over(home: Path) -> None:
    fake = Fake(home, ["0"])
    fake.runner().run()
    cell = fake.cells[0]
    update_record(fake.place.record_path(cell), evaluations={"key": "abc"})
    assert state_of(fake.place, cell, ["key"], 0).name == "trained"  # its results were deleted: evaluate again
    results = cell.folder / "results" / "abc"
    results.mkdir(parents=True)
    (results / "summary.json").write_text('{"version": 1, "means"')
    state = state_of(fake.place, cell, ["key"], 0)
    assert state.name == "damaged"
    assert "summary.json is half-written" in state.note
    (results / "summary.json").write_text('{"version": 1}')
    assert state_of(fake.place, cell, ["key"], 0).name == "finished"
    assert state_of(fake.place, cell, ["key", "another"], 0).name == "trained"
    update_record(fake.place.record_path(cell), evaluations={"key": None})  # TextCore's results have no folder of their own
    assert state_of(fake.place, cell, ["key"], 0).name == "trained"
    (cell.folder / "results" / "textcore").mkdir()
    (cell.folder / "results" / "textcore" / "abc.json").write_text("{}")
    assert state_of(fake.place, cell, ["key"], 0).name == "finished"


def test_more_seeds_later_join_the_plan(home: Path) -> None:
    fake = Fake(home, ["0"])
    first = fake.cells[0]
    second = SuiteCell(**vars(first) | {"seed": 1, "hash": "00000009", "overrides": ("seed=1",)})
    fake.place.save({"name": "fake"}, "tiny", [], [second])
    assert [cell.seed for cell in fake.place.cells()] == [1, 0]
    other = SuiteCell(**vars(first) | {"hash": "00000008", "overrides": ("train.global_batch=8",)})
    fake.place.save({"name": "fake"}, "tiny", [], [other])
    assert [cell.hash for cell in fake.place.cells()] == ["00000008"]  # another configuration of the row is not mixed in


def test_a_seed_stands_once_in_a_row_whatever_its_hash_was_before(home: Path) -> None:
    """A corpus prepared anew, or another matching, changes a cell's hash and nothing in its overrides."""
    fake = Fake(home, ["0"])
    first = fake.cells[0]
    second, anew = replace(first, seed=1, hash="00000001"), replace(first, hash="00000009")
    fake.place.save({"name": "fake"}, "tiny", [], [first, second])
    fake.place.save({"name": "fake"}, "tiny", [], [anew])
    assert [(cell.seed, cell.hash) for cell in fake.place.cells()] == [(0, "00000009"), (1, "00000001")]
    fake.place.save({"name": "fake"}, "tiny", [], [replace(anew, steps=2)])
    assert [cell.seed for cell in fake.place.cells()] == [0], "a seed of another length is no seed of the row"
    plan = json.loads(fake.place.plan_path.read_text())
    fake.place.plan_path.write_text(json.dumps(plan | {"cells": plan["cells"] * 2}))
    with pytest.raises(UserError, match=r"has v0\.seed0 twice"):
        fake.place.cells()
    fake.place.save({"name": "fake"}, "tiny", [], [anew])
    assert len(fake.place.cells()) == 1


def test_a_label_with_any_signs_has_a_log_in_the_suites_folder(home: Path) -> None:
    fake = Fake(home, ["fails"])
    for label in ("50/50", "../../../etc", "groß = klein"):
        fake.cells = [replace(fake.cells[0], label=label)]
        assert fake.place.log_path(fake.cells[0]).parent == fake.place.folder / "logs"
    assert "made of cheese" in fake.runner(retries=0).run()["00000000"].note


def test_what_goes_wrong_beside_the_commands_is_said(home: Path) -> None:
    fake = Fake(home, ["0"])
    fake.place.log_path(fake.cells[0]).mkdir(parents=True)  # no log can be written
    assert "IsADirectoryError" in fake.runner(retries=0).run()["00000000"].note


def test_a_signal_before_the_command_is_there_ends_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    child = execute._Child({"log": str(home / "log")})
    start = subprocess.Popen

    def signalled(*arguments: Any, **more: Any) -> Any:
        child._pass_on(signal.SIGTERM, None)
        return start(*arguments, **more)

    monkeypatch.setattr(execute.subprocess, "Popen", signalled)
    assert child.run([sys.executable, "-c", "import time; time.sleep(60)"]) == -signal.SIGTERM


# ------------------------------------------------------------------------------------------------------------ schedulers


def test_slurm_gets_the_parameters_that_were_given(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    parameters = {"timeout_min": 600, "nodes": 2, "gpus_per_node": 8, "slurm_partition": "gpu"}
    executor = submitit_executor(LauncherConfig("submitit", "slurm", parameters), home / "jobs")
    executor.update_parameters(name="connector.avgpool.seed0")
    script = executor._executor._make_submission_file_text("command", "uid")
    for line in ("--time=600", "--nodes=2", "--gpus-per-node=8", "--partition=gpu", "--job-name=connector.avgpool.seed0"):
        assert f"#SBATCH {line}" in script
    with pytest.raises(UserError, match=r"launcher\.parameters.*gpus_per_nod"):
        submitit_executor(LauncherConfig("submitit", "slurm", {"gpus_per_nod": 8}), home / "jobs")


def test_cells_run_as_jobs_of_submitit(home: Path) -> None:
    pytest.importorskip("submitit")
    fake = Fake(home, ["0", "fails"])
    launcher = make_launcher(LauncherConfig("submitit", "local", {"timeout_min": 1}), fake.place.folder, 0)
    assert isinstance(launcher, SubmititLauncher)
    assert states(fake.runner(retries=0, launcher=launcher).run()) == ["finished", "failed"]


def test_without_submitit_its_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"mm1-ablations\[cluster\]"):
        make_launcher(LauncherConfig("submitit"), home, 0)


def test_a_hostfile_trains_over_its_hosts_one_cell_at_a_time(home: Path) -> None:
    home.mkdir()
    (home / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    config = LauncherConfig("hostfile", hostfile=str(home / "hosts"), options=["--master_port=29501"])
    config.validate()
    launcher = make_launcher(config, home, 0)
    assert launcher.parallel == 1
    assert launcher.train[1:] == [
        "--hostfile",
        str(home / "hosts"),
        "--no_local_rank",
        "--master_port=29501",
        "--module",
        "mm1.train",
    ]
    with pytest.raises(UserError, match=r"launcher\.hostfile=nowhere"):
        LauncherConfig("hostfile", hostfile="nowhere").validate()


# ------------------------------------------------------------------------------------------------------------ end to end


def start(home: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MM1_HOME": str(home), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def python(home: Path, module: str, *arguments: str) -> str:
    done = start(home, module, *arguments)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_real_suite_is_trained_and_evaluated_and_found_again(home: Path) -> None:
    shapes = ["corpus.captions=120", "corpus.interleaved=60", "corpus.text=40", "corpus.queries=24"]
    python(home, "data_pipelines.prepare", "corpus=shapes", *shapes)
    settings = [o for o in TRAIN_OVERRIDES if not o.startswith("train.checkpoint")]
    suite = ["suite=freeze", "cells=[frozen]", "data=shapes", *settings, "evaluation.limit=2", "evaluation.shots=[0]"]
    out = python(home, "ablations.run", *suite, "parallel=2", "threads=1", "calibrate=false")
    assert "2 runs: 2 finished" in out
    (folder,) = (home / "suites").glob("freeze-tiny-*")
    place = SuiteFolder(folder)
    assert [(cell.label, cell.baseline) for cell in place.cells()] == [("trained", True), ("slow", False), ("frozen", False)]
    cells = [cell for cell in place.cells() if cell.label != "slow"]
    assert all(cell.trained and len(list(cell.folder.glob("results/*/summary.json"))) == 1 for cell in cells)
    planned = cells[0].cost
    consumed = cells[0].run.info
    assert consumed["tokens_seen"] == pytest.approx(planned["tokens"], rel=0.05)
    assert consumed["images_seen"] == pytest.approx(planned["images"], rel=0.1)
    assert consumed["flops"] == pytest.approx(planned["flops"], rel=0.08)
    assert consumed["parameters"]["total"] == planned["parameters"]
    times = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.safetensors")}
    again = python(home, "ablations.run", "resume", f"folder={folder.name}")
    assert "to train: 0 runs" in again
    assert "about 0.0 hours of training" in again
    assert "started" not in again
    assert times == {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*.safetensors")}
    plan = place.plan_path.read_bytes()
    with place.lock():
        refused = start(home, "ablations.run", *suite, "evaluation.limit=3", "calibrate=false")
    assert (refused.returncode, "another runner works on this suite" in refused.stderr) == (2, True)
    assert place.plan_path.read_bytes() == plan
    run = cells[1].folder / "run.json"
    run.write_bytes(run.read_bytes()[:-9] + b"\xff")
    listed, status = python(home, "ablations.run", "list"), python(home, "ablations.run", "status", f"folder={folder.name}")
    assert "1 of    3 trained, 1 damaged" in listed
    assert "2 runs: " not in status
    assert "1 damaged" in status
    place.plan_path.write_bytes(plan[:-9])
    assert "plan.json is half-written" in python(home, "ablations.run", "list")


def each_turn(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Call `do` in every turn of the runner's loop, while its cells run."""
    sleep = time.sleep

    def turn(seconds: float) -> None:
        do()
        sleep(seconds)

    monkeypatch.setattr("ablations.suites.runner.time.sleep", turn)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_way_to_go_on_names_the_suites_own_folder(home: Path) -> None:
    from ablations.run import as_typed
    from ablations.suites.planning import suite_folder

    for extra, folder in (([], None), (["data=full"], None), ([], str(home / "elsewhere" / "connector-small"))):
        place = suite_folder("connector", "small", extra, folder)
        given = dict(argument.split("=") for argument in place.arguments("connector", "small"))
        assert suite_folder(given["suite"], given["scale"], [], given.get("folder")).folder == place.folder
    place = suite_folder("connector", "tiny", folder="out/mine")
    assert as_typed(["action=run", "suite=connector", "scale_name=tiny", "folder=out/mine"], place.folder) == [
        "suite=connector", "scale=tiny", f"folder={place.folder}",
    ]  # fmt: skip
