"""A corpus of a few dozen hand-made documents, written in milliseconds: for tests that need known content more than realism."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_pipelines.shards import Manifest, SplitWriter

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([f"a {colour} square" for colour in COLOURS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<image>"],
    )


@cache
def square(colour: str, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_corpus(folder: Path, *, captions: int = 24, interleaved: int = 12, text: int = 10, words: int = 60) -> Path:
    """captions, interleaved and text with train and val splits, in shards of a few samples each."""
    folder.mkdir(parents=True)
    manifest = Manifest(corpus=folder.name, recipe="tests", tokenizer="tokenizer")
    tokenizer().save_pretrained(folder / "tokenizer")
    for split, share in (("train", 1.0), ("val", 0.5)):
        writer = SplitWriter(folder, "captions", split, format="img2dataset", shard_bytes=900)
        for i in range(int(captions * share)):
            colour = COLOURS[i % len(COLOURS)]
            writer.write({"png": square(colour), "txt": f"a {colour} square number {i}"}, images=1)
        manifest.splits.setdefault("captions", {})[split] = writer.close()
        writer = SplitWriter(folder, "interleaved", split, format="energon", shard_bytes=3000)
        for i in range(int(interleaved * share)):
            chosen = [COLOURS[(i + j) % len(COLOURS)] for j in range(2 + i % 3)]
            images = [name for j in range(len(chosen)) for name in (f"{j:03d}.png", None)]
            texts = [span for j, colour in enumerate(chosen) for span in (None, f"{colour} is page {i} item {j}\n")]
            members: dict[str, bytes | str] = {"json": json.dumps({"images": images, "texts": texts})}
            members |= {f"{j:03d}.png": square(colour) for j, colour in enumerate(chosen)}
            writer.write(members, images=len(chosen))
        manifest.splits.setdefault("interleaved", {})[split] = writer.close()
        writer = SplitWriter(folder, "text", split, format="text", shard_bytes=4000)
        for i in range(int(text * share)):
            writer.write({"txt": " ".join(f"word{i}x{j}" for j in range(words if i % 3 else words * 5))})
        manifest.splits.setdefault("text", {})[split] = writer.close()
    manifest.save(folder)
    return folder
