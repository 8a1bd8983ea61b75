"""Time on this machine, from a few real training steps of each kind of cell: `python -m ablations.suites.calibrate JOB.json`.

Measured on the corpus's own batches, with as many processes at once and threads each as the runner will use, for two processes
share memory bandwidth and caches. Seconds a FLOP of a cell are kept under <home>/cache/steps by what decides them: the
architecture, the mixture, threads, processes, and the machine. A frozen tower whose features are kept is timed twice, with and
without it and its pictures' decoding: its first cell in a plan pays for it, cells after it do not. What these steps leave out
(start, validation, checkpoints) is OVERHEAD.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ablations.suites.cost import Cache, corpus_folder, cost_of, encoded_images, fingerprint
from configs.errors import UserError
from mm1.config import TrainConfig

STEPS = 3
"""Timed after one step that is not."""
OVERHEAD = 20.0
"""Seconds of a cell beside its steps on two cores: imports, weights, validation, checkpoints, export."""
LARGEST = 400_000_000
"""Parameters above which nothing is timed on a CPU."""


def describe(config: TrainConfig, threads: int, processes: int) -> dict[str, Any]:
    """What decides the seconds of a step."""
    from mm1.features import kept

    settings = config.identity()
    for key in ("optim", "seed"):
        settings.pop(key)
    settings["train"].pop("steps")
    settings["image_encoder"].pop("lr_scale")
    return {
        "settings": settings,
        "micro_batch": config.engine.micro_batch,
        "corpus": fingerprint(config),
        "threads": threads,
        "processes": processes,
        "machine": machine(),
    } | ({"features": True} if kept(config) else {})


@cache
def machine() -> str:
    """The processor's name and number of cores that this process may use, and the GPU's name where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    import torch

    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{name}, {len(os.sched_getaffinity(0))} cores{gpu}"


def seconds_per_flop(
    configs: Sequence[TrainConfig], overrides: Sequence[Sequence[str]], *, threads: int, processes: int, measure: bool
) -> list[float | None]:
    """Of each configuration's training; None where it is not known and not to be measured (or its corpus is not here).

    `overrides`: what composes each. Measures those not known yet in `processes` processes at once.
    """
    keys = [describe(config, threads, processes) for config in configs]
    known = Cache("steps")
    wanted: dict[str, tuple[dict[str, Any], Sequence[str]]] = {}
    for key, config, override in zip(keys, configs, overrides, strict=True):
        if measure and corpus_folder(config) is not None and known.find(key) is None:
            wanted.setdefault(json.dumps(key, sort_keys=True), (key, override))
    if wanted:
        print(f"Timing {STEPS} steps of {len(wanted)} kinds of cell, {processes} at once, {threads} threads each.", flush=True)
        for (key, _), result in zip(wanted.values(), _measure([o for _, o in wanted.values()], threads, processes), strict=True):
            known.put(key, result)
    paid: set[str] = set()
    rates: list[float | None] = []
    for key, config in zip(keys, configs, strict=True):
        timed = known.find(key)
        rates.append(None if timed is None else _rate(config, timed, paid))
    return rates


def _rate(config: TrainConfig, timed: Mapping[str, float], paid: set[str]) -> float:
    """Seconds a FLOP of a cell; `paid`: the frozen towers whose features the cells before it leave, this one's added."""
    cold, warm = float(timed["seconds_per_flop"]), timed.get("warm_seconds_per_flop")
    images = cost_of(config).images
    if warm is None or not images:
        return cold
    tower = json.dumps([config.image_encoder.settings(), config.engine.precision, fingerprint(config)], sort_keys=True)
    share = encoded_images(config, first=tower not in paid) / images
    paid.add(tower)
    return warm + (cold - warm) * share


def _measure(cells: Sequence[Sequence[str]], threads: int, processes: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"cells": [list(overrides) for overrides in cells], "threads": threads}))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "ablations.suites.calibrate", str(job)]
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        outputs = [process.communicate() for process in running]
        for process, (_, errors) in zip(running, outputs, strict=True):
            if process.returncode:
                last = "\n".join(errors.splitlines()[-5:])
                raise UserError(f"The calibration failed; leave it out with calibrate=false. Its last words:\n{last}")
        lists = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text, _ in outputs]
    return [{key: sum(results[i][key] for results in lists) / len(lists) for key in lists[0][i]} for i in range(len(cells))]


class _AllKnown:
    """Stands for a store that has every picture (data_pipelines.loader.Known)."""

    def refresh(self) -> None:
        pass

    def find(self, key: bytes) -> int:
        return 0


def time_steps(config: TrainConfig, threads: int) -> dict[str, float]:
    """Seconds of a training step, forward to optimiser, with the loader's work, and per FLOP; of a frozen tower whose features
    are kept also with all of them there (warm_seconds_per_flop)."""
    import torch

    from mm1.engine import choose_device
    from mm1.features import kept
    from mm1.optim import parameter_groups
    from mm1.train import build

    torch.set_num_threads(threads)
    folder = corpus_folder(config)
    assert folder is not None
    device = torch.device(choose_device(config.engine.device))
    model, tokenizer = build(config, folder)
    groups = [{k: v for k, v in group.items() if k in ("params", "weight_decay")} for group in parameter_groups(model, config)]
    model.to(device=device)  # type: ignore[call-arg]  # transformers types it as a class method
    model.train()
    optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    seconds, done = _timed(config, model, tokenizer, optimiser, folder, device, warm=False)
    result = {"seconds_per_flop": seconds / done, "seconds_per_step": seconds / STEPS}
    if kept(config):
        seconds, done = _timed(config, model, tokenizer, optimiser, folder, device, warm=True)
        result["warm_seconds_per_flop"] = seconds / done
    return result


def _timed(
    config: TrainConfig, model: Any, tokenizer: Any, optimiser: Any, folder: Path, device: Any, *, warm: bool
) -> tuple[float, float]:
    """Seconds and FLOPs of STEPS steps; `warm`: with patches that are there already."""
    import torch

    from data_pipelines.loader import PackedLoader
    from mm1.flops import StepFlops
    from mm1.train import lane_stream

    flops, encoder = StepFlops(model, config.image_encoder.train == "full"), model.image_encoder
    loader = PackedLoader(
        lane_stream(config, folder, tokenizer), image_size=config.image_encoder.image_size,
        micro_batch=config.engine.micro_batch, workers=0, known=_AllKnown() if warm else None,
    )  # fmt: skip
    done, began = 0, 0.0
    precision = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    for number, batches in enumerate(iter(loader)):
        if number == 1:
            began = time.perf_counter()
        for batch in batches:
            done += flops(batch) if number else 0
            sent = batch.to(device)
            images: dict[str, Any] = {"images": sent.images}
            if warm:
                images = {"image_patches": torch.zeros(len(batch.image_slots), encoder.num_patches, encoder.width, device=device)}
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                output = model(
                    input_ids=sent.input_ids, image_slots=sent.image_slots, document_ids=sent.document_ids,
                    position_ids=sent.position_ids, labels=sent.labels, **images,
                )  # fmt: skip
            output.token_losses.sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number == STEPS:
            break
    return time.perf_counter() - began, done


def main(arguments: Sequence[str]) -> None:
    from ablations.suites.composing import Composer

    job: Mapping[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    composer = Composer()
    for overrides in job["cells"]:
        print(json.dumps(time_steps(composer.compose(overrides), job["threads"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
