"""The evaluation's engine: shared beginnings, what it measures of an answer, encoded images on disk, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.command import compose
from configs.errors import UserError
from eval.features import IMAGE_GROUP, ImageFeatures
from eval.fewshot import EvalConfig, evaluate
from eval.generate import Answer, Generator, Request, load_model
from eval.prompts import PROMPTS, build_prompt
from eval.results import Results
from eval.tasks.example import Example
from mm1.attention.settings import SparqSettings
from tests.corpus import COLOURS, square
from tests.test_fewshot import config_folder, config_for, copy_of, files, picture
from tests.test_fewshot import corpus as corpus
from tests.test_fewshot import export as export


def generator(export: Path, **changes: Any) -> Generator:
    model, tokens = load_model(export, "cpu", "float32")
    settings: dict[str, Any] = {"stop": (), "max_new_tokens": 8} | changes
    return Generator(model, tokens, ImageFeatures(model, "cpu"), **settings)


def examples(*numbers: int) -> list[Example]:
    return [Example(str(i), str(i), picture(i), "what colour is it?" * (i % 3), (f"a {COLOURS[i % 8]}",)) for i in numbers]


def requests(demonstrations: int, queries: int, *, kind: str = "vqa") -> list[Request]:
    """Queries after the same demonstrations."""
    shown = examples(*range(demonstrations))
    return [Request(build_prompt(PROMPTS["plain"][kind], shown, query)) for query in examples(*range(20, 20 + queries))]


def nearly(a: Answer, b: Answer) -> bool:
    numbers = [(a.logprob, b.logprob), (a.entropy, b.entropy), (a.image_gain, b.image_gain)]
    return a.text == b.text and all(one == pytest.approx(other, abs=1e-4) for one, other in numbers)


# ----------------------------------------------------------------------------------------------------------- beginnings


def passes(made: Generator) -> list[tuple[int, int]]:
    """(rows, new tokens) of every forward pass from here on, as a list that grows."""
    seen: list[tuple[int, int]] = []
    made.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return seen


def test_a_beginning_that_prompts_share_is_read_once_and_changes_no_answer(export: Path) -> None:
    asked = requests(4, 7)
    alone = [generator(export).answer([request])[0] for request in asked]
    made = generator(export)
    seen = passes(made)
    found: list[Answer | None] = [None] * len(asked)
    for batch, answers in made.run(asked, 3):
        for place, answer in zip(batch, answers, strict=True):
            found[place] = answer
    assert len({round(answer.logprob, 4) for answer in alone}) == 7  # else the test would say nothing
    assert all(nearly(one, other) for one, other in zip(alone, found, strict=True) if other is not None)
    longest = max(tokens for _, tokens in seen)
    assert [shape for shape in seen if shape[1] == longest] == [(1, made.encode(asked[0]).split)]


@pytest.mark.parametrize("kind", ["captioning", "vqa"])
@pytest.mark.parametrize("shots", [0, 1, 3])
def test_prompts_of_different_beginnings_share_batches(export: Path, kind: str, shots: int) -> None:
    asked = [
        Request(build_prompt(PROMPTS["plain"][kind], examples(*range(i, i + shots)), query))
        for i, query in enumerate(examples(*range(20, 29)))
    ]
    asked += requests(shots, 3, kind=kind)
    made = generator(export)
    assert sorted(i for batch in made.batches(asked, 4) for i in batch) == list(range(len(asked)))
    found = {place: answer for batch, answers in made.run(asked, 4) for place, answer in zip(batch, answers, strict=True)}
    for place, request in enumerate(asked):
        assert nearly(generator(export).answer([request])[0], found[place])


def test_a_batch_may_mix_prompts_with_and_without_demonstrations(export: Path) -> None:
    asked = [*requests(0, 2), *requests(2, 2)]
    together = generator(export).answer(asked)
    assert all(nearly(generator(export).answer([one])[0], answer) for one, answer in zip(asked, together, strict=True))


# ------------------------------------------------------------------------------------------------- what is measured of an answer


@pytest.mark.parametrize("kind", ["captioning", "vqa"])
@pytest.mark.parametrize("shots", [0, 2])
def test_logprob_entropy_and_image_gain_are_what_whole_forward_passes_give(export: Path, kind: str, shots: int) -> None:
    for request in requests(shots, 3, kind=kind):
        made = generator(export)
        answer = made.answer([request])[0]
        prompt = made.encode(request)
        tokens: list[int] = []
        features = made.features.get(prompt.images)

        def logprobs(ids: list[int], shown: torch.Tensor | None) -> torch.Tensor:
            with torch.inference_mode():
                return made._logprobs(made.model(input_ids=torch.tensor([ids]), image_features=shown, use_cache=False).logits[0])  # noqa: B023

        for _ in range(8):
            tokens.append(int(logprobs(prompt.ids + tokens, features)[-1].argmax()))
            if tokens[-1] == made.tokenizer.eos_token_id:
                break
        steps = logprobs(prompt.ids + tokens, features)[len(prompt.ids) - 1 : -1]
        own = steps.gather(1, torch.tensor(tokens)[:, None]).mean()
        assert answer.logprob == pytest.approx(float(own), abs=1e-4)
        finite = steps.exp() * steps.masked_fill(steps.isinf(), 0)
        assert answer.entropy == pytest.approx(float(-finite.sum(-1).mean()), abs=1e-4)
        length = made.model.config.num_image_tokens
        blind = prompt.ids[: prompt.split] + prompt.ids[prompt.split + length :]
        if not prompt.split:
            blind = [made.tokenizer.eos_token_id, *blind]
        without = logprobs(blind + tokens, None if not shots else features[:-1])[len(blind) - 1 : -1]
        other = without.gather(1, torch.tensor(tokens)[:, None]).mean()
        assert answer.image_gain == pytest.approx(float(own - other), abs=1e-4)
        assert abs(float(own - other)) > 1e-3  # else the picture made no difference, and nothing was tested


def test_a_prompt_without_images_has_no_image_gain(export: Path) -> None:
    assert generator(export).answer([Request(["a red square"])])[0].image_gain is None


# --------------------------------------------------------------------------------------------------- encoded images on disk


def pictures(number: int) -> list[bytes]:
    return [square(COLOURS[i % 8], 8 + i) for i in range(number)]


def features(export: Path, spill: Path | None, **changes: Any) -> ImageFeatures:
    model, _ = load_model(export, "cpu", "float32")
    made = ImageFeatures(model, "cpu", spill=spill, **changes)
    for image in pictures(21):
        made.register(image)
    return made


def test_what_falls_out_of_memory_comes_back_from_the_file(export: Path, tmp_path: Path) -> None:
    roomy, tight = features(export, None), features(export, tmp_path / "features.bin", budget=0)
    for made in (roomy, tight):
        assert sum(made.encode_all()) == 21
    expected, found = roomy.get(pictures(21)), tight.get(pictures(21))
    assert torch.equal(expected, found)
    assert torch.equal(tight.get([20, 3]), expected[[20, 3]])
    assert (roomy.encoded, tight.encoded) == (21, 21)


def test_another_process_finds_what_one_has_encoded_and_nothing_damaged_or_of_others(export: Path, tmp_path: Path) -> None:
    spill = tmp_path / "features.bin"
    expected = features(export, spill).get(pictures(21))
    again = features(export, spill)
    assert torch.equal(again.get(pictures(21)), expected)
    assert again.encoded == 0
    content = bytearray(spill.read_bytes())
    content[len(content) // 2] ^= 1  # in the second of three groups
    spill.write_bytes(content)
    damaged = features(export, spill)
    assert torch.equal(damaged.get(pictures(21)), expected)
    assert damaged.encoded == IMAGE_GROUP
    other = features(export, spill, key="trained further")
    other.get(pictures(21))
    assert other.encoded == 21


def test_processes_share_the_groups(export: Path, tmp_path: Path) -> None:
    shares = [features(export, tmp_path / "features.bin") for _ in range(2)]
    for index, made in enumerate(shares):
        list(made.encode_all(index, 2))
    assert [made.encoded for made in shares] == [8 + 5, 8]
    shares[1].get(pictures(21))
    assert shares[1].encoded == 8


def test_a_full_disk_is_named(export: Path) -> None:
    made = features(export, Path("/dev/full"))
    with pytest.raises(UserError, match=r"/dev/full: image features cannot be written .*GB: make room"):
        list(made.encode_all())


# ------------------------------------------------------------------------------------------------------- whole evaluations


def test_any_number_of_processes_writes_the_same_bytes(export: Path, corpus: Path, tmp_path: Path) -> None:
    one = evaluate(config_for(copy_of(export, tmp_path / "a"), corpus, demonstrations="fixed"))[1]
    two = evaluate(config_for(copy_of(export, tmp_path / "b"), corpus, demonstrations="fixed", processes=2))[1]
    assert files(one) == files(two)
    assert "features.bin" not in files(one)


def test_a_process_that_fails_or_is_killed_ends_the_evaluation(export: Path, corpus: Path, tmp_path: Path) -> None:
    config = config_for(copy_of(export, tmp_path), corpus, processes=2, shots=[0, 200], tasks=["questions"])
    with pytest.raises(UserError, match="200 shots want"):
        evaluate(config)
    code = (
        "from eval.fewshot import EvalConfig, evaluate\nif __name__ == '__main__':\n"
        f"    evaluate(EvalConfig(run={config.run!r}, task_corpus={str(corpus)!r}, shots=[0], processes=2, device='cpu'))\n"
    )
    script = tmp_path / "evaluation.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for _ in count():
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
            if len(workers) == 2 or process.poll() is not None:
                break
            time.sleep(0.01)
        os.kill(int(workers[0]), signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "An evaluation process ended with code -9" in said
    assert not Path(f"/proc/{workers[1]}").exists()


def test_a_killed_evaluation_does_not_encode_twice(
    export: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(copy_of(export, tmp_path), corpus, tasks=["colours"])
    encoded: list[int] = []
    encode = ImageFeatures._encode

    def counted(self: ImageFeatures, group: int) -> None:
        encode(self, group)
        encoded.append(group)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ImageFeatures, "_encode", counted)
        patched.setattr(Results, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    assert len(encoded) > 1
    assert (config_folder(config) / "features.bin").is_file()
    encoded.clear()
    monkeypatch.setattr(ImageFeatures, "_encode", counted)
    evaluate(config)
    assert encoded == []


def test_results_of_every_item_are_complete(export: Path, corpus: Path, tmp_path: Path) -> None:
    _, folder = evaluate(config_for(copy_of(export, tmp_path), corpus, demonstrations="fixed", limit=None))
    for path in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(record["entropy"] >= 0 and record["logprob"] <= 0 for record in records)
        assert len({record["image_gain"] for record in records}) > 1


# ------------------------------------------------------------------------------------------------------------------- SparQ


def test_sparq_is_a_setting_with_results_of_its_own(export: Path, corpus: Path, tmp_path: Path) -> None:
    model = copy_of(export, tmp_path)

    def predictions(**changes: Any) -> tuple[Path, list[float]]:
        _, folder = evaluate(config_for(model, corpus, shots=[4], demonstrations="fixed", tasks=["questions"], **changes))
        return folder, [json.loads(line)["logprob"] for line in (folder / "questions.4.jsonl").read_text().splitlines()]

    dense, said = predictions()
    everything, same = predictions(attention="sparq", sparq=SparqSettings(r=8, k=4096))
    few, others = predictions(attention="sparq", sparq=SparqSettings(r=2, k=4, dense_below=0))
    assert len({dense, everything, few}) == 3
    assert same == said, "k covers every token"
    assert max(abs(a - b) for a, b in zip(said, others, strict=True)) > 1e-3, "else nothing was sparse"
    assert json.loads((few / "summary.json").read_text())["sparq"]["k"] == 4


@pytest.mark.parametrize("mode", ["fixed", "per_query"])
def test_batch_size_changes_no_sparse_answer(export: Path, corpus: Path, tmp_path: Path, mode: str) -> None:
    sparq = SparqSettings(r=4, k=16, dense_below=0)

    def said(batch_size: int) -> list[tuple[str, float]]:
        model = copy_of(export, tmp_path / str(batch_size))
        config = config_for(
            model,
            corpus,
            shots=[4],
            demonstrations=mode,
            tasks=["questions"],
            attention="sparq",
            sparq=sparq,
            batch_size=batch_size,
        )
        records = [json.loads(line) for line in (evaluate(config)[1] / "questions.4.jsonl").read_text().splitlines()]
        return [(record["prediction"], record["logprob"]) for record in records]

    one, four = said(1), said(4)
    assert [text for text, _ in one] == [text for text, _ in four]
    assert [value for _, value in one] == pytest.approx([value for _, value in four], abs=1e-4)


def test_settings_of_sparq_without_sparq_are_refused() -> None:
    with pytest.raises(UserError, match="need attention=sparq"):
        compose("eval", EvalConfig, ["run=x", "sparq.k=64"])
    with pytest.raises(UserError, match=r"sparq\.k=0"):
        compose("eval", EvalConfig, ["run=x", "attention=sparq", "sparq.k=0"])
    assert compose("eval", EvalConfig, ["run=x", "attention=sparq", "sparq.k=64"]).sparq == SparqSettings(k=64)
