"""`python -m benchmarks.data --json`: the data pipelines against webdataset's own default pipeline, on the same shards.

    images_640, images_1024   JPEG of 640x480 and 1024x768 -> uint8 tensors of 336 px, images a second on one core
                              peer: WebDataset(...).decode("pil"), torchvision's bicubic Resize and PILToTensor
    text                      tar members -> documents, documents a second on one core; ours in random order, the peer in order
    loader                    caption shards -> packed batches with 2 worker processes, images a second, workers' start included
                              peer: the same decoding in a WebLoader of 2 workers, captions tokenised one by one and padded
    startup                   10,000 shards in the manifest -> the first packed sequence, runs a second
                              peer: webdataset with the same list of shards -> its first sample (one shard, no manifest)
    memory                    resident MB of a process after epoch 1 over that after epoch 3 (1: flat), text and pictures; no peer

The pictures are drawn here: noise of several scales, of about the size that a photograph has as JPEG at quality 90.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Row, arguments, best_rate, print_rows
from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.document import Origin
from data_pipelines.formats import read_document
from data_pipelines.images import decode_into
from data_pipelines.lanes import LaneStream
from data_pipelines.loader import PackedLoader
from data_pipelines.order import LaneOrder
from data_pipelines.reader import SplitReader
from data_pipelines.shards import Manifest, Split, SplitWriter
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.tokens import load_tokenizer

SIZE = 336


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """JPEG of noise at several scales, quality 90."""
    from PIL import Image

    total = np.zeros((height, width, 3))
    for cell in (4, 16, 64, 256):
        small = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(grown, dtype=float) * cell**0.5
    total = (total - total.min()) / (total.max() - total.min()) * 255
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def caption_corpus(folder: Path, count: int, width: int, height: int) -> Path:
    """Caption pairs of drawn photographs, with a manifest and a tokeniser."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]
    folder.mkdir()
    writer = SplitWriter(folder, "captions", "train", format="img2dataset")
    captions = [" ".join(rng.choice(words, 12)) for _ in range(count)]
    for caption in captions:
        writer.write({"jpg": photograph(rng, width, height), "txt": caption}, images=1, characters=len(caption))
    train_tokenizer(captions, 600, folder / "tokenizer")
    manifest = Manifest(folder.name, "benchmark", {"captions": {"train": writer.close()}}, tokenizer="tokenizer")
    manifest.save(folder)
    return folder


def webdataset_images(shards: list[str]) -> Any:
    """The pipeline webdataset's documentation leads to: (uint8 (3, 336, h), caption) pairs."""
    import webdataset
    from torchvision import transforms

    to_tensor = transforms.Compose(
        [transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC, antialias=True), transforms.PILToTensor()]
    )
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return dataset.decode("pil").to_tuple("jpg", "txt").map_tuple(to_tensor, lambda text: text)


def images(width: int, height: int, repeats: int) -> Row:
    from simplejpeg import decode_jpeg

    with tempfile.TemporaryDirectory() as temporary:
        folder = caption_corpus(Path(temporary) / "captions", 120, width, height)
        reader = SplitReader(folder, Manifest.load(folder), "captions", "train")
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        count = len(reader)
        squares = np.empty((count, SIZE, SIZE, 3), np.uint8)

        def decode_all() -> None:
            for i, square in enumerate(squares):
                decode_into(reader[i]["jpg"], square)

        ours = best_rate(count, decode_all, repeats)
        peer = best_rate(count, lambda: list(webdataset_images(shards)), repeats)

        def decode_alone() -> None:
            for members in reader:
                decode_jpeg(members["jpg"])

        limit = best_rate(count, decode_alone, repeats)
    peer_name = "webdataset, PIL, torchvision"
    return Row(f"images_{width}", ours, peer, ours / peer, limit, "images/s a core", peer_name, "JPEG decoding alone")


def text(repeats: int) -> Row:
    import webdataset

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        writer = SplitWriter(folder, "text", "train", format="text")
        for _ in range(20_000):
            writer.write({"txt": "x" * int(rng.integers(200, 3000))})
        split = writer.close()
        shards = [str(folder / shard.file) for shard in split.shards]
        manifest = Manifest(folder.name, "benchmark", {"text": {"train": split}})
        manifest.save(folder)

        def read() -> None:
            reader, order = SplitReader(folder, manifest, "text", "train"), LaneOrder(split.samples, 1, 0)
            for i in range(split.samples):
                members = reader[order[0, i] or 0]
                read_document("text", members, Origin("text", members.shard, members.key))

        def stream() -> None:
            for _ in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode().to_tuple("txt"):
                pass

        def bytes_alone() -> None:
            for shard in shards:
                Path(shard).read_bytes()

        ours, peer, limit = (best_rate(split.samples, work, repeats) for work in (read, stream, bytes_alone))
    return Row("text", ours, peer, ours / peer, limit, "documents/s a core", "webdataset", "reading the bytes, page cache warm")


def loader(repeats: int) -> Row:
    import torch
    import webdataset
    from simplejpeg import decode_jpeg

    workers, steps, per_step = 2, 96, 4
    with tempfile.TemporaryDirectory() as temporary:
        folder = caption_corpus(Path(temporary) / "captions", 160, 640, 480)
        tokenizer = load_tokenizer(folder / "tokenizer")
        packing = PackingConfig(seq_len=1024, max_images=16)
        data = DataConfig(str(folder), {"captions": SourceConfig("captions", 1.0)})

        def ours_images() -> int:
            stream = LaneStream(folder, data, packing, tokenizer, image_tokens=36, global_batch=per_step, seed=0)
            batches = PackedLoader(stream, image_size=SIZE, micro_batch=per_step, workers=workers)
            return sum(len(batch.images) for step in islice(batches, steps) for batch in step)

        shards = [str(path) for path in sorted(folder.glob("*.tar"))] * 40

        def tokenised(pair: tuple[Any, str]) -> tuple[Any, torch.Tensor]:
            ids = tokenizer(pair[1], padding="max_length", max_length=64, truncation=True, return_tensors="pt").input_ids[0]
            return pair[0], ids

        count = ours_images()

        def peer_images() -> None:
            dataset = webdataset_images(shards).map(tokenised).batched(16)
            batches = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
            for _ in islice(batches, count // 16):
                pass

        ours, peer = best_rate(count, ours_images, repeats), best_rate(count, peer_images, repeats)
        reader = SplitReader(folder, Manifest.load(folder), "captions", "train")

        def decode_alone() -> None:
            for members in reader:
                decode_jpeg(members["jpg"])

        decoded = best_rate(len(reader), decode_alone, repeats)
    limit, peer_name = workers * decoded, "webdataset's WebLoader"
    return Row("loader", ours, peer, ours / peer, limit, "images/s, 2 workers", peer_name, "JPEG decoding alone, 2 cores")


def startup(repeats: int) -> Row:
    """Ten thousand shards are one small file under ten thousand names: what counts is the manifest and the index."""
    import webdataset

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_tokenizer(["a few words of text"] * 50, 300, folder / "tokenizer")
        writer = SplitWriter(folder, "text", "train", format="text")
        for number in range(100):
            writer.write({"txt": f"document {number}: a few words of text"})
        (shard,) = writer.close().shards
        for number in range(10_000):
            (folder / f"t-{number:05d}.tar").hardlink_to(folder / shard.file)
        shards = [replace(shard, file=f"t-{number:05d}.tar") for number in range(10_000)]
        Manifest(folder.name, "benchmark", {"text": {"train": Split("text", shards)}}, tokenizer="tokenizer").save(folder)
        data = DataConfig(str(folder), {"text": SourceConfig("text", 1.0)})

        def ours() -> None:
            tokenizer = load_tokenizer(folder / "tokenizer")
            stream = LaneStream(folder, data, PackingConfig(512, 16), tokenizer, image_tokens=9, global_batch=8, seed=0)
            next(stream.lanes([0]))

        def peer() -> None:
            names = [str(folder / shard.file) for shard in shards]
            next(iter(webdataset.WebDataset(names, shardshuffle=False, empty_check=False).decode().to_tuple("txt")))

        rates = best_rate(1, ours, repeats), best_rate(1, peer, repeats)
    name = "webdataset, one shard opened"
    return Row("startup", *rates, rates[0] / rates[1], 0.5, "starts/s", name, "the goal: 2 seconds a start")


def memory(repeats: int) -> Row:
    """Both numbers are this process's resident size in MB: `peer` after the first epoch, `ours` after the third."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = caption_corpus(Path(temporary) / "captions", 160, 640, 480)
        tokenizer = load_tokenizer(folder / "tokenizer")
        data = DataConfig(str(folder), {"captions": SourceConfig("captions", 1.0)})
        stream = LaneStream(folder, data, PackingConfig(1024, 16), tokenizer, image_tokens=36, global_batch=4, seed=0)
        resident: list[float] = []
        seen = 0
        for step in PackedLoader(stream, image_size=SIZE, micro_batch=4):
            seen += sum(len(batch.images) for batch in step)
            if seen >= 160 * (len(resident) + 1):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            if len(resident) == 3:
                break
    name = "after epoch 1"
    return Row("memory", resident[2], resident[0], resident[2] / resident[0], resident[0], "MB after epoch 3", name, "flat")


CASES: dict[str, Callable[[int], Row]] = {
    "images_640": lambda repeats: images(640, 480, repeats),
    "images_1024": lambda repeats: images(1024, 768, repeats),
    "text": text,
    "loader": loader,
    "startup": startup,
    "memory": memory,
}


def main() -> None:
    import torch

    chosen = arguments(__doc__ or "", CASES)
    torch.set_num_threads(1)
    print_rows((run(chosen.repeats) for case, run in CASES.items() if not chosen.case or case in chosen.case), chosen.json)


if __name__ == "__main__":
    main()
