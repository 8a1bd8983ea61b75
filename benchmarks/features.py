"""`python -m benchmarks.features --json`: a connector trained on a frozen encoder, its features kept, against none kept.

    CASE_warm    steps a second where another run has left every feature; the peer encodes every picture (feature_cache_gb=0)
    CASE_cold    the same for the first run, which writes them: a picture that it meets again is read
    CASE_decode  the same where features are read but every picture is decoded all the same: what the loader's part is worth

The limit is the rate with patches that are in memory already and no picture read: what is left is the connector's and the
decoder's. The configuration is the base at scale tiny with +ablation=connector_avgpool and image_encoder.train=frozen on the
corpus `shapes` (or --corpus), each encoder as its YAML file has it at 98 (DINOv2) or 96 pixels; random weights with --random.
`--home` keeps the corpus and weights; the stores are made in a folder of their own and deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.report import Row

CASES = {"efficientnet_lite0": 96, "dinov2_s14": 98}
PEER = "engine.feature_cache_gb=0"


def configuration(case: str, options: argparse.Namespace) -> Any:
    from configs.command import compose
    from mm1.config import TrainConfig

    overrides = [
        f"image_encoder={case}", f"image_encoder.image_size={CASES[case]}", "image_encoder.train=frozen",
        "+ablation=connector_avgpool",
        f"data={options.corpus}", f"engine.threads={options.threads}", f"engine.workers={options.workers}",
        f"engine.device={options.device}", "optim.warmup_steps=1",
    ]  # fmt: skip
    return compose("train", TrainConfig, [*overrides, *(["image_encoder.weights=null"] if options.random else [])])


class Measurement:
    """Steps of the trainer itself, on the run's own batches, with its loader."""

    def __init__(self, config: Any, folder: Path) -> None:
        from data_pipelines import paths
        from mm1.engine import Workers
        from mm1.run import Run
        from mm1.train import build, lane_stream
        from mm1.trainer import Trainer

        self.config, self.workers = config, Workers(config.engine)
        corpus = paths.corpus(config.data.corpus)
        model, tokenizer = build(config, corpus)
        self.stream = lane_stream(config, corpus, tokenizer)
        self.trainer = Trainer(config, Run(folder), self.workers, model, self.stream)

    def rate(self, gigabytes: float, folder: Path, steps: int, *, decode: bool = False, memory: bool = False) -> float:
        """Steps a second, the first two left out, from the data's beginning. `memory`: with patches of zeros."""
        import numpy as np
        import torch

        from data_pipelines.loader import PackedLoader
        from mm1 import features
        from mm1.features import FrozenEncoder

        features.folder = lambda: folder
        engine = replace(self.config.engine, feature_cache_gb=gigabytes or 1.0)
        encoder: Any = FrozenEncoder(self.trainer.model.image_encoder, engine, self.workers.device, keep=gigabytes > 0)
        known = None if decode else encoder.store
        if memory:
            known, encoder = _Everything(), _InMemory(encoder)
        self.trainer.encoder = encoder
        loader = PackedLoader(
            self.stream, image_size=self.config.image_encoder.image_size, micro_batch=self.config.engine.micro_batch,
            workers=self.config.engine.workers, known=known,
        )  # fmt: skip
        began = 0.0
        for number, batches in enumerate(iter(loader)):
            if number == 2:
                began = time.perf_counter()
            if decode:  # as a loader that asks no store would have it, and a store that is asked all the same
                batches = [self._asked(batch, encoder.store) for batch in batches]
            self.trainer._train_step(batches, stopping=False)
            if number == steps + 1:
                break
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        assert np.isfinite(self.trainer.engine.grad_norm)
        return steps / (time.perf_counter() - began)

    def _asked(self, batch: Any, store: Any) -> Any:
        import numpy as np

        count = len(batch.image_slots)
        places = np.arange(count) % max(1, len(store))
        return replace(batch, images=batch.images[:0], feature_places=places, image_keys=np.zeros((count, 16), np.uint8))


class _Everything:
    def refresh(self) -> None:
        pass

    def find(self, key: bytes) -> int:
        return 0


class _InMemory:
    """In place of a FrozenEncoder: zeros."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.hits, self.misses, self.store = encoder, 0, 0, None

    def __call__(self, images: Any, places: Any, keys: Any) -> Any:
        import torch

        return torch.zeros(len(places), *self.encoder.shape, dtype=self.encoder.dtype, device=self.encoder.device)

    def keep(self) -> str:
        return ""


def rows(case: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    measurement = Measurement(configuration(case, options), folder / "run")
    store, steps = folder / case, options.steps
    # twice each, in turn, and the better: other work on the machine comes and goes
    cold = measurement.rate(options.gigabytes, store, steps)
    off = measurement.rate(0, store, steps)
    warm = measurement.rate(options.gigabytes, store, steps)
    decoded = measurement.rate(options.gigabytes, store, steps, decode=True)
    limit = measurement.rate(0, store, steps, memory=True)
    for _ in range(options.repeats - 1):
        cold = max(cold, measurement.rate(options.gigabytes, folder / f"{case}-{_}", steps))
        off = max(off, measurement.rate(0, store, steps))
        warm = max(warm, measurement.rate(options.gigabytes, store, steps))
        decoded = max(decoded, measurement.rate(options.gigabytes, store, steps, decode=True))
        limit = max(limit, measurement.rate(0, store, steps, memory=True))
    about = {"steps": steps, "threads": options.threads, "workers": options.workers, "size": CASES[case]}
    for name, rate in (("warm", warm), ("cold", cold), ("decode", decoded)):
        yield Row(f"{case}_{name}", rate, off, rate / off, limit, "steps/s", PEER, "patches in memory"), about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this encoder; may be given again")
    parser.add_argument("--home", help="where the corpus and the weights are; default: MM1_HOME")
    parser.add_argument("--corpus", default="shapes", help="a corpus that is prepared there")
    parser.add_argument("--random", action="store_true", help="random weights instead of a package's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    options = parser.parse_args()
    if options.home:
        os.environ["MM1_HOME"] = options.home
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not options.json:
        print(f"{'case':<28}{'ours':>10}{'peer':>10}{'ratio':>8}{'limit':>10}  unit")
    with tempfile.TemporaryDirectory() as folder:
        for case in options.case or CASES:
            for row, more in rows(case, options, Path(folder)):
                if options.json:
                    found = {k: round(v, 4) if isinstance(v, float) else v for k, v in (asdict(row) | more).items()}
                    print(json.dumps(found), flush=True)
                else:
                    print(f"{row.case:<28}{row.ours:>10.2f}{row.peer:>10.2f}{row.ratio:>8.2f}{row.limit:>10.2f}  {row.unit}")


if __name__ == "__main__":
    main()
