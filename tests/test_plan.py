"""Plans: what every mode of demonstrations promises, nearest images against brute force, and input that no evaluation accepts.

Pools of ids stand in for files where only planning is asked; where images are, they are coloured squares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from ablations.results import read_run
from configs.errors import UserError
from data_pipelines.images import decode_image
from data_pipelines.shards import Manifest, SplitWriter, Task
from eval import fewshot
from eval import plan as planning
from eval.fewshot import EvalConfig, evaluate
from eval.nearest import EncoderFeatures
from eval.plan import MODES, Plan, TaskPlan, make_plan
from eval.prompts import PROMPTS, build_prompt
from eval.tasks.corpus import read_tasks
from eval.tasks.example import Example
from eval.tasks.pool import Pool, TaskData
from tests.corpus import tokenizer
from tests.models import tiny_model
from tests.test_fewshot import picture, write_tasks
from tests.test_table import Folders


class Names:
    """A pool of ids and image ids without files."""

    def __init__(self, place: str, image_ids: dict[str, str]) -> None:
        self.place, self.image_ids, self.ids = place, image_ids, list(image_ids)

    def example(self, name: str) -> Example:
        return Example(name, self.image_ids[name], self.image_ids[name].encode(), None, ("x",))


class Vectors:
    """Features that depend on the image id alone: random directions, or all the same."""

    def __init__(self, seed: int = 0, *, same: bool = False) -> None:
        self.fingerprint, self.same = f"vectors {seed}", same

    def of(self, image: str) -> np.ndarray:
        key = "" if self.same else image
        state = int.from_bytes(hashlib.blake2b(f"{self.fingerprint} {key}".encode(), digest_size=8).digest(), "big")
        vector = np.random.default_rng(state).normal(size=24).astype(np.float32)
        return vector / np.linalg.norm(vector)

    def __call__(self, task: TaskData, pool: Pool, names: Sequence[str]) -> np.ndarray:
        return np.stack([self.of(pool.image_ids[name]) for name in names])


def task_of(queries: dict[str, str], support: dict[str, str] | None = None) -> TaskData:
    asked = Names("t/query", queries)
    return TaskData("t", "vqa", None, asked, asked if support is None else Names("t/support", support))


def large(queries: int = 70, support: int = 120) -> TaskData:
    """Two questions an image; the first images are in both pools."""
    return task_of(
        {f"q{i}": f"image{i // 2}" for i in range(queries)}, {f"s{i}": f"image{i // 2 + queries // 4}" for i in range(support)}
    )


def plan_of(task: TaskData, mode: str, **changes: Any) -> Plan:
    given: dict[str, Any] = {"shots": [0, 4, 8], "limit": None, "seed": 0} | changes
    if mode == "nearest":
        given.setdefault("features", Vectors())
    return make_plan([task], corpus="c", corpus_fingerprint="f", mode=mode, **given)


# -------------------------------------------------------------------------------------------------------------- all modes


@settings(max_examples=60, deadline=None)
@given(
    queries=some.dictionaries(some.integers(0, 30), some.integers(0, 12), min_size=1, max_size=12),
    support=some.dictionaries(some.integers(0, 30), some.integers(0, 12), min_size=1, max_size=25),
    mode=some.sampled_from(MODES),
    shots=some.integers(0, 5),
    same=some.booleans(),
    seed=some.integers(0, 3),
)
def test_no_mode_shows_the_query_its_image_or_one_image_twice(
    queries: dict[int, int], support: dict[int, int], mode: str, shots: int, same: bool, seed: int
) -> None:
    """Whatever the pools share: ids that stand in both, with the same or another image, and images under several ids."""
    task = task_of({f"i{a}": f"p{b}" for a, b in queries.items()}, {f"i{a}": f"p{b}" for a, b in support.items()})
    assert task.support is not None
    features = Vectors(same=same) if mode == "nearest" else None
    pool, asked = task.support.image_ids, task.queries.image_ids
    enough = all(
        len({image for name, image in pool.items() if name != query and image != asked[query]}) >= shots for query in asked
    )
    if not enough:
        with pytest.raises(UserError, match=f"{shots} shots want"):
            plan_of(task, mode, shots=[shots], seed=seed, features=features)
        return
    plan = plan_of(task, mode, shots=[shots], seed=seed, features=features).tasks["t"]
    for query in asked:
        shown = plan.shown(query, shots)
        pictures = [pool[name] for name in shown]
        assert query not in shown
        assert asked[query] not in pictures
        assert len(set(pictures)) == len(pictures) == shots


@pytest.mark.parametrize("mode", MODES)
def test_fewer_shots_are_inside_more_and_samples_change_nothing(mode: str) -> None:
    task = large()
    few, many, sample = (plan_of(task, mode, **c).tasks["t"] for c in ({"shots": [4]}, {}, {"limit": 20}))
    assert len(sample.queries) == 20
    for query in task.queries.ids:
        four, eight = many.shown(query, 4), many.shown(query, 8)
        assert four == few.shown(query, 4)
        assert four == (eight[4:] if mode == "nearest" else eight[:4])
        assert many.shown(query, 0) == []
    assert all(sample.shown(query, 8) == many.shown(query, 8) for query in sample.queries)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_queries_and_support_is_of_no_account(mode: str) -> None:
    task = large()
    assert task.support is not None
    turned = task_of(dict(reversed(task.queries.image_ids.items())), dict(reversed(task.support.image_ids.items())))
    one, other = (plan_of(t, mode).tasks["t"].demonstrations for t in (task, turned))
    assert one == other


@pytest.mark.parametrize("mode", ["per_query", "fixed"])
def test_a_demonstration_seed_redraws_demonstrations_and_keeps_the_queries(mode: str) -> None:
    task = large()
    base, redrawn, other = (plan_of(task, mode, limit=20, **c) for c in ({}, {"demonstration_seed": 1}, {"seed": 1}))
    assert redrawn.tasks["t"].queries == base.tasks["t"].queries != other.tasks["t"].queries
    common = set(base.tasks["t"].queries) & set(other.tasks["t"].queries)
    assert common
    for query in common:
        assert redrawn.tasks["t"].shown(query, 8) == other.tasks["t"].shown(query, 8) != base.tasks["t"].shown(query, 8)
    assert len({plan.fingerprint for plan in (base, redrawn, other)}) == 3
    assert plan_of(task, mode, limit=20, demonstration_seed=0).fingerprint == base.fingerprint


def test_plans_made_before_there_were_features_keep_their_fingerprint() -> None:
    """Else every finished evaluation would be done again."""
    plan = Plan("c", "f", 0, "per_query", None, [0, 2], {"t": TaskPlan(["q"], {"q": ["a", "b"]})})
    assert plan.fingerprint == "991a7236c48925066ec1afcf908d2cea"
    assert plan.to_json()["tasks"] == {"t": {"queries": ["q"], "demonstrations": {"q": ["a", "b"]}}}


# ---------------------------------------------------------------------------------------------------------------- nearest


def test_nearest_is_the_ranking_by_cosine_similarity_and_the_most_similar_stands_last() -> None:
    task, vectors = large(), Vectors()
    assert task.support is not None
    plan = plan_of(task, "nearest").tasks["t"]
    pool, asked = task.support.image_ids, task.queries.image_ids
    for query in plan.queries:
        own = vectors.of(asked[query])
        similar = {image: float(vectors.of(image) @ own) for image in set(pool.values()) - {asked[query]}}
        images = sorted(similar, key=similar.__getitem__, reverse=True)
        assert [pool[name] for name in plan.shown(query, 8)] == images[:8][::-1]
    assert len({plan.shown(query, 1)[0] for query in plan.queries}) > 20, "queries must differ in what is nearest"


def test_blocks_and_rounding_of_the_matrix_product_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features a hair apart, well within float32's rounding of a product: the order is that of exact arithmetic."""
    task = large()
    assert task.support is not None

    class Close(Vectors):
        def of(self, image: str) -> np.ndarray:
            return np.array([1, 1e-6 * int(image[5:]), *[0.0] * 22], np.float32)

    expected = plan_of(task, "nearest", features=Close()).tasks["t"]
    monkeypatch.setattr(planning, "QUERY_BLOCK", 1)
    assert plan_of(task, "nearest", features=Close()).tasks["t"] == expected
    numbers = [int(task.support.image_ids[name][5:]) for name in expected.shown("q60", 8)]
    assert numbers == sorted(numbers), "the larger, the nearer"
    assert numbers[-1] == max(int(image[5:]) for image in task.support.image_ids.values())


def test_equal_images_come_by_keyed_hash() -> None:
    task = large()
    assert task.support is not None
    one, other = (
        plan_of(task, "nearest", features=Vectors(same=True), demonstration_seed=seed).tasks["t"].demonstrations
        for seed in (0, 1)
    )
    assert len({tuple(shown) for shown in one.values()}) == len(one), "another draw for each query"
    assert all(one[query] != other[query] for query in one), "and for each seed"
    used = {name for shown in one.values() for name in shown}
    assert len(used) > 0.9 * len(task.support.ids), "every item of the support has its chance"


def test_plans_by_different_features_are_never_the_same() -> None:
    task = task_of({"q": "a"}, {"s": "b"})
    plans = [plan_of(task, "nearest", shots=[0, 1], features=Vectors(seed)) for seed in (0, 1)]
    assert plans[0].tasks == plans[1].tasks
    assert plans[0].fingerprint != plans[1].fingerprint
    assert plans[0].to_json()["features"] == "vectors 0"


def test_items_with_demonstrations_of_their_own_keep_them(corpus: Path) -> None:
    names = read_tasks(corpus, ["names"])[0]
    plans = [plan_of(names, mode, shots=[0, 2, 4]).tasks["names"] for mode in MODES]
    assert plans[0] == plans[1] == plans[2]
    assert plans[2].shown("episode-0", 2) == plans[2].shown("episode-0", 4)[:2]


# --------------------------------------------------------------------------------------- features of a run's image encoder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("plans") / "toy")


def save_model(folder: Path, seed: int) -> Path:
    torch.set_num_threads(1)
    model = tiny_model(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_model(tmp_path_factory.mktemp("models") / f"model{seed}", seed) for seed in (1, 2)]


@pytest.fixture
def models(exports: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(export, tmp_path / export.name)) for export in exports]


def config_for(model: Path, corpus: Path, **changes: Any) -> EvalConfig:
    given: dict[str, Any] = {"shots": [0, 2], "limit": 6, "batch_size": 4, "device": "cpu", "tasks": ["colours"]} | changes
    return EvalConfig(run=str(model), task_corpus=str(corpus), **given)


def test_features_are_the_encoders_mean_patch_of_length_one_and_are_computed_once(models: list[Path], corpus: Path) -> None:
    from eval.generate import load_model

    task = read_tasks(corpus, ["colours"])[0]
    assert task.support is not None
    given: dict[str, Any] = {
        "weights": "w",
        "corpus_fingerprint": "f",
        "folder": models[0] / "results" / "features",
        "device": "cpu",
    }
    made = EncoderFeatures(models[0], **given)
    found = made(task, task.support, task.support.ids)
    model, _ = load_model(models[0], "cpu", "float32")
    for name, vector in zip(task.support.ids, found, strict=True):
        pixels = decode_image(task.support.example(name).image, model.config.image_size, name=name)
        with torch.inference_mode():
            patches = model.image_encoder(pixels[None])[0].mean(0)
        assert vector == pytest.approx((patches / patches.norm()).numpy(), abs=1e-5)
    assert made.encoded == len(task.support.ids)

    again = EncoderFeatures(models[0] / "no model is loaded", **given)
    assert np.array_equal(again(task, task.support, task.support.ids[::-1]), found[::-1])
    assert again.encoded == 0
    more = EncoderFeatures(models[0], **given)
    more(task, task.queries, task.queries.ids)
    assert more.encoded == len(task.queries.ids), "only what is new"
    assert EncoderFeatures(models[0], **given | {"weights": "x"}).path("colours") != made.path("colours")

    made.path("colours").write_bytes(made.path("colours").read_bytes()[:-9])
    with pytest.raises(UserError, match="Delete the file"):
        EncoderFeatures(models[0], **given)(task, task.support, task.support.ids)


def test_an_evaluation_shows_the_nearest_images_and_says_so(models: list[Path], corpus: Path) -> None:
    _, folder = evaluate(config_for(models[0], corpus, demonstrations="nearest", shots=[0, 2, 4]))
    saved = json.loads((folder / "plan.json").read_text())["plan"]
    assert saved["mode"] == "nearest"
    for shots in (0, 2, 4):
        for line in map(json.loads, (folder / f"colours.{shots}.jsonl").read_text().splitlines()):
            shown = saved["tasks"]["colours"]["demonstrations"][line["id"]]
            assert line["demonstrations"] == shown[len(shown) - shots :]
    # pictures repeat their colour every 8: what looks alike is found, which chance (1 in 8) would not
    pool = {int(n.split("-")[1]) for shown in saved["tasks"]["colours"]["demonstrations"].values() for n in shown[-1:]}
    asked = saved["tasks"]["colours"]["demonstrations"]
    alike = [int(query.split("-")[1]) % 8 == int(shown[-1].split("-")[1]) % 8 for query, shown in asked.items()]
    assert pool
    assert sum(alike) >= len(alike) - 1


def test_finished_work_with_nearest_demonstrations_is_found_without_torch(models: list[Path], corpus: Path) -> None:
    _, folder = evaluate(config_for(models[0], corpus, demonstrations="nearest"))
    code = (
        "import sys; from eval.fewshot import EvalConfig, evaluate\n"
        f"_, folder = evaluate(EvalConfig(run={str(models[0])!r}, task_corpus={str(corpus)!r}, shots=[0, 2], limit=6, "
        "tasks=['colours'], demonstrations='nearest'))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == folder


def test_runs_compared_by_one_runs_eyes_have_one_plan(models: list[Path], corpus: Path) -> None:
    def plan(model: Path, **changes: Any) -> Plan:
        return fewshot.prepare(config_for(model, corpus, demonstrations="nearest", **changes))[1].plan

    own = [plan(model) for model in models]
    assert own[0].fingerprint != own[1].fingerprint
    assert own[0].tasks["colours"].queries == own[1].tasks["colours"].queries
    assert plan(models[1], nearest_by=str(models[0])).fingerprint == own[0].fingerprint
    with pytest.raises(UserError, match="only demonstrations=nearest"):
        config_for(models[0], corpus, nearest_by=str(models[1])).validate()


def test_demonstration_seeds_of_one_run_are_read_back_as_repeats(models: list[Path], corpus: Path, tmp_path: Path) -> None:
    found = [evaluate(config_for(models[0], corpus, demonstration_seed=seed)) for seed in (None, 1, 2)]
    assert len({folder for _, folder in found}) == 3
    asked = [[json.loads(line) for line in (folder / "colours.2.jsonl").read_text().splitlines()] for _, folder in found]
    assert [line["id"] for line in asked[0]] == [line["id"] for line in asked[1]]
    assert sum(a["demonstrations"] != b["demonstrations"] for a, b in zip(asked[0], asked[1], strict=True)) >= 5

    run = Folders(tmp_path / "runs").run("base", found[0][0]["run"]["hash"])
    shutil.copytree(models[0] / "results", run / "results")
    evaluations = read_run(run).evaluations
    assert [e.demonstration_seeds for e in evaluations] == [[0, 1, 2]]
    assert evaluations[0].of_seed(2).scores("colours", 2).ids == evaluations[0].scores("colours", 2).ids


# ---------------------------------------------------------------------------------------------------------------- prompts


def test_openflamingo_prompts_read_as_its_evaluation_code_writes_them() -> None:
    shown = Example("d", "d", b"D", "what?", ("red", "blue", "blue"))
    asked = Example("q", "q", b"Q", "which?", ("green",))
    own = PROMPTS["openflamingo"]
    assert build_prompt(own["captioning"], [shown], asked) == [b"D", "Output:blue\n", b"Q", "Output:"]
    assert build_prompt(own["vqa"], [shown], asked) == [
        b"D",
        "Question:what? Short answer:blue\n",
        b"Q",
        "Question:which? Short answer:",
    ]
    assert build_prompt(own["vqa"], [], asked) == [b"Q", "Question:which? Short answer:"], "0-shot shows nothing"
    assert {kind for prompts in PROMPTS.values() for kind in prompts} == {"captioning", "vqa", "binding"}
    assert all(len(prompts) == 3 for prompts in PROMPTS.values())


# -------------------------------------------------------------------------------------------------------------- bad input


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", ["plan.json", "summary.json"])
def test_results_of_another_version_are_refused_and_left_alone(models: list[Path], corpus: Path, name: str) -> None:
    config = config_for(models[0], corpus)
    _, folder = evaluate(config)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"version": 7}))
    before = bytes_of(folder)
    with pytest.raises(UserError, match=rf"{name}: results of version 7.*Move"):
        evaluate(config)
    assert bytes_of(folder) == before


def test_a_plan_of_another_dataset_is_refused_and_left_alone(models: list[Path], corpus: Path, tmp_path: Path) -> None:
    config = config_for(models[0], corpus)
    _, folder = evaluate(config)
    other = evaluate(config_for(models[0], write_tasks(tmp_path / "other"), tasks=["questions"]))[1]
    shutil.copy(other / "plan.json", folder / "plan.json")
    before = bytes_of(folder)
    with pytest.raises(UserError, match=r"plan\.json.*another plan.*corpus other"):
        evaluate(config)
    assert bytes_of(folder) == before


def test_a_checkpoint_without_its_tokeniser_is_named_before_anything_is_answered(models: list[Path], corpus: Path) -> None:
    for path in models[0].glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match=r"tokeni[sz]er") as error:
        evaluate(config_for(models[0], corpus))
    assert str(models[0]) in str(error.value)
    assert not list(models[0].glob("results/*/*.jsonl*"))


def test_an_id_that_stands_twice_in_results_is_named_and_left_alone(models: list[Path], corpus: Path) -> None:
    config = config_for(models[0], corpus)
    _, folder = evaluate(config)
    path = folder / "colours.2.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[:-1]]))
    before = bytes_of(folder)
    with pytest.raises(UserError, match=rf"duplicate ids: \['{json.loads(lines[0])['id']}'\]"):
        evaluate(config)
    assert bytes_of(folder) == before


@pytest.mark.parametrize("kind", ["captioning", "vqa"])
def test_an_empty_reference_list_is_refused_when_the_task_is_read(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    manifest = Manifest(corpus="data", recipe="tests")
    writer = SplitWriter(folder, "t", "all", format="task")
    for i in range(3):
        given = [] if i == 2 else ["red"]
        sample = {"id": f"i{i}", "image_id": f"p{i}", "question": "?", "references": given, "answers": given}
        writer.write({"json": json.dumps(sample), "webp": picture(i)}, images=1)
    manifest.splits["t"] = {"all": writer.close()}
    manifest.tasks = {"t": Task(kind, "", "t/all", "t/all")}
    manifest.save(folder)
    with pytest.raises(UserError, match=r"task t: no references to score against \(found \[\]\)"):
        read_tasks(folder)
