"""The page of an evaluation's items: what it holds, what it refuses, and that its controls work in a real browser."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.command import compose
from configs.errors import UserError
from data_pipelines.shards import Manifest
from eval import fewshot
from eval.browse import BrowseConfig, as_overrides, browse
from eval.browse_page import Gallery, as_data, histogram, page
from eval.fewshot import EvalConfig
from eval.results import REFERENCES_KEY, Results
from eval.saved import find_evaluation, open_tasks, read_saved
from eval.tasks.example import Example
from tests.browser import Browser, find_browser
from tests.corpus import square
from tests.official import write_all
from tests.test_fewshot import write_tasks

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><b>&lt;\x07"
Say = Callable[[Example, int], str]


def model(folder: Path) -> Path:
    """What an evaluation's plan needs of a model's folder: a config and weights to name. No answer is asked of it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return folder


def say(asked: Example, number: int) -> str:
    """Right answers to items 0, 3, 6, ...; those to 1 and 4 are hostile."""
    if number in (1, 4):
        return "green square " * (number == 4) + HOSTILE
    return asked.shown_answer if number % 3 == 0 else "a green square"


def say_other(asked: Example, number: int) -> str:
    """Right answers to items 0, 2, 4, ..."""
    return "a black square" if number % 2 else asked.shown_answer


def write_evaluation(export: Path, corpus: Path, spoken: Say = say, *, unfinished: bool = False, **changes: Any) -> Results:
    """A folder as eval.fewshot writes it, with the answers of `spoken`(item, its number). Unfinished: the last cell has two
    answers, and there is no summary."""
    settings: dict[str, Any] = {"shots": [0, 2], "limit": 6, "device": "cpu"} | changes
    corpora = {"task_corpus": str(corpus)} if "datasets" not in changes else {}
    _, results = fewshot.prepare(EvalConfig(run=str(export), **corpora, **settings))
    with results.opened():
        for task, shots in results.cells():
            data, plan = results.tasks[task], results.plan.tasks[task]
            records = []
            for number, query in enumerate(plan.queries):
                asked = data.queries.example(query)
                record: dict[str, Any] = {"id": query, "cluster": asked.image_id, "prediction": spoken(asked, number)}
                record[REFERENCES_KEY[data.kind]] = list(asked.references)
                if asked.names:
                    record["options"] = {name: -1.5 - (name == record["prediction"]) for name in asked.names}
                record |= {"demonstrations": plan.shown(query, shots), "logprob": -0.5 - number, "image_gain": float(number % 4)}
                records.append(record)
            if unfinished and (task, shots) == results.cells()[-1]:
                results.append(task, shots, records[:2])
                return results
            results.append(task, shots, records)
            results.finish(task, shots)
        results.summarise()
    return results


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def evaluated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write_evaluation(model(tmp_path_factory.mktemp("models") / "base"), corpus)


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same plan, every answer of another model."""
    return write_evaluation(model(tmp_path_factory.mktemp("models") / "other"), corpus, say_other)


def config_for(corpus: Path | None, out: Path, *results: Path, **changes: Any) -> BrowseConfig:
    where = {} if corpus is None else {"task_corpus": str(corpus)}
    return BrowseConfig(results=[str(folder) for folder in results], out=str(out), **where, **changes)


def records_of(results: Results, task: str, shots: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.path(task, shots).read_text().split("\n") if line]


# ------------------------------------------------------------------------------------------------------------- content


def test_the_page_holds_every_answer_with_what_was_shown(evaluated: Results, corpus: Path, tmp_path: Path) -> None:
    out, held = browse(config_for(corpus, tmp_path / "page.html", evaluated.folder))
    summary = json.loads((evaluated.folder / "summary.json").read_text())
    assert list(held["tasks"]) == ["colours", "questions", "names"]
    for task, shown in held["tasks"].items():
        data, plan = evaluated.tasks[task], evaluated.plan.tasks[task]
        assert [item["id"] for item in shown["items"]] == plan.queries
        for shots in (0, 2):
            cell, records = shown["shots"][str(shots)], records_of(evaluated, task, shots)
            estimate = summary["tasks"][task]["shots"][str(shots)]
            assert {key: cell["sides"][0][key] for key in ("mean", "se", "n")} == {k: estimate[k] for k in ("mean", "se", "n")}
            assert sum(cell["histogram"]["counts"]) == len(records)
            for answer, record in zip(cell["sides"][0]["answers"], records, strict=True):
                demonstrations = [held["examples"][number] for number in answer["demonstrations"]]
                assert [d["id"] for d in demonstrations] == record["demonstrations"]
                assert (answer["prediction"], answer["score"]) == (record["prediction"], record["score"])
                assert answer["prompt"].count(None) == shots + 1
                said = "".join(part for part in answer["prompt"] if part)
                assert all(d["answer"] in said for d in demonstrations)
                assert answer["more"]["image_gain"] == record["image_gain"]
        if data.kind == "vqa":
            assert all(item["references"][0][1] == 10 and item["question"] == "what colour?" for item in shown["items"])
    assert len(set(held["images"])) == len(held["images"])
    assert out.read_text().count(HOSTILE) == 0


def test_a_picture_is_written_once_a_size_and_no_larger_than_it_is_shown() -> None:
    noise = random.Random(0).randbytes(300 * 200 * 3)
    buffer, gallery = io.BytesIO(), Gallery()
    Image.frombytes("RGB", (300, 200), noise).save(buffer, "PNG")
    large, small = buffer.getvalue(), square("red", 16)
    assert [gallery.add(large, 224, "a"), gallery.add(large, 112, "a"), gallery.add(large, 224, "b")] == [0, 1, 0]
    assert gallery.add(small, 224, "c") == gallery.add(small, 112, "c") == 2
    assert [size_of(uri) for uri in gallery.uris] == [(224, 149), (112, 75), (16, 16)]
    with pytest.raises(UserError, match="item 7: not a whole, decodable image"):
        gallery.add(b"nothing", 224, "item 7")


def size_of(uri: str) -> tuple[int, int]:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).size


def test_a_control_shows_the_image_that_the_model_was_given(corpus: Path, tmp_path: Path) -> None:
    export = model(tmp_path / "base")
    for control in ("shuffled", "none"):
        folder = write_evaluation(export, corpus, images=control, tasks=["colours"]).folder
        _, held = browse(config_for(corpus, tmp_path / "page.html", folder))
        task = held["tasks"]["colours"]
        answers = task["shots"]["0"]["sides"][0]["answers"]
        assert held["sides"][0]["control"] == control
        for item, answer in zip(task["items"], answers, strict=True):
            assert (answer["image"] is None) == (control == "none")
            assert answer["image"] != item["image"]
            assert answer["prompt"] == ([None] if control == "shuffled" else [])


def test_two_evaluations_are_paired_by_item(evaluated: Results, other: Results, corpus: Path, tmp_path: Path) -> None:
    _, held = browse(config_for(corpus, tmp_path / "page.html", evaluated.folder, other.folder))
    for task, shown in held["tasks"].items():
        for shots, cell in shown["shots"].items():
            first, second = (records_of(side, task, int(shots)) for side in (evaluated, other))
            differences = [b["score"] - a["score"] for a, b in zip(first, second, strict=True)]
            assert cell["difference"]["mean"] == pytest.approx(sum(differences) / len(differences))
            answers = cell["sides"][1]["answers"]
            assert [answer["score"] for answer in answers] == [record["score"] for record in second]
            assert all("prompt" not in answer and "demonstrations" not in answer for answer in answers), "they are side A's"


def test_two_plans_meet_in_the_items_that_both_asked(evaluated: Results, corpus: Path, tmp_path: Path) -> None:
    fewer = write_evaluation(model(tmp_path / "other"), corpus, limit=4, shots=[0, 3])
    _, held = browse(config_for(corpus, tmp_path / "page.html", evaluated.folder, fewer.folder))
    assert held["sides"][0]["facts"]["plan"] != held["sides"][1]["facts"]["plan"]
    for task, shown in held["tasks"].items():
        assert list(shown["shots"]) == ["0"]
        assert [item["id"] for item in shown["items"]] == fewer.plan.tasks[task].queries
        assert shown["shots"]["0"]["sides"][0]["n"] == 4


def test_items_tasks_and_shots_are_chosen(evaluated: Results, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    _, held = browse(config_for(corpus, out, evaluated.folder, tasks=["questions"], shots=[2], items=2, choose="worst"))
    assert list(held["tasks"]) == ["questions"]
    shown = held["tasks"]["questions"]
    assert list(shown["shots"]) == ["2"]
    assert (len(shown["items"]), shown["of"], shown["shots"]["2"]["sides"][0]["n"]) == (2, 6, 6)
    scores = sorted(record["score"] for record in records_of(evaluated, "questions", 2))
    assert sorted(answer["score"] for answer in shown["shots"]["2"]["sides"][0]["answers"]) == scores[:2]
    sample = browse(config_for(corpus, out, evaluated.folder, items=2))[1]["tasks"]["colours"]["items"]
    more = browse(config_for(corpus, out, evaluated.folder, items=4))[1]["tasks"]["colours"]["items"]
    assert {item["id"] for item in sample} < {item["id"] for item in more}
    with pytest.raises(UserError, match=r"tasks: birds not among the finished ones of .*: colours, names, questions"):
        browse(config_for(corpus, out, evaluated.folder, tasks=["birds"]))
    with pytest.raises(UserError, match="shots: 8 not among"):
        browse(config_for(corpus, out, evaluated.folder, shots=[8]))


def test_histograms_count_every_value_once_and_never_mix_signs() -> None:
    held = histogram([0.0, 0.0, 33.3, 50.0, 100.0])
    assert (held["edges"][0], held["edges"][-1], sum(held["counts"])) == (0, 100, 5)
    assert held["counts"][0] == held["zeros"] == 2
    assert held["counts"][held["edges"].index(50)] == 1
    assert held["counts"][-1] == 1
    held = histogram([-30.0, -0.1, 0.0, 0.2, 7.0])
    zero = held["edges"].index(0)
    assert sum(held["counts"][:zero]) == 2
    assert sum(held["counts"][zero:]) == 3
    assert held["edges"][0] == -held["edges"][-1]
    assert held["zeros"] == 1
    assert histogram([0.0])["counts"] == [1]
    assert sum(histogram([712.345, 0.3])["counts"]) == 2


def test_the_data_cannot_end_its_element() -> None:
    written = as_data({"a": HOSTILE, "b": "<!--<script>", "c": "\u2028"})
    assert not set("<>&") & set(written)
    assert json.loads(written) == {"a": HOSTILE, "b": "<!--<script>", "c": "\u2028"}


# ------------------------------------------------------------------------------------------------------------ bad input


def test_an_evaluation_is_found_by_its_run_or_several_are_listed(corpus: Path, tmp_path: Path, home: Path) -> None:
    export = model(tmp_path / "base")
    first = write_evaluation(export, corpus, tasks=["colours"]).folder
    assert find_evaluation(str(export)) == find_evaluation(str(export / "results")) == find_evaluation(str(first)) == first
    write_evaluation(export, corpus, tasks=["colours"], images="shuffled")
    with pytest.raises(UserError, match=r"2 evaluations are there(.|\n)*colours; shots 0,2; limit 6; seed 0; images shuffled"):
        find_evaluation(str(export))
    run = home / "runs" / "base-0123abcd"
    shutil.copytree(first, run / "results" / first.name)
    (run / "run.json").write_text(json.dumps({"version": 1, "name": "base", "status": "finished"}))
    assert find_evaluation("base") == run / "results" / first.name
    assert read_saved(find_evaluation("base")).label == "base-0123abcd"


def test_what_is_no_evaluation_is_named(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_evaluation(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=rf"{tmp_path} holds no evaluation"):
        find_evaluation(str(tmp_path))
    with pytest.raises(UserError, match="no run named 'bass'"):
        find_evaluation("bass")
    run = home / "runs" / "base-0123abcd"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match=f"python -m eval.fewshot run={run}"):
        find_evaluation(str(run))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"no plan\.json"):
        find_evaluation(str(tmp_path))


def test_half_written_results_show_what_is_finished_and_say_what_is_not(corpus: Path, tmp_path: Path) -> None:
    results = write_evaluation(model(tmp_path / "base"), corpus, unfinished=True)
    _, held = browse(config_for(corpus, tmp_path / "page.html", results.folder))
    assert held["sides"][0]["missing"] == ["names 2-shot (2 of 5 items)"]
    assert list(held["tasks"]["names"]["shots"]) == ["0"]
    assert list(held["tasks"]["colours"]["shots"]) == ["0", "2"]
    for path in results.folder.glob("*.jsonl"):
        path.unlink()
    with pytest.raises(UserError, match=r"no task is finished yet.*python -m eval\.fewshot run=\S*/base "):
        browse(config_for(corpus, tmp_path / "page.html", results.folder))


def test_damaged_results_are_named(corpus: Path, tmp_path: Path) -> None:
    results = write_evaluation(model(tmp_path / "base"), corpus, tasks=["colours"])
    path = results.path("colours", 2)
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(UserError, match=rf"{path} is damaged or half-written"):
        read_saved(results.folder)
    path.write_text("".join(line + "\n" for line in whole.split("\n")[:-2]))
    with pytest.raises(UserError, match=r"5 items are not the plan's 6"):
        read_saved(results.folder)
    path.write_text(whole.replace('"score": ', '"points": '))
    with pytest.raises(UserError, match="damaged or half-written"):
        read_saved(results.folder)
    path.write_text(whole)
    plan = results.folder / "plan.json"
    text = plan.read_text()
    for damage, match in (
        (text[:-9], rf"{plan} is damaged"),
        (text.replace('"seed": 0', '"seed": 1'), "It was changed"),
        (text.replace('"version": 1', '"version": 7', 1), "version 7"),
        (text.replace('"control"', '"controls"'), "damaged"),
        (text.replace('"plain"', '"fancy"'), "prompts 'fancy'"),
    ):
        plan.write_text(damage)
        with pytest.raises(UserError, match=match):
            read_saved(results.folder)


def test_a_corpus_that_is_gone_or_another_one_is_named(corpus: Path, evaluated: Results, tmp_path: Path, home: Path) -> None:
    saved = read_saved(evaluated.folder)
    with pytest.raises(UserError, match=rf"there is no corpus at {home / 'data/toy'}.*task_corpus=FOLDER"):
        open_tasks(saved)
    changed = shutil.copytree(corpus, tmp_path / "toy")
    manifest = Manifest.load(changed)
    shard = manifest.splits["names"]["query"].shards[0]
    manifest.splits["names"]["query"].shards[0] = replace(shard, sha256="0" * 64)
    manifest.save(changed)
    with pytest.raises(UserError, match=rf"{changed} is not the corpus of {saved.folder}: its fingerprint is"):
        open_tasks(saved, task_corpus=str(changed))
    shutil.copytree(corpus, home / "data/toy")
    assert list(open_tasks(saved)) == ["colours", "questions", "names"]


def test_official_files_are_found_again_by_their_folder(tmp_path: Path) -> None:
    datasets = write_all(tmp_path / "vl")
    results = write_evaluation(model(tmp_path / "base"), tmp_path, datasets=str(datasets), tasks=["vqav2", "coco_karpathy"])
    _, held = browse(config_for(None, tmp_path / "page.html", results.folder, datasets=str(datasets)))
    assert held["tasks"]["vqav2"]["items"][0]["question"] == "is it 391895001?"
    with pytest.raises(UserError, match=r"datasets=FOLDER"):
        browse(config_for(None, tmp_path / "page.html", results.folder))
    path = datasets / "vqav2/v2_mscoco_train2014_annotations.json"
    path.write_text(path.read_text().replace("no 9000", "yes"))
    with pytest.raises(UserError, match=rf"{datasets} is not the source of {results.folder}"):
        browse(config_for(None, tmp_path / "page.html", results.folder, datasets=str(datasets)))


def test_two_that_cannot_be_compared_are_refused(evaluated: Results, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(UserError, match="given twice"):
        browse(config_for(corpus, out, evaluated.folder, evaluated.folder))
    apart = write_evaluation(model(tmp_path / "apart"), corpus, shots=[1])
    with pytest.raises(UserError, match="no task and number of shots in common"):
        browse(config_for(corpus, out, evaluated.folder, apart.folder))
    strict = write_evaluation(model(tmp_path / "strict"), corpus, vqa_metric="min3")
    with pytest.raises(UserError, match=r"questions: scored by vqa_official in .*, by min3 in"):
        browse(config_for(corpus, out, evaluated.folder, strict.folder))
    datasets = write_all(tmp_path / "vl")
    official = write_evaluation(model(tmp_path / "official"), corpus, datasets=str(datasets), tasks=["gqa"])
    with pytest.raises(UserError, match="of different data"):
        browse(config_for(corpus, out, evaluated.folder, official.folder))


def test_the_command_takes_results_without_a_key(tmp_path: Path) -> None:
    given = as_overrides(["base", "/a b/x-1", "out=x.html", "--cfg", "job", "shots=8"])
    assert given == ['results=["base","/a b/x-1"]', "out=x.html", "--cfg", "job", "shots=8"]
    (strange := tmp_path / "lr=1").mkdir()
    config = compose("browse", BrowseConfig, as_overrides([str(strange), "shots=8", f"out={tmp_path / 'x.html'}"]))
    assert (config.results, config.shots) == ([str(strange)], [8])
    for wrong, match in (
        ([], "Given: none"),
        (["a", "b", "c"], "Given: a, b, c"),
        (["a", "items=0"], "items=0"),
        (["a", "choose=best"], "sample, worst"),
        (["a", "pixels=4"], "pixels=4"),
        (["a", "out=/nowhere/x.html"], "no such folder"),
        (["a", f"out={tmp_path}"], "is a folder"),
    ):
        with pytest.raises(UserError, match=match):
            compose("browse", BrowseConfig, as_overrides(wrong))


# ------------------------------------------------------------------------------------------------------------- browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed (Debian: chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(
    evaluated: Results, other: Results, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "one": browse(config_for(corpus, folder / "one.html", evaluated.folder)),
        "two": browse(config_for(corpus, folder / "two.html", evaluated.folder, other.folder)),
    }


def shown(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('.item')].map(card => card.dataset.id)")


def wait_for_hash(browser: Browser, part: str) -> None:
    assert part in browser.run("location.hash")


@needs_browser
def test_a_browser_sorts_and_filters_as_the_address_says(browser: Browser, pages: Any, evaluated: Results) -> None:
    path, _ = pages["one"]
    records = records_of(evaluated, "questions", 0)
    by_score = sorted(records, key=lambda r: r["score"])
    state = "#task=questions&shots=0"
    for sort, expected in {
        "score": by_score,
        "-score": sorted(records, key=lambda r: -r["score"]),
        "logprob": sorted(records, key=lambda r: r["logprob"]),
        "-image_gain": sorted(records, key=lambda r: -r["image_gain"]),
        "plan": records,
    }.items():
        browser.open(path, f"{state}&sort={sort}")
        assert shown(browser) == [r["id"] for r in expected], sort
    zeros = [r["id"] for r in by_score if r["score"] == 0]
    assert 0 < len(zeros) < len(records)
    browser.open(path, f"{state}&zero=1")
    assert shown(browser) == zeros
    browser.open(path, f"{state}&min=50&max=100")
    assert shown(browser) == [r["id"] for r in by_score if r["score"] >= 50]
    browser.open(path, f"{state}&q=PWNED")
    assert shown(browser) == [r["id"] for r in by_score if "pwned" in r["prediction"]]
    assert browser.run("document.querySelector('.status').textContent").startswith("2 of 6 items")


@needs_browser
def test_a_browser_shows_hostile_answers_as_text_and_asks_nothing_of_any_network(browser: Browser, pages: Any) -> None:
    for path, _ in pages.values():
        browser.open(path, "#task=colours&shots=2&sort=plan")
        assert browser.run("document.title").endswith("few-shot answers")
        predictions = browser.run("[...document.querySelectorAll('.prediction')].map(p => p.textContent)")
        assert HOSTILE.replace("\x07", "\N{SYMBOL FOR BELL}") in predictions
        assert browser.run("document.querySelectorAll('img[onerror], .prediction *').length") == 0
        asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [browser.run("location.href.split('#')[0]")]
        problems = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert problems == []
        assert browser.run("(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; "
                           "document.body.append(s); return document.title; })()") != "1"  # fmt: skip
        sizes = browser.run("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert sizes
        assert min(sizes) > 0


@needs_browser
def test_a_browsers_controls_write_the_address(browser: Browser, pages: Any) -> None:
    path, held = pages["one"]
    browser.open(path)
    assert len(shown(browser)) == 6
    browser.run("document.querySelector('.segment [data-value=\"questions\"]').click()")
    browser.run("document.querySelector('.segment [data-value=\"0\"]').click()")
    assert "task=questions&shots=0" in browser.run("location.hash")
    browser.run("document.querySelector('#zero').click()")
    zeros = shown(browser)
    assert "zero=1" in browser.run("location.hash")
    assert len(zeros) < 6
    browser.press("c")
    assert browser.run("location.hash") == "#task=questions&shots=0"
    assert len(shown(browser)) == 6
    first = browser.run("document.querySelector('.bin').dataset.from")
    browser.run("document.querySelector('.bin').dispatchEvent(new MouseEvent('click'))")
    assert f"min={first}" in browser.run("location.hash")
    assert len(shown(browser)) == held["tasks"]["questions"]["shots"]["0"]["histogram"]["counts"][0]
    browser.run("history.back()")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert len(shown(browser)) == 6
    browser.press("]")
    assert browser.run("document.querySelectorAll('.item')[0].querySelectorAll('.demonstrations li').length") == 2
    browser.press("j")
    browser.press("j")
    assert browser.run("document.activeElement.dataset.rank") == "2"
    browser.press("o")
    browser.run("new Promise(done => setTimeout(done, 50))")
    assert browser.run("document.activeElement.querySelectorAll('pre img').length") == 3
    text = browser.run("document.activeElement.querySelector('pre').textContent")
    assert text.count("Question: what colour? Short answer:") == 3
    browser.press("/")
    assert browser.run("document.activeElement.id") == "q"
    browser.run("document.activeElement.blur()")
    link = browser.run("document.querySelectorAll('.title a')[3].hash")
    browser.open(path, link)
    assert browser.run("document.activeElement.dataset.rank") == "4"


@needs_browser
def test_a_browser_shows_two_evaluations_side_by_side(browser: Browser, pages: Any, evaluated: Results, other: Results) -> None:
    path, held = pages["two"]
    first, second = records_of(evaluated, "questions", 2), records_of(other, "questions", 2)
    differences = {a["id"]: b["score"] - a["score"] for a, b in zip(first, second, strict=True)}
    assert len(set(differences.values())) == 3
    for sort, key in (("difference", lambda d: d), ("-difference", lambda d: -d), ("-apart", lambda d: -abs(d))):
        browser.open(path, f"#task=questions&shots=2&sort={sort}")
        assert shown(browser) == sorted(differences, key=lambda name: key(differences[name])), sort
    browser.open(path, "#task=questions&shots=2")
    assert shown(browser) == sorted(differences, key=lambda name: differences[name])
    answers = browser.run("[...document.querySelectorAll('.item:first-child .prediction')].map(p => p.textContent)")
    at = [r["id"] for r in first].index(shown(browser)[0])
    assert answers == [first[at]["prediction"], second[at]["prediction"]]
    assert browser.run("document.querySelectorAll('.item:first-child .demonstrations').length") == 1
    mean = held["tasks"]["questions"]["shots"]["2"]["difference"]["mean"]
    assert f"{abs(mean):.1f}" in browser.run("document.querySelectorAll('.cards b')[2].textContent")
    browser.open(path, "#task=questions&shots=2&min=0&max=1000")
    assert set(shown(browser)) == {name for name, value in differences.items() if value >= 0}


@needs_browser
def test_a_browser_draws_many_items_as_one_scrolls_and_all_of_them_to_print(browser: Browser, pages: Any, tmp_path: Path) -> None:
    held = json.loads(json.dumps(pages["one"][1]))
    task = held["tasks"]["questions"]
    task["items"] = [item | {"id": f"{number}"} for number, item in enumerate(task["items"] * 50)]
    for cell in task["shots"].values():
        cell["sides"][0]["answers"] *= 50
    path = tmp_path / "many.html"
    path.write_text(page(held), encoding="utf-8")
    browser.open(path, "#task=questions")
    few = len(shown(browser))
    assert 40 <= few < 300
    browser.open(path, "#task=questions&sort=plan&item=250")
    assert browser.run("document.activeElement.dataset.id") == "250"
    browser.open(path, "#task=questions")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert len(shown(browser)) == 300
