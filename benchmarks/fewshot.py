"""`python -m benchmarks.fewshot --json`: few-shot evaluation against the loop that a user would write, and CIDEr-D.

    fixed       8 shots, the same demonstrations before every query; items a second, image files to answers
    per_query   8 shots, each query with demonstrations of its own from a pool
    cider, cider_cached, cider_captions   benchmarks/cider.py

The peer is transformers' own `generate` on the same model, one item at a time: nine images decoded and encoded, the prompt read,
greedy decoding to the same number of tokens, in a process of its own. Its answers are compared with ours. Ours also measures what
it keeps of every answer (entropy, image gain), which the loop does not. Both may use all cores: ours as a process a core
(eval.fewshot's processes=), the loop with as many threads as serve it best. Loading is in neither time. The model is that of
scale=tiny with random weights, with which no answer ends early.

limit: the same images encoded and the same prompts read, nothing decoded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cider import cider_rows
from benchmarks.report import Row, arguments, print_rows
from eval.prompts import PROMPTS, build_prompt
from eval.tasks.example import Example

SHOTS, ITEMS, POOL, NEW_TOKENS = 8, 64, 48, 20
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Setup:
    model: Any
    tokenizer: Any
    device: str
    requests: dict[str, list[Any]]


def drawn_image(rng: np.random.Generator) -> bytes:
    """JPEG of 160x120: noise of several scales."""
    from benchmarks.data import photograph

    return photograph(rng, 160, 120)


def setup(device: str) -> Setup:
    from configs.command import compose
    from data_pipelines.tokenizer import train_tokenizer
    from eval.generate import Request
    from mm1.config import TrainConfig
    from mm1.train import build

    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]
    captions = [" ".join(rng.choice(words, 12)) for _ in range(ITEMS + POOL)]
    examples = [Example(str(i), str(i), drawn_image(rng), None, (caption,)) for i, caption in enumerate(captions)]
    with tempfile.TemporaryDirectory() as temporary:
        train_tokenizer(captions, 600, Path(temporary) / "tokenizer")
        config = compose("train", TrainConfig, ["image_encoder.weights=null"])
        model, tokenizer = build(config, Path(temporary))
    pool, queries = examples[:POOL], examples[POOL:]
    shown = {
        "fixed": [pool[:SHOTS]] * ITEMS,
        "per_query": [[pool[i] for i in rng.choice(POOL, SHOTS, replace=False)] for _ in queries],
    }
    template = PROMPTS["plain"]["captioning"]
    requests = {
        mode: [
            Request(build_prompt(template, demonstrations, query)) for demonstrations, query in zip(lists, queries, strict=True)
        ]
        for mode, lists in shown.items()
    }
    return Setup(model.eval().to(device), tokenizer, device, requests)


def ours(
    made: Setup, mode: str, index: int = 0, count: int = 1, spill: Path | None = None, encoded: Any = None
) -> dict[int, str]:
    """The engine as `eval.fewshot` runs it, from encoded image files to texts; process `index` of `count` (eval/workers.py)."""
    generator = engine(made, spill)
    prompts = [generator.encode(request) for request in made.requests[mode]]
    for _ in generator.features.encode_all(index, count):
        pass
    if encoded is not None:
        encoded.wait()
    texts: dict[int, str] = {}
    for places in generator.batches(prompts, 16)[index::count]:
        texts |= {
            place: answer.text for place, answer in zip(places, generator.answer([prompts[i] for i in places]), strict=True)
        }
    return texts


def side_by_side(made: Setup, mode: str, repeats: int, count: int) -> tuple[float, dict[int, str]]:
    """(items a second of `count` processes of one thread, their answers), once the model is loaded."""
    context = multiprocessing.get_context("fork")
    start, encoded, found = context.Barrier(count + 1), context.Barrier(count), context.Queue()

    def work(index: int, folder: Path) -> None:
        texts: dict[int, str] = {}
        for repeat in range(repeats + 1):
            start.wait()
            texts = ours(made, mode, index, count, folder / f"{repeat}.bin", encoded)
            start.wait()
        found.put(texts)

    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=work, args=(index, Path(folder)), daemon=True) for index in range(count)]
        for process in processes:
            process.start()
        fastest = float("inf")
        for _ in range(repeats + 1):
            start.wait(600)
            began = time.perf_counter()
            start.wait(600)
            fastest = min(fastest, time.perf_counter() - began)
        texts = {place: text for _ in processes for place, text in found.get(timeout=60).items()}
        for process in processes:
            process.join()
    return ITEMS / fastest, texts


def engine(made: Setup, spill: Path | None = None) -> Any:
    from eval.features import ImageFeatures
    from eval.generate import Generator

    features = ImageFeatures(made.model, made.device, spill=spill)
    return Generator(made.model, made.tokenizer, features, stop=(), max_new_tokens=NEW_TOKENS)


def plain_loop(made: Setup, mode: str) -> list[str]:
    """What a user would write with transformers."""
    import torch

    from data_pipelines.images import decode_image

    model, texts = made.model, []
    generator = engine(made)
    model.decoder.set_attn_implementation("sdpa")
    for request in made.requests[mode]:
        ids = torch.tensor([generator.encode(request).ids], device=made.device)
        size = model.config.image_size
        images = torch.stack([decode_image(part, size) for part in request.parts if isinstance(part, bytes)])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                images=images.to(made.device),
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                suppress_tokens=generator._impossible.nonzero()[:, 0].tolist(),
                pad_token_id=made.tokenizer.eos_token_id,
            )
        texts.append(made.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def read_alone(made: Setup, mode: str) -> None:
    """Every distinct image encoded, every prompt read: less cannot be done before the first token."""
    import torch

    generator = engine(made)
    prompts = [generator.encode(request) for request in made.requests[mode]]
    with torch.inference_mode():
        for places in generator.batches(prompts, 16):
            generator._read([prompts[place] for place in places])


def rate(work: Callable[[], object], device: str, repeats: int) -> float:
    """Items a second of the fastest of `repeats` runs, after one that warms up."""
    import torch

    fastest = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return ITEMS / fastest


def peer_rates(device: str, mode: str, repeats: int) -> dict[str, Any]:
    """In a process of its own, whose torch nobody has helped (mm1/cpu.py): {"rates": threads -> items/s, "texts": answers}."""
    command = [sys.executable, "-m", "benchmarks.fewshot", "--device", device, "--repeats", str(repeats), "--peer", mode]
    done = subprocess.run(command, env=os.environ | {"MM1_PLAIN_MKL": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_peer(device: str, mode: str, repeats: int) -> None:
    import torch

    made = setup(device)
    rates, texts = {}, plain_loop(made, mode)
    for threads in sorted({1, CORES}) if device == "cpu" else [1]:
        torch.set_num_threads(threads)
        rates[threads] = rate(partial(plain_loop, made, mode), device, repeats)
    print(json.dumps({"rates": rates, "texts": texts}))


def engine_row(mode: str, made: Setup, repeats: int) -> Row:
    import torch

    torch.set_num_threads(1)
    if made.device == "cpu":
        mine, said = side_by_side(made, mode, repeats, CORES)
        limit = CORES * rate(partial(read_alone, made, mode), made.device, repeats)
    else:
        said = ours(made, mode)
        mine, limit = (rate(partial(work, made, mode), made.device, repeats) for work in (ours, read_alone))
    peer = peer_rates(made.device, mode, repeats)
    different = sum(said[place] != text for place, text in enumerate(peer["texts"]))
    if different > ITEMS // 20:  # a tie in the last bit may fall otherwise; more is not the same work
        raise AssertionError(f"{mode}: {different} of {ITEMS} answers differ from the plain loop's; nothing to compare")
    threads, best = max(peer["rates"].items(), key=lambda pair: pair[1])
    name = f"generate, item by item, {threads} thread{'s' * (int(threads) > 1)}"
    return Row(mode, mine, best, mine / best, limit, "items/s", name, "images encoded and prompts read alone")


CASES = ("fixed", "per_query", "cider", "cider_cached", "cider_captions")


def main() -> None:
    from mm1.cpu import use_whole_width

    use_whole_width()
    if "--peer" in sys.argv:  # what peer_rates starts
        _, _, device, _, repeats, _, mode = sys.argv
        print_peer(device, mode, int(repeats))
        return
    chosen = arguments(__doc__ or "", CASES)
    cases = chosen.case or CASES
    modes = [mode for mode in ("fixed", "per_query") if mode in cases]
    if modes:
        made = setup(chosen.device)
        print_rows((engine_row(mode, made, chosen.repeats) for mode in modes), chosen.json)
    if captions := [case for case in cases if case.startswith("cider")]:
        print_rows(cider_rows(chosen.repeats, captions), chosen.json)


if __name__ == "__main__":
    main()
