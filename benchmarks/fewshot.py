"""`python -m benchmarks.fewshot --json`: few-shot evaluation against the loop that a user would write, and CIDEr-D.

    fixed       8 shots, the same demonstrations before every query; items a second, image files to answers
    per_query   8 shots, each query with demonstrations of its own from a pool
    cider, cider_cached, cider_captions   benchmarks/cider.py

The peer is transformers' own `generate` on the same model, one item at a time: nine images decoded and encoded, the prompt read,
greedy decoding to the same number of tokens. Its answers are compared with ours before anything is timed. Ours also measures what
it keeps of every answer (entropy, image gain), which the loop does not. Both run on all cores: ours in one thread, the loop in as
many as serve it best. The model is that of scale=tiny with random weights; with it, no answer ends early.

limit: the same images encoded and the same prompts read, nothing decoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.cider import cider_rows
from benchmarks.report import Row, arguments, print_rows
from eval.prompts import PROMPTS, build_prompt
from eval.tasks.example import Example

SHOTS, ITEMS, POOL, NEW_TOKENS = 8, 64, 48, 20


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
    import tempfile
    from pathlib import Path

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


def ours(made: Setup, mode: str) -> list[str]:
    """The engine as `eval.fewshot` runs it, from encoded image files to texts."""
    generator = engine(made)
    texts = [""] * ITEMS
    for places, answers in generator.run(made.requests[mode], 16):
        for place, answer in zip(places, answers, strict=True):
            texts[place] = answer.text
    return texts


def engine(made: Setup) -> Any:
    from eval.features import ImageFeatures
    from eval.generate import Generator

    features = ImageFeatures(made.model, made.device)
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


def engine_row(mode: str, made: Setup, repeats: int) -> Row:
    import os

    import torch

    cores = os.cpu_count() or 1
    torch.set_num_threads(1)
    said = ours(made, mode)
    different = sum(a != b for a, b in zip(said, plain_loop(made, mode), strict=True))
    if different > ITEMS // 20:  # a tie in the last bit may fall otherwise; more is not the same work
        raise AssertionError(f"{mode}: {different} of {ITEMS} answers differ from the plain loop's; nothing to compare")
    mine, limit = (rate(partial(work, made, mode), made.device, repeats) for work in (ours, read_alone))
    peers = {}
    for threads in sorted({1, cores}) if made.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        peers[threads] = rate(partial(plain_loop, made, mode), made.device, repeats)
    best = max(peers, key=lambda threads: peers[threads])
    name = f"generate, item by item, {best} thread{'s' * (best > 1)}"
    return Row(mode, mine, peers[best], mine / peers[best], limit, "items/s", name, "images encoded and prompts read alone")


CASES = ("fixed", "per_query", "cider", "cider_cached", "cider_captions")


def main() -> None:
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
