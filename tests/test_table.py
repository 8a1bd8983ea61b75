"""Tables from run folders made on the spot: numbers equal those computed by hand, and nothing incomparable is compared."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ablations import statistics as st
from ablations.results import find_runs, read_evaluation, read_jsonl, read_run
from ablations.tables.building import build
from ablations.tables.cells import Table
from ablations.tables.render import CSV_COLUMNS, aligned, duration, render_csv, render_markdown, si
from ablations.tables.selection import select
from configs.errors import UserError

TASKS = {"colours": ("vqa_official", "vqa", 12.5), "captions": ("cider_d", "captioning", None)}


class Folders:
    """Makes run folders as mm1/run.py and eval/fewshot.py write them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, name: str, hash: str, *, seed: int = 0, ablation: list[str] | None = None, **changes: Any) -> Path:
        folder = self.root / f"{name}-{hash}"
        folder.mkdir(parents=True)
        config = {"scale": changes.pop("scale", "tiny"), "seed": seed, "connector": {"kind": changes.pop("connector", name)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        record = {
            "version": 1,
            "name": name,
            "ablation": ([] if name == "base" else [name]) if ablation is None else ablation,
            "hash": hash,
            "seed": seed,
            "status": "finished",
            "parameters": {
                "image_encoder": 1000,
                "connector": 200,
                "decoder": 3_000_000,
                "total": 3_001_200,
                "trainable": 3_001_200,
            },
            "tokens_seen": 500_000,
            "loss_tokens_seen": 200_000,
            "images_seen": 4000,
            "steps": 200,
            "flops": 1.5e13,
            "seconds": 75.0,
            "corpus": {"name": "starter", "fingerprint": "c0ffee0000"},
            "identity": {"seed": seed, "connector": config["connector"]},
        } | changes
        if record["status"] == "running":  # mm1/run.py writes these at checkpoints and at the end only
            record = {key: value for key, value in record.items() if key not in ("tokens_seen", "flops", "parameters")}
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    def evaluation(
        self, run: Path, scores: dict[tuple[str, int], list[float]], *, plan: str = "feed0001", control: str | None = None,
        order: np.random.Generator | None = None, hash: str = "", demonstration_seed: int | None = None, weights: str = "w",
    ) -> Path:  # fmt: skip
        """`scores[task, shots]` in points; two items share an image. `order` shuffles the lines in the files. With a
        `demonstration_seed` there is a plan.json, of the same items for every such seed."""
        folder = run / "results" / (hash or f"e-{plan}-{control}")
        folder.mkdir(parents=True)
        if demonstration_seed is not None:
            planned = {"corpus": "starter", "seed": 0, "demonstration_seed": demonstration_seed or None}
            queries = {task: {"queries": ["a"], "demonstrations": {"a": [str(demonstration_seed)]}} for task, _ in scores}
            content = {"version": 1, "weights": weights, "plan": planned | {"tasks": queries}}
            (folder / "plan.json").write_text(json.dumps(content, indent=1))
        tasks: dict[str, Any] = {}
        for (task, shots), values in scores.items():
            metric, kind, chance = TASKS[task]
            clusters = [f"image{i // 2}" for i in range(len(values))]
            lines = [
                {
                    "id": f"{task}{i}",
                    "cluster": c,
                    "prediction": "a",
                    "answers": ["a"],
                    "score": v,
                    "demonstrations": [],
                    "logprob": -1,
                }
                for i, (v, c) in enumerate(zip(values, clusters, strict=True))
            ]
            lines = [lines[i] for i in (order.permutation(len(lines)) if order else range(len(lines)))]
            (folder / f"{task}.{shots}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            own = st.clustered_mean(np.array(values), clusters)
            held = {"mean": own.mean, "se": own.se, "n": own.n, "clusters": own.clusters}
            tasks.setdefault(task, {"metric": metric, "kind": kind, "chance": chance, "shots": {}})["shots"][str(shots)] = held
        record = json.loads((run / "run.json").read_text())
        summary = {
            "version": 1,
            "run": {"name": record["name"], "hash": record["hash"]},
            "plan_fingerprint": plan,
            "control": control,
            "seed": 0,
            "tasks": tasks,
            "means": {},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder


def answers(seed: int, lift: float = 0.0, n: int = 40) -> dict[tuple[str, int], list[float]]:
    """Scores of a model of the given quality; the items' difficulty is common to all seeds."""
    hard, own = np.random.default_rng(1), np.random.default_rng(100 + seed)
    found = {}
    for task in TASKS:
        for shots in (0, 4):
            level = hard.uniform(0, 60, n // 2).repeat(2) + lift + own.normal(0, 6, n)
            found[task, shots] = [float(v) for v in np.clip(level, 0, 100).round(3)]
    return found


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "runs")


@pytest.fixture
def two(folders: Folders) -> Folders:
    folders.evaluation(folders.run("avgpool", "bbbb0000"), answers(2, lift=12), order=np.random.default_rng(0))
    folders.evaluation(folders.run("base", "aaaa0000"), answers(1))
    return folders


def table_of(folders: Folders, *runs: str, **options: Any) -> Table:
    return build(select(runs, root=folders.root, **options))


def row(table: Table, task: str | None, label: str, control: str | None = None) -> Any:
    block = next(b for b in table.blocks if b.task == task)
    return next(r for r in block.rows if r.label == label and r.control == control)


def test_numbers_equal_those_by_hand_and_pairs_are_found_by_id(two: Folders) -> None:
    table = table_of(two)
    assert [r.label for r in table.blocks[0].rows] == ["base", "avgpool"], "the run without ablations comes first"
    base, other = answers(1), answers(2, lift=12)
    differences, errors = [], []
    for task in TASKS:
        cell = row(table, task, "avgpool").cells[4]
        delta = np.array(other[task, 4]) - np.array(base[task, 4])
        by_image = delta.reshape(-1, 2).mean(1)
        assert cell.score.mean == pytest.approx(np.mean(other[task, 4]))
        assert cell.difference.value == pytest.approx(delta.mean())
        assert cell.difference.se == pytest.approx(by_image.std(ddof=1) / math.sqrt(20))
        assert cell.difference.high - cell.difference.value == pytest.approx(2.0930240544 * cell.difference.se), "t(0.975, 19)"
        differences.append(delta.mean())
        errors.append(cell.difference.se)
    mean = row(table, None, "avgpool").cells[4].difference
    assert mean.value == pytest.approx(np.mean(differences))
    assert mean.se == pytest.approx(math.hypot(*errors) / 2)
    assert mean.se < row(table, None, "avgpool").cells[4].score.se, "pairing must pay, or the items were not matched"


def test_holm_runs_over_all_differences_of_a_block(two: Folders) -> None:
    two.evaluation(two.run("c_abs", "cccc0000"), answers(3, lift=1))
    block = table_of(two).blocks[0]
    cells = [r.cells[k] for r in block.rows[1:] for k in (0, 4)]
    assert [c.p_holm for c in cells] == pytest.approx(st.holm([c.difference.p for c in cells if c.difference]))
    assert block.rows[0].cells[0].p_holm is None
    assert row(table_of(two), None, "avgpool").cells[0].significant


def test_baseline_can_be_chosen_and_turns_the_sign(two: Folders) -> None:
    forth, back = table_of(two, "base", "avgpool"), table_of(two, "base", baseline="avgpool")
    assert back.blocks[0].rows[0].label == "avgpool"
    a, b = row(forth, "colours", "avgpool").cells[0].difference, row(back, "colours", "base").cells[0].difference
    assert (a.value, a.low, a.high) == pytest.approx((-b.value, -b.high, -b.low))


def test_one_seed_is_called_item_level_only(two: Folders) -> None:
    assert "item-level only: one training seed" in render_markdown(table_of(two))


def test_seeds_of_one_variant_are_one_row_with_their_spread_apart(two: Folders) -> None:
    two.evaluation(two.run("base", "aaaa0001", seed=1), answers(11, lift=3))
    half = table_of(two)
    assert [r.seeds for r in half.blocks[0].rows] == [[0, 1], [0]]
    assert row(half, None, "avgpool").cells[0].difference_has_seeds is False
    assert "(items)" in render_markdown(half)

    two.evaluation(two.run("avgpool", "bbbb0001", seed=1), answers(12, lift=9))
    cell = row(table_of(two), "colours", "avgpool").cells[0]
    means = [np.mean(answers(2, 12)["colours", 0]), np.mean(answers(12, 9)["colours", 0])]
    base = [np.mean(answers(1)["colours", 0]), np.mean(answers(11, 3)["colours", 0])]
    assert cell.score.mean == pytest.approx(np.mean(means))
    runs = np.array([answers(2, 12)["colours", 0], answers(12, 9)["colours", 0]])
    left = (runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()).reshape(2, 20, 2).mean(2)
    by_items = (left**2).sum() / (20 * 19 * 2)
    assert cell.score.se_seeds == pytest.approx(math.sqrt((means[0] - means[1]) ** 2 / 4 - by_items))
    assert cell.difference.value == pytest.approx(np.mean(means) - np.mean(base))
    deltas = np.mean([answers(2, 12)["colours", 0], answers(12, 9)["colours", 0]], 0)
    deltas = deltas - np.mean([answers(1)["colours", 0], answers(11, 3)["colours", 0]], 0)
    items = deltas.reshape(-1, 2).mean(1).std(ddof=1) / math.sqrt(20)
    of_base = row(table_of(two), "colours", "base").cells[0].score.se_seeds
    assert cell.difference.se == pytest.approx(math.hypot(items, cell.score.se_seeds, of_base))
    assert of_base < abs(base[0] - base[1]) / 2


# --------------------------------------------------------------------------------------------------- demonstration seeds


@pytest.fixture
def redrawn(folders: Folders) -> Folders:
    """Two runs after demonstrations of seeds 0, 1 and 2, the same items each time; seed 1 lifts both by 20 points."""
    for number, (name, run_hash) in enumerate((("base", "aaaa0000"), ("avgpool", "bbbb0000"))):
        run = folders.run(name, run_hash)
        for drawn, lift in ((0, 0), (1, 20), (2, -5)):
            own = answers(10 * number + drawn, lift=lift + 10 * number)
            folders.evaluation(run, own, plan=f"feed000{drawn}", demonstration_seed=drawn)
    return folders


def test_demonstration_seeds_are_averaged_and_their_spread_is_kept_apart(redrawn: Folders) -> None:
    table = table_of(redrawn)
    cell = row(table, "colours", "base").cells[4]
    each = np.array([answers(drawn, lift)["colours", 4] for drawn, lift in ((0, 0), (1, 20), (2, -5))])
    other = np.array([answers(10 + drawn, 10 + lift)["colours", 4] for drawn, lift in ((0, 0), (1, 20), (2, -5))])
    assert cell.score.mean == pytest.approx(each.mean())
    assert cell.score.se_items == pytest.approx(each.mean(0).reshape(-1, 2).mean(1).std(ddof=1) / math.sqrt(20))
    assert cell.score.se_seeds is None
    assert cell.score.se_demonstrations == pytest.approx(each.mean(1).std(ddof=1) / math.sqrt(3), rel=0.02)
    assert cell.score.se == pytest.approx(math.hypot(cell.score.se_items, cell.score.se_demonstrations))
    difference = row(table, "colours", "avgpool").cells[4].difference
    assert difference.value == pytest.approx((other - each).mean())
    assert difference.se < cell.score.se_demonstrations / 3, "what demonstrations do to both runs is no error of the difference"
    text = render_markdown(table)
    assert "means over the demonstration seeds 0, 1, 2" in text
    assert f"(d {cell.score.se_demonstrations:.1f})" in text
    line = next(csv.DictReader(io.StringIO(render_csv(table))))
    assert float(line["se_demonstrations"]) == table.blocks[0].rows[0].cells[0].score.se_demonstrations


def test_rows_are_compared_at_the_demonstration_seeds_they_share(redrawn: Folders) -> None:
    (redrawn.root / "avgpool-bbbb0000/results/e-feed0000-None/summary.json").unlink()
    table = table_of(redrawn)
    assert "demonstration seeds 1, 2" in render_markdown(table)
    assert "left out (base-aaaa0000: 0)" in render_markdown(table)
    expected = np.mean([answers(drawn, lift)["colours", 0] for drawn, lift in ((1, 20), (2, -5))])
    assert row(table, "colours", "base").cells[0].score.mean == pytest.approx(expected)
    (redrawn.root / "avgpool-bbbb0000/results/e-feed0001-None/summary.json").unlink()
    single = table_of(redrawn)
    assert row(single, "colours", "base").cells[0].score.se_demonstrations is None
    (redrawn.root / "base-aaaa0000/results/e-feed0002-None/summary.json").unlink()
    with pytest.raises(UserError, match=r"base-aaaa0000: 0, 1\n  avgpool-bbbb0000: 2(.|\n)*demonstration_seed="):
        table_of(redrawn)


def test_one_of_several_demonstration_seeds_can_be_named(redrawn: Folders) -> None:
    table = table_of(redrawn, "base", "avgpool", evaluation="feed0001")
    assert row(table, "colours", "base").cells[0].score.mean == pytest.approx(np.mean(answers(1, 20)["colours", 0]))
    common = read_run(redrawn.root / "base-aaaa0000").evaluations[0].items_plan
    assert "seeds 0, 1, 2" in render_markdown(table_of(redrawn, "base", "avgpool", evaluation=common[:8]))


def test_evaluations_of_other_weights_or_of_one_seed_twice_are_no_repeats(redrawn: Folders) -> None:
    run = redrawn.root / "base-aaaa0000"
    assert [e.demonstration_seeds for e in read_run(run).evaluations] == [[0, 1, 2]]
    redrawn.evaluation(run, answers(5), plan="feed0003", demonstration_seed=3, weights="trained further")
    assert [e.demonstration_seeds for e in read_run(run).evaluations] == [[0, 1, 2], [3]]
    redrawn.evaluation(run, answers(6), plan="feed0004", demonstration_seed=2)
    assert sorted(e.demonstration_seeds for e in read_run(run).evaluations) == [[0], [1], [2], [2], [3]]
    with pytest.raises(UserError, match="several evaluations"):
        table_of(redrawn, "base")


def test_the_bootstrap_knows_nothing_of_demonstration_seeds(redrawn: Folders) -> None:
    with pytest.raises(UserError, match="demonstration seeds"):
        build(select(root=redrawn.root), interval="bootstrap")


def test_a_control_stands_under_its_run_and_is_compared_with_it(two: Folders) -> None:
    blind = answers(5, lift=-15)
    two.evaluation(two.root / "avgpool-bbbb0000", blind, control="shuffled")
    table = table_of(two)
    assert [(r.label, r.control) for r in table.blocks[0].rows] == [("base", None), ("avgpool", None), ("avgpool", "shuffled")]
    expected = np.mean(blind["colours", 0]) - np.mean(answers(2, 12)["colours", 0])
    assert row(table, "colours", "avgpool", "shuffled").cells[0].difference.value == pytest.approx(expected)
    alone = [c.p_holm for c in row(table, None, "avgpool").cells.values()]
    (two.root / "avgpool-bbbb0000" / "results" / "e-feed0001-shuffled" / "summary.json").unlink()
    assert alone == [c.p_holm for c in row(table_of(two), None, "avgpool").cells.values()], "controls do not widen the family"
    assert "↳ images shuffled" in render_markdown(table)


def test_other_plans_are_refused_and_named(two: Folders) -> None:
    two.evaluation(two.run("c_abs", "cccc0000"), answers(3), plan="dead0002")
    with pytest.raises(UserError) as error:
        table_of(two, "base", "avgpool", "c_abs")
    assert "c_abs-cccc0000: plan dead0002" in str(error.value)
    assert str(error.value).endswith("python -m eval.fewshot run=c_abs-cccc0000")
    found = select(root=two.root)
    assert [v.label for v in found.variants] == ["base", "avgpool"]
    assert found.left_out == ["c_abs-cccc0000 (another plan)"]


def test_the_same_items_under_other_prompts_are_no_comparison(two: Folders) -> None:
    for name, prompts in (("base-aaaa0000", "plain"), ("avgpool-bbbb0000", "photo")):
        path = two.root / name / "results/e-feed0001-None/summary.json"
        summary = json.loads(path.read_text()) | {"dtype": "float32"}
        for task in summary["tasks"].values():
            task["prompts"] = prompts
        path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"different plans(.|\n)*cider_d photo"):
        table_of(two, "base", "avgpool")


def test_several_common_plans_want_a_choice(two: Folders) -> None:
    for name in ("base-aaaa0000", "avgpool-bbbb0000"):
        two.evaluation(two.root / name, answers(1), plan="dead0002")
    with pytest.raises(UserError, match="evaluation="):
        table_of(two, "base", "avgpool")
    assert table_of(two, "base", "avgpool", evaluation="dead").plan.startswith("dead0002 ")


def test_two_evaluations_of_one_plan_are_not_chosen_between(two: Folders) -> None:
    two.evaluation(two.root / "base-aaaa0000", answers(9), hash="sparq")
    with pytest.raises(UserError, match="several evaluations"):
        table_of(two, "base", "avgpool")


def test_other_corpora_are_refused(two: Folders) -> None:
    two.evaluation(two.run("c_abs", "cccc0000", corpus={"name": "mine", "fingerprint": "0dd0000"}), answers(3))
    with pytest.raises(UserError, match=r"c_abs-cccc0000: corpus mine 0dd0000"):
        table_of(two, "base", "c_abs")
    assert select(root=two.root).left_out == ["c_abs-cccc0000 (another corpus)"]


def test_unfinished_and_unevaluated_runs(two: Folders) -> None:
    two.run("late", "dddd0000", status="running")
    two.run("bare", "eeee0000")
    assert select(root=two.root).left_out == ["bare-eeee0000 (not evaluated)", "late-dddd0000 (status running)"]
    with pytest.raises(UserError, match="'running'"):
        table_of(two, "base", "late")
    with pytest.raises(UserError, match=r"eval\.fewshot run=bare-eeee0000"):
        table_of(two, "base", "bare")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-9], "half-written"),
        (lambda text: text[: text[:-1].rfind("\n") + 1], "39 items"),
        (lambda text: text.replace('"score": ', '"score": 1'), "belong to different evaluations"),
        (lambda text: text.replace('"cluster"', '"image"', 1), "line 1: no cluster"),
        (lambda text: "{\n" + text, "line 1: not a JSON object"),
    ],
)
def test_half_written_or_foreign_items_are_refused(two: Folders, damage: Any, message: str) -> None:
    path = two.root / "base-aaaa0000/results/e-feed0001-None/colours.4.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as error:
        table_of(two)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["run.json", "results/e-feed0001-None/summary.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda t: t[:-5], "half-written"), (lambda t: t.replace('"version": 1', '"version": 7'), "version is 7")],
)
def test_half_written_or_other_records_are_refused(two: Folders, name: str, damage: Any, message: str) -> None:
    path = two.root / "base-aaaa0000" / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message):
        table_of(two)


def test_a_plan_is_the_same_however_its_file_is_written_and_refused_where_either_half_is_broken(redrawn: Folders) -> None:
    """As eval/results.py writes it the plan stands last, and is parsed once for all runs (ablations/results.py)."""
    run = read_run(redrawn.root / "base-aaaa0000")
    path = run.evaluations[0].folder / "plan.json"
    text = path.read_text()
    found = [read_evaluation(path.parent, run)]
    for order in (sorted, lambda keys: sorted(keys, reverse=True)):  # plan first, and last
        for indent in (None, 1, 2):
            path.write_text(json.dumps({key: json.loads(text)[key] for key in order(json.loads(text))}, indent=indent))
            found.append(read_evaluation(path.parent, run))
    assert len({(e.items_plan, e.demonstration_seed, e.weights) for e in found}) == 1
    assert found[0].items_plan
    for broken in (text[:-9], text.replace('"weights": ', '"weights" '), text.replace('"plan": {', '"plan": ')):
        path.write_text(broken)
        with pytest.raises(UserError, match="half-written or damaged"):
            read_evaluation(path.parent, run)


def test_results_copied_from_another_run_are_refused(two: Folders) -> None:
    foreign = two.root / "avgpool-bbbb0000/results/e-feed0001-None"
    foreign.rename(two.root / "base-aaaa0000/results/copied")
    with pytest.raises(UserError, match="results of run bbbb0000"):
        table_of(two, "base")


def test_missing_shots_say_what_to_run(two: Folders) -> None:
    with pytest.raises(UserError, match=r"colours at 8 shots.*eval\.fewshot run=base-aaaa0000.*shots=\[0,8\]"):
        build(select(["base"], root=two.root), [0, 8])


def test_rows_that_took_more_are_marked(two: Folders) -> None:
    two.evaluation(two.run("long", "cccc0000", tokens_seen=600_000, steps=240), answers(3))
    two.evaluation(two.run("near", "dddd0000", tokens_seen=502_000), answers(4))
    table = table_of(two)
    assert {r.label: r.matched for r in table.blocks[0].rows} == {"base": True, "avgpool": True, "long": False, "near": True}
    text = render_markdown(table)
    assert "long ≠" in text
    assert "tokens +20.0%, steps +20.0%" in text


def test_names_prefixes_folders_and_scales(two: Folders) -> None:
    two.run("base_wide", "cccc0000")
    assert [r.label for r in find_runs(["base"], two.root)] == ["base-aaaa0000"], "a whole name is not a prefix of another"
    assert [r.label for r in find_runs(["base_"], two.root)] == ["base_wide-cccc0000"]
    assert [r.label for r in find_runs([str(two.root / "base-aaaa0000"), "base-aaaa"], two.root)] == ["base-aaaa0000"]
    with pytest.raises(UserError, match=r"'nothing'.*avgpool-bbbb0000"):
        find_runs(["nothing"], two.root)
    two.run("base", "ffff0000", scale="mm1")
    with pytest.raises(UserError, match="several scales"):
        find_runs(["base"], two.root)


def test_bootstrap_intervals_are_near_the_others(two: Folders) -> None:
    chosen = select(root=two.root)
    t, drawn = (row(build(chosen, interval=kind), None, "avgpool").cells[0].difference for kind in ("t", "bootstrap"))
    assert drawn.value == pytest.approx(t.value)
    assert (drawn.low, drawn.high) == pytest.approx((t.low, t.high), abs=0.15 * (t.high - t.low))


def test_csv_parses_back_to_the_table(two: Folders) -> None:
    two.evaluation(two.root / "avgpool-bbbb0000", answers(5, lift=-15), control="shuffled")
    table = table_of(two)
    lines = list(csv.DictReader(io.StringIO(render_csv(table))))
    assert list(lines[0]) == CSV_COLUMNS
    assert len(lines) == sum(len(r.cells) for b in table.blocks for r in b.rows) == 3 * 3 * 2
    for line in lines:
        task = None if line["task"] == "mean" else line["task"]
        cell = row(table, task, line["variant"], line["control"] or None).cells[int(line["shots"])]
        assert float(line["value"]) == cell.score.mean
        assert (line["difference"] == "") == (cell.difference is None)
        if cell.difference:
            assert (float(line["ci_low"]), float(line["p"])) == (cell.difference.low, cell.difference.p)
    assert {line["compared_with"] for line in lines} == {"", "base", "avgpool"}


def test_markdown_columns_line_up(two: Folders) -> None:
    for part in render_markdown(table_of(two)).split("\n\n"):
        if part.startswith("|"):
            assert len({len(line) for line in part.splitlines()}) == 1
            assert len({line.count("|") for line in part.splitlines()}) == 1
    assert aligned(["a", "b"], [["long", "1"]]).splitlines()[1] == "| ---- | --: |"
    assert (si(999_600), si(999.7), si(999_499)) == ("1M", "1k", "999k")
    assert (si(1_234_567), si(999), si(4.2e9), duration(59.6), duration(19_230)) == (
        "1.23M",
        "999",
        "4.2G",
        "1 min 0 s",
        "5 h 20 min",
    )


def test_the_later_record_of_a_step_holds(two: Folders) -> None:
    folder = two.root / "base-aaaa0000"
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 4}\n{"step": 3, "lo'
    )
    with pytest.raises(UserError, match="half-written"):
        read_run(folder).metrics()
    lines = read_jsonl(folder / "metrics.jsonl", open_end=True)
    assert len(lines) == 3
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished"', '"running"'))
    assert [m["loss"] for m in read_run(folder).metrics()] == [5, 4]


def test_the_command_prints_and_writes_the_same_table(two: Folders, tmp_path: Path) -> None:
    def table(*extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ablations.table", "runs=[base,avgpool]", f"output={tmp_path / 'out'}", *extra]
        environment = {"MM1_HOME": str(tmp_path), "PATH": ""}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = table()
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out/table.md").read_text() == render_markdown(table_of(two))
    assert (tmp_path / "out/table.csv").read_text() == render_csv(table_of(two))
    wrong = table("shots=[3]")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr


def test_help_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, ablations.tables.render, ablations.plots; print({'torch', 'matplotlib', 'hydra'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
