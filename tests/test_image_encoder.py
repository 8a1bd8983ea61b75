"""Image encoders: the same patches as the libraries they come from, at any resolution, and nothing that does not train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from configs import CONFIG_DIR
from configs.errors import UserError
from mm1.model import config, geometry, pretrained
from mm1.model.image_encoder import (
    ImageEncoder,
    OpenClipEncoder,
    TimmEncoder,
    TransformersEncoder,
    build_image_encoder,
    resize_position_table,
)

torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
SMALL |= {"patch_size": 8}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    "quick_gelu": True,
}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small CLIP known to open_clip by name."""
    path = tmp_path_factory.mktemp("open_clip") / "mm1-test-tiny.json"
    path.write_text(json.dumps(CLIP))
    open_clip.add_model_config(path)
    return path.stem


def hf(model_type: str, image_size: int = 32, **more: Any) -> TransformersEncoder:
    return TransformersEncoder(config=SMALL | {"model_type": model_type}, image_size=image_size, **more)


def vit(image_size: int = 32, architecture: str = "vit_tiny_patch16_224", **more: Any) -> TimmEncoder:
    return TimmEncoder(architecture, image_size=image_size, options=VIT, **more)


FAMILIES = ["clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit"]
FAMILIES += ["aimv2_vision_model", "vit"]
# One line an encoder.
ENCODERS = {
    "open_clip": lambda: OpenClipEncoder(CLIP, image_size=48),
    "open_clip resnet": lambda: OpenClipEncoder(
        {"embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}}, image_size=64
    ),
    "timm vit": lambda: vit(48),
    "timm vit, one block": lambda: vit(48, depth=1),
    "timm dinov2": lambda: TimmEncoder("vit_small_patch14_reg4_dinov2", image_size=28, options={"embed_dim": 24, "depth": 1}),
    "timm cnn, stride 16": lambda: TimmEncoder("tf_efficientnet_lite0", image_size=64, patch_size=16),
    "timm cnn, stride 32": lambda: TimmEncoder("tf_efficientnet_lite0", image_size=64, patch_size=32),
} | {name: (lambda name=name: hf(name, 48)) for name in FAMILIES}


def pixels(encoder: ImageEncoder, number: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = encoder.image_size
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ENCODERS)
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name]().train()
    images = pixels(encoder)
    patches = encoder(images)
    side = encoder.image_size // encoder.patch_size
    assert encoder.grid == (side, side)
    assert patches.shape == (2, encoder.num_patches, encoder.width)

    patches.square().mean().backward()
    assert not [n for n, p in encoder.named_parameters() if p.grad is None], "every parameter gets a gradient"

    # A checkpoint: settings as JSON and a state dict, no weight file, no network.
    settings = json.loads(json.dumps(encoder.settings()))
    other = build_image_encoder(settings, load_weights=False)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.eval()(images), encoder.eval()(images))
    assert other.settings() == settings
    assert not {name for name, _ in encoder.named_buffers()} - set(encoder.state_dict()), "a checkpoint holds every buffer"

    assert isinstance(encoder.flops_per_image(), int)
    assert encoder.flops_per_image() > 0


# ------------------------------------------------------------------------------------------- the underlying models' own


def test_open_clip_patches_are_its_own_tokens(tiny_clip: str, tmp_path: Path) -> None:
    model = open_clip.create_model(tiny_clip).eval()
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    encoder = OpenClipEncoder(tiny_clip, weights=str(tmp_path / "clip.safetensors"), image_size=32).eval()
    model.visual.output_tokens = True
    images = pixels(encoder)
    _, tokens = model.visual(encoder.normalise(images))
    assert torch.equal(encoder(images), tokens)
    assert encoder.width == 32
    assert encoder.grid == (4, 4)


def test_open_clip_positions_are_resized_as_open_clip_does(tiny_clip: str, tmp_path: Path) -> None:
    model = open_clip.create_model(tiny_clip)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    encoder = OpenClipEncoder(tiny_clip, weights=str(tmp_path / "clip.pt"), image_size=56)
    state = {"visual.positional_embedding": model.visual.positional_embedding.detach().clone()}
    open_clip.model.resize_pos_embed(state, open_clip.create_model(tiny_clip, force_image_size=56))
    assert torch.equal(encoder.tower.positional_embedding, state["visual.positional_embedding"])
    # The same resampling serves the transformers towers.
    assert torch.equal(resize_position_table(model.visual.positional_embedding, 50), state["visual.positional_embedding"])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_patches_are_the_last_hidden_states(family: str) -> None:
    encoder = hf(family).eval()
    images = pixels(encoder)
    normal = encoder.normalise(images)
    if family == "siglip2_vision_model":  # the model takes its processor's flat patches
        processor = transformers.Siglip2ImageProcessor(do_resize=False, patch_size=8, max_num_patches=16)
        flat = processor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")
        hidden = encoder.tower(**flat).last_hidden_state
    else:
        hidden = encoder.tower(pixel_values=normal).last_hidden_state
    if family == "clip_vision_model":
        hidden = encoder.tower.post_layernorm(hidden)
    prefix = {"clip_vision_model": 1, "dinov2": 1, "vit": 1, "dinov2_with_registers": 5}
    dropped = hidden.shape[1] - 16
    assert dropped == prefix.get(family, encoder.tower.config.to_dict().get("num_register_tokens", -1) + 1)
    assert torch.allclose(encoder(images), hidden[:, dropped:], atol=1e-5)


def test_transformers_from_a_clip_folder(tmp_path: Path) -> None:
    """The vision half of a saved CLIP, with the folder's own normalisation, at the native resolution and at another."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    processor = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = TransformersEncoder(str(tmp_path), image_size=32).eval()
    assert encoder.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    images = pixels(encoder)
    hidden = model.vision_model(pixel_values=encoder.normalise(images)).last_hidden_state
    assert torch.allclose(encoder(images), model.vision_model.post_layernorm(hidden)[:, 1:], atol=1e-6)

    larger = TransformersEncoder(str(tmp_path), image_size=56)
    table = larger.tower.embeddings.position_embedding.weight
    assert torch.equal(table, resize_position_table(model.vision_model.embeddings.position_embedding.weight, 50))
    assert torch.equal(table[0], model.vision_model.embeddings.position_embedding.weight[0]), "the class token has no place"
    assert larger(pixels(larger)).shape == (2, 49, 32)


def test_an_enclosing_transformers_model_leaves_the_tower_alone() -> None:
    """Its post_init walks the children and could initialise them anew."""

    class Around(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, tower: nn.Module) -> None:
            super().__init__(transformers.PretrainedConfig())
            self.tower = tower
            self.post_init()

    encoder = hf("siglip_vision_model", 48)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    Around(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_timm_patches_and_positions_are_timms(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **VIT).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    same = vit(32, weights=str(tmp_path / "vit.safetensors")).eval()
    images = pixels(same)
    assert torch.equal(same(images), model.forward_features(same.normalise(images))[:, 1:])
    larger = vit(56, weights=str(tmp_path / "vit.safetensors")).eval()
    model.set_input_size(img_size=56)
    assert torch.equal(larger.tower.pos_embed, model.pos_embed)
    assert torch.equal(larger(pixels(larger)), model.forward_features(larger.normalise(pixels(larger)))[:, 1:])


def test_timm_depth_cuts_blocks_and_keeps_the_norm() -> None:
    encoder = vit(32, depth=1).eval()
    assert len(encoder.tower.blocks) == 1
    tower = encoder.tower
    x = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(encoder.normalise(pixels(encoder))))))
    assert torch.allclose(encoder(pixels(encoder)), tower.norm(tower.blocks[0](x))[:, 1:], atol=1e-6)


@pytest.mark.parametrize(("stride", "width"), [(16, 112), (32, 320)])
def test_a_cnns_stage_is_a_row_major_grid(stride: int, width: int) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder("tf_efficientnet_lite0", image_size=64, patch_size=stride).eval()
    model = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    model.load_state_dict(encoder.tower.state_dict(), strict=False)
    feature_map = model(encoder.normalise(pixels(encoder)))[{16: 3, 32: 4}[stride]]
    patches = encoder(pixels(encoder))
    assert feature_map.shape == (2, width, *encoder.grid)
    assert torch.allclose(patches[:, 1], feature_map[:, :, 0, 1], atol=1e-5), "the second patch is the first row's second"
    assert torch.allclose(patches, feature_map.flatten(2).transpose(1, 2), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("name", ["open_clip", "timm vit", "siglip_vision_model", "dinov2"])
def test_normalisation_is_the_towers_own(name: str) -> None:
    encoder = ENCODERS[name]()
    image = pixels(encoder, 1)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    size = encoder.image_size
    if name == "open_clip":
        expected = open_clip.image_transform(size, is_train=False)(picture)
    elif name == "timm vit":
        own = timm.get_pretrained_cfg("vit_tiny_patch16_224")
        expected = timm.data.create_transform((3, size, size), mean=own.mean, std=own.std, crop_pct=1.0)(picture)
    else:
        kind = {"siglip_vision_model": transformers.SiglipImageProcessor, "dinov2": transformers.BitImageProcessor}[name]
        known = {"dinov2": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}}.get(name, {})
        processor = kind(do_resize=False, do_center_crop=False, **known)
        expected = torch.as_tensor(np.asarray(processor(picture)["pixel_values"][0]))
    assert torch.allclose(encoder.normalise(image)[0], expected, atol=1e-6)


def test_normalisation_follows_the_parameters_dtype() -> None:
    encoder = ENCODERS["open_clip"]()
    exact = encoder.normalise(pixels(encoder))
    half = encoder.bfloat16()
    assert half.normalise(pixels(half)).dtype == torch.bfloat16
    grey_level = 1 / 255 / encoder.std.float().min()
    assert (half.normalise(pixels(half)).float() - exact).abs().max() < 2 * grey_level
    assert half(pixels(half)).dtype == torch.bfloat16


def test_open_clip_file_of_unclear_normalisation_is_refused(tmp_path: Path) -> None:
    """ViT-L-14's tags disagree, and a file does not say which it is."""
    weights = tmp_path / "some.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(UserError, match=r"image_encoder.mean=null.*openai"):
        OpenClipEncoder("ViT-L-14", weights=str(weights), image_size=224)


# ---------------------------------------------------------------------------------------------------------- batch norm


def test_batch_norm_keeps_its_statistics_and_trains_its_scale() -> None:
    encoder = TimmEncoder("tf_efficientnet_lite0", image_size=64, patch_size=16).train()
    before = {n: b.clone() for n, b in encoder.named_buffers()}
    images = pixels(encoder, 3)
    alone, together = encoder(images[:1]), encoder(images)[:1]
    assert torch.allclose(alone, together, atol=1e-4), "no image sees another through the statistics"
    together.sum().backward()
    norm = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    assert not norm.training
    assert norm.weight.grad is not None
    assert all(torch.equal(b, before[n]) for n, b in encoder.named_buffers())


# --------------------------------------------------------------------------------------------- cost, configuration, errors


@pytest.mark.parametrize(
    ("architecture", "size", "gigaflops"),
    [("ViT-L-14", 224, 162), ("ViT-L-14-336", 336, 382), ("ViT-H-14", 224, 335), ("ViT-H-14-378-quickgelu", 378, 1007)],
)
def test_flops_agree_with_open_clips_profile(architecture: str, size: int, gigaflops: int) -> None:
    with torch.device("meta"):
        encoder = OpenClipEncoder(architecture, image_size=size)
    assert round(encoder.flops_per_image() / 1e9) == gigaflops


def from_yaml(option: str, *overrides: str) -> config.ImageEncoderConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        raw = compose(overrides=[f"+image_encoder={option}", *overrides])
    return OmegaConf.to_object(raw)["image_encoder"]


OPTIONS = sorted(path.stem for path in (CONFIG_DIR / "image_encoder").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_builds(option: str) -> None:
    """On the meta device and without weights; what is known by a hub id alone is only checked."""
    chosen = from_yaml(option)
    chosen.validate()
    assert (CONFIG_DIR / "image_encoder" / f"{option}.yaml").read_text().startswith("# ")
    if getattr(chosen, "path", None) is None:
        with torch.device("meta"):
            encoder = build_image_encoder(chosen.settings(), load_weights=False)
        assert encoder.grid == chosen.grid()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("image_encoder.image_size=60", "image_encoder.image_size=60.*56 or 64"),
        ("image_encoder.train=half", "image_encoder.train=half.*frozen"),
        ("image_encoder.lr_scale=0", "image_encoder.lr_scale=0"),
        ("image_encoder.depth=0", "image_encoder.depth=0"),
        ("image_encoder.mean=[0.5]", "image_encoder.mean"),
        ("image_encoder.path=somewhere", "image_encoder.path=somewhere"),
    ],
)
def test_impossible_settings_are_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_yaml("vit_tiny", override).validate()


def test_wrong_keys_and_types_are_hydras() -> None:
    for override in ("image_encoder.image_size=64.5", "image_encoder.size=64"):
        with pytest.raises(ConfigCompositionException):
            from_yaml("vit_tiny", override)


def test_geometry() -> None:
    assert geometry.grid(336, 14) == (24, 24)
    assert geometry.square_side(144) == 12
    for wrong in (0, -4, 2, 63):
        with pytest.raises(UserError, match=f"connector.num_tokens={wrong}"):
            geometry.square_side(wrong)
    with pytest.raises(UserError, match=r"image_encoder.image_size=384.*378 or 392"):
        geometry.check_image_size(384, 14)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: vit(32, patch_size=4), "image_encoder.patch_size=4"),
        (lambda: vit(32, depth=3), "image_encoder.depth=3.*2 blocks"),
        (lambda: vit(32, weights="/nowhere.safetensors"), "image_encoder.weights=/nowhere"),
        (lambda: vit(32, weights="package:nothing"), "efficientnet_lite0"),
        (lambda: TimmEncoder("vit_unheard_of", image_size=32), "image_encoder.architecture=vit_unheard_of"),
        (lambda: TimmEncoder("tf_efficientnet_lite0", image_size=64, patch_size=64), "strides"),
        (lambda: TimmEncoder("tf_efficientnet_lite0", image_size=64, depth=2), "image_encoder.depth=2"),
        (lambda: OpenClipEncoder("ViT-unheard-of", image_size=32), "image_encoder.architecture=ViT-unheard-of"),
        (lambda: OpenClipEncoder("ViT-B-32", image_size=32, weights="no_tag"), "image_encoder.weights=no_tag.*openai"),
        (lambda: TransformersEncoder("/nowhere", image_size=32), "image_encoder.path=/nowhere"),
        (lambda: TransformersEncoder(image_size=32, config={"model_type": "nothing"}), "model_type='nothing'"),
        (lambda: build_image_encoder({"kind": "os.system"}, load_weights=False), "image_encoder.kind='os.system'"),
        (lambda: build_image_encoder({"kind": "timm", "architecture": "a", "image_size": 8, "x": 1}, load_weights=False), "'x'"),
    ],
)
def test_wrong_settings_are_named(build: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT).state_dict()
    del state["blocks.1.attn.proj.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"blocks.1.attn.proj.weight"):
        vit(32, weights=str(tmp_path / "part.safetensors"))


# ------------------------------------------------------------------------------------------------------ package weights


def test_efficientnet_names_are_converted(tmp_path: Path) -> None:
    """A torch file under other names but in the same order becomes timm's state dict; another order is refused."""
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {f"_layer{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}
    torch.save(renamed, tmp_path / "weights.pth")
    converted = pretrained.efficientnet((tmp_path / "weights.pth").read_bytes(), "tf_efficientnet_lite0")
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
    torch.save(dict(reversed(renamed.items())), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not match"):
        pretrained.efficientnet((tmp_path / "weights.pth").read_bytes(), "tf_efficientnet_lite0")


def test_onnx_tensors_and_nodes_are_read() -> None:
    """A file written by hand after onnx.proto3: one tensor of 1 x 300 and one MatMul that uses it."""

    def message(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    values = torch.arange(300.0)
    tensor = varint(1 << 3) + varint(1) + varint(1 << 3) + varint(300) + varint(2 << 3) + varint(1)
    tensor += message(8, b"w") + message(9, values.numpy().tobytes())
    node = message(1, b"x") + message(1, b"w") + message(2, b"y") + message(3, b"/fc/MatMul") + message(4, b"MatMul")
    tensors, nodes = pretrained.onnx_graph(varint(1 << 3) + varint(8) + message(7, message(1, node) + message(5, tensor)))
    assert torch.equal(tensors["w"], values[None])
    assert nodes == {"/fc/MatMul": ["x", "w"]}


def test_package_weights_without_a_network_point_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM1_HOME", str(tmp_path))

    def refuse(name: str, version: str, into: Path, folder: Path, hint: str) -> None:
        raise UserError(f"no network. {hint}")

    monkeypatch.setattr("data_pipelines.packages._pip_download", refuse)
    with pytest.raises(UserError, match="image_encoder=vit_tiny"):
        pretrained.ensure_weights("efficientnet_lite0")
