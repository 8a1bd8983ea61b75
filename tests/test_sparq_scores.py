"""SparQ's rivals against plain transcriptions in float64, bytes by the stated formulas, and the benchmark that compares them."""

# ruff: noqa: F811 (a fixture's name is both an import and an argument)
from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sparq_probe, sparq_scores
from benchmarks.sparq_curves import by_method, draw
from benchmarks.sparq_probe import Method, methods
from benchmarks.sparq_recall import recall_lines
from benchmarks.sparq_rivals import Rival, RivalLayer, elements, equal_budget, rival_attention
from benchmarks.sparq_scores import SparqScoresConfig, flags_as_settings, measure
from configs.command import compose
from configs.errors import UserError
from mm1.attention.segments import Segment
from mm1.attention.sparq import SparqSettings, select
from tests.sparq import dense_definition, example, softmax
from tests.test_fewshot import corpus, export  # noqa: F401

D, HEADS, KV_HEADS = 8, 4, 2
MODULE = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=False)


# ---------------------------------------------------------------------------------------------------------- the methods


def stream(length: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, Hq, length, d), keys and values (B, Hkv, length, d) in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(batch, heads, length, D, generator=generator, dtype=torch.float64)  # noqa: E731
    return 2 * draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def attended(
    settings: SparqSettings | None, q: Tensor, k: Tensor, v: Tensor, cuts: list[int], padding: list[int] | None = None
) -> Tensor:
    """What the attention gives for tokens that come in passes of `cuts`, the first read densely: (B, length, Hq, d)."""
    batch, length = len(q), q.shape[2]
    layer, outputs, at = RivalLayer(SparqSettings()), [], 0
    for count in cuts:
        part = slice(at, at + count)
        if at:
            layer.settings = settings
            layer.questions = [count] * batch
        keys, values = layer.update(k[:, :, part], v[:, :, part])
        slots = torch.arange(at + count)
        mask = (slots <= slots[at:, None]) & (slots >= torch.tensor(padding or [0] * batch)[:, None, None])
        mask = mask[:, None]
        outputs.append(rival_attention(MODULE, q[:, :, part], keys, values, mask)[0])
        at += count
    assert at == length
    return torch.cat(outputs, 1)


def reference(method: str, k: int, q: Tensor, keys: Tensor, values: Tensor, prefill: int, sinks: int = 0) -> Tensor:
    """One key-value head's group q (g, length, d), keys and values (length, d): outputs (length, g, d), a token at a time."""
    length = len(keys)
    mass, alive = [0.0] * length, set(range(length))
    outputs = []
    for t in range(length):
        seen = list(range(t + 1))
        if t >= prefill and len(seen) > k:
            if method == "local":
                seen = sorted(set(seen[:sinks]) | set(seen[len(seen) - (k - sinks) :]))
            else:
                seen = [s for s in seen if s in alive]
                recent = set(range(t + 1 - k // 2, t + 1))
                while len(seen) > k:  # the paper's greedy step: whoever had least attention goes, and never comes back
                    gone = min((s for s in seen if s not in recent), key=lambda s: mass[s])
                    seen.remove(gone)
                    alive.discard(gone)
        rows = []
        for head in range(len(q)):
            weights = softmax([float(q[head, t] @ keys[s]) / math.sqrt(D) for s in seen])
            rows.append(sum((w * values[s] for w, s in zip(weights, seen, strict=True)), torch.zeros(D).double()))
            for w, s in zip(weights, seen, strict=True):
                mass[s] += w
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize(("method", "sinks"), [("local", 0), ("local", 3), ("h2o", 0)])
@pytest.mark.parametrize(("k", "cuts"), [(7, [21, 9, *[1] * 10]), (8, [3, 7, *[1] * 30])])
def test_rivals_equal_their_definitions(method: str, sinks: int, k: int, cuts: list[int]) -> None:
    q, keys, values = stream(40)
    ours = attended(Rival(k=k, dense_below=1, method=method, sinks=sinks), q, keys, values, cuts)
    for head in range(KV_HEADS):
        group = slice(head * 2, head * 2 + 2)
        expected = reference(method, k, q[0, group], keys[0, head], values[0, head], cuts[0], sinks)
        assert (ours[0, :, group] - expected).abs().max() < 1e-12


def test_h2o_remembers_what_the_prompt_attended_to() -> None:
    """The token that the whole prompt looked at survives far outside the window, and a token evicted never returns."""
    q, keys, values = stream(30)
    keys[0, :, 2] = 0
    keys[0, :, 2, 0] = 30.0
    q[0, :, :, 0] = 1.0
    values[0, :, 2] = 100.0
    h2o, local = (attended(Rival(k=6, dense_below=1, method=m), q, keys, values, [20, *[1] * 10]) for m in ("h2o", "local"))
    assert h2o[0, -1].min() > 90
    assert local[0, -1].abs().max() < 10


@pytest.mark.parametrize("settings", [Rival(k=40, method="local"), Rival(k=40, method="h2o"), SparqSettings(r=4, k=40)])
def test_a_budget_of_all_tokens_is_dense_attention(settings: SparqSettings) -> None:
    q, keys, values = stream(40)
    ours = attended(settings, q, keys, values, [20, 10, *[1] * 10])
    for t in (20, 29, 30, 39):
        dense = dense_definition(q[:, :, t], keys[:, :, : t + 1], values[:, :, : t + 1])
        assert (ours[:, t] - dense).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["local", "h2o"])
def test_a_row_of_a_padded_batch_is_the_row_alone(method: str) -> None:
    q, keys, values = stream(36, batch=2)
    padding, settings = [0, 9], Rival(k=6, dense_below=1, method=method, sinks=2 if method == "local" else 0)
    both = attended(settings, q, keys, values, [20, 6, *[1] * 10], padding)
    alone = attended(settings, q[1:, :, 9:], keys[1:, :, 9:], values[1:, :, 9:], [11, 6, *[1] * 10])
    assert (both[1, 20:] - alone[0, 11:]).abs().max() < 1e-12


def test_exact_scores_keep_the_most_mass() -> None:
    """Of all choices of k tokens with the same window, r = d has the largest exact attention summed over the group."""
    q, keys, values = example(3, HEADS, KV_HEADS, 200, 16)
    segment = Segment(keys, keys.transpose(2, 3).contiguous(), values, torch.zeros(3).long(), torch.full((3,), 200))
    exact = (q.view(3, KV_HEADS, -1, 16) @ keys.transpose(-1, -2) / 4).softmax(-1).sum(2)

    def mass(r: int) -> Tensor:
        return exact.gather(2, select(q, [segment], SparqSettings(r=r, k=24), 0.25).tokens).sum(-1)

    assert (mass(16) >= mass(4) - 1e-12).all()
    assert (mass(16) > mass(4) + 1e-3).any()


# ------------------------------------------------------------------------------------------------------------ the bytes


def test_bytes_are_those_of_the_stated_formulas() -> None:
    assert elements("dense", 1000, 64) == 2 * 1000 * 64 + 2 * 64
    assert elements("sparq", 1000, 64, r=16, k=32) == 1000 * 16 + 2 * 32 * 64 + 4 * 64
    assert elements("oracle", 1000, 64, k=32) == 1000 * 64 + 32 * 64 + 4 * 64
    assert elements("local", 1000, 64, k=32) == 2 * 32 * 64 + 2 * 64
    assert elements("h2o", 1000, 64, k=32) == 2 * 32 * 64 + 2 * 64 + 2 * 32
    # docs/sparq.md: at S 4,096, d 128, r 32, k 128 a step moves 6.4 times fewer
    assert round(elements("dense", 4096, 128) / elements("sparq", 4096, 128, r=32, k=128), 1) == 6.4


@pytest.mark.parametrize("family", ["local", "h2o"])
def test_rivals_may_move_what_sparq_moves_and_no_more(family: str) -> None:
    for tokens in (150, 2000.5):
        for r in (8, 64):
            k = equal_budget(family, tokens, 64, r=r, k=32)
            room = elements("sparq", tokens, 64, r=r, k=32)
            assert elements(family, tokens, 64, k=k) <= room < elements(family, tokens, 64, k=k + 1)
            settings = Method(family, r, 32).settings(tokens, 64)
            assert settings is not None
            assert settings.k == k > 32


def test_settings_that_cannot_work_are_named() -> None:
    for make in (lambda: Rival(method="quest"), lambda: Rival(k=4, sinks=4)):
        with pytest.raises(UserError, match=r"quest|sinks=4"):
            make()
    for text in ("shots=[0]", "probes=[needle]", "r=[8,8]", "k=2", "batch_size=0"):
        with pytest.raises(UserError, match=text.split("=")[0]):
            compose("sparq_scores", SparqScoresConfig, ["run=x", text])
    assert flags_as_settings(["run=x", "--json", "--plot", "a.png"]) == ["run=x", "json=true", "plot=a.png"]


# -------------------------------------------------------------------------------------------------------- the benchmark


def config_of(export: Path, corpus: Path, **changes: Any) -> SparqScoresConfig:
    settings: dict[str, Any] = {"tasks": ["colours"], "shots": [4], "limit": 4, "r": [2], "k": 8, "batch_size": 3} | changes
    return SparqScoresConfig(run=str(export), task_corpus=str(corpus), **settings)


def kept(home: Path, name: str) -> list[dict[str, Any]]:
    [path] = home.glob(f"cache/sparq_scores/*/*/{name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_method_answers_the_same_items_and_a_budget_of_all_is_dense(export: Path, corpus: Path, home: Path) -> None:
    rows = list(measure(config_of(export, corpus, tasks=["colours", "questions"], r=[4], k=2000, limit=3)))
    names = {method.name for method in methods([4], 2000, recall=False)}
    assert {row.case for row in rows} == {f"{where}@4 {name}" for where in ("colours", "questions", "mean") for name in names}
    found = by_method(kept(home, "colours.4.jsonl"))
    assert found.keys() == names
    for records in found.values():  # every row is shorter than its budget
        for record, dense in zip(records, found["dense"], strict=True):
            assert record["id"] == dense["id"]
            assert record["prediction"] == dense["prediction"]
            assert record["logprob"] == pytest.approx(dense["logprob"], abs=2e-5)
    assert {row.agreement for row in rows} == {100.0}


def test_sparse_methods_differ_and_the_mean_is_of_paired_items(export: Path, corpus: Path, home: Path) -> None:
    rows = {row.case: row for row in measure(config_of(export, corpus))}
    found = by_method(kept(home, "colours.4.jsonl"))
    for name in ("sparq r2 k8", "local r2 k8", "h2o r2 k8", "oracle k8"):
        difference = [a["logprob"] - b["logprob"] for a, b in zip(found[name], found["dense"], strict=True)]
        assert max(map(abs, difference)) > 1e-3
        row = rows[f"colours@4 {name}"]
        assert row.nats[0] == pytest.approx(sum(difference) / 4, abs=1e-4)
        assert row.nats[1] < row.nats[0] < row.nats[2]
        assert row.moved < 1
    assert rows["colours@4 dense"].moved == 1


def test_in_answer_only_the_first_token_is_dense_and_the_question_is_not_sparse(export: Path, corpus: Path, home: Path) -> None:
    """A one-token reference after a dense prefill uses no SparQ: the trap that `question sparse` is for."""
    list(measure(config_of(export, corpus, tasks=["questions"], shots=[6])))
    found = by_method(kept(home, "questions.6.jsonl"))
    long = [a["logprob"] - b["logprob"] for a, b in zip(found["sparq r2 k8, answer only"], found["dense"], strict=True)]
    assert max(map(abs, long)) > 1e-4  # the second token on is sparse
    sparse = [a["logprob"] for a in found["sparq r2 k8"]]
    assert sparse != [a["logprob"] for a in found["sparq r2 k8, answer only"]]


def test_a_killed_comparison_goes_on_and_a_finished_one_is_found(
    export: Path,
    corpus: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = [json.dumps(r, sort_keys=True) for r in (list(measure(config_of(export, corpus))), kept(home, "colours.4.jsonl"))[1]]
    [path] = home.glob("cache/sparq_scores/*/*/colours.4.jsonl")
    path.write_text("".join(f"{line}\n" for line in whole[:7]) + whole[7][:40], encoding="utf-8")
    answered: list[str] = []
    batch = sparq_probe.Probe._batch

    def counted(self: Any, items: Any, wanted: Any, tokens: float) -> Any:
        answered.extend(method.name for method in wanted)
        return batch(self, items, wanted, tokens)

    monkeypatch.setattr(sparq_probe.Probe, "_batch", counted)
    list(measure(config_of(export, corpus)))
    assert sorted(json.dumps(r, sort_keys=True) for r in kept(home, "colours.4.jsonl")) == sorted(whole)
    assert answered
    answered.clear()
    monkeypatch.setattr("eval.workers.Worker", None)  # a finished comparison loads no model
    assert list(measure(config_of(export, corpus)))
    assert not answered


def told(ids: list[int], target: list[int]) -> int:
    return sum(ids[at : at + len(target)] == target for at in range(len(ids)))


def test_recall_hides_the_query_s_picture_once_and_the_control_never(
    export: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[sparq_probe.Item] = []
    items = sparq_probe.Probe.items

    def noted(self: Any, shots: int) -> Any:
        found = items(self, shots)
        seen.extend(found)
        return found

    monkeypatch.setattr(sparq_probe.Probe, "items", noted)
    rows = list(measure(config_of(export, corpus, shots=[6], probes=["recall"])))
    assert len(seen) == 4
    places = set()
    for item in seen:
        own = item.prompt.images[-1]
        unbound, absent = item.controls["unbound"], item.controls["absent"]
        assert item.prompt.images.count(own) == 2
        assert unbound.images.count(own) == absent.images.count(own) == 1
        assert item.prompt.ids == unbound.ids  # only pictures differ
        assert told(item.prompt.ids, item.target) == 1
        assert told(absent.ids, item.target) == 0
        place = item.prompt.images.index(own)
        places.add(place)
        after = item.prompt.ids[item.prompt.starts[place] + 4 :]
        assert after[: len(item.target)] == item.target
    assert len(places) > 1
    kept_share = {row.case.split()[-1]: row.kept for row in rows}
    assert kept_share["dense"] in (100.0, None)
    assert kept_share["absent"] in (0.0, None)


def test_whole_runs_are_timed_and_paired(export: Path, corpus: Path, home: Path) -> None:
    rows = [row for row in measure(config_of(export, corpus, r=[4], runs=[4])) if row.unit == "items/s"]
    assert [row.case for row in rows] == [f"run colours@4 r4 k8, {setup}" for setup in sparq_scores.SETUPS]
    assert all(row.ours > 0 and row.items == 4 for row in rows)
    assert next(record["method"] for record in kept(home, "runs.jsonl")) == "dense"


def test_the_picture_has_a_panel_a_cell(export: Path, corpus: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is kept"):
        draw([home / "benchmarks"], tmp_path / "curves.png")
    list(measure(config_of(export, corpus, probes=["task", "recall"])))
    [folder] = (home / "cache" / "sparq_scores").iterdir()
    assert draw([folder], tmp_path / "curves.png").stat().st_size > 20_000


def test_recall_pages_repeat_pictures_with_their_names_alone() -> None:
    import numpy as np

    pairs = [(f"picture {i}".encode(), f"caption {i}") for i in range(300)]
    lines = recall_lines(np.random.default_rng(0), pairs, 200)
    dealt = dict(lines)
    assert len(lines) == 200
    assert 60 < len(dealt) < 100  # six in ten repeat
    assert all(dealt[picture] == caption for picture, caption in lines)
    assert sum(picture.decode()[8:] == caption[8:] for picture, caption in dealt.items()) < 5
