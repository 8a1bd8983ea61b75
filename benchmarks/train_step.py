"""Measures mm1.trainer's own step for benchmarks/train.py: the whole, its parts, its wait for data; and its ranks.

python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.train_step '{"home": ..., ...}'    # seconds of a rank's step
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Settings:
    """What a measuring process is told."""

    home: str
    overrides: list[str]
    device: str
    threads: int
    batches: int
    repeats: int
    channels_last: bool = False
    padded: bool = False
    rows: int = 8


@dataclass
class Measured:
    seconds: float
    """Of a step, on average over the batches; the best pass."""
    tokens: float
    """A step's, padding left out."""
    images: float
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Name -> seconds a step, bytes kept for the backward pass."""
    flops: dict[str, float] = field(default_factory=dict)
    """Name -> FLOPs a step; `total` of all."""
    loss: float = math.nan
    padding: float = math.nan
    memory: float = math.nan
    """Peak resident (CPU) or allocated (GPU) bytes."""
    waiting: float = math.nan
    peak: float = math.nan
    """FLOP/s in large matrix products."""


def _config(settings: Settings) -> Any:
    from configs.command import compose
    from mm1.config import TrainConfig

    os.environ["MM1_HOME"] = settings.home
    fixed = ["data=shapes", f"engine.device={settings.device}", f"engine.threads={settings.threads}"]
    return compose("train", TrainConfig, [*fixed, *settings.overrides])


def setting(settings: Settings) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Configuration, model, tokeniser, stream and the first batches, the same in every process."""
    import torch

    from data_pipelines import paths
    from data_pipelines.loader import PackedLoader
    from mm1.train import build, lane_stream

    torch.set_num_threads(settings.threads)
    config = _config(settings)
    corpus = paths.corpus("shapes")
    model, tokenizer = build(config, corpus)
    stream = lane_stream(config, corpus, tokenizer)
    loader = iter(PackedLoader(stream, image_size=model.config.image_size, micro_batch=config.engine.micro_batch))
    return config, model, tokenizer, stream, [next(loader) for _ in range(settings.batches)]


def memory(device: str) -> float:
    import resource

    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_ours(settings: Settings) -> Measured:
    """mm1.trainer's own step on batches in memory; then its parts, and the wait for its own loader."""
    import torch

    from benchmarks.step_parts import Catcher, decoder_parts, measure, synchronise
    from data_pipelines.batch import IGNORE
    from data_pipelines.loader import PackedLoader
    from mm1.engine import Workers
    from mm1.model.loss import token_losses
    from mm1.run import Run
    from mm1.trainer import Trainer

    config, model, _, stream, steps = setting(settings)
    workers = Workers(config.engine)
    trainer = Trainer(config, Run(Path(settings.home) / "run"), workers, model, stream)
    loss = float("nan")

    def run(batches: Any) -> None:
        nonlocal loss
        part = trainer._train_step(batches, stopping=False)
        loss = sum(part["loss_sums"]) / sum(part["loss_counts"]) if math.isnan(loss) else loss
        synchronise()

    best = float("inf")
    for number in range(settings.repeats + 1):
        start = time.perf_counter()
        for batches in steps:
            run(batches)
        if number:
            best = min(best, time.perf_counter() - start)
    flat = [batch for batches in steps for batch in batches]
    count, per_step = len(steps), config.train.global_batch // config.engine.micro_batch
    tokens = sum(int((b.document_ids > 0).sum()) for b in flat) / count
    images = sum(len(b.images) for b in flat) / count
    out = Measured(best / count, tokens, images, loss=loss, memory=memory(settings.device))
    out.padding = 1 - tokens / (config.train.global_batch * config.packing.seq_len)
    out.flops = {"total": sum(trainer.flops(b) for b in flat) / count, **_part_flops(trainer, flat, count)}
    out.peak = peak(workers.device, config.engine.precision)

    batch = max(flat, key=lambda b: len(b.images)).to(workers.device)
    scale = per_step * images / per_step / max(len(batch.images), 1)
    modules = {"vision": [model.image_encoder], "connector": [model.connector], **decoder_parts(model.decoder)}
    catcher = Catcher({**modules, "head": [model.get_output_embeddings()]})
    names = ("input_ids", "images", "image_slots", "document_ids", "position_ids", "labels")
    model(**{name: getattr(batch, name) for name in names})
    head, args, _ = catcher.calls.pop("head")[0]
    found = catcher.parts(settings.repeats)
    states, labels = args[0].detach().requires_grad_(), batch.labels[batch.labels != IGNORE]
    found["loss"] = measure(lambda: [token_losses(head(states), labels)[0]], settings.repeats)
    out.parts = {name: (part.seconds, part.saved) for name, part in found.items()}
    for name in ("vision", "connector"):
        seconds, saved = out.parts[name]
        out.parts[name] = (seconds * scale, saved)
    out.parts["optimiser"] = (optimiser_seconds(trainer.engine.optimizer, settings.repeats), 0)
    del catcher
    torch.cuda.empty_cache() if settings.device == "cuda" else None

    loader = PackedLoader(
        stream, image_size=model.config.image_size, micro_batch=config.engine.micro_batch, workers=max(1, config.engine.workers)
    )
    batches, waited, whole = iter(loader), 0.0, 0.0
    for number in range(4 * settings.batches):
        start = time.perf_counter()
        step = next(batches)
        got = time.perf_counter()
        run(step)
        if number >= settings.batches:
            waited, whole = waited + got - start, whole + time.perf_counter() - start
    out.waiting = waited / whole
    workers.close()
    return out


def optimiser_seconds(optimizer: Any, repeats: int) -> float:
    """Seconds of a step of AdamW alone, on gradients that are there."""
    import torch

    from benchmarks.step_parts import synchronise

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    best = float("inf")
    for _ in range(repeats + 1):
        synchronise()
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        getattr(optimizer, "optimizer", optimizer).step()
        synchronise()
        best = min(best, time.perf_counter() - start)
    return best


def _part_flops(trainer: Any, batches: list[Any], steps: int) -> dict[str, float]:
    """FLOPs a step of each part, forward and backward, by mm1/flops.py's terms."""
    flops, model = trainer.flops, trainer.model
    tokens = sum(int((b.document_ids > 0).sum()) for b in batches) / steps
    pairs = sum(int((b.position_ids[b.document_ids > 0] + 1).sum()) for b in batches) / steps
    images = sum(len(b.images) for b in batches) / steps
    from benchmarks.step_parts import decoder_parts

    own = {
        name: sum(p.numel() for module in modules for p in module.parameters())
        for name, modules in decoder_parts(model.decoder).items()
    }
    connector = 3 * model.connector.flops_per_image()
    return {
        "vision": (flops.per_image - connector) * images,
        "connector": connector * images,
        "attention": 3 * (2 * own["attention"] * tokens + flops.per_pair * pairs),
        "mlp": 3 * 2 * own["mlp"] * tokens,
        "loss": 3 * flops.per_label * sum(b.loss_tokens for b in batches) / steps,
    }


def peak(device: Any, precision: str) -> float:
    """FLOP/s in large matrix products: a GPU's data sheet, or the faster of torch's two libraries on this CPU."""
    import torch

    from mm1.flops import peak_flops

    known = peak_flops(device, precision) or math.nan
    if device.type != "cpu":
        return known
    a, b = (torch.randn(1024, 1024).to(torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        best = min(best, time.perf_counter() - start)
    return max(known, 2 * 1024**3 / best)


def measure_ranks(settings: Settings, stage: int) -> float:
    """In each of the processes of a launcher: seconds of a step in which each has the very batch that one process would have."""
    from data_pipelines.loader import die_with_parent
    from mm1.engine import Workers
    from mm1.run import Run
    from mm1.trainer import Trainer

    die_with_parent()  # ranks that wait for one another would keep the cores busy for ever
    config, model, _, stream, steps = setting(settings)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config.engine.zero_stage = stage
    config.train.global_batch *= world
    workers = Workers(config.engine)
    trainer = Trainer(config, Run(Path(settings.home) / "run"), workers, model, stream)
    best = float("inf")
    for number in range(settings.repeats + 1):
        workers.barrier()
        start = time.perf_counter()
        for batches in steps:
            trainer._train_step(batches, stopping=False)
        if number:
            best = min(best, time.perf_counter() - start)
    if workers.main:
        print(json.dumps({"seconds": best / len(steps)}), flush=True)
    workers.close()
    return best / len(steps)


if __name__ == "__main__":
    from mm1.cpu import use_whole_width

    use_whole_width()
    told = json.loads(sys.argv[1])
    measure_ranks(Settings(**told["settings"]), told["stage"])
