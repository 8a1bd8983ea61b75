"""TextCore: every task at 0 and 2 shots through lm-eval, rows of every layout, what is mended, resuming, errors."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.command import compose
from configs.errors import UserError
from eval import textcore
from eval.tasks.textcore import TASKS, TextTask, find_files, read_split
from eval.textcore import TextcoreConfig, evaluate, render
from tests.corpus import COLOURS, tokenizer
from tests.models import LLAMA, tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mm1-ablations[textcore]'")

ITEMS = 6


def made_up(name: str, i: int) -> dict[str, Any]:
    """Row i of a task, as the Hub has it."""
    colour, other, third = COLOURS[i % 8], COLOURS[(i + 1) % 8], COLOURS[(i + 2) % 8]
    choices = {"text": [colour, other, third], "label": ["A", "B", "C"]}
    rows: dict[str, dict[str, Any]] = {
        "arc_easy": {"id": str(i), "question": f"which is {colour}, {i}?", "choices": choices, "answerKey": "ABC"[i % 3]},
        "piqa": {"goal": f"paint it {colour}, {i}", "sol1": f"use {colour}", "sol2": f"use {other}", "label": i % 2},
        "lambada": {"text": f"number {i} is a {colour} square and a {other} one is {third}"},
        "winogrande": {
            "sentence": f"The {colour} one beat the {other} one, {i}, for _ is fast.",
            "option1": colour,
            "option2": other,
            "answer": str(1 + i % 2),
        },
        "hellaswag": {
            "ind": i,
            "activity_label": "Painting",
            "ctx_a": f"A square is {colour}, {i}.",
            "ctx_b": "it",
            "endings": [f"stays {c}." for c in COLOURS[:4]],
            "label": str(i % 4),
        },
        "sciq": {
            "question": f"what is {colour}, {i}?",
            "correct_answer": colour,
            "distractor1": other,
            "distractor2": third,
            "distractor3": "nothing",
            "support": f"Squares are {colour}.",
        },
        "triviaqa": {"question": f"who is {colour}, {i}", "answer": {"aliases": [colour, f"the {colour} one"], "value": colour}},
        "webqs": {"url": "x", "question": f"what is {colour}, {i}?", "answers": [other, colour]},
    }
    return rows[name if name in rows else "arc_easy"]


def write_datasets(folder: Path, *, demonstrations: bool = True) -> Path:
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True)
        for split, first in ((task.queries, 0), *([(task.demonstrations, 20)] if demonstrations else [])):
            if split == task.queries and first:
                continue
            rows = [made_up(name, first + i) for i in range(ITEMS)]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_datasets(tmp_path_factory.mktemp("textcore") / "data")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "model"
    model = tiny_model(seed=1, decoder=LLAMA | {"max_position_embeddings": 600, "tie_word_embeddings": False})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def copy_of(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "model", ignore=shutil.ignore_patterns("results")))


def config_for(model: Path, data: Path, **changes: Any) -> TextcoreConfig:
    return TextcoreConfig(run=str(model), datasets=str(data), device="cpu", **changes)


def rows_of(data: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    files = find_files(data, [name], [2])[name]
    return {split: read_split(TASKS[name], paths) for split, paths in files.items()}


def prompts_of(data: Path, name: str, shots: int) -> list[Any]:
    """lm-eval's requests of a task, as it builds them."""
    from eval.adapters.lm_eval_tasks import build_task

    task = build_task(name, rows_of(data, name), shots=shots, seed=1234)
    task.build_all_requests()
    return [(request.doc, *request.args) for request in task.instances]


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_every_task_runs_at_0_and_2_shots_and_the_mean_is_of_eight(export: Path, data: Path, tmp_path: Path) -> None:
    config = config_for(copy_of(export, tmp_path), data, shots=[0, 2])
    content, path = evaluate(config)
    assert json.loads(path.read_text()) == content
    assert path.parent == tmp_path / "model" / "results" / "textcore"
    for name, task in TASKS.items():
        for shots in ("0", "2"):
            cell = content["tasks"][name][shots]
            assert cell["metric"] == task.metric
            assert (cell["n"], len(cell["scores"])) == (ITEMS, ITEMS)
            assert cell["mean"] == pytest.approx(100 * sum(cell["scores"]) / ITEMS)
            assert cell["mean"] == pytest.approx(100 * cell["lm_eval"][task.metric])
            mean = sum(cell["scores"]) / ITEMS
            variance = sum((score - mean) ** 2 for score in cell["scores"]) / (ITEMS - 1)
            assert cell["se"] == pytest.approx(100 * math.sqrt(variance / ITEMS))
    cells = {name: content["tasks"][name]["2"] for name in TASKS}
    assert len({cell["mean"] for cell in cells.values()}) > 3
    arc = (cells["arc_easy"]["mean"] + cells["arc_challenge"]["mean"]) / 2
    others = [cell["mean"] for name, cell in cells.items() if not name.startswith("arc")]
    assert content["textcore"]["2"]["mean"] == pytest.approx((arc + sum(others)) / 8)
    arc_error = (cells["arc_easy"]["se"] ** 2 + cells["arc_challenge"]["se"] ** 2) / 4
    errors = [cell["se"] ** 2 for name, cell in cells.items() if not name.startswith("arc")]
    assert content["textcore"]["2"]["se"] == pytest.approx(math.sqrt(arc_error + sum(errors)) / 8)
    table = render(content, config, path)
    assert "TextCore" in table
    assert f"{content['textcore']['2']['mean']:7.2f} ±{content['textcore']['2']['se']:6.2f}" in table
    assert all(name in table for name in TASKS)


def test_scores_do_not_depend_on_the_batch_and_a_part_has_no_mean(export: Path, data: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 7):
        config = config_for(copy_of(export, tmp_path / str(size)), data, batch_size=size, tasks=["arc", "triviaqa"], shots=[2])
        content, path = evaluate(config)
        results.append({name: cells["2"]["scores"] for name, cells in content["tasks"].items()})
        assert content["textcore"] == {}
        assert "mean of all eight" in render(content, config, path)
    assert results[0] == results[1]
    assert set(results[0]) == {"arc_easy", "arc_challenge", "triviaqa"}


def test_a_killed_evaluation_goes_on_with_the_first_unfinished_task(
    export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.adapters import lm_eval_tasks

    chosen: dict[str, Any] = {"tasks": ["piqa", "sciq", "lambada"], "shots": [0, 1]}
    whole = evaluate(config_for(copy_of(export, tmp_path / "a"), data, **chosen))[1].read_bytes()
    run_task, done = lm_eval_tasks.run_task, []

    def dies(model: Any, name: str, rows: Any, **settings: Any) -> dict[str, Any]:
        if len(done) in (1, 3):
            done.append(None)
            raise KeyboardInterrupt
        done.append((name, settings["shots"]))
        return run_task(model, name, rows, **settings)

    monkeypatch.setattr(lm_eval_tasks, "run_task", dies)
    model = copy_of(export, tmp_path / "b")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(config_for(model, data, **chosen))
    content, path = evaluate(config_for(model, data, **chosen))
    assert path.read_bytes() == whole
    assert [cell for cell in done if cell] == [(n, s) for n in ("piqa", "lambada", "sciq") for s in (0, 1)]
    evaluate(config_for(model, data, tasks=["piqa"], shots=[0]))
    assert json.loads(path.read_text()) == content, "what is not asked for stays"


def test_finished_work_is_found_again_without_torch(export: Path, data: Path, tmp_path: Path) -> None:
    model = copy_of(export, tmp_path)
    evaluate(config_for(model, data, tasks=["piqa"]))
    code = (
        "import sys; from eval.textcore import TextcoreConfig, evaluate, render\n"
        f"config = TextcoreConfig(run={str(model)!r}, datasets={str(data)!r}, tasks=['piqa'])\n"
        "print(render(*[evaluate(config)[0], config, evaluate(config)[1]]))\n"
        "assert 'torch' not in sys.modules and 'lm_eval' not in sys.modules and 'datasets' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "piqa" in done.stdout


def test_other_data_or_other_weights_are_evaluated_again(
    export: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_of(export, tmp_path)
    own = Path(shutil.copytree(data, tmp_path / "data"))
    config = config_for(model, own, tasks=["piqa", "sciq"])
    before, path = evaluate(config)
    rows = [made_up("piqa", i) for i in range(1, ITEMS)]
    (own / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after, again = evaluate(config)
    assert again == path
    assert after["tasks"]["piqa"]["0"]["n"] == ITEMS - 1
    assert after["tasks"]["sciq"] == before["tasks"]["sciq"]
    tiny_model(seed=2, decoder=LLAMA | {"max_position_embeddings": 600, "tie_word_embeddings": False}).save_pretrained(model)
    capsys.readouterr()
    trained, _ = evaluate(config)
    assert "of other weights" in capsys.readouterr().out
    assert trained["weights"] != after["weights"]


def test_limit_takes_the_first_queries_and_is_a_result_of_its_own(export: Path, data: Path, tmp_path: Path) -> None:
    model = copy_of(export, tmp_path)
    whole, path = evaluate(config_for(model, data, tasks=["hellaswag"]))
    part, other = evaluate(config_for(model, data, tasks=["hellaswag"], limit=4))
    assert other != path
    assert part["tasks"]["hellaswag"]["0"]["scores"] == whole["tasks"]["hellaswag"]["0"]["scores"][:4]


def test_cut_prompts_are_counted_and_shown(data: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    tiny_model(decoder=LLAMA | {"max_position_embeddings": 40}).save_pretrained(short)
    tokenizer().save_pretrained(short)
    config = config_for(short, data, tasks=["sciq"], shots=[0, 2])
    content, path = evaluate(config)
    assert content["tasks"]["sciq"]["2"]["truncated"] == 4 * ITEMS  # requests: one a choice
    assert f"lost their beginning: sciq 0-shot {content['tasks']['sciq']['0']['truncated']}, sciq 2-shot 24" in render(
        content, config, path
    )


# -------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_lm_evals_own(data: Path) -> None:
    first = {name: prompts_of(data, name, 0)[0] for name in TASKS}
    assert first["arc_easy"][1:] == ("Question: which is red, 0?\nAnswer:", " red")
    assert first["piqa"][1:] == ("Question: paint it red, 0\nAnswer:", " use red")
    assert first["lambada"][1:] == ("number 0 is a red square and a green one is", " blue")
    assert first["winogrande"][1:] == ("The red one beat the green one, 0, for red", " is fast.")
    assert first["hellaswag"][1:] == ("Painting: A square is red, 0. It", " stays red.")
    assert first["sciq"][1:] == ("Squares are red.\nQuestion: what is red, 0?\nAnswer:", " green")
    assert first["triviaqa"][1] == "Question: who is red, 0?\nAnswer:"
    assert first["triviaqa"][2]["until"] == ["\n", ".", ","]
    assert first["webqs"][1:] == ("Question: what is red, 0?\nAnswer:", " green")


def test_demonstrations_show_the_right_answers(data: Path) -> None:
    for name in TASKS:
        if name in ("lambada", "winogrande"):
            continue
        shown = {row_text(name, row): row for row in rows_of(data, name)[TASKS[name].demonstrations]}
        for _, prompt, *_ in prompts_of(data, name, 2):
            *demonstrations, _ = prompt.split("\n\n")
            assert len(demonstrations) == 2
            for demonstration in demonstrations:
                question = next(text for text in shown if demonstration.startswith(text))
                assert demonstration == f"{question} {right_answer(name, shown[question])}"


def row_text(name: str, row: dict[str, Any]) -> str:
    if name == "hellaswag":
        return f"Painting: {row['ctx_a']} It"
    if name == "sciq":
        return f"{row['support']}\nQuestion: {row['question']}\nAnswer:"
    mark = "?" if name == "triviaqa" else ""
    return f"Question: {row['goal'] if name == 'piqa' else row['question']}{mark}\nAnswer:"


def right_answer(name: str, row: dict[str, Any]) -> str:
    right: dict[str, Callable[[], str]] = {
        "piqa": lambda: row[f"sol{row['label'] + 1}"],
        "hellaswag": lambda: row["endings"][int(row["label"])],
        "sciq": lambda: row["correct_answer"],
        "triviaqa": lambda: row["answer"]["aliases"][0],
        "webqs": lambda: sorted(row["answers"])[0],
    }
    return right[name]() if name in right else row["choices"]["text"]["ABC".index(row["answerKey"])]


def test_what_is_mended_is_broken_in_lm_eval(data: Path) -> None:
    """Should a later lm-eval not need it, this test says so."""
    from eval.adapters import lm_eval_tasks

    with pytest.raises(AssertionError, match="Answer is not a string"):
        lm_eval_tasks.build_task("webqs", rows_of(data, "webqs"), shots=2, seed=0, mended=False).build_all_requests()
    task = lm_eval_tasks.build_task("lambada", rows_of(data, "lambada"), shots=4, seed=0, mended=False)
    task.build_all_requests()
    texts = [(request.doc["text"], request.args[0]) for request in task.instances]
    assert any(text in prompt.replace("  ", " ") for text, prompt in texts)  # the query, answered
    assert all("  " in prompt for _, prompt in texts)


def test_lambadas_demonstrations_are_other_queries_as_they_stand(data: Path) -> None:
    texts = {row["text"] for row in rows_of(data, "lambada")["test"]}
    for doc, prompt, _ in prompts_of(data, "lambada", 4):
        *demonstrations, query = prompt.split("\n\n")
        assert len(set(demonstrations)) == 4
        assert set(demonstrations) < texts
        assert doc["text"] not in demonstrations
        assert doc["text"].startswith(query)


# ---------------------------------------------------------------------------------------------------------------- files


def convert(task: TextTask, tmp_path: Path, name: str, text: str | bytes) -> list[dict[str, Any]]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_split(task, [path])


def test_the_publishers_own_files_give_the_hubs_rows(tmp_path: Path) -> None:
    arc = made_up("arc_easy", 1)
    nested = [{"text": text, "label": label} for text, label in zip(arc["choices"]["text"], "ABC", strict=True)]
    published = {"id": "1", "question": {"stem": arc["question"], "choices": nested}, "answerKey": arc["answerKey"]}
    wanted = {key: arc[key] for key in ("question", "choices", "answerKey")}
    assert convert(TASKS["arc_easy"], tmp_path, "test.jsonl", json.dumps(published)) == [wanted]

    trivia = made_up("triviaqa", 2)
    upper = {"Question": trivia["question"], "Answer": {"Aliases": trivia["answer"]["aliases"], "Value": "x"}, "Extra": 1}
    found = convert(TASKS["triviaqa"], tmp_path, "validation.json", json.dumps({"Data": [upper], "Version": 1.0}))
    assert found == [{"question": trivia["question"], "answer": {"aliases": trivia["answer"]["aliases"]}}]
    assert found == convert(TASKS["triviaqa"], tmp_path, "validation.jsonl", json.dumps(trivia))

    web = {"utterance": "what?", "targetValue": '(list (description "Jamaican \\"Creole\\" English") (description Patois))'}
    assert convert(TASKS["webqs"], tmp_path, "test.json", json.dumps([web])) == [
        {"question": "what?", "answers": ['Jamaican "Creole" English', "Patois"]}
    ]

    (tmp_path / "piqa").mkdir()
    rows = [{key: value for key, value in made_up("piqa", i).items() if key != "label"} for i in range(3)]
    (tmp_path / "piqa" / "validation-labels.lst").write_text("0\n1\n1\n")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert [row["label"] for row in convert(TASKS["piqa"], tmp_path, "piqa/validation.jsonl", text)] == [0, 1, 1]
    with pytest.raises(UserError, match=r"validation-labels\.lst: 3 labels, fewer than rows"):
        convert(TASKS["piqa"], tmp_path, "piqa/validation.jsonl", text * 2)


def test_parquet_shards_and_arrays_hold_the_same_rows(data: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, task in TASKS.items():
        rows = [made_up(name, i) for i in range(ITEMS)]
        (tmp_path / name).mkdir()
        for shard in range(2):
            table = pyarrow.Table.from_pylist(rows[shard * 3 : shard * 3 + 3])
            pyarrow.parquet.write_table(table, tmp_path / name / f"{task.queries}-0000{shard}-of-00002.parquet")
    sharded, lines = (find_files(folder, list(TASKS), [0]) for folder in (tmp_path, data))
    for name, task in TASKS.items():
        wanted = read_split(task, lines[name][task.queries])
        assert len(wanted) == ITEMS
        assert read_split(task, sharded[name][task.queries]) == wanted
        array = json.dumps([made_up(name, i) for i in range(ITEMS)])
        assert convert(task, tmp_path, "array.json", array) == wanted


def test_missing_files_are_all_named_before_a_model_is_loaded(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textcore, "_load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as error:
        evaluate(config_for(export, tmp_path))
    for name, task in TASKS.items():
        assert f"{tmp_path / name / task.queries}.jsonl" in str(error.value)
    assert "train" not in str(error.value)  # not needed without demonstrations
    only = write_datasets(tmp_path / "queries", demonstrations=False)
    with pytest.raises(UserError, match=r"sciq/train\.jsonl"):
        evaluate(config_for(export, only, shots=[0, 2]))
    (only / "sciq" / "test.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"split test lies there 2 times \(test\.jsonl, test\.parquet\)"):
        evaluate(config_for(export, only))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arc_easy", {"answerKey": "Z"}, r"jsonl:line 1: answerKey is 'Z', not one of A, B, C"),
        ("piqa", {"label": -1}, r"label is -1, not one of 0, 1"),
        ("piqa", {"goal": None}, r"goal is NoneType, not text"),
        ("lambada", {"text": "word"}, r"nothing to predict it from"),
        ("winogrande", {"answer": ""}, r"answer is '', not one of 1, 2"),
        ("winogrande", {"sentence": "no blank"}, r"no _ to fill"),
        ("hellaswag", {"label": ""}, r"label is '', not one of 0, 1, 2, 3"),
        ("sciq", {"support": ...}, r"no 'support' \(sciq\); it has question"),
        ("triviaqa", {"answer": {"aliases": []}}, r"answer\.aliases is \[\]"),
        ("webqs", {"answers": "red"}, r"answers is 'red', not a list of texts"),
    ],
)
def test_rows_that_are_not_the_tasks_are_named(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    row = {key: value for key, value in (made_up(name, 0) | change).items() if value is not ...}
    with pytest.raises(UserError, match=message):
        convert(TASKS[name], tmp_path, "rows.jsonl", json.dumps(row))


def test_piqas_labels_must_be_as_many_as_its_rows(tmp_path: Path) -> None:
    row = json.dumps({"goal": "g", "sol1": "a", "sol2": "b"}) + "\n"
    for labels, message in (
        ("0\n1\n0\n", "3 labels, more than the 2 rows of rows"),
        ("0\n", "1 labels, fewer than rows in rows"),
    ):
        (tmp_path / "rows-labels.lst").write_text(labels)
        with pytest.raises(UserError, match=rf"rows-labels\.lst: {message}"):
            convert(TASKS["piqa"], tmp_path, "rows.jsonl", 2 * row)


def test_a_part_of_a_split_is_refused(tmp_path: Path) -> None:
    only = tmp_path / "sciq/test-00000-of-00002.jsonl"
    only.parent.mkdir()
    only.write_text(json.dumps(made_up("sciq", 0)))
    with pytest.raises(UserError, match=rf"Task sciq: {only.parent} lacks 1 of 2 shards of test, the first of them number 00001"):
        find_files(tmp_path, ["sciq"], [0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", '[{"text": "é b"}]'.encode("latin-1"), r"rows\.json: no UTF-8"),
        ("rows.json", b"[" * 100_000, r"rows\.json: no JSON"),
        ("rows.jsonl", b'{"text": "a \\ud83d"}', r"text is 'a \\ud83d', which holds half of a character"),
    ],
    ids=["latin-1", "nested", "half a character"],
)
def test_text_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_split(TASKS["lambada"], [tmp_path / name])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, text, message in (
        ("rows.jsonl", '{"text": "a b"}\n{"text": ', "line 2: no JSON"),
        ("rows.json", '[{"text": "a b"', "rows.json: no JSON"),
        ("rows.json", "[1]", "item 0: must be a JSON object"),
        ("rows.json", "[]", "holds no rows"),
    ):
        with pytest.raises(UserError, match=message):
            convert(TASKS["lambada"], tmp_path, name, text)
    assert convert(TASKS["lambada"], tmp_path, "rows.json", '{"text": "a b"}\n{"text": "c d"}\n') == [
        {"text": "a b"},
        {"text": "c d"},
    ]


# -------------------------------------------------------------------------------------------------------------- command


def test_settings_are_checked_and_lists_may_be_one_word() -> None:
    config = compose("textcore", TextcoreConfig, ["run=base", "datasets=/data/textcore", "tasks=arc", "shots=4"])
    assert (config.tasks, config.shots, config.limit) == (["arc_easy", "arc_challenge"], [4], None)
    for override, message in (
        ("tasks=[boolq]", "boolq unknown; choose from arc_easy"),
        ("shots=[4,0]", "rising order"),
        ("limit=0", "limit=0: give a number from 1 up"),
        ("dtype=int8", "dtype=int8: choose from float32"),
    ):
        with pytest.raises(UserError, match=message):
            compose("textcore", TextcoreConfig, ["run=base", "datasets=/data", override])
    with pytest.raises(UserError, match=r"datasets: no value given"):
        compose("textcore", TextcoreConfig, ["run=base"])


def test_more_shots_than_demonstrations_are_refused(export: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"sciq: 7 shots want as many demonstrations"):
        evaluate(config_for(export, data, tasks=["sciq"], shots=[7]))
    with pytest.raises(UserError, match=r"lambada: 6 shots want as many demonstrations"):
        evaluate(config_for(export, data, tasks=["lambada"], shots=[6]))
