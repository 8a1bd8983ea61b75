"""Connectors: equality with written-out references, the published parameter counts, and what every connector must hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from torch import nn

from configs import CONFIG_DIR
from configs.errors import UserError
from mm1.model import config, connector, geometry
from mm1.model.connector import Connector, build_connector, trust_connector

torch.set_num_threads(1)

# One line a connector: its option, and settings that make it small.
CONNECTORS = [
    pytest.param("avgpool", {}, id="avgpool"),
    pytest.param("attnpool", {"heads": 4}, id="attnpool"),
    pytest.param("resampler", {"depth": 2, "heads": 2, "head_width": 8}, id="resampler"),
    pytest.param("cabstractor", {"depth": 1, "hidden": 24}, id="cabstractor"),
    pytest.param("cabstractor", {"depth": 0}, id="cabstractor-depth0"),
    pytest.param("mlp", {}, id="mlp"),
    pytest.param("pixelshuffle", {}, id="pixelshuffle"),
]
GRID, WIDTH, OUT = (6, 6), 16, 40


def from_yaml(option: str, *overrides: str) -> config.ConnectorConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        # connector_width is the scale's business, of which there is none here
        raw = compose(overrides=[f"+connector={option}", "+connector_width=1024", *overrides])
    return OmegaConf.to_object(raw)["connector"]


def small(option: str, **settings: object) -> Connector:
    tokens = {} if option == "mlp" else {"num_tokens": 9}
    chosen = from_yaml(option, *(f"connector.{key}={value}" for key, value in (tokens | settings).items()))
    return build_connector(chosen.settings(GRID), in_width=WIDTH, grid=GRID, out_width=OUT)


@pytest.mark.parametrize(("option", "settings"), CONNECTORS)
class TestEveryConnector:
    def test_shape_and_gradients(self, option: str, settings: dict) -> None:
        torch.manual_seed(0)
        module = small(option, **settings)
        patches = torch.randn(2, 36, WIDTH, requires_grad=True)
        before = patches.detach().clone()
        tokens = module(patches)
        assert tokens.shape == (2, 36 if option == "mlp" else 9, OUT) == (2, module.num_tokens, OUT)
        assert torch.equal(patches.detach(), before), "cached features must stay"
        tokens.square().mean().backward()
        assert patches.grad is not None
        # A key's bias shifts all scores of a query alike, which softmax does not see: its gradient is 0, but it is there.
        assert not [name for name, p in module.named_parameters() if p.grad is None]

    def test_images_do_not_mix(self, option: str, settings: dict) -> None:
        module = small(option, **settings).eval()
        patches = torch.randn(3, 36, WIDTH)
        assert torch.allclose(module(patches)[1:2], module(patches[1:2]), atol=1e-5)

    def test_checkpoint_settings_rebuild_it(self, option: str, settings: dict) -> None:
        module = small(option, **settings)
        other = small(option, **settings)
        other.load_state_dict(module.state_dict())
        patches = torch.randn(1, 36, WIDTH)
        assert torch.equal(module(patches), other(patches))

    def test_flops_grow_with_width(self, option: str, settings: dict) -> None:
        module = small(option, **settings)
        assert isinstance(module.flops_per_image(), int)
        assert module.flops_per_image() >= 2 * module.num_tokens * WIDTH * OUT


def test_average_pooling_is_the_mean_of_its_cells() -> None:
    module = small("avgpool")
    patches = torch.randn(1, 36, WIDTH)
    cells = patches.view(3, 2, 3, 2, WIDTH).mean(dim=(1, 3)).view(1, 9, WIDTH)
    assert torch.allclose(module(patches), module.proj(cells), atol=1e-6)
    assert module.flops_per_image() == 2 * 9 * WIDTH * OUT


def test_pooling_is_adaptive_where_the_grid_does_not_divide() -> None:
    """16 patches a side to 12 (224 pixels, 144 tokens): cell i covers floor(i*16/12) to ceil((i+1)*16/12)."""
    module = connector.AveragePooling(in_width=4, grid=(16, 16), out_width=4, num_tokens=144)
    patches = torch.randn(1, 256, 4)
    rows = [slice(i * 16 // 12, -(-(i + 1) * 16 // 12)) for i in range(12)]
    image = patches.view(16, 16, 4)
    expected = torch.stack([image[r, c].mean(dim=(0, 1)) for r in rows for c in rows])
    assert torch.allclose(module(patches)[0], module.proj(expected), atol=1e-6)


def test_attention_pooling_against_pytorchs_attention() -> None:
    torch.manual_seed(0)
    module = small("attnpool", heads=4)
    reference = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([module.query.weight, module.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([module.query.bias, module.key_value.bias]))
        reference.out_proj.weight.copy_(module.out.weight)
        reference.out_proj.bias.copy_(module.out.bias)
    patches = torch.randn(2, 36, WIDTH)
    keys = patches + module.positions
    tokens, _ = reference(module.latents.expand(2, -1, -1), keys, keys)
    tokens = tokens + module.mlp(module.norm(tokens))
    assert torch.allclose(module(patches), module.proj(tokens), atol=1e-5)


def reference_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Honeybee's block in plain torch, from the text: (B, C, h, w) -> (B, C', h, w)."""

    def layer_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)

    y = F.silu(layer_norm(F.conv2d(x, block.conv1.conv.weight), block.conv1.bn))
    y = F.silu(layer_norm(F.conv2d(y, block.conv2.conv.weight, padding=1, groups=y.shape[1]), block.conv2.bn))
    squeezed = F.silu(F.conv2d(y.mean((2, 3), keepdim=True), block.se.fc1.weight, block.se.fc1.bias))
    y = y * torch.sigmoid(F.conv2d(squeezed, block.se.fc2.weight, block.se.fc2.bias))
    y = layer_norm(F.conv2d(y, block.conv3.conv.weight), block.conv3.bn)
    if isinstance(block.downsample, nn.Identity):
        return F.silu(y + x)
    return F.silu(y + layer_norm(F.conv2d(x, block.downsample.conv.weight), block.downsample.bn))


def test_c_abstractor_blocks_equal_the_text() -> None:
    torch.manual_seed(0)
    stage = connector.reg_stage(2, 12, 32)
    for parameter in stage.parameters():  # norms start as the identity, which would hide a missing scale or shift
        nn.init.normal_(parameter, std=0.3)
    assert stage.b1.se.fc1.out_channels == round(0.25 * 12), "squeezed to a quarter of the block's input channels"
    assert stage.b2.se.fc1.out_channels == round(0.25 * 32)
    x = torch.randn(2, 12, 5, 5)
    expected = reference_block(stage.b2, reference_block(stage.b1, x))
    assert torch.allclose(stage(x), expected, atol=1e-5)


def test_c_abstractor_has_the_published_size() -> None:
    """2.64M parameters a 1024-wide block, 15.8M for six, readout 6.3M at D = 2048."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        module = connector.CAbstractor(in_width=1024, grid=(24, 24), out_width=2048, num_tokens=144)
    norms = 3 * 2 * 1024
    block = 1024 * 1024 + 9 * 1024 + (1024 * 256 + 256 + 256 * 1024 + 1024) + 1024 * 1024 + norms
    assert round(block / 1e6, 2) == 2.64
    assert [count(b) for b in module.stage1.children()] == [count(b) for b in module.stage2.children()] == [block] * 3
    assert round((count(module.stage1) + count(module.stage2)) / 1e6, 1) == 15.8
    assert count(module.readout) == 1024 * 2048 + 2048 + 2048 * 2048 + 2048
    assert round(count(module.readout) / 1e6, 1) == 6.3
    assert count(module) == 6 * block + count(module.readout) + 576 * 1024


def test_pixel_shuffle_keeps_every_patch_of_a_cell() -> None:
    module = small("pixelshuffle")
    patches = torch.arange(36.0).view(1, 36, 1).expand(1, 36, WIDTH)
    folded: list[torch.Tensor] = []
    module.mlp.norm.register_forward_pre_hook(lambda _, args: folded.append(args[0]))
    module(patches)
    assert folded[0].shape == (1, 9, 4 * WIDTH)
    assert folded[0][0, 4].unique().tolist() == [14, 15, 20, 21], "the middle cell of a 6 x 6 grid"


@pytest.mark.parametrize("pixels", [224, 336])
@pytest.mark.parametrize("num_tokens", [64, 144])
@pytest.mark.parametrize("option", ["avgpool", "attnpool", "cabstractor"])
def test_the_papers_grid_of_connectors(option: str, num_tokens: int, pixels: int) -> None:
    """Figure 4: three connectors, 64 and 144 tokens, 224 and 336 pixels, on the meta device."""
    grid = geometry.grid(pixels, 14)
    chosen = from_yaml(option, f"connector.num_tokens={num_tokens}")
    with torch.device("meta"):
        module = build_connector(chosen.settings(grid), in_width=1024, grid=grid, out_width=2048)
        assert module(torch.empty(1, grid[0] * grid[1], 1024)).shape == (1, num_tokens, 2048)


class TestRefusals:
    def test_hydra_refuses_types_and_unknown_keys(self) -> None:
        with pytest.raises(ConfigCompositionException, match="num_tokens"):
            from_yaml("attnpool", "connector.num_tokens=64.5")
        with pytest.raises(ConfigCompositionException, match="headz"):
            from_yaml("attnpool", "connector.headz=4")

    @pytest.mark.parametrize(
        ("option", "override", "said"),
        [
            ("avgpool", "connector.num_tokens=10", "connector.num_tokens=10.*9 or 16"),
            ("avgpool", "connector.num_tokens=null", "connector.num_tokens=null"),
            ("avgpool", "connector.num_tokens=49", "connector.num_tokens=49.*6 x 6"),
            ("mlp", "connector.num_tokens=9", "connector.num_tokens=9.*null"),
            ("pixelshuffle", "connector.num_tokens=16", "connector.num_tokens=16.*1, 4, 9, 36"),
            ("attnpool", "connector.heads=0", "connector.heads=0"),
            ("cabstractor", "connector.depth=-1", "connector.depth=-1"),
        ],
    )
    def test_impossible_numbers(self, option: str, override: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            from_yaml(option, override).tokens(GRID)

    def test_heads_that_do_not_divide(self) -> None:
        with pytest.raises(UserError, match=r"connector.heads=5"):
            small("attnpool", heads=5)

    def test_build_takes_connectors_only(self) -> None:
        for target, said in [
            ("torch.nn.Linear", "not a|is not a"),
            ("mm1.model.connector.Nothing", "not to be found"),
            ("x", "x"),
        ]:
            with pytest.raises(UserError, match=said):
                build_connector({"_target_": target}, in_width=4, grid=GRID, out_width=4)

    def test_a_model_does_not_choose_what_is_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = "import mm1.model.connector as c\nclass Own(c.AveragePooling): pass\n"
        for name in ("unasked", "by_name", "by_variable"):
            (tmp_path / f"own_connector_{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

        def build(name: str) -> Connector:
            settings = {"_target_": f"own_connector_{name}.Own", "num_tokens": 4}
            return build_connector(settings, in_width=4, grid=GRID, out_width=4)

        with pytest.raises(UserError, match=r"own_connector_unasked.*import it before.*MM1_CONNECTORS=own_connector_unasked"):
            build("unasked")
        assert "own_connector_unasked" not in sys.modules
        trust_connector("own_connector_by_name.Own")
        assert type(build("by_name")).__name__ == "Own"
        monkeypatch.setenv("MM1_CONNECTORS", "another,own_connector_by_variable")
        assert type(build("by_variable")).__name__ == "Own"

    def test_build_names_an_unknown_key(self) -> None:
        settings = {"_target_": "mm1.model.connector.AveragePooling", "num_tokens": 9, "depth": 3}
        with pytest.raises(UserError, match=r"connector.depth: AveragePooling.*num_tokens"):
            build_connector(settings, in_width=4, grid=GRID, out_width=4)


def test_every_option_has_a_schema_and_a_summary() -> None:
    files = sorted(path.stem for path in (CONFIG_DIR / "connector").glob("*.yaml"))
    assert files == sorted(config.CONNECTORS) == sorted({param.values[0] for param in CONNECTORS})
    for name in files:
        assert type(from_yaml(name)) is config.CONNECTORS[name]
        assert (CONFIG_DIR / "connector" / f"{name}.yaml").read_text().startswith("# ")
