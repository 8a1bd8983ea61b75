"""The training configuration: typed, composed by Hydra from configs/train.yaml, checked before anything is loaded.

No torch here: a wrong key, type or combination is refused in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.command import register
from configs.errors import UserError
from data_pipelines.config import DataConfig, PackingConfig
from mm1.model.config import TRAIN_MODES, ConnectorConfig, ImageEncoderConfig
from mm1.optim import MM1_LAW, peak_learning_rate


@dataclass
class DecoderConfig:
    """A causal language model: from a local folder (`path`), or new from a transformers `architecture`."""

    path: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    """A folder with a transformers tokeniser; without one, that of `path`, or else the one prepared with the corpus."""
    train: str = "full"
    lr_scale: float = 1.0

    def validate(self) -> None:
        if self.path is None and "model_type" not in self.architecture:
            raise UserError("decoder: give decoder.path, or decoder.architecture.model_type with the sizes of a new model.")
        if self.path is not None and self.architecture:
            raise UserError(
                f"decoder.path={self.path} brings its own architecture; decoder.architecture must then be empty ({{}})."
            )
        if self.train not in TRAIN_MODES:
            raise UserError(f"decoder.train={self.train}: must be one of {', '.join(TRAIN_MODES)}.")
        if self.lr_scale <= 0:
            raise UserError(f"decoder.lr_scale={self.lr_scale}: must be positive; decoder.train=frozen keeps the weights.")


@dataclass
class OptimConfig:
    """AdamW with MM1's laws; see mm1/optim.py."""

    peak_lr: float | None = None
    """None: by the law."""
    law: str | None = None
    """A file with a and b of exp(a ln N + b), N the decoder's parameters without embeddings, as `python -m ablations.law` writes
    it; None: MM1's law, a = -0.4214 and b = -0.5535."""
    weight_decay: float = 0.1
    """Relative to the learning rate: a step shrinks a weight by weight_decay x lr, which is MM1's lambda = 0.1 eta."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 20
    final_lr: float = 0.1
    """The cosine ends at this share of the peak."""
    grad_clip: float = 1.0
    z_loss: float = 0.0

    def validate(self) -> None:
        for key in ("eps", "grad_clip"):
            if getattr(self, key) <= 0:
                raise UserError(f"optim.{key}={getattr(self, key)}: must be positive.")
        if self.peak_lr is not None and self.peak_lr <= 0:
            raise UserError(f"optim.peak_lr={self.peak_lr}: must be positive, or null for the law.")
        if self.law is not None:
            if self.peak_lr is not None:
                raise UserError(
                    f"optim.peak_lr={self.peak_lr} and optim.law={self.law}: give one of them, and null for the other."
                )
            read_law(self.law)
        for key in ("beta1", "beta2", "final_lr"):
            if not 0 <= getattr(self, key) < 1 and not (key == "final_lr" and self.final_lr == 1):
                raise UserError(f"optim.{key}={getattr(self, key)}: must lie in [0, 1).")
        for key in ("weight_decay", "warmup_steps", "z_loss"):
            if getattr(self, key) < 0:
                raise UserError(f"optim.{key}={getattr(self, key)}: must not be negative.")

    def peak(self, decoder_parameters: int) -> float:
        """The peak learning rate; `decoder_parameters` counts no embeddings. UserError for a law that gives an absurd one."""
        if self.peak_lr is not None:
            return self.peak_lr
        law = MM1_LAW if self.law is None else read_law(self.law)
        exponent = law[0] * math.log(decoder_parameters) + law[1]
        if not -30 < exponent < 0:
            raise UserError(
                f"optim.law={self.law}: a={law[0]:g}, b={law[1]:g} give a learning rate of exp({exponent:.4g}) for a decoder of "
                f"{decoder_parameters:,} parameters. Is it the file that `python -m ablations.law` wrote?"
            )
        return peak_learning_rate(decoder_parameters, law)

    def identity(self) -> dict[str, Any]:
        """What changes the weights: of a law what it says, wherever the file lies; nothing where there is none."""
        settings = asdict(self)
        path = settings.pop("law")
        return settings | ({} if path is None else {"law": dict(zip("ab", read_law(path), strict=True))})


def read_law(path: str) -> tuple[float, float]:
    """a and b of a law's file. Raises UserError naming file, key and value."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    hint = "`python -m ablations.law suite=learning_rate` writes such a file."
    try:
        content = OmegaConf.to_container(OmegaConf.load(Path(path).expanduser()))
    except FileNotFoundError:
        raise UserError(f"optim.law={path}: no such file. {hint}") from None
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"optim.law={path}: no readable YAML ({' '.join(str(error).split())[:200]}). {hint}") from error
    found = []
    for key in ("a", "b"):
        value = content.get(key) if isinstance(content, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"optim.law={path}: {key}={value!r}, where a number is needed. {hint}")
        found.append(float(value))
    return found[0], found[1]


SUITE_KEYS: dict[str, str | None] = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and engine.micro_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "the section optim",
    "scheduler": "optim.warmup_steps and optim.final_lr",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types"), "engine.precision"),
    **dict.fromkeys(("compression_training", "curriculum_learning", "data_efficiency", "progressive_layer_drop")),
}
"""DeepSpeed's keys that change the weights -> where this suite sets the same, if it does."""


@dataclass
class EngineConfig:
    """How the steps are executed. Nothing here but `precision` changes what is computed."""

    precision: str = "fp32"
    zero_stage: int = 0
    micro_batch: int = 1
    """Sequences a process takes at once; the rest of its share of the global batch is accumulated."""
    workers: int = 1
    device: str = "auto"
    threads: int | None = None
    """CPU threads a process; None: all cores, shared evenly between the processes of a machine."""
    checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, a third more time."""
    checkpoint_encoder: bool = False
    """The same for the image encoder."""
    attention: str = "auto"
    """How documents are kept apart: packed (each by itself), flex (block-sparse, for GPUs), dense (a mask of S x S);
    auto: packed on a CPU, dense on a GPU."""
    kernels: str = "auto"
    """auto: equal convolutions that are faster on a CPU (mm1/model/onednn.py); plain: torch's own choice."""
    loss_chunk: int = 0
    """Positions whose logits are in memory at once; 0: all."""
    compile: str | None = None
    """A backend of torch.compile (inductor) for the decoder's layers and the encoder; shapes must then repeat."""
    feature_cache_gb: float = 8.0
    """Gigabytes of <home>/cache/features, where what a frozen image encoder makes of each picture is kept for all runs
    (mm1/features.py); 0: nothing is kept. A picture takes P x C values: 16 KB of EfficientNet-Lite0 at 96 pixels, 1.2 MB of
    ViT-L/14 at 336 pixels in bfloat16."""
    liger: bool = False
    """liger-kernel's fused decoder layers, on GPUs."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Merged, section by section, over the DeepSpeed configuration this one makes, for offloading, communication settings and the
    like. What would change the weights has keys of its own here (SUITE_KEYS)."""

    @property
    def stage(self) -> int:
        """The ZeRO stage in force: `deepspeed` may name another than `zero_stage`."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", self.zero_stage))

    def validate(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"engine.precision={self.precision}: must be fp32 or bf16.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"engine.zero_stage={self.zero_stage}: must be 0, 1, 2 or 3.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"engine.device={self.device}: must be auto, cpu or cuda.")
        if self.attention not in ("auto", "packed", "flex", "dense"):
            raise UserError(f"engine.attention={self.attention}: must be auto, packed, flex or dense.")
        if self.kernels not in ("auto", "plain"):
            raise UserError(f"engine.kernels={self.kernels}: must be auto or plain.")
        if not 0 <= self.feature_cache_gb < math.inf:
            raise UserError(f"engine.feature_cache_gb={self.feature_cache_gb}: gigabytes, or 0 to keep no features.")
        if self.loss_chunk < 0:
            raise UserError(f"engine.loss_chunk={self.loss_chunk}: positions at once, or 0 for all of them.")
        if self.micro_batch < 1 or self.workers < 0:
            raise UserError(f"engine.micro_batch={self.micro_batch}, engine.workers={self.workers}: at least 1 and 0.")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"engine.threads={self.threads}: at least 1, or null for all cores.")
        for key, instead in SUITE_KEYS.items():
            if key in self.deepspeed:
                raise UserError(
                    f"engine.deepspeed.{key}={self.deepspeed[key]}: it changes what is trained, and a run's hash does not see it "
                    f"there. {f'Set {instead} instead' if instead else 'The suite has no key for it: leave it out'}."
                )
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
            raise UserError(f"engine.deepspeed.zero_optimization={zero}: must be a section, with a stage of 0, 1, 2 or 3 if any.")


@dataclass
class LoopConfig:
    steps: int
    global_batch: int
    """Sequences a step, over all processes."""
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    validation_sequences: int = 48
    """Sequences a source for the validation loss at the end; 0 leaves it out."""

    def validate(self) -> None:
        for key in ("steps", "global_batch", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise UserError(f"train.{key}={getattr(self, key)}: must be at least 1.")
        if self.validation_sequences < 0:
            raise UserError(f"train.validation_sequences={self.validation_sequences}: sequences a source, or 0 for none.")


@dataclass
class TrainConfig:
    image_encoder: ImageEncoderConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    data: DataConfig
    packing: PackingConfig
    optim: OptimConfig
    engine: EngineConfig
    train: LoopConfig
    scale: str
    connector_width: int
    """Inner width of a C-Abstractor at this scale (configs/connector/cabstractor.yaml refers to it)."""
    high_resolution: int
    """Pixels a side that +ablation=resolution_high stands for at this scale."""
    seed: int = 0
    name: str | None = None
    """Of the run; None: made from the ablations, `base` without any."""
    ablation: list[str] = field(default_factory=list)

    @property
    def run_name(self) -> str:
        return self.name or "+".join(sorted(self.ablation)) or "base"

    def validate(self) -> None:
        """Raises UserError for any setting or combination that cannot work, naming key and value."""
        if self.name is not None and not re.fullmatch(r"[\w.+=-]+", self.name):
            raise UserError(f"name={self.name!r}: letters, digits and . _ + = - only; it becomes a folder's name.")
        self.image_encoder.validate()
        self.connector.validate()
        for section in (self.decoder, self.data, self.optim, self.engine, self.train):
            section.validate()
        self.packing.validate(self.image_tokens)
        if self.train.global_batch % self.engine.micro_batch:
            raise UserError(
                f"train.global_batch={self.train.global_batch} must be a multiple of "
                f"engine.micro_batch={self.engine.micro_batch}."
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise UserError(f"optim.warmup_steps={self.optim.warmup_steps} must be below train.steps={self.train.steps}.")

    @property
    def image_tokens(self) -> int:
        """Tokens of the decoder's sequence that one image takes."""
        return self.connector.tokens(self.image_encoder.grid())

    def identity(self) -> dict[str, Any]:
        """All that changes the weights, as plain values: what the run's hash is made of.

        Left out: names, where and how fast it runs, how data are fetched and how much of them may be lost, and how often it logs,
        saves and validates.
        """
        settings = asdict(self)
        for key in ("name", "ablation", "scale", "connector_width", "high_resolution"):
            settings.pop(key)
        settings["engine"] = {"precision": self.engine.precision}
        settings["optim"] = self.optim.identity()
        settings["data"].pop("access")
        for source in settings["data"]["sources"].values():
            source.pop("max_faults")
        if (order := list(self.data.sources)) != sorted(order):  # which comes first decides ties, hence the stream
            settings["data"]["order"] = order
        for key in ("log_every", "checkpoint_every", "keep_checkpoints", "validation_sequences"):
            settings["train"].pop(key)
        return settings

    def hash(self, corpus_fingerprint: str) -> str:
        """Eight hex digits over identity and corpus: the same on every rank and however the run was started."""
        text = json.dumps({"config": self.identity(), "corpus": corpus_fingerprint}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


register("decoder", DecoderConfig, "schema/decoder")
