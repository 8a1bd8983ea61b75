"""`python -m mm1.train +ablation=connector_avgpool`: one configuration -> one trained run, found again if it is there already."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.command import command
from data_pipelines import paths
from data_pipelines.config import SourceConfig
from data_pipelines.shards import Manifest, require_space
from mm1.config import TrainConfig
from mm1.run import Run, run_for

if TYPE_CHECKING:
    from data_pipelines.batch import PackedBatch
    from data_pipelines.lanes import LaneStream
    from mm1.engine import Workers
    from mm1.model.multimodal import MultimodalLM


@command("train", schema=TrainConfig)
def main(config: TrainConfig) -> int:
    """Train an image encoder, a connector and a decoder together on a mixture of captions, interleaved documents and text.

    Without arguments: the base configuration (C-Abstractor) at scale tiny, on two CPU cores, on the starter corpus. An ablation
    changes one thing: +ablation=connector_avgpool. Two at once: +ablation=[connector_avgpool,data_no_text]. A killed training
    goes on where its last checkpoint stood; a finished one is not repeated.
    """
    from data_pipelines.prepare import ensure_corpus
    from mm1.cpu import use_whole_width

    use_whole_width()
    corpus = ensure_corpus(config.data.corpus)
    fingerprint = Manifest.load(corpus).fingerprint
    run = run_for(config, fingerprint)
    if run.finished:
        say(f"Already trained: {run.folder}")
        return 0
    return train(config, run, corpus, fingerprint)


def train(config: TrainConfig, run: Run, corpus: Path, fingerprint: str) -> int:
    """Train into `run`; 0 when finished, 130 when stopped by a signal with everything saved."""
    require_space(paths.runs(), 500_000_000, f"Training {run.folder.name}")
    say(f"Training {config.run_name} (scale {config.scale}) into {run.folder}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mm1.engine import Workers

    workers = Workers(config.engine)
    try:
        if workers.main:
            with run.lock():
                run.create(config, fingerprint)
                workers.barrier()
                return _train(config, run, corpus, workers)
        workers.barrier()
        return _train(config, run, corpus, workers)
    finally:
        workers.close()


def _train(config: TrainConfig, run: Run, corpus: Path, workers: Workers) -> int:
    from mm1.trainer import Interrupted, Trainer, run_counters, validation_losses

    model, tokenizer = build(config, corpus)
    stream = lane_stream(config, corpus, tokenizer)
    trainer = Trainer(config, run, workers, model, stream)
    if workers.main:
        say(_description(config, trainer.parameters, trainer.peak_lr, stream))
        run.update(parameters=trainer.parameters, peak_lr=trainer.peak_lr, world=workers.world)
    try:
        seen = trainer.fit()
    except Interrupted as stopped:
        if workers.main:
            run.update(status="interrupted")
            say(f"\nStopped after step {stopped.step} of {config.train.steps}; everything is saved in {run.folder}.")
            say("Go on with the same command.")
        return 130
    batches = validation_batches(config, corpus, tokenizer)
    losses = validation_losses(model, batches, workers.device)
    trainer.export(tokenizer)
    if workers.main:
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run.update(status="finished", steps=config.train.steps, validation=losses, finished=finished)
        run.update(**run_counters(seen))
        held_out = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        say(f"Held-out loss (nats a token): {held_out}")
        say(f"Trained in {seen['seconds']:.0f} s: {run.folder}")
        say(f"Evaluate it: python -m eval.fewshot run={run.folder.name}")
    return 0


def build(config: TrainConfig, corpus: Path) -> tuple[MultimodalLM, Any]:
    """The untrained model of a configuration, float32 on the CPU, with its tokeniser; weights depend on `config.seed` alone."""
    import torch

    from data_pipelines.tokens import image_token_id, load_tokenizer
    from mm1.model.connector import trust_connector
    from mm1.model.decoder import build_decoder
    from mm1.model.image_encoder import build_image_encoder
    from mm1.model.multimodal import MultimodalConfig, MultimodalLM

    trust_connector(config.connector._target_)
    tokenizer = load_tokenizer(Path(config.decoder.tokenizer or config.decoder.path or corpus / "tokenizer"))
    torch.manual_seed(config.seed)
    encoder = build_image_encoder(config.image_encoder.settings(), load_weights=True)
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    # Drawn from its own seed, the decoder starts the same whatever encoder or connector stands before it.
    torch.manual_seed(config.seed + 1)
    decoder = build_decoder(config.decoder, len(tokenizer), special)
    torch.manual_seed(config.seed + 2)
    settings = MultimodalConfig(
        image_encoder=encoder.settings(),
        connector=config.connector.settings(encoder.grid),
        text_config=decoder.config,
        image_token_id=image_token_id(tokenizer),
    )
    return MultimodalLM(settings, image_encoder=encoder, decoder=decoder), tokenizer


def lane_stream(config: TrainConfig, corpus: Path, tokenizer: Any) -> LaneStream:
    """The training data of a configuration, in its order."""
    from data_pipelines.lanes import LaneStream

    return LaneStream(
        corpus,
        config.data,
        config.packing,
        tokenizer,
        image_tokens=config.image_tokens,
        global_batch=config.train.global_batch,
        seed=config.seed,
    )


def validation_batches(config: TrainConfig, corpus: Path, tokenizer: Any) -> dict[str, list[PackedBatch]]:
    """source -> the first `validation_sequences` sequences of its `val` split, the same for every run on this corpus.

    A source without a sample held out has none, which is said.
    """
    from data_pipelines.lanes import LaneStream
    from data_pipelines.loader import PackedLoader

    batches: dict[str, list[PackedBatch]] = {}
    manifest = Manifest.load(corpus)
    count = config.train.validation_sequences
    micro_batch = math.gcd(count, config.engine.micro_batch)
    for name, source in config.data.sources.items() if count else ():
        split = manifest.splits.get(name, {}).get("val")
        if split is None or split.samples == 0:
            say(f"  {name}: {manifest.corpus} holds nothing of it out, so it has no held-out loss")
            continue
        data = replace(config.data, sources={name: SourceConfig(kind=source.kind, ratio=1.0, split="val")})
        stream = LaneStream(corpus, data, config.packing, tokenizer, image_tokens=config.image_tokens, global_batch=count, seed=0)
        loader = PackedLoader(stream, image_size=config.image_encoder.image_size, micro_batch=micro_batch)
        batches[name] = next(iter(loader))
    return batches


def _description(config: TrainConfig, parameters: dict[str, int], peak_lr: float, stream: LaneStream) -> str:
    names = ("image_encoder", "connector", "decoder")
    parts = ", ".join(f"{name.replace('_', ' ')} {parameters[name] / 1e6:.2f}M" for name in names)
    mixture = ", ".join(f"{name} {source.ratio:.0%}" for name, source in config.data.sources.items() if source.ratio)
    return (
        f"  parameters: {parts}; {parameters['trainable'] / 1e6:.2f}M trained\n"
        f"  data: {stream.manifest.corpus} ({mixture}); {config.train.global_batch} x {config.packing.seq_len} tokens a step, "
        f"{config.image_tokens} tokens an image\n"
        f"  peak learning rate {peak_lr:.2e}, {config.train.steps} steps"
    )


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


if __name__ == "__main__":
    main()
