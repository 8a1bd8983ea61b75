"""`python -m benchmarks.train --json`: a training step of a scale, and of what a user would take instead, on the same batches.

    tokens      tokens a second: mm1.trainer's whole step; the peer is transformers' LLaVA under Trainer, on the same batches
    useful      the same tokens, where the peer has one document a row, padded (benchmarks/llava.py)
    vision, connector, attention, mlp, loss, optimiser
                each part of the step alone, forward and backward, times a second; the peer's is the same part of its model.
                The limit is the part's FLOPs at the machine's peak in large matrix products
    loader      per cent of the step that does not wait for data, with worker processes; no peer
    zero2, zero3
                steps a second of each of two processes on one machine, against one process with the same batch and without ZeRO,
                one thread each (CPU only)

Both train the same weights in processes of their own, one after the other, each with its libraries' defaults. Other settings of
the run can be given as key=value. `--plot FILE` draws where the time goes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.report import Row, print_rows
from benchmarks.train_step import Measured, Settings
from mm1.cpu import use_whole_width

PARTS = ("vision", "connector", "attention", "mlp", "loss", "optimiser")
CASES = ("tokens", "useful", *PARTS, "loader", "zero2", "zero3")
PEER = "transformers' LLaVA and Trainer"


def apart(work: Any, settings: Settings, whole_width: bool = True) -> Measured:
    """In a process of its own: allocator, threads and memory are its alone. whole_width: of matrix products, as in mm1.train."""
    start = use_whole_width if whole_width else None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        return pool.submit(work, settings).result()


def corpus_home(folder: str) -> None:
    """Draw the corpus `shapes` there: 18 seconds, no network."""
    environment = os.environ | {"MM1_HOME": folder}
    subprocess.run(
        [sys.executable, "-m", "data_pipelines.prepare", "corpus=shapes"], env=environment, check=True, stdout=subprocess.DEVNULL
    )


def ranks(settings: Settings, processes: int, stage: int) -> float:
    """Seconds of a step of `processes` on this machine."""
    from data_pipelines.loader import die_with_parent

    told = json.dumps({"settings": asdict(settings), "stage": stage})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "-m", "benchmarks.train_step", told],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=die_with_parent,
    )
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"seconds"')))["seconds"]


def rows(settings: Settings, cases: Iterable[str], lent: bool) -> Iterable[tuple[Row, dict[str, Any]]]:
    """Each case's row, with further values for --json. lent: the peer's matrix products are as wide as ours."""
    if {"tokens", "useful", "loader", *PARTS} & set(cases):
        yield from step_rows(settings, cases, lent)
    if settings.device == "cpu" and {"zero2", "zero3"} & set(cases):
        alone = replace(settings, threads=1)
        one = ranks(alone, 1, 0)
        tokens = 1.0 / one
        for stage in (2, 3):
            if f"zero{stage}" in cases:
                rate = 1.0 / ranks(alone, 2, stage)
                yield Row(f"zero{stage}", rate, tokens, rate / tokens, tokens, "steps/s a rank", "one process", "the same"), {}


def step_rows(settings: Settings, cases: Iterable[str], lent: bool) -> Iterable[tuple[Row, dict[str, Any]]]:
    from benchmarks.llava import measure_peer
    from benchmarks.train_step import measure_ours

    ours, peer = apart(measure_ours, settings), apart(measure_peer, settings, lent)
    if abs(ours.loss / peer.loss - 1) > (1e-4 if settings.device == "cpu" else 2e-2):
        raise AssertionError(f"the first step's loss is {ours.loss} here and {peer.loss} there: nothing to compare")
    limit = ours.peak / ours.flops["total"]
    extra = {
        "step_ms": 1e3 * ours.seconds,
        "peer_step_ms": 1e3 * peer.seconds,
        "images_per_second": ours.images / ours.seconds,
        "padding": ours.padding,
        "gflops": ours.flops["total"] / 1e9,
        "mfu": ours.flops["total"] / ours.seconds / ours.peak,
        "peer_mfu": ours.flops["total"] / peer.seconds / ours.peak,
        "memory_mb": ours.memory / 1e6,
        "peer_memory_mb": peer.memory / 1e6,
    }
    if "tokens" in cases:
        rate, other = ours.tokens / ours.seconds, peer.tokens / peer.seconds
        yield Row("tokens", rate, other, rate / other, limit * ours.tokens, "tokens/s", PEER, "peak FLOP/s"), extra
    if "useful" in cases:
        padded = apart(measure_peer, replace(settings, padded=True), lent)
        rate, other = ours.tokens / ours.seconds, padded.tokens / padded.seconds
        more = {"peer_padding": padded.padding, "peer_step_ms": 1e3 * padded.seconds, "peer_memory_mb": padded.memory / 1e6}
        yield Row("useful", rate, other, rate / other, limit * ours.tokens, "tokens/s", f"{PEER}, padded", "peak FLOP/s"), more
    for name in PARTS:
        if name in cases:
            (own, saved), (others, others_saved) = ours.parts[name], peer.parts[name]
            least = ours.peak / ours.flops[name] if name in ours.flops else math.nan
            more = {"ms": 1e3 * own, "peer_ms": 1e3 * others, "share": own / ours.seconds, "peer_share": others / peer.seconds}
            more |= {"gflops": ours.flops.get(name, 0) / 1e9, "saved_mb": saved / 1e6, "peer_saved_mb": others_saved / 1e6}
            yield Row(name, 1 / own, 1 / others, others / own, least, "times a second", PEER, "peak FLOP/s"), more
    if "loader" in cases:
        kept = 100 * (1 - ours.waiting)
        yield Row("loader", kept, math.nan, math.nan, 100.0, "% of the step", "none", "no wait"), {"wait": ours.waiting}


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Two bars, ours and the peer's, of the parts' milliseconds in a step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = [name for name in PARTS if name in found]
    labels = {"vision": "vision tower", "attention": "decoder attention", "mlp": "decoder MLP", "loss": "logits, loss"}
    figure, axes = plt.subplots(figsize=(8, 2.3), layout="constrained")
    for y, key, step in ((1, "ms", "step_ms"), (0, "peer_ms", "peer_step_ms")):
        left = 0.0
        total = found["tokens"][step]
        widths = [found[name][key] for name in names]
        rest = max(0.0, total - sum(widths))
        for i, (name, width) in enumerate(zip([*names, "rest"], [*widths, rest], strict=True)):
            axes.barh(
                y, width, left=left, color=f"C{i}" if name != "rest" else "0.8", label=labels.get(name, name) if y else None
            )
            if width > 0.04 * found["tokens"]["peer_step_ms"]:
                axes.text(
                    left + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white" if name != "rest" else "0.2"
                )
            left += width
        axes.text(left, y, f"  {total:.0f} ms", va="center")
    axes.set_yticks([1, 0], ["ours", "LLaVA,\nTrainer"])
    axes.set_xlim(0, 1.12 * max(found["tokens"]["step_ms"], found["tokens"]["peer_step_ms"]))
    axes.set_xlabel("milliseconds a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scale", default="tiny", help="configs/scale")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process; all cores if not given"
    )
    parser.add_argument("--batches", type=int, default=4, help="different steps in a pass")
    parser.add_argument("--repeats", type=int, default=3, help="passes; the best counts")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; may be given again")
    parser.add_argument("--home", help="where the corpus `shapes` is or is to be kept; a temporary folder if not given")
    parser.add_argument("--peer-channels-last", action="store_true", help="lend the peer our layout of feature maps")
    parser.add_argument("--peer-whole-width", action="store_true", help="lend it our wide matrix products (mm1/cpu.py)")
    parser.add_argument("--rows", type=int, default=8, help="documents in the padded peer's micro-batch; 8 is Trainer's default")
    parser.add_argument("--plot", type=Path, help="draw where the time goes into this file")
    parser.add_argument("overrides", nargs="*", help="settings of the run: key=value")
    chosen = parser.parse_args()
    # The tower's shapes count and not its weights, which would need a network.
    overrides = [f"scale={chosen.scale}", "image_encoder.weights=null", *chosen.overrides]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = chosen.home or temporary
        corpus_home(home)
        settings = Settings(home, overrides, chosen.device, chosen.threads, chosen.batches, chosen.repeats, rows=chosen.rows)
        settings.channels_last = chosen.peer_channels_last

        def plain() -> Iterable[Row]:
            for row, more in rows(settings, chosen.case or CASES, chosen.peer_whole_width):
                found[row.case] = {**asdict(row), **more}
                if chosen.json:
                    values = {k: round(v, 4) if isinstance(v, float) else v for k, v in found[row.case].items()}
                    print(json.dumps(values), flush=True)
                yield row

        if chosen.json:
            list(plain())
        else:
            print_rows(plain(), False)
    if chosen.plot:
        plot(found, chosen.plot)


if __name__ == "__main__":
    main()
