"""The training loop: steps of a fixed global batch, logged, saved, resumable to the same numbers.

    PackedLoader -> [micro-batches of a step] -> sum of token losses / tokens of the *global* batch -> Engine -> AdamW

Dividing by the global token count (one small all-reduce a step) is what makes two processes compute exactly what one would:
micro-batches and ranks hold different numbers of labelled tokens, and a mean of means would weigh them unequally.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from configs.errors import UserError
from data_pipelines.batch import IGNORE, KINDS, PackedBatch
from data_pipelines.faults import Fault, FaultLog, Loss, check_budgets
from data_pipelines.lanes import LaneStream, totals
from data_pipelines.loader import PackedLoader, naming_dead_workers
from mm1.config import TrainConfig
from mm1.engine import PARTIAL, Engine, Workers
from mm1.features import FrozenEncoder, kept, shared_out
from mm1.flops import StepFlops, peak_flops
from mm1.model.decoder import parameters_without_embeddings
from mm1.model.multimodal import MultimodalLM
from mm1.optim import learning_rate, parameter_groups
from mm1.run import Run, config_differences
from mm1.speed import on_device, prepare

SHOWN_FAULTS = 5
"""Lines a report of faults prints; the file has all."""


class Interrupted(Exception):
    """Training was stopped by a signal after a checkpoint was saved; `step` steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Trainer:
    """Trains `model` on `stream` as the configuration says; `fit()` returns the counters of what was consumed."""

    def __init__(self, config: TrainConfig, run: Run, workers: Workers, model: MultimodalLM, stream: LaneStream) -> None:
        self.config, self.run, self.workers, self.model, self.stream = config, run, workers, model, stream
        self.flops = StepFlops(model, config.image_encoder.train == "full")
        self.peak_lr = config.optim.peak(parameters_without_embeddings(model.decoder))
        groups = parameter_groups(model, config)
        self.parameters = count_parameters(model)
        prepare(model, config.engine, workers.device, config.packing)
        self.engine = Engine(model, groups, workers, config.engine, config.optim, config.train.global_batch)
        # Compared with a checkpoint's: a tokeniser that was exchanged in its place, say, has the same path and other ids.
        self._identity = stream.identity() | {"image_encoder": {"image_size": model.config.image_size}}
        self.sources: dict[str, dict[str, int]] = {}
        """Of each source, what all processes have taken and delivered so far (packing.Counts)."""
        self.step = 0
        self.lanes: dict[int, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        """Found by this process since they were last reported."""
        self.window = Window()
        self.seen = {"tokens": 0, "loss_tokens": 0, "images": 0, "flops": 0, "seconds": 0.0}
        self.frozen = config.image_encoder.train == "frozen"
        if self.frozen:
            self.seen |= {"features_read": 0, "features_computed": 0}

    def fit(self) -> dict[str, float]:
        """Run to the last step. Raises Interrupted after Ctrl-C or SIGTERM, with everything saved."""
        generators = self._resume()
        total = self.config.train.steps
        loader = PackedLoader(
            self.stream,
            image_size=self.model.config.image_size,
            micro_batch=self.config.engine.micro_batch,
            world=self.workers.world,
            rank=self.workers.rank,
            workers=self.config.engine.workers,
            step=self.step,
            states=self.lanes,
            known=self.encoder.store if self.encoder else None,
        )
        if self.workers.main and loader.workers != self.config.engine.workers:
            asked = f"engine.workers={self.config.engine.workers}"
            print(f"  {asked} do not divide the {loader.per_step} sequences a process takes each step: {loader.workers} used")
        log = MetricsLog(self.run, self.step) if self.workers.main else None
        peak = peak_flops(self.workers.device, self.config.engine.precision)
        quiet = not self.workers.main
        bar = tqdm(total=total, initial=self.step, desc=self.run.name, unit="step", disable=quiet, dynamic_ncols=True)
        with stop_signals() as stop, naming_dead_workers():
            batches = iter(loader)
            while self.step < total:
                began = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - began
                if generators is not None:  # not before the first batch: the loader draws a number of its own when it starts
                    set_generators(generators, self.workers.device)
                    generators = None
                part = self._train_step(micro_batches, stopping=stop.requested)
                elapsed = time.perf_counter() - began
                self.seen["seconds"] += elapsed
                self.window.add(part, waited, elapsed)
                self.step += 1
                logs = self.step % self.config.train.log_every == 0 or self.step == total
                saves = self.step % self.config.train.checkpoint_every == 0 or self.step == total or part["stop"]
                if logs or saves:
                    self._account()
                if logs:
                    row = self.window.row(self.step, self._learning_rate(self.step - 1), self.workers.world, peak)
                    if log is not None:
                        log.write(row)
                        bar.set_postfix(loss=f"{row['loss']:.3f}", tokens_s=f"{row['tokens_per_second']:.0f}")
                    self.window = Window()
                bar.update()
                if saves:
                    self._save()
                if part["stop"] and self.step < total:
                    bar.close()
                    raise Interrupted(self.step)
        bar.close()
        if log is not None:
            log.close()
        return dict(self.seen)

    @cached_property
    def encoder(self) -> FrozenEncoder | None:
        """Of a frozen image encoder, once its weights are in place; None for one that trains, or that ZeRO-3 shares out."""
        if not self.frozen:
            return None
        if shared_out(self.config.engine):
            if self.workers.main:
                print("  ZeRO-3 shares out the frozen image encoder's weights: it runs for every picture, no features are kept")
            return None
        encoder = FrozenEncoder(self.model.image_encoder, self.config.engine, self.workers.device, keep=kept(self.config))
        if (store := encoder.store) and self.workers.main:
            size = store.bytes / 1e3
            print(f"  features of the frozen image encoder: {len(store):,} pictures in {store.folder}, {size:.0f} KB each")
            self.run.update(feature_store=str(store.folder))
        return encoder

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.peak_lr, self.config.train.steps, self.config.optim)

    def _train_step(self, micro_batches: list[PackedBatch], stopping: bool) -> dict[str, Any]:
        """One optimiser step; returns sums over all processes."""
        self.model.train()
        if self.frozen:
            self.model.image_encoder.eval()  # no dropout, where nothing learns from it
        tokens = sum(int((b.document_ids > 0).sum()) for b in micro_batches)
        images = sum(len(b.image_slots) for b in micro_batches)
        flops = sum(self.flops(b) for b in micro_batches)
        labelled = sum(b.loss_tokens for b in micro_batches)
        # The wish to stop travels with the counts: all processes act on it at the same step.
        counts = [float(count) for count in (tokens, images, flops, labelled, stopping)]
        tokens, images, flops, labelled, stops = map(int, self.workers.sum(counts))
        by_kind = torch.zeros(2, len(KINDS), dtype=torch.float64)
        z_loss = self.config.optim.z_loss
        losses = []
        before = (self.encoder.hits, self.encoder.misses) if self.encoder else (0, 0)
        for micro_batch, batch in zip(micro_batches, on_device(micro_batches, self.workers.device), strict=True):
            self.lanes |= micro_batch.lane_states
            self.faults += micro_batch.faults
            frozen = self.encoder and self.encoder(batch.images, micro_batch.feature_places, micro_batch.image_keys)
            output = self.engine(
                input_ids=batch.input_ids,
                images=batch.images if frozen is None else None,
                image_patches=frozen,
                image_slots=batch.image_slots,
                document_ids=batch.document_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
            )
            loss = output.token_losses.sum()
            if z_loss:
                loss = loss + z_loss * output.token_z.sum()
            self.engine.backward(loss / max(labelled, 1))
            self.engine.step(self._learning_rate(self.step))
            losses.append(output.token_losses.detach().double())
        for batch, own in zip(micro_batches, losses, strict=True):  # only now, so that a GPU is not waited for in between
            kinds = batch.kinds[batch.labels != IGNORE].long()
            by_kind[0].index_add_(0, kinds, own.cpu())
            by_kind[1].index_add_(0, kinds, torch.ones(len(kinds), dtype=torch.float64))
        if self.encoder and (full := self.encoder.keep()) and self.workers.main:
            tqdm.write(f"Further features of the frozen image encoder are not kept: {full}.")
        after = (self.encoder.hits, self.encoder.misses) if self.encoder else (0, 0)
        *sums, read, computed = self.workers.sum([*by_kind.flatten().tolist(), after[0] - before[0], after[1] - before[1]])
        self.seen["tokens"] += int(tokens)
        self.seen["loss_tokens"] += int(labelled)
        self.seen["images"] += int(images)
        self.seen["flops"] += int(flops)
        if self.frozen:
            self.seen["features_read"] += int(read)
            self.seen["features_computed"] += int(computed)
        slots = self.config.train.global_batch * self.config.packing.seq_len
        return {
            "loss_sums": sums[: len(KINDS)],
            "loss_counts": sums[len(KINDS) :],
            "tokens": tokens,
            "images": images,
            "flops": flops,
            "executed_flops": flops - int(read) * self.flops.encoder_forward,
            "features_read": int(read),
            "padding": 1 - tokens / slots,
            "grad_norm": self.engine.grad_norm,
            "stop": stops > 0,
        }

    def _account(self) -> None:
        """Lists new faults, notes what has come from each source so far, and stops a run that loses too much of one.

        Before every checkpoint too: a run that goes on from it does not come by the faults before it again.
        All processes call it at the same steps. Raises UserError naming source, counts and budget.
        """
        own = {name: asdict(counts) for name, counts in totals(self.stream, self.lanes).items()}
        parts = self.workers.gather((self.faults, own))
        self.faults = []
        self.sources = {name: {key: sum(part[name][key] for _, part in parts) for key in own[name]} for name in own}
        path = self.run.folder / "faults.jsonl"
        if self.workers.main and (found := [fault for faults, _ in parts for fault in faults]):
            new = FaultLog(path).add(found)
            for fault in new[:SHOWN_FAULTS]:
                tqdm.write(f"left out: {fault}")
            if len(new) > SHOWN_FAULTS:
                tqdm.write(f"left out: {len(new) - SHOWN_FAULTS:,} more, listed in {path}")
        losses = {name: Loss(c["taken_documents"] + c["skipped"], c["skipped"]) for name, c in self.sources.items()}
        check_budgets(losses, {name: self.config.data.sources[name].max_faults for name in losses}, str(path))

    # -------------------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        if (folder := self.run.checkpoints / f"step-{self.step:07d}").exists():
            return
        lanes = {lane: state for part in self.workers.gather(self.lanes) for lane, state in part.items()}
        state = {"step": self.step, "seen": self.seen, "world": self.workers.world, "window": json.dumps(asdict(self.window))}
        state["generators"] = self.workers.gather(get_generators(self.workers.device))
        state["lanes"], state["stream"] = json.dumps(lanes, separators=(",", ":")), json.dumps(self._identity)
        self.engine.save(folder, state)
        if self.workers.main:
            self.run.update(steps=self.step, sources=self.sources, **run_counters(self.seen))
            for old in self._checkpoints()[: -self.config.train.keep_checkpoints]:
                remove_tree(old)

    def _checkpoints(self) -> list[Path]:
        """Whole ones, the oldest first."""
        return sorted(path for path in self.run.checkpoints.glob("step-*") if path.suffix != PARTIAL)

    def _resume(self) -> dict[str, torch.Tensor] | None:
        """Back to the last checkpoint; returns the state that this process's generators had, or None without a checkpoint."""
        if self.workers.main:
            for torn in self.run.checkpoints.glob(f"step-*{PARTIAL}"):  # of a process that was killed while it saved
                remove_tree(torn)
        found = self._checkpoints()
        if not found:
            return None
        state = self.engine.load(found[-1])
        if differences := config_differences(json.loads(state["stream"]), self._identity):
            raise UserError(
                f"{found[-1]} is a checkpoint of other data. What differs: {'; '.join(differences)}. Bring back "
                "what it was trained on, or give this run another name=..."
            )
        self.step, self.seen = state["step"], self.seen | state["seen"]
        self.lanes = {int(lane): value for lane, value in json.loads(state["lanes"]).items()}
        if self.workers.main:
            print(f"Going on from step {self.step} ({found[-1]}).")
        if "generators" not in state:  # saved before there were windows and a state of each process
            return {"cpu": state["rng"]}
        self.window = Window(**json.loads(state["window"]))
        # another number of processes has no draws to repeat
        return state["generators"][self.workers.rank if state["world"] == self.workers.world else 0]

    def export(self, tokenizer: Any) -> None:
        """Write the save_pretrained folder (safetensors, configuration, tokeniser)."""
        from transformers.utils import logging

        weights = self.engine.weights()
        if self.workers.main:
            logging.disable_progress_bar()
            self.model.config.image_encoder = self.model.image_encoder.settings()
            self.model.save_pretrained(self.run.export, state_dict=weights)
            tokenizer.save_pretrained(self.run.export)
        self.workers.barrier()


def count_parameters(model: MultimodalLM) -> dict[str, int]:
    names = ("image_encoder", "connector", "decoder")
    parts = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in names}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    without = parameters_without_embeddings(model.decoder)
    return {**parts, "total": sum(parts.values()), "trainable": trainable, "decoder_without_embeddings": without}


def run_counters(seen: dict[str, Any]) -> dict[str, Any]:
    """The counters as run.json names them."""
    return {
        "tokens_seen": seen["tokens"],
        "loss_tokens_seen": seen["loss_tokens"],
        "images_seen": seen["images"],
        "flops": seen["flops"],
        "seconds": round(seen["seconds"], 1),
    } | {key: seen[key] for key in ("features_read", "features_computed") if key in seen}


def get_generators(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from: uint8, by kind of device; the GPU's where the model is on one."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Back to what `get_generators` returned; a generator that it did not know stays as it is."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@dataclass
class Window:
    """What the steps since the last logged row have to say; part of a checkpoint, so that a resumed run logs whole rows."""

    parts: list[dict[str, Any]] = field(default_factory=list)
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, part: dict[str, Any], waited: float, seconds: float) -> None:
        self.parts.append(part)
        self.waited += waited
        self.seconds += seconds

    def row(self, step: int, lr: float, world: int, peak: float | None) -> dict[str, float]:
        """What metrics.jsonl gets: losses in nats a token, rates in tokens and images a second over all processes."""
        sums = [sum(part["loss_sums"][i] for part in self.parts) for i in range(len(KINDS))]
        counts = [sum(part["loss_counts"][i] for part in self.parts) for i in range(len(KINDS))]
        row: dict[str, float] = {"step": step, "loss": sum(sums) / max(sum(counts), 1)}
        row |= {f"loss_{kind}": sums[i] / counts[i] for i, kind in enumerate(KINDS) if counts[i]}
        row["lr"] = lr
        row["grad_norm"] = self.parts[-1]["grad_norm"]
        row["tokens_per_second"] = sum(part["tokens"] for part in self.parts) / self.seconds
        row["images_per_second"] = sum(part["images"] for part in self.parts) / self.seconds
        row["padding"] = sum(part["padding"] for part in self.parts) / len(self.parts)
        row["loader_wait"] = self.waited / self.seconds
        row["seconds"] = self.seconds
        if any(part["features_read"] for part in self.parts):
            row["features_read"] = sum(part["features_read"] for part in self.parts) / sum(part["images"] for part in self.parts)
        if peak:
            row["mfu"] = sum(part["executed_flops"] for part in self.parts) / self.seconds / (peak * world)
        return row


class MetricsLog:
    """metrics.jsonl and TensorBoard. On a resume, rows after the checkpoint are dropped: they will be computed again."""

    def __init__(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = []
        if run.metrics.is_file():
            whole = [line for line in run.metrics.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        run.metrics.write_text("".join(line + "\n" for line in kept))
        self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, float]) -> None:
        rounded = {name: round(value, 6) if isinstance(value, float) and name != "lr" else value for name, value in row.items()}
        self._file.write(json.dumps(rounded) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name.replace("loss_", "loss/"), value, int(row["step"]))

    def close(self) -> None:
        self._file.close()
        self._writer.close()


class StopSignals:
    requested = False
    """A signal reached this process; all processes stop after the step in which they have told each other."""


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second Ctrl-C stops at once."""
    state = StopSignals()

    def request(number: int, frame: FrameType | None) -> None:
        if state.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        state.requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def remove_tree(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def validation_losses(
    model: MultimodalLM, batches: Mapping[str, Sequence[PackedBatch]], device: torch.device
) -> dict[str, float]:
    """Mean loss in nats a token over fixed batches, by source; and for captions the loss with images shuffled among the batch.

    The difference of the two caption losses is what the images are worth to the model.
    """
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def add(name: str, batch: PackedBatch, images: torch.Tensor) -> None:
        output = model(
            input_ids=batch.input_ids,
            images=images,
            image_slots=batch.image_slots,
            document_ids=batch.document_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
        )
        assert output.token_losses is not None
        sums[name] = sums.get(name, 0.0) + float(output.token_losses.double().sum())
        counts[name] = counts.get(name, 0) + int((batch.labels != IGNORE).sum())

    for source, own in batches.items():
        for batch in (batch.to(device) for batch in own):
            add(f"loss_{source}", batch, batch.images)
            kind = KINDS[int(batch.kinds.max())]  # the source's, and -1 on padding
            if kind == "captions" and len(batch.images) > 1:
                add(f"loss_{source}_shuffled_images", batch, batch.images.roll(1, dims=0))
    return {name: sums[name] / max(counts[name], 1) for name in sums}
