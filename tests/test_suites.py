"""Suites: every cell composes at every scale, changes what its row says, consumes like the others, is found by its hash."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ablations import run
from ablations.law import MM1, Optimum, best_rate, fit
from ablations.suites import cost
from ablations.suites.composing import Composer, step_overrides
from ablations.suites.evaluation import check_evaluation
from ablations.suites.matching import marks, match, mismatch
from ablations.suites.planning import build_cells, suite_cells
from ablations.suites.suite import (
    SCALES,
    EvaluationConfig,
    PlannedCell,
    SuiteConfig,
    changed_keys,
    load_suite,
    plan_cells,
    suite_names,
)
from configs import CONFIG_DIR
from configs.command import compose
from configs.errors import UserError
from data_pipelines.lanes import LaneStream
from mm1.config import TrainConfig
from mm1.flops import StepFlops
from mm1.optim import peak_learning_rate
from mm1.run import run_for
from tests.corpus import write_corpus
from tests.models import TRAIN_OVERRIDES
from tests.test_fewshot import write_tasks


def suite(axes: dict[str, Any], **more: Any) -> SuiteConfig:
    made = SuiteConfig(**{"name": "test", "axes": axes, "matching": "steps"} | more)
    made.validate()
    return made


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_composes_at_every_scale(name: str, composer: Composer) -> None:
    for scale in SCALES:
        loaded = load_suite(name)
        cells = plan_cells(loaded, scale, seeds=[0, 1], composer=composer)
        assert loaded.name == name
        assert sum(cell.baseline for cell in cells) == 2
        assert cells[0].baseline
        assert len(cells) >= 4 or name == "seeds"
        assert len({(cell.config.run_name, cell.seed) for cell in cells}) == len(cells)
        identities = {str(cell.config.identity()) for cell in cells}
        assert len(identities) == len(cells), "two cells of this suite are the same training"
        assert set(loaded.paper) <= {cell.label for cell in cells} or scale != "mm1"
        for cell in cells:
            assert cell.config.image_tokens <= cell.config.packing.seq_len // 4
            assert {c.config.train.global_batch for c in cells} == {cell.config.train.global_batch}


def test_a_cells_overrides_are_its_training(composer: Composer) -> None:
    """What the composer puts together is what `python -m mm1.train` would be told, key for key."""
    for name, scale in (("connector", "tiny"), ("learning_rate", "tiny"), ("data_quality", "mm1"), ("encoder", "small")):
        for cell in plan_cells(load_suite(name), scale, composer=composer)[::3]:
            assert compose("train", TrainConfig, list(cell.overrides)) == cell.config
    ablation = ["+ablation=[connector_avgpool,resolution_high]", "train.steps=77", "+engine.deepspeed.a=1"]
    assert composer.compose(ablation) == compose("train", TrainConfig, ablation)


def test_the_papers_grid_of_connectors(composer: Composer) -> None:
    cells = plan_cells(load_suite("connector"), "mm1", composer=composer)
    shapes = {
        (c.config.connector._target_.rpartition(".")[2], c.config.image_tokens, c.config.image_encoder.image_size) for c in cells
    }
    kinds = ("AveragePooling", "AttentionPooling", "CAbstractor")
    assert shapes == {(kind, tokens, pixels) for kind in kinds for tokens in (64, 144) for pixels in (224, 336)}
    assert (cells[0].config.image_tokens, cells[0].config.image_encoder.image_size) == (144, 336)


def test_the_baseline_at_tiny_is_the_quick_starts_run(composer: Composer) -> None:
    base = compose("train", TrainConfig)
    for name in ("connector", "encoder", "freeze", "tokens", "packing", "data_text"):
        cell = plan_cells(load_suite(name), "tiny", composer=composer)[0]
        assert cell.config.hash("corpus") == base.hash("corpus"), name


# ---------------------------------------------------------------------------------------------------------------- errors


def test_all_invalid_cells_are_listed_at_once(composer: Composer) -> None:
    axes = {"tokens": {"a": ["connector.num_tokens=9"], "b": ["connector.num_tokens=10"], "c": ["connector.num_tokens=4096"]}}
    with pytest.raises(UserError, match=r"2 of 3 cells are invalid") as caught:
        plan_cells(suite(axes), "tiny", seeds=[0, 1, 2], composer=composer)
    assert "b: " in str(caught.value)
    assert "c: " in str(caught.value)
    assert str(caught.value).count("connector.num_tokens=10") == 1  # not once a seed


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        (
            {"x": {"a.b": [], "a": ["seed=0"]}, "y": {"c": [], "b.c": ["engine.micro_batch=2"]}},
            {},
            "two cells have the name test.a.b.c",
        ),
        (
            {"one": {"a": [], "b": ["connector.num_tokens=4"]}, "two": {"c": [], "d": ["connector.num_tokens=1"]}},
            {},
            r"axes one and two both set connector.num_tokens.*changes: \{two: \[connector.num_tokens\]\}",
        ),
        (
            {"one": {"a": [], "b": ["connector.num_tokens=4", "optim.peak_lr=1e-3"]}},
            {},
            r"'b' of axis one changes connector and optim .*changes: \{one: \[connector, optim\]\}",
        ),
        ({"one": {"a": [], "b": ["+ablation=[data_no_text,encoder_frozen]"]}}, {}, "changes image_encoder and data"),
        ({"one": {"a": []}}, {"baseline": {"one": "z"}}, r"baseline \{one: z\} is not there"),
        ({"one": {"a": "connector=avgpool"}}, {}, "must be a list of overrides"),
        ({"one": {"a": {"huge": ["connector=avgpool"]}}}, {}, "'huge' is no scale"),
        ({"one": {"a": {"mm1": ["connector=avgpool"]}}}, {}, "axis one has no variant at scale tiny"),
        ({"one": {"a": ["connector.numtokens=4"]}}, {}, r"connector.numtokens=4: Key 'numtokens' not in 'CAbstractorConfig'"),
        ({"one": {"a": ["connector=avgpol"]}}, {}, r"connector=avgpol: .*avgpol"),
    ],
)
def test_a_suite_that_is_wrong_says_where(axes: dict[str, Any], more: dict[str, Any], message: str, composer: Composer) -> None:
    with pytest.raises(UserError, match=message):
        plan_cells(suite(axes, **more), "tiny", composer=composer)


def test_an_axis_may_make_valid_what_all_cells_have(composer: Composer) -> None:
    """DINOv2 sees patches of 14 pixels, which the scale's 96 pixels are no multiple of; each cell says another size."""
    sizes = {"size": {"low": ["image_encoder.image_size=56"], "high": ["image_encoder.image_size=98"]}}
    extra = ["image_encoder=dinov2_s14", *step_overrides("tiny", 100, ["image_encoder=dinov2_s14"])]
    cells = plan_cells(suite(sizes), "tiny", extra=extra, composer=composer)
    assert [(c.config.image_encoder.image_size, c.config.train.steps) for c in cells] == [(56, 100), (98, 100)]
    sizes["size"]["odd"] = ["image_encoder.image_size=64"]
    with pytest.raises(UserError, match=r"1 of 3 cells are invalid:\n  odd: image_encoder\.image_size=64: .*multiple of 14"):
        plan_cells(suite(sizes), "tiny", extra=extra, composer=composer)
    with pytest.raises(UserError, match=r"^image_encoder\.image_size=96: .*multiple of 14"):
        plan_cells(suite({"rate": {"a": [], "b": ["optim.peak_lr=1e-3"]}}), "tiny", extra=extra, composer=composer)


def test_what_is_declared_may_change_together(composer: Composer) -> None:
    axes = {"one": {"a": [], "b": ["connector.num_tokens=4", "optim.peak_lr=1e-3"]}}
    cells = plan_cells(suite(axes, changes={"one": ["optim"]}), "tiny", composer=composer)
    assert changed_keys(cells[0].config, cells[1].config) == ["connector.num_tokens", "optim.peak_lr"]


def test_an_override_for_all_cells_must_not_undo_an_axis(composer: Composer) -> None:
    loaded = load_suite("connector")
    with pytest.raises(UserError, match=r"axis tokens of suite connector varies connector\.num_tokens"):
        plan_cells(loaded, "tiny", extra=["connector.num_tokens=4"], composer=composer)
    with pytest.raises(UserError, match=r"^typo=2: Key 'typo' not in"):
        plan_cells(loaded, "tiny", extra=["typo=2"], composer=composer)
    assert all(c.config.seed == 0 for c in plan_cells(loaded, "tiny", extra=["optim.z_loss=1e-4"], composer=composer))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("freeze", "seed=5", r"seed=5: .*seeds=\[\.\.\.\]"),
        ("freeze", "name=mine", "name=mine: .*named by suite and cell"),
        ("freeze", "+ablation=encoder_frozen", r"\+ablation=encoder_frozen: axis encoder .* varies image_encoder.train"),
        ("connector", "+ablation=[data_no_text,connector_avgpool]", "axis connector of suite connector varies connector"),
        ("connector", "connector={num_tokens: 4}", r"connector=\{num_tokens: 4\}: axis connector"),
        ("packing", "packing={isolate_documents: false}", r"varies packing\.isolate_documents"),
        ("data_ratio", "+ablation=data_no_text", "axis .* varies data"),
    ],
)
def test_what_would_undo_an_axis_is_refused_however_it_is_written(
    name: str, override: str, message: str, composer: Composer
) -> None:
    with pytest.raises(UserError, match=message):
        plan_cells(load_suite(name), "tiny", extra=[override], composer=composer)


@pytest.mark.parametrize(
    ("name", "override"), [("tokens", "connector=avgpool"), ("freeze", "+ablation=data_no_text"), ("connector", "data=full")]
)
def test_what_leaves_an_axis_alone_is_taken(name: str, override: str, composer: Composer) -> None:
    plan_cells(load_suite(name), "tiny", extra=[override], composer=composer)


def test_a_suite_is_called_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text((CONFIG_DIR / "suite" / "freeze.yaml").read_text())
    monkeypatch.setattr("ablations.suites.suite.CONFIG_DIR", tmp_path)
    with pytest.raises(UserError, match=r"mine\.yaml: name: freeze; it must be mine"):
        load_suite("mine")


def test_labels_may_have_any_letters(composer: Composer) -> None:
    cells = plan_cells(suite({"size": {"groß": [], "a=b/c": ["connector.num_tokens=4"]}}), "tiny", composer=composer)
    assert [(cell.label, cell.config.name) for cell in cells] == [("groß", "test.gro_"), ("a=b/c", "test.a_b_c")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["nosuch"]}, "nosuch"),
        ({"images": ["true", "shufled"]}, "images=shufled: choose from"),
        ({"limit": -3}, "limit=-3"),
        ({"shots": [-1]}, r"shots=\[-1\]"),
        ({"shots": [0, 10_000]}, "10000|10,000"),
        ({"overrides": ["batch_sise=4"]}, "batch_sise"),
        ({"overrides": ["vqa_metric=foo"]}, "foo"),
        ({"textcore": ["datasets=FOLDER", "tasks=[arcade]"]}, "arcade unknown"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused_before_training(
    settings: dict[str, Any], message: str, evaluable: str
) -> None:
    check_evaluation(EvaluationConfig(limit=2, shots=[0]), [evaluable])
    with pytest.raises(UserError, match=message):
        check_evaluation(EvaluationConfig(**{"limit": 2, "shots": [0]} | settings), [evaluable])


@pytest.fixture(scope="module")
def evaluable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a corpus with tasks."""
    return str(write_tasks(tmp_path_factory.mktemp("evaluable") / "toy"))


@pytest.mark.parametrize("images", [[], ["shuffled"]])
def test_a_suites_evaluation_has_the_true_images(images: list[str]) -> None:
    with pytest.raises(UserError, match="true must be among them"):
        suite({}, evaluation=EvaluationConfig(images=images))


def test_a_variant_that_stands_twice_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suite").mkdir()
    text = (CONFIG_DIR / "suite" / "freeze.yaml").read_text()
    (tmp_path / "suite" / "freeze.yaml").write_text(text.replace("    frozen:", "    slow:"))
    monkeypatch.setattr("ablations.suites.suite.CONFIG_DIR", tmp_path)
    with pytest.raises(UserError, match=r"freeze\.yaml.*duplicate key slow"):
        load_suite("freeze")
    with pytest.raises(UserError, match=r"there is no .*Suites: freeze"):
        load_suite("frieze")


def test_a_source_the_corpus_lacks_is_found_before_anything_starts(home: Path) -> None:
    corpus = write_corpus(home / "data" / "two_captions")
    with pytest.raises(UserError, match=r"2 cells cannot be trained:\n  synthetic_7: .*no captions_synthetic/train"):
        build_cells(load_suite("data_quality"), "mm1", seeds=[0], extra=["data.corpus=" + str(corpus), "packing.seq_len=512"])


# -------------------------------------------------------------------------------------------------------------- matching


def small(corpus: Path) -> list[str]:
    """Overrides that make cells of a few thousand parameters on a hand-made corpus."""
    return [*(o for o in TRAIN_OVERRIDES if not o.startswith("connector")), "connector=avgpool", f"data.corpus={corpus}"]


TOKENS = {"tokens": {"four": ["connector.num_tokens=4"], "one": ["connector.num_tokens=1"], "nine": ["connector.num_tokens=9"]}}


@pytest.mark.parametrize("matching", ["tokens", "images", "flops"])
def test_matched_cells_consume_alike(matching: str, home: Path, composer: Composer) -> None:
    corpus = write_corpus(home / "data" / "small", captions=60, interleaved=40, text=30)
    tested = suite(TOKENS, matching=matching)
    cells = match(tested, plan_cells(tested, "tiny", extra=[*small(corpus), "train.steps=600", "optim.warmup_steps=60"]))
    consumed = [getattr(cost.cost_of(cell.config), matching) for cell in cells]
    assert consumed == pytest.approx([consumed[0]] * 3, rel=0.01)
    steps = [cell.config.train.steps for cell in cells]
    assert steps[0] == 600
    assert len(set(steps)) > 1, "equal steps would have done"
    for cell in cells:
        assert cell.config.optim.warmup_steps == pytest.approx(cell.config.train.steps / 10, abs=1)
        assert composer.compose(cell.overrides) == cell.config


def test_the_planned_step_is_what_the_stream_delivers(home: Path) -> None:
    """Tokens, images and FLOPs a step against the batches that training would take, counted by its own StepFlops."""
    from data_pipelines.loader import PackedLoader
    from mm1.train import build

    corpus = write_corpus(home / "data" / "small", captions=60, interleaved=40, text=30)
    config = Composer().compose([*small(corpus), "connector.num_tokens=4", "train.steps=100"])
    model, tokenizer = build(config, corpus)
    stream = LaneStream(corpus, config.data, config.packing, tokenizer, image_tokens=4, global_batch=8, seed=0)
    loader = iter(PackedLoader(stream, image_size=16, micro_batch=4, workers=0))
    flops = StepFlops(model, encoder_trains=True)
    batches = [batch for _ in range(60) for batch in next(loader)]
    planned = cost.cost_of(config)
    assert planned.tokens / 100 == pytest.approx(sum(int((b.document_ids > 0).sum()) for b in batches) / 60, rel=0.02)
    assert planned.images / 100 == pytest.approx(sum(len(b.images) for b in batches) / 60, rel=0.03)
    assert planned.flops / 100 == pytest.approx(sum(flops(b) for b in batches) / 60, rel=0.02)
    assert planned.backward_flops == pytest.approx(2 * planned.forward_flops)
    frozen = cost.cost_of(Composer().compose([*small(corpus), "connector.num_tokens=4", "image_encoder.train=frozen"]))
    assert frozen.trained == planned.parameters - cost.parts_of(config).image_encoder
    assert frozen.backward_flops < 2 * frozen.forward_flops


def test_images_cannot_be_matched_where_there_are_none(home: Path) -> None:
    corpus = write_corpus(home / "data" / "small")
    none = ["data.sources.captions.ratio=0", "data.sources.interleaved.ratio=0", "data.sources.text.ratio=1"]
    tested = suite({"data": {"all": [], "text": none}}, matching="images")
    with pytest.raises(UserError, match="matching=images, but text has none"):
        match(tested, plan_cells(tested, "tiny", extra=[*small(corpus), "connector.num_tokens=4"]))


def test_rows_that_do_not_match_are_marked() -> None:
    base = {"tokens_seen": 1000, "flops": 5e9}
    assert mismatch("tokens", base, {"tokens_seen": 1010}) is None
    assert mismatch("tokens", base, {"tokens_seen": 1031}) == "tokens +3.1 %"
    assert mismatch("flops", base, {"tokens_seen": 1000, "flops": 4e9}) == "flops -20.0 %"
    other = {"tokens_seen": 2000}
    runs = [
        ("base", 0, True, base),
        ("base", 1, True, other),
        ("a", 0, False, base),
        ("a", 1, False, other),
        ("b", 1, False, base),
    ]
    assert marks("tokens", runs) == {"b": "tokens -50.0 %"}  # each seed against its own baseline


# ------------------------------------------------------------------------------------------------------- hashes and scale


def test_a_run_is_found_by_its_hash_whatever_its_name(home: Path) -> None:
    corpus = write_corpus(home / "data" / "small")
    extra = [*small(corpus), "connector.num_tokens=4"]
    trained = Composer().compose(["scale=tiny", *extra, "name=mine"])
    folder = run_for(trained, cost.fingerprint(trained))
    folder.create(trained, cost.fingerprint(trained))
    cells = build_cells(load_suite("freeze"), "tiny", seeds=[0], extra=extra)
    assert cells[0].folder == folder.folder
    assert "name=mine" in cells[0].overrides  # and goes on under that name
    assert [cell.folder.name.rpartition("-")[0] for cell in cells[1:]] == ["freeze.slow", "freeze.frozen"]
    elsewhere = build_cells(load_suite("packing"), "tiny", seeds=[0], extra=extra)
    assert elsewhere[0].hash == cells[0].hash  # the baselines of both suites are one run


def test_seeds_differ_in_nothing_else(composer: Composer) -> None:
    cells = plan_cells(load_suite("data_ratio"), "tiny", seeds=[0, 1, 2], composer=composer)
    rows: dict[str, list[PlannedCell]] = {}
    for cell in cells:
        rows.setdefault(cell.label, []).append(cell)
    for row in rows.values():
        assert [cell.config.seed for cell in row] == [0, 1, 2]
        assert len({str(cell.config.identity() | {"seed": 0}) for cell in row}) == 1


def test_a_thousand_cells(home: Path) -> None:
    """Composed, matched, costed, deduplicated, with folders and costs; half of them are the other half's trainings."""
    corpus = write_corpus(home / "data" / "small")
    axes = {
        "rate": {f"r{i}": [f"optim.peak_lr={i + 1}e-5"] for i in range(25)},
        "tokens": {f"t{n}": [f"connector.num_tokens={n}"] for n in (1, 4, 9, 16)},
        "logging": {"a": ["train.log_every=1"], "b": ["train.log_every=2"]},
    }
    began = time.process_time()
    extra = [*(o for o in small(corpus) if not o.startswith("train.log")), "packing.seq_len=128"]
    cells = build_cells(suite(axes, matching="flops"), "tiny", seeds=range(5), extra=extra)
    assert len(cells) == 1000
    assert len({cell.hash for cell in cells}) == 500
    assert time.process_time() - began < 30  # the issue's own bound: a property of the plan, not a benchmark


def test_cells_for_a_table(home: Path) -> None:
    corpus = write_corpus(home / "data" / "small")
    found = suite_cells("freeze", "tiny", seeds=[0, 1], extra=[*small(corpus), "connector.num_tokens=4"])
    assert [(cell.label, cell.seed) for cell in found[:3]] == [("trained", 0), ("trained", 1), ("slow", 0)]
    assert not any(cell.trained for cell in found)


# --------------------------------------------------------------------------------------------------------------- command


def test_what_is_no_setting_of_the_command_is_one_of_every_cell() -> None:
    given = ["status", "suite=connector", "data=shapes", "train.steps=5", "evaluation.limit=3", "launcher.cluster=debug"]
    own, cells = run.gathered([*given, "scale=small"])
    assert own[:2] == ["action=status", "suite=connector"]
    assert own[2:] == ["suite.evaluation.limit=3", "launcher.cluster=debug", "scale_name=small"]
    assert cells == ["data=shapes", "train.steps=5"]


def test_the_commands_settings_are_checked() -> None:
    ok = ["suite=freeze", "seeds=[3,5]", "evaluation.limit=7"]
    config = compose("run", run.RunConfig, run.gathered(ok)[0])
    assert config.seed_list() == [3, 5]
    assert config.suite is not None
    assert config.suite.evaluation.fewshot() == [["tasks=null", "shots=[0,4,8]", "limit=7", "seed=0", "images=true"]]
    bad: list[tuple[Sequence[str], str]] = [
        (["suite=freeze", "seeds=0"], "seeds=0"),
        (["suite=freeze", "seeds=[1,1]"], r"seeds=\[1, 1\]"),
        (["suite=freeze", "scale_name=huge"], "scale=huge"),
        ([], "suite=...: which one"),
        (["suite=freeze", "retries=-1"], "retries=-1"),
        (["suite=freeze", "launcher=hostfile"], "launcher.hostfile=FILE"),
    ]
    for overrides, message in bad:
        with pytest.raises(UserError, match=message):
            compose("run", run.RunConfig, list(overrides))


def test_no_more_cells_at_once_than_cores_and_memory_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = run.RunConfig()
    for memory, free, expected in [(1e9, 1e12, (16, 1, 0)), (1.75e9, 21e9, (4, 4, 0)), (50e9, 21e9, (1, 16, 0))]:
        monkeypatch.setattr(run, "available_memory", lambda free=free: free)
        assert run.carried(config, memory) == expected
    config.parallel, config.threads = 3, 2
    assert run.carried(config, 50e9) == (3, 2, 0)  # what is given holds


def test_fewer_steps_keep_the_share_of_warm_up() -> None:
    assert step_overrides("tiny", 85, []) == ["train.steps=85", "optim.warmup_steps=10"]
    with pytest.raises(UserError, match="give one of them"):
        step_overrides("tiny", 85, ["train.steps=4"])


# ------------------------------------------------------------------------------------------------------------------- law


def test_the_law_is_found_in_losses_made_from_it() -> None:
    sizes = {"9M": 9_000_000, "85M": 85_000_000, "302M": 302_000_000, "1.2B": 1_200_000_000}
    optima = []
    for size, n in sizes.items():
        grid = [peak_learning_rate(n) * 2.0**k for k in (-2.3, -1.3, -0.3, 0.7, 1.7)]
        losses = {rate: 2 + 0.1 * math.log(rate / peak_learning_rate(n)) ** 2 for rate in grid}
        optima.append(Optimum(size, n, best_rate(losses, size), losses))
    law = fit(optima)
    assert (law.a, law.b) == pytest.approx(MM1)
    assert max(abs(r) for r in law.residuals.values()) < 1e-9


def test_the_laws_interval_is_least_squares_own() -> None:
    optima = [Optimum(str(n), n, rate, {}) for n, rate in ((10**6, 2e-3), (10**7, 6e-4), (10**8, 3e-4), (10**9, 8e-5))]
    law = fit(optima)
    stats = pytest.importorskip("scipy.stats")
    line = stats.linregress([math.log(o.parameters) for o in optima], [math.log(o.rate) for o in optima])
    width = stats.t.ppf(0.975, 2)
    assert law.a_interval == pytest.approx((line.slope - width * line.stderr, line.slope + width * line.stderr))
    assert law.b_interval == pytest.approx(
        (line.intercept - width * line.intercept_stderr, line.intercept + width * line.intercept_stderr)
    )
    assert fit(optima[:2]).a_interval is None


def test_an_optimum_at_the_edge_of_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"size 9M: the highest rate 0\.003 is the best.*Widen the grid"):
        best_rate({1e-3: 3.0, 2e-3: 2.9, 3e-3: 2.8}, "9M")
    with pytest.raises(UserError, match="at least 3"):
        best_rate({1e-3: 3.0, 2e-3: 2.9}, "9M")
