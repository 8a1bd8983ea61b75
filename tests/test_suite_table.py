"""Tables of suites, from folders as finished cells leave them: what stands in a row, what is paired, what each axis does, what is
refused."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablations import statistics as st
from ablations.law import fit, optima_of
from ablations.results import read_run
from ablations.suites.composing import step_overrides
from ablations.suites.planning import evaluation_key, suite_folder
from ablations.suites.suite import EvaluationConfig, SuiteConfig
from ablations.tables.answers import ScoreReader
from ablations.tables.render import CSV_COLUMNS
from ablations.tables.suite_table import SuiteTable, suite_table
from ablations.tables.suite_text import render_suite_csv, render_suite_latex, render_suite_markdown, suite_sections
from configs.errors import UserError
from tests.suite_folders import TASKS, Study

AXES: dict[str, dict[str, Any]] = {
    "connector": {"avgpool": ["connector=avgpool"], "attnpool": ["connector=attnpool"], "cabs": ["connector=cabstractor"]},
    "tokens": {"few": ["connector.num_tokens=4"], "many": ["connector.num_tokens=9"]},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MM1_HOME", str(tmp_path))
    return tmp_path


def config(**changes: Any) -> SuiteConfig:
    given = {"name": "connector", "about": "Kinds & numbers.", "axes": AXES, "baseline": {"connector": "cabs", "tokens": "few"}}
    return SuiteConfig(**given | {"evaluation": EvaluationConfig(shots=[0, 4])} | changes)


def finished(study: Study, *left_out: str) -> Study:
    for cell in study.cells:
        if cell.name not in left_out:
            study.finish(cell.label, cell.seed)
    return study


def cell_of(found: SuiteTable, label: str, shots: int = 0, task: str | None = None) -> Any:
    block = next(block for block in found.table.blocks if block.task == task)
    return next(row for row in block.rows if row.label == label and row.control is None).cells[shots]


# ------------------------------------------------------------------------------------------------------------------ rows


def test_rows_are_the_labels_in_the_suites_order_and_seeds_are_one_row() -> None:
    finished(Study(config(), seeds=[0, 1]))
    found = suite_table("connector")
    labels = ["cabs.few", "avgpool.few", "avgpool.many", "attnpool.few", "attnpool.many", "cabs.many"]
    assert [row.label for row in found.rows] == labels
    assert all([row.label for row in block.rows] == labels for block in found.table.blocks)
    assert [variant.label for variant in found.selection.variants] == labels
    assert all(row.finished_seeds == [0, 1] == [cell.seed for cell in row.cells] for row in found.rows)
    assert found.axes == {"connector": ["avgpool", "attnpool", "cabs"], "tokens": ["few", "many"]}
    assert (found.baseline, found.missing) == ("cabs.few", [])


def test_what_is_not_finished_is_listed_and_left_out() -> None:
    study = finished(Study(config(), seeds=[0, 1]), "avgpool.few.seed0", "avgpool.few.seed1", "cabs.many.seed1")
    study.train("avgpool.few", 1)
    found = suite_table("connector")
    assert found.missing == ["avgpool.few.seed0: waiting", "avgpool.few.seed1: trained", "cabs.many.seed1: waiting"]
    assert "avgpool.few" not in [row.label for row in found.rows]
    text = render_suite_markdown(found)
    assert "avgpool.few.seed1: trained" in text
    assert "9 of 12 runs are finished" in text


def test_a_difference_is_over_the_seeds_that_both_sides_have() -> None:
    study = finished(Study(config(), seeds=[0, 1, 2]), "cabs.many.seed1", "avgpool.few.seed0", "avgpool.few.seed1")
    found = suite_table("connector")

    def means(label: str, *seeds: int) -> float:
        return float(np.mean([study.scores(label, seed)["captions", 4] for seed in seeds]))

    cell = cell_of(found, "cabs.many", 4, "captions")
    assert cell.score.mean == pytest.approx(means("cabs.many", 0, 2))
    assert cell.difference.value == pytest.approx(means("cabs.many", 0, 2) - means("cabs.few", 0, 2))
    assert abs(means("cabs.few", 0, 2) - means("cabs.few", 0, 1, 2)) > 1e-3
    assert cell.difference_has_seeds
    single = cell_of(found, "avgpool.few", 4, "captions")
    assert single.difference.value == pytest.approx(means("avgpool.few", 2) - means("cabs.few", 2))
    assert not single.difference_has_seeds
    assert "cabs.many has the training seeds 0, 2, cabs.few has 0, 1, 2: its Δ is over the seeds that both have (0, 2)" in (
        render_suite_markdown(found)
    )


def test_with_no_seed_in_common_all_are_compared_and_that_is_said() -> None:
    study = finished(Study(config(), seeds=[0, 1]), "cabs.few.seed1", "cabs.many.seed0")
    found = suite_table("connector")
    expected = np.mean(study.scores("cabs.many", 1)["captions", 0]) - np.mean(study.scores("cabs.few", 0)["captions", 0])
    assert cell_of(found, "cabs.many", 0, "captions").difference.value == pytest.approx(expected)
    assert "with none in common" in render_suite_markdown(found)


def test_rows_that_lack_the_same_seeds_share_a_note() -> None:
    finished(Study(config(), seeds=[0, 1]), "cabs.many.seed1", "avgpool.many.seed1", "avgpool.few.seed0")
    notes = [note for note in suite_table("connector").table.notes if "the training seeds" in note]
    assert sorted(notes, key=len, reverse=True) == [
        "avgpool.many, cabs.many have the training seeds 0, cabs.few has 0, 1: their Δ is over the seeds that both have (0).",
        "avgpool.few has the training seeds 1, cabs.few has 0, 1: its Δ is over the seeds that both have (1).",
    ]


def test_only_the_suites_own_evaluations_are_taken() -> None:
    study = finished(Study(config()))
    before = render_suite_markdown(suite_table("connector"))
    for cell in study.cells:
        study.evaluate(cell, study.scores("another", 7, n=20), plan="dead0002", name="by-hand")
    assert render_suite_markdown(suite_table("connector")) == before
    other = suite_table("connector", evaluation="dead")
    assert cell_of(other, "cabs.few").score.n == 40
    assert cell_of(suite_table("connector"), "cabs.few").score.n == 80


def test_controls_of_the_suite_stand_below_their_rows() -> None:
    finished(Study(config(evaluation=EvaluationConfig(shots=[0], images=["true", "shuffled"]))))
    found = suite_table("connector")
    assert [(row.label, row.control) for row in found.table.blocks[0].rows[:3]] == [
        ("cabs.few", None),
        ("cabs.few", "shuffled"),
        ("avgpool.few", None),
    ]


# ---------------------------------------------------------------------------------------------------- marks, paper, costs


@pytest.mark.parametrize(("matching", "marked"), [("tokens", ["avgpool.few"]), ("images", ["cabs.many"]), ("steps", [])])
def test_what_the_suite_matches_decides_the_mark(matching: str, marked: list[str]) -> None:
    study = Study(config(matching=matching))
    changes: dict[str, Any] = {"avgpool.few": {"tokens_seen": 560_000}, "cabs.many": {"images_seen": 5000}}
    for cell in study.cells:
        study.finish(cell.label, cell.seed, **changes.get(cell.label, {}))
    found = suite_table("connector")
    assert [row.label for row in found.rows if row.mark] == marked
    assert [row.label for row in found.table.blocks[0].rows if not row.matched] == marked
    text = render_suite_markdown(found)
    assert all(f"{label} ≠" in text for label in marked)
    assert (f"as many {matching} as cabs.few, and did" in text) == (not marked)


def test_a_wider_tolerance_takes_the_mark_away() -> None:
    study = Study(config())
    for cell in study.cells:
        study.finish(cell.label, cell.seed, tokens_seen=515_000 if cell.label == "avgpool.few" else 500_000)
    assert suite_table("connector").row("avgpool.few").mark == "tokens +3.0 %"
    assert suite_table("connector", match_within=0.05).row("avgpool.few").mark is None


def test_the_papers_values_stand_beside_where_there_are_some() -> None:
    finished(Study(config(paper={"cabs.many": {"0": 39.9}, "avgpool.few": {"0": 36.9, "8": 62.2}})))
    found = suite_table("connector")
    assert found.row("avgpool.few").paper == {0: 36.9, 8: 62.2}
    section = suite_sections(found)[0]
    assert section.header == ["variant", "0-shot", "Δ 0-shot", "paper 0-shot", "4-shot", "Δ 4-shot"]
    printed = {line[0]: line[3] for line in section.lines}
    assert {label: text for label, text in printed.items() if text} == {"avgpool.few": "36.9", "cabs.many": "39.9"}
    assert not any("paper" in name for other in suite_sections(found)[1:] for name in other.header)
    assert "only the order of the rows can be compared" in render_suite_markdown(found)


def test_resources_show_what_a_row_got_and_what_was_planned() -> None:
    finished(Study(config()))
    section = suite_sections(suite_table("connector"))[-1]
    line = dict(zip(section.header, section.lines[0], strict=True))
    assert (line["tokens / plan"], line["FLOPs / plan"], line["steps / plan"]) == (
        "500k / 510k", "1.50e+13 / 1.60e+13", "200 / 200",
    )  # fmt: skip


def test_csv_has_the_columns_of_runs_and_those_of_suites() -> None:
    finished(Study(config(paper={"avgpool.few": {"0": 36.9}})))
    found = suite_table("connector")
    lines = list(csv.DictReader(io.StringIO(render_suite_csv(found))))
    assert [name for name in lines[0] if name in CSV_COLUMNS] == CSV_COLUMNS
    assert len(lines) == 3 * 6 * 2
    line = next(line for line in lines if line["variant"] == "avgpool.few" and line["task"] == "mean")
    assert (line["suite"], line["axis_connector"], line["axis_tokens"], line["paper"]) == ("connector", "avgpool", "few", "36.9")
    assert (float(line["planned_tokens"]), float(line["planned_flops"])) == (510_000, 1.6e13)
    assert {line["paper"] for line in lines if line["task"] != "mean"} == {""}


# --------------------------------------------------------------------------------------------------------------- effects


def additive(label: str) -> dict[tuple[str, int], list[float]]:
    """Scores that are the item's, 3 points for attnpool and 10 for many."""
    items = np.random.default_rng(3).uniform(20, 60, 40)
    lift = 3 * label.startswith("attnpool") + 10 * label.endswith("many")
    return {(task, shots): [float(v) for v in items + lift] for task in TASKS for shots in (0, 4)}


def test_an_axis_effect_is_the_mean_over_the_other_axes() -> None:
    study = Study(config())
    for cell in study.cells:
        study.finish(cell.label, cell.seed, additive(cell.label))
    found = suite_table("connector").effects
    assert found is not None
    effects = {(e.axis, e.variant, e.shots): e for e in found.main}
    assert {key: round(e.difference.value, 6) for key, e in effects.items() if e.shots == 0} == {
        ("connector", "avgpool", 0): 0.0,
        ("connector", "attnpool", 0): 3.0,
        ("tokens", "many", 0): 10.0,
    }
    assert [effects[key].pairs for key in (("connector", "attnpool", 0), ("tokens", "many", 0))] == [2, 3]
    assert effects["tokens", "many", 0].against == "few"


def test_an_effects_interval_is_that_of_the_averaged_paired_differences() -> None:
    study = finished(Study(config()), "attnpool.many.seed0")
    found = suite_table("connector").effects
    assert found is not None
    effect = next(e for e in found.main if (e.axis, e.shots) == ("tokens", 4))
    assert effect.pairs == 2, "attnpool has few only"
    estimates = []
    for task in TASKS:
        held = {
            label: np.array(study.scores(label, 0)[task, 4]) for label in ("cabs.many", "cabs.few", "avgpool.many", "avgpool.few")
        }
        delta = (held["cabs.many"] - held["cabs.few"] + held["avgpool.many"] - held["avgpool.few"]) / 2
        estimates.append(st.clustered_mean(delta, [f"image{i // 2}" for i in range(40)]))
    mean = st.average_tasks(estimates)
    expected = st.difference(mean.mean, *mean.error)
    for name in ("value", "se", "low", "high", "p"):
        assert getattr(effect.difference, name) == pytest.approx(getattr(expected, name))
    assert [e.p_holm for e in found.main] == st.holm([e.difference.p for e in found.main])
    assert not effect.has_seeds


def test_effects_of_several_seeds_hold_the_seeds_error() -> None:
    study = Study(config(), seeds=[0, 1, 2])
    for cell in study.cells:
        lift = {0: -4.0, 1: 0.0, 2: 4.0}[cell.seed] if cell.label.endswith("many") else 0.0
        scores = {key: [v + lift for v in values] for key, values in additive(cell.label).items()}
        study.finish(cell.label, cell.seed, scores)
    found = suite_table("connector").effects
    assert found is not None
    effect = next(e for e in found.main if (e.axis, e.shots) == ("tokens", 0))
    assert effect.has_seeds
    assert effect.seeds == (0, 1, 2)
    assert effect.difference.value == pytest.approx(10)
    assert effect.difference.se == pytest.approx(4 / math.sqrt(3)), "SD 4 over three seeds; items add nothing"


def test_the_grid_has_a_place_for_every_cell() -> None:
    study = finished(Study(config()), "attnpool.many.seed0")
    found = suite_table("connector")
    assert found.effects is not None
    grid = found.effects.grids[1]
    assert (grid.shots, grid.rows, grid.columns) == (4, [("avgpool",), ("attnpool",), ("cabs",)], ["few", "many"])
    for (kind,), means in zip(grid.rows, grid.means, strict=True):
        for tokens, mean in zip(grid.columns, means, strict=True):
            if (kind, tokens) == ("attnpool", "many"):
                assert mean is None
            else:
                expected = np.mean([study.scores(f"{kind}.{tokens}", 0)[task, 4] for task in TASKS])
                assert mean == pytest.approx(expected)


def test_one_axis_has_no_effects_beside_its_table() -> None:
    finished(Study(config(axes={"connector": AXES["connector"]}, baseline={"connector": "cabs"})))
    assert suite_table("connector").effects is None


# ------------------------------------------------------------------------------------------------------- law and TextCore


def rates() -> SuiteConfig:
    axes = {
        "decoder": {"small": ["decoder=a"], "large": ["decoder=b"]},
        "rate": {"1e-3": ["optim.peak_lr=1e-3"], "2e-3": ["optim.peak_lr=2e-3"], "4e-3": ["optim.peak_lr=4e-3"]},
    }
    law = {"size": "decoder", "rate": "rate"}
    return config(name="learning_rate", axes=axes, baseline={"decoder": "small", "rate": "2e-3"}, law=law, matching="steps")


def rated(study: Study, *left_out: str) -> Study:
    for cell in study.cells:
        size, rate = cell.choice["decoder"], float(cell.choice["rate"])
        best = 0.0021 if size == "small" else 0.0018
        loss = 3 + math.log(rate / best) ** 2 + 0.01 * cell.seed
        validation = {"loss_captions": loss, "loss_text": loss + 1, "loss_captions_shuffled": 99.0}
        own = {"decoder_without_embeddings": 10_000 if size == "small" else 40_000}
        if cell.name not in left_out:
            study.finish(cell.label, cell.seed, peak_lr=rate, validation=validation, parameters=own)
    return study


def test_a_grid_of_rates_shows_held_out_losses_and_the_law() -> None:
    study = rated(Study(rates(), seeds=[0, 1]))
    found = suite_table("learning_rate").law
    assert found is not None
    cell = found.losses["small"]["2e-3"]
    assert cell.mean == pytest.approx(3.5 + math.log(2e-3 / 0.0021) ** 2 + 0.005)
    assert cell.se == pytest.approx(0.005)
    assert found.law == fit(optima_of(study.cells, "decoder", "rate"))
    text = render_suite_markdown(suite_table("learning_rate"))
    assert "## Held-out loss by decoder and rate" in text
    assert f"log(rate) = {found.law.a:.4f} log(N)" in text
    assert len(re.findall(r"± 0.005 <", text)) == 2, "the best of each size is marked"


def test_a_law_that_cannot_be_fitted_says_why() -> None:
    rated(Study(rates()), "large.4e-3.seed0")
    found = suite_table("learning_rate").law
    assert found is not None
    assert found.law is None
    assert "large.4e-3.seed0" in render_suite_markdown(suite_table("learning_rate"))
    assert "4e-3" not in found.losses["large"]


def textcore(study: Study, label: str, seed: int, points: float, **changes: Any) -> Path:
    names = ["arc_easy", "arc_challenge", "piqa", "lambada", "winogrande", "hellaswag", "sciq", "triviaqa", "webqs"]
    cell = study.by_name[f"{label}.seed{seed}"]
    settings: list[str] = study.suite.evaluation.textcore or []
    study.note(cell, evaluation_key(["textcore", *settings]), None)
    content = {
        "version": 1, "lm_eval": "0.4.9", "limit": 50, "seed": 1234, "dtype": "float32", "weights": "w",
        "run": {"name": label, "hash": cell.hash},
        "tasks": {name: {"0": {"mean": points, "se": 2.0, "n": 50}} for name in names},
    } | changes  # fmt: skip
    path = cell.folder / "results" / "textcore" / f"{len(changes)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_textcore_has_a_table_of_its_own() -> None:
    evaluation = EvaluationConfig(shots=[0], textcore=["datasets=/data", "limit=50"])
    study = finished(Study(config(evaluation=evaluation), seeds=[0, 1]))
    assert study.suite.evaluation.textcore
    for cell in study.cells:
        textcore(study, cell.label, cell.seed, 40 + 2 * cell.seed + 5 * (cell.label == "cabs.many"))
        textcore(study, cell.label, cell.seed, 99, limit=None)  # by hand, of everything: not the suite's
    found = suite_table("connector")
    assert found.textcore is not None
    cell_ = found.textcore.cells["cabs.many"][0]
    assert (cell_.mean, cell_.difference) == (46, 5)
    items = math.sqrt(7 * 4 + 2) / 8  # seven tasks of SE 2, and ARC's two halves of SE 2
    assert cell_.se == pytest.approx(math.hypot(items, 1.0))
    assert cell_.difference_se == pytest.approx(math.hypot(items, 1.0) * math.sqrt(2))
    text = render_suite_markdown(found)
    assert "## TextCore\n" in text
    assert "99.0" not in text
    path = textcore(study, "cabs.few", 0, 1)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        suite_table("connector")


# ---------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_suite_and_one_that_was_never_started() -> None:
    with pytest.raises(UserError, match=r"suite=konnektor: there is no .*Suites: connector"):
        suite_table("konnektor")
    with pytest.raises(UserError, match=r"holds no suite.*started: none yet\. Start it: python -m ablations.run suite=con"):
        suite_table("connector")
    with pytest.raises(UserError, match=r"scale=tony: must be one of tiny"):
        suite_table("connector", "tony")
    finished(Study(config()))
    with pytest.raises(UserError, match=r"started: connector-tiny"):
        suite_table("connector", extra=["train.steps=100"])


def test_a_folder_of_another_suite_or_scale() -> None:
    finished(Study(config(name="encoder"), folder="mine"))
    with pytest.raises(UserError, match=r"mine holds suite encoder, scale tiny, not connector, tiny"):
        suite_table("connector", folder="mine")
    with pytest.raises(UserError, match=r"holds suite encoder, scale tiny, not encoder, small"):
        suite_table("encoder", "small", folder="mine")


def test_an_unfinished_baseline_names_the_command_that_finishes_it() -> None:
    finished(Study(config(), seeds=[0, 1]), "cabs.few.seed0", "cabs.few.seed1")
    with pytest.raises(UserError) as error:
        suite_table("connector")
    assert "cabs.few.seed0: waiting, cabs.few.seed1: waiting" in str(error.value)
    assert str(error.value).endswith("python -m ablations.run suite=connector scale_name=tiny 'seeds=[0, 1]'")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("results/e0/summary.json", lambda text: text[:-5], "half-written"),
        ("results/e0/captions.4.jsonl", lambda text: text[:-9], "half-written"),
        ("results/e0/captions.4.jsonl", lambda text: text[: text[:-1].rfind("\n") + 1], "39 items"),
        ("results/e0/captions.4.jsonl", lambda text: text.replace('"score": ', '"score": 1'), "different evaluations"),
        ("results/e0/captions.4.jsonl", lambda text: text.replace("}\n", "\n", 1), "line 1: not a JSON object"),
        (
            "results/e0/captions.4.jsonl",
            lambda text: text.replace('"captions3"', '"captions77"'),
            "cannot be paired|only in the one",
        ),
        ("run.json", lambda text: text.replace('"version": 1', '"version": 7'), "version is 7"),
        ("run.json", lambda text: text.replace('"hash": "', '"hash": "0'), "Move it away"),
    ],
)
def test_what_is_damaged_is_named(name: str, damage: Any, message: str) -> None:
    study = finished(Study(config()))
    path = study.by_name["avgpool.few.seed0"].folder / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as error:
        suite_table("connector")
    assert "avgpool.few" in str(error.value) or "captions" in str(error.value)


def test_results_and_records_of_others_are_refused() -> None:
    study = finished(Study(config()))
    own, other = study.by_name["cabs.few.seed0"], study.by_name["cabs.many.seed0"]
    summary = other.folder / "results/e0/summary.json"
    kept = summary.read_text()
    summary.write_text((own.folder / "results/e0/summary.json").read_text())
    with pytest.raises(UserError, match=f"results of run {own.hash}, but they lie in the folder of {other.hash}"):
        suite_table("connector")
    summary.write_text(kept)
    record = study.place.record_path(other)
    record.write_text(record.read_text().replace('"connector"', '"encoder"'))
    with pytest.raises(UserError, match=r"is of encoder .* not of connector"):
        suite_table("connector")


def test_cells_that_answered_another_plan_are_refused() -> None:
    study = finished(Study(config()), "cabs.many.seed0")
    cell = study.train("cabs.many")
    study.evaluate(cell, study.scores("cabs.many", 0), plan="dead0002")
    study.note(cell, evaluation_key(study.suite.evaluation.fewshot()[0]), "e0")
    with pytest.raises(
        UserError, match=r"1 of 6 cells were evaluated on another plan than feed0001(.|\n)*cabs.many.seed0: plan dead"
    ):
        suite_table("connector")


# --------------------------------------------------------------------------------------------------------------- reading


def test_the_quick_reader_gives_what_the_careful_one_gives() -> None:
    study = finished(Study(config(axes={"tokens": AXES["tokens"]}, baseline={})))
    reader = ScoreReader()
    for cell in study.cells:
        evaluation = read_run(cell.folder).evaluations[0]
        for key in ((task, shots) for task in TASKS for shots in (0, 4)):
            slow, quick = evaluation.scores(*key), reader.scores(evaluation, *key)
            assert (quick.ids, quick.clusters) == (slow.ids, slow.clusters)
            assert quick.scores.tolist() == slow.scores.tolist()


def test_items_in_another_order_are_paired_by_their_ids() -> None:
    study = finished(Study(config(axes={"tokens": AXES["tokens"]}, baseline={})))
    before = cell_of(suite_table("connector"), "many", 4, "captions").difference
    path = study.by_name["many.seed0"].folder / "results/e0/captions.4.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert cell_of(suite_table("connector"), "many", 4, "captions").difference == before


def test_a_score_that_is_not_the_last_field_is_read_with_care() -> None:
    study = finished(Study(config(axes={"tokens": AXES["tokens"]}, baseline={})))
    before = render_suite_csv(suite_table("connector"))
    for cell in study.cells:
        for path in cell.folder.glob("results/*/*.jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(record | {"nested": {"score": 5.0}}) + "\n" for record in records))
    assert render_suite_csv(suite_table("connector")) == before


def test_a_runs_configuration_is_still_there() -> None:
    finished(Study(config()))
    run = suite_table("connector").rows[0].runs[0]
    assert run.config == {"scale": "tiny", "seed": 0}
    assert (run.scale, run.label) == ("tiny", read_run(run.folder).label)


# --------------------------------------------------------------------------------------------------------------- command


def command(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-m", "ablations.table", *arguments]
    environment = {**os.environ, "MM1_HOME": str(home)}
    return subprocess.run(given, capture_output=True, text=True, env=environment, check=False)


def test_the_command_writes_into_the_suites_folder(home: Path) -> None:
    finished(Study(config()))
    done = command("suite=connector", "scale=tiny", "seeds=1", "evaluation.limit=50", home=home)
    assert done.returncode == 0, done.stderr
    folder = home / "suites/connector-tiny/tables"
    assert done.stdout == (folder / "table.md").read_text() == render_suite_markdown(suite_table("connector"))
    assert (folder / "table.csv").read_text() == render_suite_csv(suite_table("connector"))
    assert (folder / "table.tex").read_text() == render_suite_latex(suite_table("connector"))
    assert "left out: seeds=1 evaluation.limit=50" in done.stderr


def test_overrides_choose_the_suites_folder_as_they_do_for_its_run(home: Path) -> None:
    done = command("suite=connector", "steps=100", "data=shapes", home=home)
    assert done.returncode == 2
    extra = ["data=shapes", *step_overrides("tiny", 100, ["data=shapes"])]
    assert "train.steps=100" in extra
    place = suite_folder("connector", "tiny", extra)
    assert f"{place.folder} holds no suite" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_of_runs_and_suites_are_not_mixed(home: Path) -> None:
    mixed = command("suite=connector", "runs=[base]", home=home)
    assert (mixed.returncode, "leave runs= and baseline= out" in mixed.stderr) == (2, True)
    lonely = command("folder=mine", home=home)
    assert (lonely.returncode, "add suite=NAME" in lonely.stderr) == (2, True)
