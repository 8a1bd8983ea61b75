"""What a cell will cost, before anything starts: parameters, FLOPs with the vision tower, tokens, images, memory.

    configuration -> parts on the meta device, shapes without weights -> parameters, FLOPs an image, token, pair, label
    corpus        -> its first sequences, packed as training will    -> images, tokens, pairs, labels a step
                                                                              x steps -> FLOPs, memory

Where the corpus is not on this machine, sequences are assumed: a caption is an image and 24 tokens of text, an interleaved
document has 326 tokens of text an image (OBELICS: 115B tokens, 353M images), every sequence is full. The plan says so.

FLOPs are those of the method: a frozen tower's pass counts for every image, so that matching by FLOPs and a run's own count
(mm1/flops.py) do not depend on what is on the disk. What is executed is less where its features are kept (mm1/features.py):
`encoded_images` says how often the tower runs, in the first cell of a tower and in those that find its features;
`Cost.executed_flops` is the first one's, and calibrate.py's times go by it.

Memory is an estimate: weights, gradients and Adam's two moments, and what autograd keeps of one micro-batch (counted on the meta
device for the tower and the connector; 34 values a token, layer and channel for the decoder: Korthikanti et al. 2022, equation 2,
without the attention matrices).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.config import SourceConfig
from data_pipelines.shards import MANIFEST, Manifest
from mm1.config import TrainConfig
from mm1.run import write_atomically

if TYPE_CHECKING:
    import torch

SAMPLED_TOKENS = 262_144
"""Of each source, packed to learn what a sequence holds: 512 sequences at scale tiny, 0.2 % standard error of their tokens."""
MOST_LANES = 32
CAPTION_TEXT, INTERLEAVED_TEXT = 24, 326
UNKNOWN_VOCABULARY = 32_000
CACHE_VERSION = 1


@dataclass(frozen=True)
class Contents:
    """Means of a packed sequence, or of a step. pairs: query-key pairs that may see each other; labels: positions with a loss."""

    images: float
    tokens: float
    pairs: float
    labels: float


@dataclass(frozen=True)
class Parts:
    """An architecture in numbers; FLOPs are of one forward pass, a multiply-add counted as 2."""

    image_encoder: int
    connector: int
    decoder: int
    decoder_without_embeddings: int
    encoder_flops: int
    connector_flops: int
    token_flops: float
    pair_flops: float
    label_flops: float
    image_values: int
    """Values autograd keeps of one image, tower and connector."""
    token_values: int
    """Values it keeps of one token of the decoder."""
    vocabulary: int

    @property
    def parameters(self) -> int:
        return self.image_encoder + self.connector + self.decoder


@dataclass(frozen=True)
class Cost:
    """Of one cell. flops: forward and backward passes, vision tower included; memory: bytes on the busiest process."""

    parameters: int
    trained: int
    steps: int
    tokens: float
    images: float
    forward_flops: float
    backward_flops: float
    memory: float
    assumed: bool
    """The corpus is not here: what a sequence holds is assumed."""
    saved_flops: float = 0.0
    """Of a frozen tower over images whose features it has left before, in this very run; contained in forward_flops."""

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops

    @property
    def executed_flops(self) -> float:
        return self.flops - self.saved_flops


# ----------------------------------------------------------------------------------------------------------------- data


def corpus_folder(config: TrainConfig) -> Path | None:
    """The prepared corpus, or None where it is not on this machine."""
    folder = paths.corpus(config.data.corpus)
    return folder if (folder / MANIFEST).is_file() else None


@cache
def manifest(folder: Path) -> Manifest:
    return Manifest.load(folder)


def fingerprint(config: TrainConfig) -> str:
    """Of the corpus; empty where it is not there yet, and then hashes are provisional."""
    folder = corpus_folder(config)
    return manifest(folder).fingerprint if folder else ""


def check_sources(config: TrainConfig) -> None:
    """Raises UserError where the prepared corpus lacks a source that the configuration draws on."""
    if folder := corpus_folder(config):
        for name, source in config.data.sources.items():
            if source.ratio:
                manifest(folder).split(name, source.split)


def step_contents(config: TrainConfig) -> tuple[Contents, bool]:
    """Means of one optimiser step, and whether they are assumed. Sources weigh as their ratios do."""
    folder = corpus_folder(config)
    drawn = {name: source for name, source in config.data.sources.items() if source.ratio}
    if folder is None:
        means = [(source.ratio, _assumed(source.kind, config)) for source in drawn.values()]
    elif config.data.unit == "sequence":
        means = [(source.ratio, _measured(config, {name: replace(source, ratio=1.0)}, folder)) for name, source in drawn.items()]
    else:
        means = [(1.0, _measured(config, drawn, folder))]
    batch = config.train.global_batch
    summed = {key: batch * sum(ratio * getattr(mean, key) for ratio, mean in means) for key in Contents.__annotations__}
    return Contents(**summed), folder is None


def _assumed(kind: str, config: TrainConfig) -> Contents:
    length, tokens = config.packing.seq_len, config.image_tokens
    if kind == "text":
        return Contents(0, length, length * (length + 1) / 2 / 4, length)  # documents of a quarter of the sequence
    text = CAPTION_TEXT if kind == "captions" else INTERLEAVED_TEXT
    images = min(config.packing.max_images, length // (tokens + text))
    filled = min(length, images * (tokens + text)) if kind == "captions" else length
    document = tokens + text if kind == "captions" else length / 2
    return Contents(images, filled, filled * (document + 1) / 2, filled - images * tokens)


def _measured(config: TrainConfig, sources: Mapping[str, SourceConfig], folder: Path) -> Contents:
    data = replace(config.data, sources=dict(sources))
    described = {
        "version": CACHE_VERSION,
        "corpus": manifest(folder).fingerprint,
        "tokenizer": config.decoder.tokenizer or config.decoder.path,
        "sources": {name: [s.kind, s.ratio, s.split] for name, s in sources.items()},
        "unit": data.unit,
        "packing": asdict(config.packing),
        "image_tokens": config.image_tokens,
        "lanes": (lanes := min(config.train.global_batch, MOST_LANES)),
        "sequences": (count := _sampled(config, max(config.data.sources[name].ratio for name in sources))),
    }
    found = Cache("sequences").get(described, lambda: asdict(_read_sequences(config, data, folder, lanes, count)))
    return Contents(**found)


def _sampled(config: TrainConfig, ratio: float) -> int:
    """Sequences to look at: about as many as training takes of a source (the first are packed tighter), to a power of two."""
    taken = config.train.steps * config.train.global_batch * ratio
    return max(32, min(2 ** round(math.log2(max(taken, 1))), SAMPLED_TOKENS // config.packing.seq_len))


def _read_sequences(config: TrainConfig, data: Any, folder: Path, lanes: int, count: int) -> Contents:
    from data_pipelines.lanes import LaneStream
    from data_pipelines.packing import IGNORE

    tokenizer = _tokenizer(config.decoder.tokenizer or config.decoder.path or str(folder / "tokenizer"))
    stream = LaneStream(folder, data, config.packing, tokenizer, image_tokens=config.image_tokens, global_batch=lanes, seed=0)
    sums = dict.fromkeys(Contents.__annotations__, 0.0)
    for item in islice(stream.lanes(list(range(lanes))), count):
        real = item.sequence.document_ids > 0
        sums["images"] += len(item.sequence.images)
        sums["tokens"] += int(real.sum())
        sums["pairs"] += int((item.sequence.position_ids[real] + 1).sum())
        sums["labels"] += int((item.sequence.labels != IGNORE).sum())
    return Contents(**{key: value / count for key, value in sums.items()})


@cache
def _tokenizer(folder: str) -> Any:
    from data_pipelines.tokens import load_tokenizer

    return load_tokenizer(Path(folder))


def vocabulary(config: TrainConfig) -> int:
    folder = corpus_folder(config)
    place = config.decoder.tokenizer or config.decoder.path or (str(folder / "tokenizer") if folder else None)
    return len(_tokenizer(place)) if place else UNKNOWN_VOCABULARY


# ----------------------------------------------------------------------------------------------------------- the model


def parts_of(config: TrainConfig) -> Parts:
    """Built on the meta device once an architecture, tower, connector and decoder each by itself. Raises UserError as training
    would for settings that no model can have."""
    encoder = _encoder(json.dumps(config.image_encoder.settings() | {"weights": None}, sort_keys=True))
    decoder = _decoder(json.dumps(asdict(config.decoder), sort_keys=True), vocabulary(config))
    width = decoder.get_input_embeddings().embedding_dim
    settings = json.dumps(config.connector.settings(encoder.grid), sort_keys=True)
    return _parts(encoder, _connector(settings, encoder.width, encoder.grid, width), decoder)


@cache
def _encoder(settings: str) -> Any:
    import torch

    from mm1.model.image_encoder import build_image_encoder

    given = json.loads(settings)
    if given["kind"] == "transformers":
        given.pop("weights")
    with torch.device("meta"):
        return build_image_encoder(given, load_weights=False)


@cache
def _connector(settings: str, in_width: int, grid: tuple[int, int], out_width: int) -> Any:
    import torch

    from mm1.model.connector import build_connector, trust_connector

    trust_connector(json.loads(settings)["_target_"])
    with torch.device("meta"):
        return build_connector(json.loads(settings), in_width=in_width, grid=grid, out_width=out_width)


@cache
def _decoder(settings: str, size: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from mm1.config import DecoderConfig
    from mm1.model.decoder import decoder_architecture

    architecture = decoder_architecture(DecoderConfig(**json.loads(settings)))
    architecture.vocab_size = max(size, architecture.vocab_size if json.loads(settings)["path"] else size)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture)


@cache
def _parts(encoder: Any, connector: Any, decoder: Any) -> Parts:
    import torch

    from mm1.flops import StepFlops
    from mm1.model.decoder import parameters_without_embeddings

    text = decoder.config
    whole = SimpleNamespace(
        image_encoder=encoder, connector=connector, decoder=decoder, config=SimpleNamespace(get_text_config=lambda: text)
    )
    flops = StepFlops(cast(Any, whole), encoder_trains=False)
    image = torch.empty(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8, device="meta")
    patches = torch.empty(1, encoder.grid[0] * encoder.grid[1], encoder.width, device="meta", requires_grad=True)
    return Parts(
        image_encoder=_count(encoder),
        connector=_count(connector),
        decoder=_count(decoder),
        decoder_without_embeddings=parameters_without_embeddings(decoder),
        encoder_flops=encoder.flops_per_image(),
        connector_flops=connector.flops_per_image(),
        token_flops=flops.per_token,
        pair_flops=flops.per_pair,
        label_flops=flops.per_label,
        image_values=_kept(encoder, image) + _kept(connector, patches),
        token_values=34 * text.num_hidden_layers * text.hidden_size,
        vocabulary=text.vocab_size,
    )


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _kept(module: Any, inputs: torch.Tensor) -> int:
    """Values that autograd keeps for the backward pass of module(inputs), its own parameters left out; nothing is computed."""
    import torch

    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes() // tensor.element_size()
        alive.append(tensor)  # or a freed storage's place would be taken by another
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.device("meta"):
        module(inputs)
    return sum(kept.values())


# ----------------------------------------------------------------------------------------------------------------- sums


def cost_of(config: TrainConfig, processes: int = 1) -> Cost:
    """Of training a configuration on that many processes. Raises UserError for what no model can be."""
    parts, (step, assumed) = parts_of(config), step_contents(config)
    text = parts.token_flops * step.tokens + parts.pair_flops * step.pairs + parts.label_flops * step.labels
    forward = text + (parts.encoder_flops + parts.connector_flops) * step.images
    tower = 2 if config.image_encoder.train == "full" else 0
    backward = 2 * text + (tower * parts.encoder_flops + 2 * parts.connector_flops) * step.images
    frozen = parts.image_encoder if config.image_encoder.train == "frozen" else 0
    frozen += parts.decoder if config.decoder.train == "frozen" else 0
    steps = config.train.steps
    return Cost(
        parameters=parts.parameters,
        trained=parts.parameters - frozen,
        steps=steps,
        tokens=steps * step.tokens,
        images=steps * step.images,
        forward_flops=steps * forward,
        backward_flops=steps * backward,
        memory=_memory(config, parts, parts.parameters - frozen, step, processes),
        assumed=assumed,
        saved_flops=parts.encoder_flops * (steps * step.images - encoded_images(config, first=True)),
    )


def encoded_images(config: TrainConfig, *, first: bool) -> float:
    """Images that a run's image encoder computes: all of them, but for a frozen one whose features are kept.

    Then `first`, the first run of this encoder, computes each picture of the corpus once and later ones none, as far as
    engine.feature_cache_gb holds them; for pictures beyond it is computed each time.
    """
    from mm1.features import kept

    step, _ = step_contents(config)
    images = config.train.steps * step.images
    if not kept(config) or not images:
        return images
    folder = corpus_folder(config)
    drawn = [(name, source.split) for name, source in config.data.sources.items() if source.ratio]
    pictures = sum(manifest(folder).split(*source).images for source in drawn) if folder else images
    encoder = _encoder(json.dumps(config.image_encoder.settings() | {"weights": None}, sort_keys=True))
    size = encoder.num_patches * encoder.width * (2 if config.engine.precision == "bf16" else 4)
    fitting = min(1.0, config.engine.feature_cache_gb * 1e9 / (size * max(pictures, 1)))
    return images * (1 - fitting) + (min(images, pictures) * fitting if first else 0)


def _memory(config: TrainConfig, parts: Parts, trained: int, step: Contents, processes: int) -> float:
    """Bytes on one process. ZeRO-1 shares out the optimiser's states, 2 the gradients too, 3 the weights as well."""
    bf16 = config.engine.precision == "bf16"
    weight, gradient, optimiser = (2, 2, 12) if bf16 else (4, 4, 8)
    stage = config.engine.stage
    held = weight * parts.parameters / (processes if stage >= 3 else 1)
    held += gradient * trained / (processes if stage >= 2 else 1) + optimiser * trained / (processes if stage >= 1 else 1)
    share = config.engine.micro_batch / config.train.global_batch
    tokens, size = config.engine.micro_batch * config.packing.seq_len, weight
    layers = parts.token_values if not config.engine.checkpointing else parts.token_values // 17
    frozen = config.image_encoder.train == "frozen"
    images = step.images * share * (parts.image_values if not frozen else parts.image_values // 4)
    logits = 3 * 4 * step.labels * share * parts.vocabulary  # logits, their exponentials and gradients, float32
    return held + size * (tokens * layers + images) + logits


class Cache:
    """Small results by what they are of, one JSON file each under <home>/cache: plans of a thousand cells look things up once."""

    def __init__(self, name: str) -> None:
        self.folder = paths.home() / "cache" / name

    def path(self, described: Mapping[str, Any]) -> Path:
        import hashlib

        return self.folder / f"{hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=12).hexdigest()}.json"

    def find(self, described: Mapping[str, Any]) -> Any | None:
        path = self.path(described)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}). Delete it; it is made again.") from error
        return held["result"]

    def put(self, described: Mapping[str, Any], result: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(described), json.dumps({"of": described, "result": result}) + "\n")

    def get(self, described: Mapping[str, Any], make: Any) -> Any:
        held = self.find(described)
        if held is None:
            held = make()
            self.put(described, held)
        return held


def total(costs: Sequence[Cost], key: str) -> float:
    return sum(getattr(cost, key) for cost in costs)
