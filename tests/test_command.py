"""Commands: what --help says and what it costs, how ablations compose, what a key accepts, how mistakes are told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hydra.errors import ConfigCompositionException

from ablations.run import RunConfig
from ablations.table import TableConfig
from configs import CONFIG_DIR
from configs.command import KeyKind, compose, key_kinds, quote, quoted, summary
from configs.errors import UserError
from eval.fewshot import EvalConfig
from mm1.config import TrainConfig

ABLATIONS = sorted((CONFIG_DIR / "ablation").glob("*.yaml"))


def train(*overrides: str) -> TrainConfig:
    return compose("train", TrainConfig, list(overrides))


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("module", ["mm1.train", "eval.fewshot", "ablations.table", "ablations.plots", "data_pipelines.prepare"])
def test_help_needs_no_torch(module: str) -> None:
    code = f"import sys; sys.argv = ['x', '--help']; from {module} import main; main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {module}" in done.stdout


def test_tables_and_reports_need_no_torch() -> None:
    rooms = "ablations.report.write, ablations.tables.suite_table, ablations.tables.suite_text"
    code = f"import sys; import {rooms}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_lists_every_ablation_with_a_line() -> None:
    said = subprocess.run([sys.executable, "-m", "mm1.train", "--help"], capture_output=True, text=True, check=True).stdout
    lines = {words[0]: words[1] for line in said.splitlines() if len(words := line.split(maxsplit=1)) == 2}
    assert ABLATIONS
    for path in ABLATIONS:
        assert summary(path)
        assert lines[path.stem] == summary(path)


# ------------------------------------------------------------------------------------------------------------ ablations


def test_an_unknown_ablation_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        train("+ablation=connector_unheard_of")
    assert all(path.stem in str(caught.value) for path in ABLATIONS)


def test_two_ablations_compose_and_hash_alike_however_they_are_written() -> None:
    base, joined = train(), train("+ablation=[connector_avgpool,encoder_frozen]")
    for written in (
        train("+ablation=connector_avgpool", "+ablation=encoder_frozen"),
        train("connector=avgpool", "image_encoder.train=frozen"),
    ):
        assert written.identity() == joined.identity()
        assert written.hash("corpus") == joined.hash("corpus")
    for named in (joined, train("+ablation=connector_avgpool", "+ablation=encoder_frozen")):
        assert named.ablation == ["connector_avgpool", "encoder_frozen"]
        assert named.run_name == "connector_avgpool+encoder_frozen"
    assert joined.image_encoder.train == "frozen"
    assert joined.connector == train("+ablation=connector_avgpool").connector
    alone = {train(f"+ablation={name}").hash("corpus") for name in joined.ablation}
    assert len({base.hash("corpus"), joined.hash("corpus"), *alone}) == 4


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", "train.steps"),
        ("train.stepz=3", "stepz"),
        ("optimiser=adam", "optimiser"),
        ("connector=unheard_of", "cabstractor"),
    ],
)
def test_wrong_types_and_unknown_keys_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        train(override)
    assert said in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["connector.num_tokens=10"], r"connector\.num_tokens=10"),
        (["image_encoder.image_size=100"], r"image_encoder\.image_size=100"),
        (["connector=pixelshuffle", "connector.num_tokens=16", "image_encoder.image_size=160"], r"connector\.num_tokens=16"),
        (["train.global_batch=12", "engine.micro_batch=8"], r"train\.global_batch=12 .*engine\.micro_batch=8"),
        (["train.steps=10", "optim.warmup_steps=10"], r"optim\.warmup_steps=10 .*train\.steps=10"),
        (["name=a/b"], "name='a/b'"),
    ],
)
def test_impossible_combinations_name_key_and_value(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(*overrides)


def test_a_mistake_ends_a_command_with_its_text_alone() -> None:
    command = [sys.executable, "-m", "mm1.train", "connector.num_tokens=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: connector.num_tokens=10")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------- lists


@dataclass
class Lists:
    names: list[str] = field(default_factory=list)
    optional: list[int] | None = None
    mapping: dict[str, list[str]] = field(default_factory=dict)
    word: str = ""


def test_keys_that_hold_lists_or_texts_are_known_by_the_schema() -> None:
    lists = {"names": KeyKind(True, True), "optional": KeyKind(True, False), "word": KeyKind(False, True)}
    assert key_kinds(Lists) == lists
    assert key_kinds(RunConfig)["suite.evaluation.images"] == KeyKind(True, True)
    assert "seeds" not in key_kinds(RunConfig), "Any: a number or a list"


@pytest.mark.parametrize(
    ("override", "runs"),
    [
        ("runs=base", ["base"]),
        ("runs=runs/base-6eca29d8", ["runs/base-6eca29d8"]),
        ('runs="my runs/base"', ["my runs/base"]),
        ("runs=[base]", ["base"]),
        ("runs=[base,other]", ["base", "other"]),
    ],
)
def test_one_word_is_a_list_of_one(override: str, runs: list[str]) -> None:
    assert compose("table", TableConfig, [override]).runs == runs


def test_one_number_is_a_list_and_null_stays_null() -> None:
    config = compose("eval", EvalConfig, ["run=base", "shots=4", "tasks=binding"])
    assert (config.run, config.shots, config.tasks) == ("base", [4], ["binding"])
    assert compose("eval", EvalConfig, ["run=base", "tasks=null"]).tasks is None


# -------------------------------------------------------------------------------------------------------------- quoting

AWKWARD = [
    "/home/josé/x",
    "/data/a(1)/b",
    "/data/x=1",
    "c#/x",
    "~/x",
    "a&b;c",
    "shard-{000..127}.tar",
    "表",
    "50/50",
    'a"b',
    "a\\",
]


@pytest.mark.parametrize("text", [*AWKWARD, 'a\\"b', "a\\\\", "12e45678", "true", "a,b", "[a]", "", "a: b", " a "])
def test_a_quoted_text_is_read_back_unchanged(text: str) -> None:
    assert compose("eval", EvalConfig, [f"run={quote(text)}"]).run == text


@pytest.mark.parametrize("text", [text for text in AWKWARD if not {'"', "\\"} & set(text)])
def test_paths_need_no_quotes_alone_or_in_a_list(text: str) -> None:
    assert compose("eval", EvalConfig, [f"run={text}"]).run == text
    assert compose("table", TableConfig, [f"runs={text}"]).runs == [text]
    assert compose("table", TableConfig, [f"runs=[base, {text},x]"]).runs == ["base", text, "x"]


@pytest.mark.parametrize("text", ["12e45678", "1e23", "true", "007", "1_000", "inf", "-5"])
def test_texts_that_look_like_numbers_stay_texts(text: str) -> None:
    assert compose("table", TableConfig, ["suite_name=seeds", f"evaluation={text}"]).evaluation == text
    assert compose("table", TableConfig, [f"runs=[{text},base]"]).runs == [text, "base"]
    assert compose("table", TableConfig, [f"runs={text}"]).runs == [text]
    assert compose("eval", EvalConfig, ["run=base", "limit=null", "seed=7"]).limit is None


@pytest.mark.parametrize(
    "value", ["null", "${run}", "{a: 1}", "choice(a,b)", "a,b", r"a\,b", "'a=b'", '"a=b"', "[{a: b}]", "[[x, y], [z]]", "a b"]
)
def test_what_hydra_has_a_meaning_for_is_left_alone(value: str) -> None:
    assert quoted(f"key={value}", KeyKind(False, True)) == f"key={value}"
