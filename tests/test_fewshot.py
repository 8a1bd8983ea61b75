"""Few-shot evaluation: the plan's promises, prompts, decoding that ignores its batch, resuming, controls, errors.

The tasks are written on the spot: coloured squares with known answers.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ablations.results import read_jsonl
from configs.command import compose
from configs.errors import UserError
from data_pipelines.shards import Manifest, SplitWriter, Task
from eval import fewshot
from eval.controls import show_shuffled
from eval.features import ImageFeatures
from eval.fewshot import EvalConfig, evaluate
from eval.generate import Answer, Generator, Request
from eval.plan import Plan, derangement, make_plan, sample_queries
from eval.prompts import PROMPTS, build_prompt, options
from eval.results import Results, score
from eval.tasks.corpus import TaskData, read_tasks
from eval.tasks.example import Example
from tests.corpus import COLOURS, square, tokenizer
from tests.models import tiny_model

QUERIES = 12


def picture(i: int) -> bytes:
    """A different image for every i: eight colours at sizes that resize to the same square."""
    return square(COLOURS[i % len(COLOURS)], 8 + i // len(COLOURS))


def write_tasks(folder: Path, *, duplicate: bool = False) -> Path:
    """Captioning and VQA with a support split (VQA: two questions an image, and support = query), and binding."""
    folder.mkdir(parents=True)
    manifest = Manifest(corpus=folder.name, recipe="tests")
    for split, first, count in (("support", 0, 20), ("query", 20, QUERIES)):
        writer = SplitWriter(folder, "colours", split, format="task")
        for i in range(first, first + count):
            name = f"caption-{first if duplicate else i}"
            said = {"id": name, "image_id": f"image-{i}", "references": [f"a {COLOURS[i % 8]} square", f"square {i}"]}
            writer.write({"json": json.dumps(said), "webp": picture(i)}, images=1)
        manifest.splits.setdefault("colours", {})[split] = writer.close()
    writer = SplitWriter(folder, "questions", "all", format="task")
    for i in range(2 * QUERIES):
        asked = {
            "id": f"question-{i}",
            "image_id": f"image-{i // 2}",
            "question": "what colour?",
            "answers": [COLOURS[i // 2 % 8]] * 10,
        }
        writer.write({"json": json.dumps(asked), "webp": picture(i // 2)}, images=1)
    manifest.splits["questions"] = {"all": writer.close()}
    writer = SplitWriter(folder, "names", "query", format="task")
    for i in range(5):
        names = ["dax", "blicket"]
        shown = [{"image": f"{j:03d}.webp", "name": names[j % 2]} for j in range(4)]
        episode = {
            "id": f"episode-{i}",
            "image_id": f"q-{i}",
            "names": names,
            "answer": names[i % 2],
            "demonstrations": shown,
            "query": "q.webp",
        }
        images = {f"{j:03d}.webp": picture(10 * i + j) for j in range(4)} | {"q.webp": picture(10 * i + 7)}
        writer.write({"json": json.dumps(episode), **images}, images=5)
    manifest.splits["names"] = {"query": writer.close()}
    manifest.tasks = {
        "colours": Task("captioning", "", "colours/support", "colours/query"),
        "questions": Task("vqa", "", "questions/all", "questions/all", 0.125),
        "names": Task("binding", "", "names/query", "names/query", 0.5),
    }
    manifest.save(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="session")
def tasks(corpus: Path) -> dict[str, TaskData]:
    return {task.name: task for task in read_tasks(corpus)}


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, large enough that its answers differ from prompt to prompt."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "model"
    model = tiny_model(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def plan_of(tasks: dict[str, TaskData], **changes: Any) -> Plan:
    settings: dict[str, Any] = {"shots": [0, 2, 4], "limit": None, "seed": 0} | changes
    return make_plan(list(tasks.values()), corpus="toy", corpus_fingerprint="0", **settings)


def config_for(export: Path, corpus: Path, **changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {"shots": [0, 2], "limit": 6, "batch_size": 4, "device": "cpu"} | changes
    return EvalConfig(run=str(export), task_corpus=str(corpus), **settings)


# ----------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("mode", ["per_query", "fixed"])
def test_demonstrations_never_show_the_query_or_its_image_nor_one_image_twice(tasks: dict[str, TaskData], mode: str) -> None:
    plan = plan_of(tasks, mode=mode)
    for task in (tasks["colours"], tasks["questions"]):
        assert task.support is not None
        images, asked = task.support.image_ids, task.queries.image_ids
        for query, shown in plan.tasks[task.name].demonstrations.items():
            assert query not in shown
            pictures = [images[name] for name in shown]
            assert asked[query] not in pictures
            assert len(set(pictures)) == len(pictures) == 4


def test_fewer_shots_are_the_beginning_of_more(tasks: dict[str, TaskData]) -> None:
    few, many = plan_of(tasks, shots=[0, 2]), plan_of(tasks, shots=[4])
    for name in tasks:
        for query, shown in few.tasks[name].demonstrations.items():
            assert shown == many.tasks[name].demonstrations[query][:2]


def test_a_query_keeps_its_demonstrations_in_any_sample_and_samples_are_nested(tasks: dict[str, TaskData]) -> None:
    whole, part = plan_of(tasks), plan_of(tasks, limit=5)
    for name in tasks:
        chosen = part.tasks[name].queries
        assert len(chosen) == 5
        assert {q: whole.tasks[name].demonstrations[q] for q in chosen} == part.tasks[name].demonstrations
    ids = [f"q{i}" for i in range(40)]
    shuffled = random.Random(0).sample(ids, len(ids))
    small = sample_queries(ids, task="t", seed=0, limit=7)
    assert set(small) == set(sample_queries(shuffled, task="t", seed=0, limit=7))
    assert set(small) < set(sample_queries(ids, task="t", seed=0, limit=20))
    assert small == sorted(small, key=ids.index)


def test_fixed_demonstrations_are_shared_and_per_query_ones_differ(tasks: dict[str, TaskData]) -> None:
    fixed = plan_of(tasks, mode="fixed").tasks["colours"].demonstrations
    assert len({tuple(shown) for shown in fixed.values()}) == 1
    assert len({tuple(shown) for shown in plan_of(tasks).tasks["colours"].demonstrations.values()}) > QUERIES / 2


def test_the_fingerprint_changes_with_what_is_asked_and_with_nothing_else(tasks: dict[str, TaskData]) -> None:
    assert plan_of(tasks).fingerprint == plan_of(tasks).fingerprint
    different = [plan_of(tasks, **change) for change in ({"seed": 1}, {"limit": 3}, {"shots": [0, 2]}, {"mode": "fixed"})]
    assert len({plan.fingerprint for plan in [plan_of(tasks), *different]}) == 5


def test_plans_that_cannot_be_made_are_refused(tasks: dict[str, TaskData]) -> None:
    with pytest.raises(UserError, match="12 shots want"):
        plan_of({"questions": tasks["questions"]}, shots=[12])
    with pytest.raises(UserError, match="brings 4 demonstrations"):
        plan_of({"names": tasks["names"]}, shots=[8])
    with pytest.raises(UserError, match="rising order"):
        plan_of(tasks, shots=[4, 0])
    with pytest.raises(UserError, match="per_query, fixed, nearest"):
        plan_of(tasks, mode="similar")


# -------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_read_as_the_templates_say() -> None:
    shown = Example("d", "d", b"D", "what {image}?", ("red", "blue", "blue"))
    asked = Example("q", "q", b"Q", "which?", ("green",))
    assert build_prompt(PROMPTS["plain"]["captioning"], [shown], asked) == [b"D", "blue\n", b"Q"]
    assert build_prompt(PROMPTS["mm1"]["captioning"], [shown], asked) == [b"D", "A photo of blue\n", b"Q", "A photo of"]
    vqa = build_prompt(PROMPTS["plain"]["vqa"], [shown], asked)
    assert vqa == [b"D", "Question: what {image}? Short answer: blue\n", b"Q", "Question: which? Short answer:"]
    assert build_prompt(PROMPTS["plain"]["vqa"], [], asked) == [b"Q", "Question: which? Short answer:"]
    assert build_prompt(PROMPTS["plain"]["binding"], [shown], asked, with_images=False) == ["This is a blue\nThis is a"]
    assert options(PROMPTS["plain"]["binding"], ["dax"]) == (" dax",)


# ------------------------------------------------------------------------------------------------------------- decoding


def generator(export: Path, **changes: Any) -> Generator:
    from eval.generate import load_model

    model, tokens = load_model(export, "cpu", "float32")
    settings: dict[str, Any] = {"stop": ("\n",), "max_new_tokens": 12} | changes
    return Generator(model, tokens, ImageFeatures(model, "cpu"), **settings)


def prompts(count: int = 9) -> list[Request]:
    """Of different lengths, with 0 to 3 images, two options each."""
    return [
        Request(
            [part for j in range(i % 4) for part in (picture(i + j), f"a {COLOURS[j]}\n" * (1 + i // 3))] + ["a square"],
            (" red", " yellow!"),
        )
        for i in range(count)
    ]


def answers_at(made: Generator, requests: list[Request], batch_size: int) -> list[Answer]:
    answers: dict[int, Answer] = {}
    for batch, found in made.run(requests, batch_size):
        answers |= dict(zip(batch, found, strict=True))
    return [answers[i] for i in range(len(requests))]


def test_answers_do_not_depend_on_the_batch(export: Path) -> None:
    requests = prompts()
    one, eight = (answers_at(generator(export), requests, size) for size in (1, 8))
    assert [answer.text for answer in one] == [answer.text for answer in eight]
    assert len({answer.text for answer in one}) > 3  # else the test would say nothing
    for a, b in zip(one, eight, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert a.options == pytest.approx(b.options, abs=1e-3)


def test_greedy_text_and_scores_equal_a_forward_pass_over_the_whole_text(export: Path) -> None:
    made = generator(export, stop=(), max_new_tokens=6)
    model, tokens = made.model, made.tokenizer
    for request in prompts(5):
        answer = made.answer([request])[0]
        ids = made.encode(request).ids
        images = made.features.get([part for part in request.parts if not isinstance(part, str)])
        for text, expected in zip(request.options, answer.options, strict=True):
            more = tokens.encode(text, add_special_tokens=False)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids + more]), image_features=images).logits[0]
            chosen = made._logprobs(logits)[len(ids) - 1 : -1].gather(1, torch.tensor(more)[:, None])
            assert expected == pytest.approx(float(chosen.sum()), rel=1e-4, abs=1e-3)
        grown = list(ids)
        for _ in range(6):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([grown]), image_features=images).logits[0, -1:]
            grown.append(int(made._logprobs(logits).argmax()))
        spoken = grown[len(ids) :]
        if tokens.eos_token_id in spoken:
            spoken = spoken[: spoken.index(tokens.eos_token_id)]
        assert answer.text == tokens.decode(spoken).strip()


def test_a_stop_cuts_the_text_and_the_rest_is_not_generated(export: Path) -> None:
    request = prompts()[3]
    free = generator(export, stop=(), max_new_tokens=12).answer([request])[0].text
    assert len(free) > 3
    stop = free[len(free) // 2]
    assert generator(export, stop=(stop,)).answer([request])[0].text == free[: free.index(stop)].strip()


def test_every_distinct_image_is_encoded_once_and_a_small_budget_changes_nothing(export: Path) -> None:
    requests = prompts()
    made = generator(export)
    roomy = answers_at(made, requests, 4)
    assert made.features.encoded == len({part for request in requests for part in request.parts if isinstance(part, bytes)})
    tight = generator(export)
    tight.features.budget = 0
    assert answers_at(tight, requests, 4) == roomy


def test_prompts_longer_than_the_decoder_are_refused(export: Path) -> None:
    with pytest.raises(UserError, match="512 positions"):
        generator(export).answer([Request(["a red square " * 300])])


# ------------------------------------------------------------------------------------------------------------- controls


def test_the_derangement_moves_every_image_and_loses_none() -> None:
    names = [f"i{n}" for n in range(17)]
    mapping = derangement(names * 2, seed=3, key="t")
    assert set(mapping) == set(mapping.values()) == set(names)
    assert all(a != b for a, b in mapping.items())
    assert mapping == derangement(names[::-1], seed=3, key="t")
    assert mapping != derangement(names, seed=4, key="t")
    with pytest.raises(UserError, match="no other one"):
        derangement(["one"], seed=0, key="t")


def test_shuffled_changes_every_image_and_nothing_else(tasks: dict[str, TaskData]) -> None:
    for task in tasks.values():
        show = show_shuffled(task, 0)
        for pool in {task.queries, task.support} - {None}:
            assert pool is not None
            for name in pool.ids:
                own, other = pool.example(name), show(pool, name)
                assert other.image != own.image
                assert (other.id, other.question, other.references, other.names) == (
                    own.id,
                    own.question,
                    own.references,
                    own.names,
                )
                for mine, theirs in zip(own.demonstrations, other.demonstrations, strict=True):
                    assert mine.image != theirs.image
                    assert mine.references == theirs.references


# ----------------------------------------------------------------------------------------------------------- evaluation


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def copy_of(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "model", ignore=shutil.ignore_patterns("results")))


def test_a_killed_evaluation_resumes_to_the_same_bytes(
    export: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(config_for(copy_of(export, tmp_path / "a"), corpus))[1]
    config = config_for(copy_of(export, tmp_path / "b"), corpus)
    append = Results.append
    calls = 0

    def dies(self: Results, task: str, shots: int, records: list[dict[str, Any]]) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:  # in the middle of writing
            append(self, task, shots, records[:1])
            with open(self._partial(task, shots), "a") as file:
                file.write('{"id": "half a li')
            raise KeyboardInterrupt
        append(self, task, shots, records)

    monkeypatch.setattr(Results, "append", dies)
    for _ in range(30):
        try:
            resumed = evaluate(config)[1]
            break
        except KeyboardInterrupt:
            assert not list(config_folder(config).glob("summary.json"))
    assert calls > 6
    assert resumed.name == whole.name
    assert files(resumed) == files(whole)


def config_folder(config: EvalConfig) -> Path:
    return fewshot.prepare(config)[1].folder


def test_results_hold_what_tables_read(export: Path, corpus: Path, tmp_path: Path) -> None:
    summary, folder = evaluate(config_for(copy_of(export, tmp_path), corpus))
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["version"] == 1
    assert summary["control"] is None
    measured = {"logprob", "entropy", "image_gain"}
    assert summary["tasks"]["names"]["chance"] == 50.0
    for task, keys in {"colours": {"references"}, "questions": {"answers"}, "names": {"references", "options"}}.items():
        for shots in (0, 2):
            lines = [json.loads(line) for line in (folder / f"{task}.{shots}.jsonl").read_text().splitlines()]
            estimate = summary["tasks"][task]["shots"][str(shots)]
            assert estimate["n"] == len(lines)
            assert estimate["mean"] == pytest.approx(sum(line["score"] for line in lines) / len(lines))
            assert estimate["clusters"] == len({line["cluster"] for line in lines})
            for line in lines:
                assert {"id", "cluster", "prediction", "score", "demonstrations", *measured} | keys == set(line)
                assert len(line["demonstrations"]) == shots
    means = [summary["tasks"][task]["shots"]["2"]["mean"] for task in summary["tasks"]]
    assert summary["means"]["2"]["mean"] == pytest.approx(sum(means) / 3)


def test_predictions_may_hold_any_line_separator(
    export: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, append = "red\u2028blue\u2029\x85\x0b\x0c\x1c\r\n", Results.append

    def speaks(self: Results, task: str, shots: int, records: list[dict[str, Any]]) -> None:
        append(self, task, shots, [record | {"prediction": said} for record in records])

    monkeypatch.setattr(Results, "append", speaks)
    summary, folder = evaluate(config_for(copy_of(export, tmp_path), corpus, tasks=["colours"], shots=[0]))
    read = [line["prediction"] for line in read_jsonl(folder / "colours.0.jsonl")]
    assert read == [said] * summary["tasks"]["colours"]["shots"]["0"]["n"], "the tables read the same lines"


def test_batch_size_changes_no_answer_and_controls_are_results_of_their_own(export: Path, corpus: Path, tmp_path: Path) -> None:
    model = copy_of(export, tmp_path)

    def predictions(**changes: Any) -> tuple[Path, list[str]]:
        folder = evaluate(config_for(model, corpus, tasks=["colours"], **changes))[1]
        return folder, [json.loads(line)["prediction"] for line in (folder / "colours.2.jsonl").read_text().splitlines()]

    plain, said = predictions(batch_size=3)
    shuffled, said_shuffled = predictions(images="shuffled")
    blind, said_blind = predictions(images="none")
    assert len({plain, shuffled, blind}) == 3
    assert said not in (said_shuffled, said_blind)
    assert json.loads((shuffled / "summary.json").read_text())["control"] == "shuffled"
    shutil.rmtree(plain)
    assert predictions(batch_size=1) == (plain, said)


def test_finished_work_is_found_again_without_torch(export: Path, corpus: Path, tmp_path: Path) -> None:
    model = copy_of(export, tmp_path)
    before = files(evaluate(config_for(model, corpus))[1])
    code = (
        "import sys; from eval.fewshot import EvalConfig, evaluate\n"
        f"_, folder = evaluate(EvalConfig(run={str(model)!r}, task_corpus={str(corpus)!r}, shots=[0, 2], limit=6))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(Path(done.stdout.strip())) == before


def test_new_weights_are_evaluated_again(export: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of(export, tmp_path)
    config = config_for(model, corpus, tasks=["names"])
    folder = evaluate(config)[1]
    old = (folder / "names.2.jsonl").read_bytes()
    trained = tiny_model(seed=2)
    trained.save_pretrained(model)
    assert evaluate(config)[1] == folder
    assert "other weights" in capsys.readouterr().out
    assert (folder / "names.2.jsonl").read_bytes() != old


def test_mistakes_are_named(export: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no colors. It has: colours, questions, names"):
        evaluate(config_for(export, corpus, tasks=["colors"]))
    with pytest.raises(UserError, match=r"tasks=\[\]: names none. Name some of colours, questions, names"):
        evaluate(config_for(export, corpus, tasks=[]))
    for tasks in (["questions"], ["colours"]):
        with pytest.raises(UserError, match=r"^vqa_metric=foo: no such VQA accuracy. Choose from: vqa_official"):
            evaluate(config_for(export, corpus, tasks=tasks, vqa_metric="foo"))
    with pytest.raises(UserError, match="task_corpus=NAME"):
        evaluate(EvalConfig(run=str(export)))
    with pytest.raises(UserError, match="fewer than 2 images"):
        evaluate(config_for(export, corpus, limit=1))
    with pytest.raises(UserError, match="both have the id 'caption-20'"):
        evaluate(config_for(export, write_tasks(tmp_path / "twice", duplicate=True)))
    model = copy_of(export, tmp_path)
    folder = evaluate(config_for(model, corpus, tasks=["names"]))[1]
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"version": 0}))
    with pytest.raises(UserError, match="version 0"):
        evaluate(config_for(model, corpus, tasks=["names"]))
    run = tmp_path / "unfinished"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"version": 1, "status": "running"}))
    with pytest.raises(UserError, match=r"no exported model yet \(status: running\)"):
        evaluate(EvalConfig(run=str(run), task_corpus=str(corpus)))


def test_the_command_line_checks_its_settings() -> None:
    config = compose("eval", EvalConfig, ["run=x", "images=true", "shots=[0,4]", "limit=null"])
    assert (config.images, config.shots, config.limit) == ("true", [0, 4], None)
    with pytest.raises(UserError, match="true, shuffled, none"):
        compose("eval", EvalConfig, ["run=x", "images=yes"])
    with pytest.raises(UserError, match=r"run=\.\.\."):
        compose("eval", EvalConfig, [])


def test_binding_takes_the_likelier_name_and_a_tie_for_a_guess() -> None:
    records = [{"options": {"dax": a, "kip": b}, "references": ["dax"]} for a, b in ((-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0))]
    assert score("binding", "accuracy", records) == [100.0, 0.0, 50.0]
