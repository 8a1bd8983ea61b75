"""The report of a suite: what it holds, that nothing in it acts, and that it works in a real browser."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ablations.law import Optimum, best_rate, fit
from ablations.report import samples as report_samples
from ablations.report.curves import extent_of, thinned, training_of
from ablations.report.write import write_report
from ablations.statistics import difference
from ablations.suites.record import SuiteFolder
from ablations.tables.held_out import Change, HeldOut, LossEffect, LossRow
from ablations.tables.suite_extras import LawGrid, LossCell, Textcore, TextcoreCell
from ablations.tables.suite_table import SuiteTable
from ablations.tables.suite_text import law_section
from data_pipelines.shards import Manifest, SplitWriter, Task
from tests.browser import Browser, find_browser
from tests.suite_tables import MadeSuite, plain_tasks, suite_of

HOSTILE = "</td></table><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
AXES = {"connector": ["avgpool", "cabstractor"], "tokens": ["few", "many"], "resolution": ["low", "high"]}
ITEMS = 8


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("MM1_HOME", str(folder))
        yield folder


def connector(**changes: Any) -> MadeSuite:
    baseline = {"connector": "cabstractor", "tokens": "many", "resolution": "high"}
    worth = {"few": -15.0, "low": -25.0, "avgpool": -1.0}
    own: dict[str, Any] = {"quality": lambda choice, shots: sum(worth.get(v, 0.0) for v in choice.values()) + shots}
    return MadeSuite("connector", AXES, baseline, **own | changes)


def write_pictures(home: Path) -> Manifest:
    """A corpus with the items of `plain_tasks`, a picture each."""
    corpus = home / "data" / "starter"
    corpus.mkdir(parents=True)
    manifest = Manifest("starter", "starter")
    for name, kind, answer in (("captions", "captioning", "references"), ("colours", "vqa", "answers")):
        writer = SplitWriter(corpus, name, "test", format="task")
        for i in range(ITEMS):
            picture = io.BytesIO()
            Image.new("RGB", (24, 16), (20 * i, 30, 30)).save(picture, "png")
            record = {"id": f"{name}{i}", "image_id": f"image{i // 2}", answer: [f"thing {i}"], "question": f"what is {i}?"}
            writer.write({"png": picture.getvalue(), "json": json.dumps(record)})
        manifest.splits[name] = {"test": writer.close()}
        manifest.tasks[name] = Task(kind, "", f"{name}/test", f"{name}/test")
    manifest.save(corpus)
    return manifest


@pytest.fixture(scope="module")
def suite(home: Path, tmp_path_factory: pytest.TempPathFactory) -> SuiteTable:
    """Eight variants of two seeds with hostile answers, a marked row, a paper's value and a missing cell; the corpus is there."""
    corpus = {"name": "starter", "fingerprint": write_pictures(home).fingerprint}

    def say(references: Any, score: float) -> str:
        return HOSTILE if score < 50 else references[0]

    made = connector(say=say, record=lambda choice: {"corpus": corpus, "flops": 1e13 * (2 - (choice["tokens"] == "few"))})
    found = suite_of(tmp_path_factory.mktemp("connector"), replace(made, about=f"Tokens & resolution {HOSTILE}"))
    found.missing.append(f"cabstractor.few.low.seed2: failed ({HOSTILE})")
    last = found.rows[-1]
    found.rows[-1] = replace(last, mark="tokens +3.0 %", paper={4: 61.25})
    return found


@pytest.fixture(scope="module")
def page(suite: SuiteTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(suite, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of learning rates, an ordered axis beside a smaller one."""
    axes = {"decoder": ["1M", "3M"], "rate": ["4e-4", "8e-4", "1.6e-3"]}
    found = suite_of(tmp_path_factory.mktemp("rates"), MadeSuite("learning_rate", axes, {"decoder": "3M", "rate": "8e-4"}))
    losses = {
        size: {r: LossCell(4 + 3e6 * (float(r) - 9e-4) ** 2, 0.01, [0, 1]) for r in axes["rate"]} for size in axes["decoder"]
    }
    optima = []
    for size, parameters in (("1M", 1_000_000), ("3M", 3_000_000)):
        by_rate = {float(rate): cell.mean for rate, cell in losses[size].items()}
        optima.append(Optimum(size, parameters, best_rate(by_rate), by_rate))
    found.law = LawGrid("decoder", "rate", axes["decoder"], axes["rate"], losses, fit(optima), None)
    return write_report(found, tmp_path_factory.mktemp("report") / "report.html")


def text_of(path: Path) -> str:
    """What a reader sees, roughly: the page without its tags."""
    body = re.sub(r"<script>.*?</script>|<style>.*?</style>|<title>.*?</title>", "", path.read_text(), flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


# ------------------------------------------------------------------------------------------------------------- content


def test_every_number_of_the_table_is_on_the_page(suite: SuiteTable, page: Path) -> None:
    written = page.read_text()
    for block in suite.table.blocks:
        for row in block.rows:
            for cell in row.cells.values():
                assert f"{cell.score.mean:.1f} <i>± {cell.score.se:.1f} (s {cell.score.se_seeds:.1f})</i>" in written
                if (d := cell.difference) is not None:
                    assert f"{d.value:+.1f}</b>{'*' if cell.significant else ''} <i>[{d.low:+.1f}, {d.high:+.1f}]</i>" in written
    assert " (items)" not in written.split('id="reading"')[0]
    assert '<td class="n paper" data-v="61.25">61.2</td>' in written
    seen = text_of(page)
    assert "tokens +3.0 %" in seen
    assert "1 cell " in seen.replace("\n", " ")
    assert all(note in seen for note in suite.table.notes)
    assert "python -m ablations.run suite=connector scale=tiny" in seen


def test_cells_show_settings_plans_and_what_differs(suite: SuiteTable, tmp_path: Path) -> None:
    """Also of a variant whose first finished seed is another one than the baseline's."""
    late = replace(suite.rows[1], runs=suite.rows[1].runs[1:])
    written = write_report(replace(suite, rows=[suite.rows[0], late, *suite.rows[2:]]), tmp_path / "report.html").read_text()
    assert "not finished" in written.split('id="cell-1"')[1].split("</details>")[0]
    for number, row in enumerate(suite.rows):
        part = written.split(f'id="cell-{number}"')[1].split("</details>")[0]
        for cell in row.cells:
            assert cell.folder.name in part
        assert html.escape("\n".join(row.cells[0].overrides)) in part
        changed = html.escape(f"connector.kind: {suite.baseline} -> {row.label}")
        assert (changed in part) == (number > 0)
        assert "690k <i>of 688k</i>" in part
        assert "seed: 0 -&gt; 1" not in part, "training seeds are no difference of configuration"


def test_held_out_losses_stand_with_their_changes(suite: SuiteTable, tmp_path: Path) -> None:
    change = Change(difference(-0.25, 0.01, 2), (0, 1, 2), p_holm=0.01)
    base, other = (row.label for row in suite.rows[:2])
    rows = [LossRow(base, (0, 1, 2), {"text": 4.5}, {}), LossRow(other, (0, 1, 2), {"text": 4.25}, {"text": change})]
    effects = [LossEffect("kind<", other, base, {"text": change}, 2)]
    written = write_report(replace(suite, held_out=HeldOut(["text"], rows, effects)), tmp_path / "report.html").read_text()
    shown = written.split("What each axis does to the held-out loss")
    assert '<td class="n" data-v="4.25">4.250</td><td class="n" data-v="-0.25">-0.250 [-0.293, -0.207] *</td>' in shown[0]
    assert "kind&lt;" in shown[1]
    assert f"<td>{html.escape(f'{other} - {base}')}</td>" in shown[1]


def test_a_frozen_encoder_says_what_its_features_cost(suite: SuiteTable, tmp_path: Path) -> None:
    run = suite.rows[1].runs[0].folder
    record = json.loads((run / "run.json").read_text())
    try:
        (run / "run.json").write_text(json.dumps(record | {"features_read": 12345, "features_computed": 678}))
        written = write_report(suite, tmp_path / "report.html").read_text()
    finally:
        (run / "run.json").write_text(json.dumps(record))
    parts = [part.split("</details>")[0] for part in written.split('id="cell-')[1:]]
    told = "features of 12,345 pictures came from the store, 678 were computed"
    assert [told in part for part in parts] == [number == 1 for number in range(len(parts))]
    assert "12,345 pictures" not in written.split('id="frozen"')[0]
    assert "Of 13,023 pictures in all steps 678 were encoded" in written.split('id="frozen"')[1]


def test_the_windows_of_a_frozen_encoder_are_those_after_the_first(suite: SuiteTable) -> None:
    run = suite.rows[1].runs[0].folder
    record = json.loads((run / "run.json").read_text())
    assert training_of(suite.rows[1]).windows == []
    try:
        (run / "run.json").write_text(json.dumps(record | {"features_read": 5, "features_computed": 6}))
        lines = suite.rows[1].runs[0].metrics()
        found = training_of(suite.rows[1]).windows
    finally:
        (run / "run.json").write_text(json.dumps(record))
    assert len(lines) > 2
    assert found == [(line.get("features_read", 0.0), line["images_per_second"]) for line in lines[1:]]


def test_the_commands_are_those_of_the_plan(suite: SuiteTable, tmp_path: Path) -> None:
    arguments = ["suite=connector", "scale_name=tiny", "seeds=2", "evaluation.images=[true,shuffled]"]
    plan = {"version": 1, "suite": {"name": "connector"}, "scale": "tiny", "arguments": arguments, "cells": []}
    folder = tmp_path / "connector-tiny"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    seen = text_of(write_report(replace(suite, place=SuiteFolder(folder)), tmp_path / "report.html"))
    assert "python -m ablations.run suite=connector scale=tiny seeds=2 'evaluation.images=[true,shuffled]'" in seen
    assert "python -m ablations.table suite=connector scale=tiny " in seen
    other = tmp_path / "mine"
    folder.rename(other)
    seen = text_of(write_report(replace(suite, place=SuiteFolder(other)), tmp_path / "report.html"))
    assert f"python -m ablations.table suite=connector scale=tiny folder={other} " in seen


def test_answers_are_the_plans_first_items_with_their_pictures(suite: SuiteTable, page: Path) -> None:
    answers = page.read_text().split('<section id="answers">')[1].split("</section>")[0]
    shown = re.findall(r'<p class="id">(.*?)</p>', answers)
    assert shown == [f"{task}{i}" for task in ("colours", "captions") for i in range(report_samples.ITEMS)]
    assert answers.count('<img src="data:image/webp') == len(shown)
    assert answers.count("<article>") * len(suite.rows) == answers.count('<th scope="row">')
    assert "what is 3?" in answers


def test_without_the_corpus_answers_stay_and_the_page_says_why(tmp_path: Path) -> None:
    found = suite_of(tmp_path, connector(seeds=1, record=lambda choice: {"corpus": {"name": "gone", "fingerprint": "ab"}}))
    path = write_report(found, tmp_path / "report.html")
    assert "there is no corpus at" in text_of(path)
    assert "data:image" not in path.read_text().split("</style>")[1]
    assert path.read_text().count("<article>") == 2 * report_samples.ITEMS


def test_pictures_have_a_bound_and_what_is_left_out_is_said(suite: SuiteTable, tmp_path: Path, monkeypatch: Any) -> None:
    whole = write_report(suite, tmp_path / "whole.html").read_text()
    sizes = [len(uri) for uri in re.findall(r'<img src="(data:[^"]+)"', whole)]
    monkeypatch.setattr(report_samples, "PICTURE_BYTES", sum(sizes[:3]) + 10)
    small = write_report(suite, tmp_path / "small.html").read_text()
    assert len(re.findall(r'<img src="data:', small)) == 3
    assert "Some pictures are left out" in small
    assert "Some pictures are left out" not in whole


def test_one_variant_alone_is_a_report_too(tmp_path: Path) -> None:
    seen = write_report(suite_of(tmp_path, MadeSuite("seeds", {}, {}, seeds=3)), tmp_path / "report.html").read_text()
    assert '<figure class="forest">' not in seen
    assert '<figure class="bars">' in seen
    assert 'id="effects"' not in seen


def test_textcore_has_a_section_where_it_was_evaluated(suite: SuiteTable, tmp_path: Path) -> None:
    held = Textcore([0], {suite.baseline: {0: TextcoreCell(41.37, 0.52, [0])}}, {})
    seen = write_report(replace(suite, textcore=held), tmp_path / "report.html").read_text()
    assert "41.4 <i>± 0.5</i>" in seen.split('id="textcore"')[1].split("</section>")[0]


def test_controls_stand_under_their_run_in_table_and_bars(suite: SuiteTable, tmp_path: Path) -> None:
    block = suite.table.blocks[0]
    low = replace(block.rows[2].cells[4], score=replace(block.rows[2].cells[4].score, mean=12.34), difference_has_seeds=False)
    control = replace(block.rows[2], control="shuffled", cells={0: low, 4: low})
    rows = [*block.rows[:3], control, *block.rows[3:]]
    table = replace(suite.table, blocks=[replace(block, rows=rows), *suite.table.blocks[1:]])
    seen = write_report(replace(suite, table=table), tmp_path / "report.html").read_text()
    body = next(part for part in seen.split("<tbody>") if "images shuffled" in part)
    assert html.unescape(re.sub("<[^>]+>", "", body)).startswith(suite.rows[2].label)
    assert "12.3 <i>" in body
    assert "] (items)</i>" in body
    assert seen.split("<style>")[1].split("</style>")[1].count('class="notch"') == 2


def test_a_law_that_cannot_be_fitted_says_why(suite: SuiteTable, tmp_path: Path) -> None:
    losses = {"1M": {"4e-4": LossCell(4.0, None, [0])}}
    grid = LawGrid("decoder", "rate", ["1M"], ["4e-4"], losses, None, "size 1M: 1 learning rates <are> finished")
    seen = write_report(replace(suite, law=grid), tmp_path / "report.html").read_text()
    assert "No line is fitted: size 1M: 1 learning rates &lt;are&gt; finished" in seen


def test_a_rate_that_diverged_is_not_the_best() -> None:
    losses = {"1M": {"4e-4": LossCell(math.nan, None, [0]), "2e-4": LossCell(4.0, None, [0]), "1e-4": LossCell(5.0, None, [0])}}
    section = law_section(LawGrid("decoder", "rate", ["1M"], ["4e-4", "2e-4", "1e-4"], losses, None, "it diverged"))
    assert section.lines == [["1M", "diverged", "4.000 <", "5.000"]]


# ------------------------------------------------------------------------------------------------------------- drawing


def test_curves_are_thinned_without_a_shift(suite: SuiteTable) -> None:
    steps = np.arange(1, 1001)
    middle, losses = thinned(list(steps), list(9 - 0.003 * steps))
    assert len(middle) == 100
    assert losses == pytest.approx(9 - 0.003 * middle)
    training = training_of(suite.rows[1])
    mean = training.mean("loss_text")
    assert mean is not None
    assert mean[1] == pytest.approx(np.mean([own for _, own in training.curves["loss_text"]], axis=0))
    assert list(training.held_out) == [0, 1]


def test_a_run_that_diverged_flattens_no_other_and_is_named(tmp_path: Path) -> None:
    found = suite_of(tmp_path, connector(seeds=1))
    folder = found.rows[2].runs[0].folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[30:] = [line | {"loss": math.nan, "loss_text": 1e6} for line in lines[30:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((folder / "run.json").read_text())
    record["validation"]["loss_text"] = math.nan
    (folder / "run.json").write_text(json.dumps(record))
    trainings = [training_of(row) for row in found.rows]
    steps, losses = trainings[2].curves["loss"][0]
    assert np.isfinite(losses).all()
    assert steps[-1] == 150, "a curve ends where its losses do"
    for kind in ("loss", "loss_text"):
        extent = extent_of([curve for training in trainings for curve in training.curves[kind]])
        usual = extent_of(trainings[0].curves[kind])
        assert extent.high - extent.low < 3.5 * (usual.high - usual.low)
    written = write_report(found, tmp_path / "report.html")
    assert f"Diverged: {found.rows[2].label}, seed 0." in text_of(written)
    assert not re.search(r"[^a-z]nan[^a-z]", written.read_text())
    assert written.read_text().count(">diverged<") == 2


# ------------------------------------------------------------------------------------------------------------- browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed (Debian: chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def count(browser: Browser, selector: str) -> int:
    return int(browser.run(f"document.querySelectorAll({json.dumps(selector)}).length"))


@needs_browser
def test_a_browser_shows_hostile_text_as_text_and_asks_nothing_of_any_network(browser: Browser, page: Path, rates: Path) -> None:
    for path in (page, rates):
        browser.open(path)
        asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [browser.run("location.href")]
        assert [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")] == []
    browser.open(page)
    assert browser.run("document.title") == "Suite connector, scale tiny"
    assert count(browser, "img[onerror], main script") == 0
    said = browser.run("[...document.querySelectorAll('#answers bdi')].map(b => b.textContent)")
    assert HOSTILE in said
    assert HOSTILE in browser.run("document.querySelector('.about').textContent")
    assert HOSTILE in browser.run("document.querySelector('.missing').textContent")
    sizes = browser.run("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(sizes) == 2 * report_samples.ITEMS
    assert min(sizes) == 24
    assert browser.run("(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; "
                       "document.body.append(s); return document.title; })()") != "1"  # fmt: skip


@needs_browser
def test_a_browser_sorts_by_every_column_and_back(browser: Browser, page: Path, suite: SuiteTable) -> None:
    browser.open(page)
    names = "[...document.querySelector('.tab table').tBodies].map(b => b.rows[0].cells[0].textContent.split(' ')[0])"
    rows = suite.table.blocks[0].rows
    given = [row.label for row in rows]

    def click(column: int) -> list[str]:
        browser.run(f"document.querySelector('.tab table').tHead.rows[0].cells[{column}].firstChild.click()")
        return browser.run(names)

    heads = browser.run("[...document.querySelector('.tab table').tHead.rows[0].cells].map(c => c.textContent)")
    assert heads == ["variant", "0-shot", "Δ 0-shot", "4-shot", "Δ 4-shot", "paper, 4-shot"]
    by_score = sorted(given, key=lambda label: -next(r.cells[0].score.mean for r in rows if r.label == label))
    assert browser.run(names) == given
    assert click(1) == by_score
    assert click(1) == by_score[::-1]
    assert click(1) == given
    differences = {r.label: d.value for r in rows if (d := r.cells[4].difference)}
    assert click(4) == [*sorted(differences, key=lambda label: -differences[label]), suite.baseline], "no value comes last"
    assert click(5)[0] == given[-1]
    assert click(0) == sorted(given)


@needs_browser
def test_the_figures_have_a_mark_for_every_number(browser: Browser, page: Path, rates: Path, suite: SuiteTable) -> None:
    browser.open(page)
    rows, shots, tabs = len(suite.rows), len(suite.table.shots), len(suite.table.blocks)
    first = ".tab:nth-of-type(2)"  # the bar of buttons is the first div
    assert count(browser, f"{first} .bars svg.plot") == shots
    assert count(browser, f"{first} .bars rect.mark") == rows * shots
    assert count(browser, f"{first} .bars .whisker") == rows * shots
    assert count(browser, f"{first} .forest .mark") == (rows - 1) * shots
    assert count(browser, f"{first} .forest .interval") == (rows - 1) * shots
    assert count(browser, f"{first} .forest .band") == shots
    significant = [r.cells[k].significant for r in suite.table.blocks[0].rows for k in suite.table.shots]
    assert 0 < sum(significant) < len(significant)
    assert count(browser, f"{first} .forest .mark:not(.flat)") == sum(significant)
    assert count(browser, "rect.mark") == rows * shots * tabs
    assert suite.effects is not None
    assert count(browser, ".effects .mark") == len(suite.effects.main) == 3 * shots
    assert count(browser, ".flops .mark") == count(browser, ".seconds .mark") == rows * shots
    assert count(browser, ".losses path.mean") == 4 * rows
    assert count(browser, ".own-losses svg.plot") == rows
    assert count(browser, ".own-losses path.seed") == 2 * rows
    assert count(browser, ".held-out .mark") == rows
    assert count(browser, ".held-out .seed-mark") == 2 * rows
    browser.open(rates)
    assert count(browser, ".tab .bars") == 0
    assert count(browser, f"{first} .lines path.curve") == 2 * shots
    assert count(browser, f"{first} .lines .mark") == 6 * shots
    assert count(browser, ".law .mark") == 6 + 2
    assert count(browser, ".law .ring") == 2


@needs_browser
def test_a_bar_is_as_high_as_its_score(browser: Browser, page: Path, suite: SuiteTable) -> None:
    browser.open(page)
    found = browser.run(
        "[...document.querySelectorAll('.tab:nth-of-type(2) .bars rect.mark')].map(r => [r.textContent, r.height.baseVal.value])"
    )
    heights = dict(found)
    told = {}
    for row in suite.table.blocks[0].rows:
        for k in suite.table.shots:
            told[f"{row.label}, {k}-shot"] = row.cells[k].score.mean
    ratios = [height / told[text.split(":")[0]] for text, height in heights.items()]
    assert len(ratios) == len(told)
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.01)


@needs_browser
def test_tabs_links_and_narrow_screens(browser: Browser, page: Path, suite: SuiteTable) -> None:
    browser.open(page)
    shown = "[...document.querySelectorAll('.tab')].map(t => t.offsetHeight > 0)"
    assert browser.run(shown) == [True, False, False]
    browser.run("document.querySelectorAll('.segment button')[2].click()")
    assert browser.run(shown) == [False, False, True]
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run(shown) == [True, True, True]
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.open(page, "#cell-3")
    assert browser.run("[...document.querySelectorAll('details.cell')].map(d => d.open)").index(True) == 3
    sections = browser.run("[...document.querySelectorAll('nav a')].map(a => document.querySelector(a.hash).tagName)")
    assert sections == ["SECTION"] * 7
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=2, mobile=True)
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= 360
    tops = browser.run("[...document.querySelectorAll('.own-losses .panels > div')].map(d => d.offsetTop)")
    assert tops[0] == tops[1] < tops[2], "two small panels side by side"
    browser.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_many_variants_are_folded_up_and_filtered(browser: Browser, tmp_path: Path) -> None:
    variants = [f"v{i}" for i in range(50)]
    made = MadeSuite("many", {"variant": variants}, {"variant": "v0"}, seeds=1, steps=6)
    browser.open(write_report(suite_of(tmp_path, made, plain_tasks(4)), tmp_path / "report.html"))
    assert browser.run("document.querySelector('.bars details').open") is False
    assert count(browser, ".tab:nth-of-type(2) .bars rect.mark") == 100
    browser.run("(() => { const f = document.querySelector('.find'); f.value = 'V1'; f.dispatchEvent(new Event('input')); })()")
    seen = "[...document.querySelector('.tab table').tBodies].filter(b => !b.hidden).length"
    assert browser.run(seen) == 11
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=2, mobile=True)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("document.querySelector('.bars .panels > div').scrollWidth") > 1000
    assert browser.run("document.documentElement.scrollWidth") <= 360, "what is wide scrolls within the page"
    browser.call("Emulation.clearDeviceMetricsOverride")
