"""What makes a step fast changes nothing: every fast path against the plain one, loss and gradients."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.command import compose
from configs.errors import UserError
from data_pipelines import native
from data_pipelines.batch import IGNORE, PackedBatch
from data_pipelines.config import DataConfig, PackingConfig, SourceConfig
from data_pipelines.lanes import LaneStream
from data_pipelines.loader import PackedLoader
from mm1.config import EngineConfig, TrainConfig
from mm1.model import depthwise, packed_attention
from mm1.model.image_encoder import ImageEncoder, build_image_encoder
from mm1.model.loss import chunked_losses, token_losses
from mm1.model.multimodal import MultimodalLM
from mm1.model.onednn import conv_norm_pairs, use_onednn
from mm1.speed import on_device, prepare
from tests.corpus import tokenizer, write_corpus
from tests.models import AVGPOOL, IMAGE_SIZE, LLAMA, TRAIN_OVERRIDES, tiny_model

torch.set_num_threads(1)
CPU = torch.device("cpu")
NAMES = ("input_ids", "images", "image_slots", "document_ids", "position_ids", "labels")
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
WINDOWED = LLAMA | {"model_type": "mistral", "sliding_window": 7}
WINDOWED_IN_PART = LLAMA | {"model_type": "gemma3_text", "sliding_window": 7, "head_dim": 8}
WINDOWED_IN_PART |= {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    corpus = write_corpus(tmp_path_factory.mktemp("corpora") / "tiny")
    data = DataConfig(str(corpus), {name: SourceConfig(name, 1 / 3) for name in ("captions", "interleaved", "text")})
    stream = LaneStream(
        corpus, data, PackingConfig(seq_len=128, max_images=6), tokenizer(), image_tokens=4, global_batch=6, seed=0
    )
    made = next(islice(PackedLoader(stream, image_size=IMAGE_SIZE, micro_batch=6), 1))[0]
    assert (made.document_ids == 0).any()
    assert made.document_ids.max() > 4
    return made


def step(model: MultimodalLM, batch: PackedBatch, **extra: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses with their z, and every parameter's gradient of their sum."""
    model.zero_grad()
    output = model(**{name: getattr(batch, name) for name in NAMES}, **extra)
    assert output.token_losses is not None
    (output.token_losses.sum() + 0.1 * output.token_z.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return torch.stack([output.token_losses.detach(), output.token_z.detach()]), gradients


def close(
    ours: tuple[torch.Tensor, dict[str, torch.Tensor]], plain: tuple[torch.Tensor, dict[str, torch.Tensor]], tol: float
) -> None:
    """Relative to each tensor's own size, or a thousandth of the largest gradient's: some are rounding alone (the keys' bias)."""
    floor = 1e-3 * max(float(gradient.norm()) for gradient in plain[1].values())
    for name, expected in {"loss": plain[0], **plain[1]}.items():
        found = ours[0] if name == "loss" else ours[1][name]
        error = float((found.double() - expected.double()).norm()) / max(float(expected.norm()), floor)
        assert error < tol, (name, error)


# ---------------------------------------------------------------------------------------------------------- packed attention


@pytest.mark.parametrize(
    "decoder",
    [LLAMA, LLAMA | {"num_key_value_heads": 4}, LLAMA | {"model_type": "qwen2"}, GPT2, WINDOWED, WINDOWED_IN_PART],
    ids=["grouped", "all heads", "qwen2", "gpt2", "mistral", "gemma3"],
)
def test_packed_attention_equals_a_dense_mask(batch: PackedBatch, decoder: dict[str, Any]) -> None:
    model = tiny_model(decoder=decoder).train().double()
    plain = step(model, batch)
    model.decoder.set_attn_implementation(packed_attention.NAME)
    close(step(model, batch), plain, 1e-12)


@pytest.mark.parametrize("decoder", [WINDOWED, WINDOWED_IN_PART], ids=["mistral", "gemma3"])
def test_a_packed_document_is_seen_through_the_windows_of_one_alone(batch: PackedBatch, decoder: dict[str, Any]) -> None:
    """Logits under the dense mask against transformers' own masks for one document."""
    model = tiny_model(decoder=decoder).eval().double()
    row = int((batch.document_ids == 2).sum(dim=1).argmax())
    own = batch.document_ids[row] == 2
    assert own.sum() > 7
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids[row : row + 1],
            document_ids=batch.document_ids[row : row + 1],
            position_ids=batch.position_ids[row : row + 1],
        ).logits[0, own]
        alone = model.decoder(input_ids=batch.input_ids[row : row + 1, own]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_packed_attention_survives_recomputation(batch: PackedBatch) -> None:
    model = tiny_model().train().double()
    plain = step(model, batch)
    prepare(model, EngineConfig(checkpointing=True, kernels="plain"), CPU)
    assert model.decoder.config._attn_implementation == "packed"
    assert model.decoder.is_gradient_checkpointing
    close(step(model, batch), plain, 1e-12)


def test_packed_documents_do_not_see_each_other_or_the_future() -> None:
    """One token's value changed: outputs move after it in its own document, and nowhere else."""
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]])
    segments = packed_attention.document_segments(ids)
    assert segments[0, 0].tolist() == [[0, 0, 3], [0, 3, 5], [0, 8, 1], [1, 0, 8], [1, 8, 2]]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 10, 8, generator=generator) for _ in range(3))
    before, _ = packed_attention.packed_attention(nn.Module(), q, k, v, segments)
    v[0, :, 5] += 1
    after, _ = packed_attention.packed_attention(nn.Module(), q, k, v, segments)
    moved = (before != after).flatten(2).any(-1)
    assert moved.nonzero().tolist() == [[0, 5], [0, 6], [0, 7]]
    assert not after[0, 9].any()  # padding


def test_a_batch_of_padding_alone_runs() -> None:
    model = tiny_model().train()
    prepare(model, EngineConfig(), CPU)
    nothing = {"input_ids": torch.ones(2, 8, dtype=torch.long), "document_ids": torch.zeros(2, 8, dtype=torch.long)}
    output = model(**nothing, labels=torch.full((2, 8), IGNORE))
    output.token_losses.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_buckets_waste_little_and_hold_every_token_once() -> None:
    lengths = [17, 300, 16, 3, 40, 18, 41, 2, 1, 74]
    ids = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])[None]
    plan = packed_attention.plan(packed_attention.document_segments(ids), CPU)
    assert sum(n * length for n, length in plan.buckets) == len(plan.rows) <= sum(lengths) * packed_attention.FILL
    assert sorted(plan.columns[plan.real].tolist()) == list(range(sum(lengths)))
    assert len(plan.buckets) < len(lengths)


@pytest.mark.parametrize("window", [None, 7])
def test_block_masks_are_the_dense_mask(batch: PackedBatch, window: int | None) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = torch.randn(3, 6, 2, 128, 16).unbind()
    block_mask = packed_attention.document_block_mask(batch.document_ids, window)
    dense = packed_attention.document_mask(batch.document_ids, window)
    with torch.no_grad():
        torch.testing.assert_close(
            flex_attention(q, k, v, block_mask=block_mask), F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        )


def test_generation_is_untouched() -> None:
    ids, images = torch.tensor([[2, 2, 2, 2, 60, 61], [1, 2, 2, 2, 2, 62]]), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    options = {
        "attention_mask": (ids != 1).long(),
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    model = tiny_model().eval()
    plain = model.generate(input_ids=ids, images=images, **options)
    prepare(model, EngineConfig(), CPU)
    assert torch.equal(model.generate(input_ids=ids, images=images, **options), plain)


# ---------------------------------------------------------------------------------------------------------------------- loss


def test_token_losses_are_cross_entropy_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 11, dtype=torch.float64, generator=generator)).requires_grad_()
    labels = torch.randint(0, 11, (7,), generator=generator)
    losses, log_partition = token_losses(logits, labels)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(log_partition, logits.logsumexp(-1))
    assert torch.autograd.gradcheck(lambda x: token_losses(x, labels), (logits,))
    rounded = logits.detach().bfloat16().requires_grad_()
    losses, _ = token_losses(rounded, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(rounded.float(), labels, reduction="none"))


@pytest.mark.parametrize("chunk", [1, 5, 64, 10_000])
def test_a_loss_in_chunks_is_the_same_loss(batch: PackedBatch, chunk: int) -> None:
    model = tiny_model().train().double()
    plain = step(model, batch)
    model.loss_chunk = chunk
    close(step(model, batch), plain, 1e-12)


def test_chunks_do_not_depend_on_the_number_of_labels() -> None:
    """Under ZeRO-3 every rank must come to the head equally often, also one without a label."""
    calls: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return hidden @ torch.ones(4, 9)

    losses, _ = chunked_losses(head, torch.ones(2, 4, requires_grad=True), torch.tensor([1, 2]), 5)
    assert len(losses) == 2
    assert len(calls) == 5
    assert len(chunked_losses(head, torch.ones(0, 4), torch.zeros(0, dtype=torch.long), 5)[0]) == 0


def test_chunks_refuse_a_decoder_that_scales_its_logits(batch: PackedBatch) -> None:
    model = tiny_model(decoder=LLAMA | {"model_type": "granite", "logits_scaling": 2.0}).train()
    model.loss_chunk = 8
    with pytest.raises(UserError, match="loss_chunk=8"):
        step(model, batch)


# -------------------------------------------------------------------------------------------------------------------- oneDNN


def tower(architecture: str, size: int = 64, stride: int = 16) -> ImageEncoder:
    torch.manual_seed(0)
    settings = {"kind": "timm", "architecture": architecture, "image_size": size, "patch_size": stride}
    encoder = build_image_encoder(settings, load_weights=False).train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return encoder


def encode(encoder: ImageEncoder, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    encoder.zero_grad()
    patches = encoder(images)
    generator = torch.Generator().manual_seed(1)
    (patches * torch.randn(patches.shape, dtype=torch.float64, generator=generator).to(patches.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(encoder.parameters()))
    return patches.detach(), gradients


@pytest.mark.parametrize("architecture", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050"])
def test_a_folded_batch_norm_is_the_batch_norm(architecture: str) -> None:
    """ReLU6 with asymmetric padding, ReLU with shortcuts, hard-swish with squeeze-excite. In float64 through torch's
    convolutions, in float32 through oneDNN's."""
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = tower(architecture)
    folded = deepcopy(encoder)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    assert use_onednn(folded) == norms > 10
    assert folded.state_dict().keys() == encoder.state_dict().keys()
    plain = encode(encoder.double(), images)
    close(encode(deepcopy(folded), images), plain, 2e-4)
    close(encode(folded.double(), images), plain, 1e-11)


@pytest.mark.parametrize("channels", [16, 21, 40])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (5, 1, 2), (5, 2, 0), (5, 2, 2), (4, 3, 1), (7, 1, 3), (5, 1, 4)]
)
def test_depthwise_gradients_are_torchs(channels: int, kernel: int, stride: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((9, 12), (5, 5), (1, 7)):
        if min(height, width) + 2 * padding < kernel:
            continue
        x = torch.randn(3, channels, height, width, generator=generator)
        weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x.double(), weight, None, stride, padding, 1, channels)
        gradient = torch.randn(y.shape, generator=generator)
        (expected,) = torch.autograd.grad(y, weight, gradient.double())
        found = depthwise.weight_gradient(x, gradient, kernel, stride, padding)
        assert found is not None
        assert (found - expected).norm() / expected.norm() < 1e-6
        torch.set_num_threads(2)
        assert torch.equal(depthwise.weight_gradient(x, gradient, kernel, stride, padding), found)
        torch.set_num_threads(1)


def test_without_a_compiler_torch_computes_the_gradients(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*args: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(native, "load", missing)
    depthwise._kernel.cache_clear()
    encoder = tower("tf_efficientnet_lite0")
    folded = deepcopy(encoder)
    use_onednn(folded)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    close(encode(folded, images), encode(encoder.double(), images), 2e-4)
    depthwise._kernel.cache_clear()
    assert capsys.readouterr().err.count("depthwise.c cannot be compiled (no C compiler)") == 1


def test_only_a_convolution_that_feeds_its_norm_alone_is_folded() -> None:
    class Tower(nn.Module):
        image_size = 8

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
            self.norms.eval()
            self.norms[3].train()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.norms[0](self.a(images.float()))
            y = self.b(x)
            x = self.norms[1](y) + y  # used twice
            x = self.norms[2](self.c(x) * 2)  # not what the convolution made
            return self.norms[3](self.d(x))  # statistics of the batch

    tower = Tower()
    assert conv_norm_pairs(tower) == [(tower.a, tower.norms[0])]


# ---------------------------------------------------------------------------------------------------------------- the whole step


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_chunk": 32}, {"checkpointing": True, "checkpoint_encoder": True}, {"compile": "aot_eager"}],
    ids=["auto", "chunks", "recomputed", "compiled"],
)
def test_a_prepared_model_takes_the_plain_step(batch: PackedBatch, settings: dict[str, Any]) -> None:
    abstractor = AVGPOOL | {"_target_": "mm1.model.connector.CAbstractor", "hidden": 16}
    model = tiny_model(connector=abstractor).train()
    model.decoder.resize_token_embeddings(320)
    plain = step(deepcopy(model).double(), batch)
    names = list(model.state_dict())
    prepare(model, EngineConfig(**settings), CPU)
    close(step(model, batch), plain, 1e-4)
    assert list(model.state_dict()) == names
    assert list(on_device([batch], CPU)) == [batch]


def test_the_benchmarks_peer_computes_the_same_loss(batch: PackedBatch) -> None:
    """LLaVA on packed and on padded documents: what benchmarks/train.py times is the same work."""
    from benchmarks.llava import llava, packed_inputs, padded_inputs

    model = tiny_model().train()
    plain, _ = step(model, batch)
    packed, padded = packed_inputs(model, batch), padded_inputs(model, [batch], tokenizer().pad_token_id, 5)
    peer = llava(model)
    with torch.no_grad():
        torch.testing.assert_close(peer(**packed).loss, plain[0].mean())
        counts = [int((inputs["labels"] != IGNORE).sum()) for inputs in padded]
        total = sum(float(peer(**inputs).loss) * count for inputs, count in zip(padded, counts, strict=True) if count)
    assert sum(counts) == len(plain[0])
    assert total == pytest.approx(float(plain[0].sum()), rel=1e-4)


def test_speed_is_no_part_of_a_run() -> None:
    options = ["attention=dense", "kernels=plain", "loss_chunk=8", "compile=inductor", "liger=true", "checkpoint_encoder=true"]
    plain = compose("train", TrainConfig, TRAIN_OVERRIDES)
    fast = compose("train", TrainConfig, [*TRAIN_OVERRIDES, *(f"engine.{option}" for option in options)])
    assert fast.hash("x") == plain.hash("x")


@pytest.mark.parametrize("setting", [{"attention": "sparse"}, {"kernels": "fast"}, {"loss_chunk": -1}])
def test_impossible_settings_are_named(setting: dict[str, Any]) -> None:
    ((key, value),) = setting.items()
    with pytest.raises(UserError, match=f"engine.{key}={value}"):
        EngineConfig(**setting).validate()


def test_what_a_machine_or_a_decoder_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.liger=true"):
        prepare(tiny_model(), EngineConfig(liger=True), CPU)
    model = tiny_model()
    model.decoder.set_attn_implementation("eager")
    prepare(model, EngineConfig(), CPU)
    assert model.decoder.config._attn_implementation == "eager"  # auto leaves a choice alone
    with pytest.raises(UserError, match=r"engine\.attention=packed"):
        prepare(model, EngineConfig(attention="packed"), CPU)
