"""Image features for `demonstrations=nearest`: of a run's own image encoder, computed once and kept on disk.

    image -> image encoder (before the connector) -> patches (P, C) -> mean -> length 1 -> <results>/features/KEY.safetensors

One file a task, its KEY a hash of the run's weights and the corpus: another run, a run trained further or another corpus has
features of its own. Images are encoded when a plan first asks for them, in groups of BATCH in the order asked; what the file
holds is never computed again, so an evaluation that goes on finds the same demonstrations. Without new images no model is loaded.

A comparison of several runs should name one run for all of them (nearest_by=...): by its own features each run would see other
demonstrations, and such plans are not compared.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from data_pipelines.images import decode_image
from eval.device import pick_device
from eval.tasks.pool import Pool, TaskData

VERSION = 1
BATCH = 32


class EncoderFeatures:
    """eval/plan.py's Features. `weights`: the fingerprint of the weights in `export`; `folder`: where files are kept."""

    def __init__(self, export: Path, *, weights: str, corpus_fingerprint: str, folder: Path, device: str = "auto") -> None:
        self.export, self.folder, self.device = export, folder, device
        key = json.dumps([VERSION, weights, corpus_fingerprint]).encode()
        self.fingerprint = hashlib.blake2b(key, digest_size=16).hexdigest()
        self.encoded = 0
        """Images encoded by this object, as against those found on disk."""
        self._model: Any = None
        self._known: dict[str, dict[str, np.ndarray]] = {}

    def path(self, task: str) -> Path:
        key = hashlib.blake2b(json.dumps([self.fingerprint, task]).encode(), digest_size=8).hexdigest()
        return self.folder / f"{key}.safetensors"

    def __call__(self, task: TaskData, pool: Pool, names: Sequence[str]) -> np.ndarray:
        """float32 (len(names), C), rows of length 1. Raises UserError for a damaged file, an image that cannot be read, or a
        folder that holds no model of this suite."""
        if task.name not in self._known:
            self._known[task.name] = self._read(task.name)
        known, images = self._known[task.name], pool.image_ids
        missing: dict[str, str] = {}
        for name in names:
            if images[name] not in known:
                missing.setdefault(images[name], name)
        if missing:
            known |= dict(zip(missing, self._encode(task, pool, list(missing.values())), strict=True))
            self._write(task.name, known)
        return np.stack([known[images[name]] for name in names])

    def _encode(self, task: TaskData, pool: Pool, wanted: Sequence[str]) -> np.ndarray:
        import torch
        from tqdm import tqdm

        if self._model is None:
            from eval.generate import load_model

            self._model, _ = load_model(self.export, pick_device(self.device), "float32")
        model, found = self._model, []
        with tqdm(total=len(wanted), unit="img", desc=f"{task.name}, features", file=sys.stderr) as bar:
            for start in range(0, len(wanted), BATCH):
                group = wanted[start : start + BATCH]
                size = model.config.image_size
                pixels = torch.stack([decode_image(pool.example(name).image, size, name=name) for name in group])
                with torch.inference_mode():
                    patches = model.image_encoder(pixels.to(model.device))
                    found.append(torch.nn.functional.normalize(patches.float().mean(1), dim=1).cpu().numpy())
                bar.update(len(group))
        self.encoded += len(wanted)
        return np.concatenate(found)

    def _read(self, task: str) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError, safe_open

        path = self.path(task)
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, vectors = file.metadata() or {}, file.get_tensor("features")
            images = json.loads(metadata["images"])
            if metadata["fingerprint"] != self.fingerprint or len(images) != len(vectors):
                raise ValueError("it is of other weights or another corpus")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise UserError(
                f"{path}: image features that cannot be used ({error}). Delete the file; they are made again."
            ) from error
        return dict(zip(images, vectors, strict=True))

    def _write(self, task: str, known: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        path = self.path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        metadata = {"fingerprint": self.fingerprint, "task": task, "images": json.dumps(list(known))}
        save_file({"features": np.stack(list(known.values()))}, partial, metadata=metadata)
        partial.replace(path)
