"""Other harnesses' view of a model: equality with lm-eval's own HFLM, batches that change nothing, lmms-eval with a made-up
task."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from configs.errors import UserError
from data_pipelines.tokens import encode_parts, image_token_id
from eval.adapters import decoding
from eval.features import ImageFeatures
from eval.generate import Generator, Request, load_model
from mm1.model.image_encoder import build_image_encoder
from mm1.model.multimodal import MultimodalConfig, MultimodalLM
from tests.corpus import COLOURS, tokenizer
from tests.models import AVGPOOL, ENCODER, LLAMA

ROOT = Path(__file__).parent.parent
POSITIONS = 64


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text-only decoder, and the same weights inside a MultimodalLM; weights large enough that prompts matter."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    special = {name: getattr(tokenizer(), name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"} | {
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,  # tied, it says the same token over and over
    }
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, **special, vocab_size=len(tokenizer())))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    encoder = build_image_encoder(ENCODER, load_weights=False)
    config = MultimodalConfig(
        image_encoder=encoder.settings(),
        connector=AVGPOOL,
        text_config=decoder.config,
        image_token_id=image_token_id(tokenizer()),
    )
    whole = MultimodalLM(config, image_encoder=encoder, decoder=decoder)
    home = tmp_path_factory.mktemp("models")
    for name, model in {"text": decoder, "mm1": whole}.items():
        model.save_pretrained(home / name)
        tokenizer().save_pretrained(home / name)
    return {"text": home / "text", "mm1": home / "mm1"}


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given, task_name="made up") for given in arguments]


PAIRS = [
    *[("a red square is", f" {colour}") for colour in COLOURS],
    *[(f"a {colour} square is", f" more {colour} than a red one") for colour in COLOURS[:4]],
    ("a red square is", " red"),  # twice the same
    ("a red square is", " xy"),  # two that differ in the last token but one
    ("a red square is", " ay"),
    ("", "a blue square"),
    ("", "x"),
    ("ends with spaces  ", "green"),
    ("one token", "s"),
    ("far too long: " + "a yellow square, " * 20, " and a black one"),
    ("nearly too long " + "ab" * 30, " é"),
]
PROMPTS = ["a red square", "x", "", "the blue one: " * 3, "far too long: " + "a yellow square, " * 20, "a white"]


@pytest.fixture(scope="session")
def hflm(folders: dict[str, Path]) -> Any:
    """lm-eval's own wrapper of the text-only decoder, one request at a time."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mm1-ablations[textcore]'")
    pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate: pip install 'mm1-ablations[dev]'")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folders["text"]), device="cpu", dtype="float32", batch_size=1)


def ours(folder: Path, batch_size: int) -> Any:
    from eval.adapters.lm_eval import MM1LM

    return MM1LM(str(folder), device="cpu", batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("kind", ["text", "mm1"])
def test_log_likelihoods_equal_lm_evals_own(hflm: Any, folders: dict[str, Path], kind: str, batch_size: int) -> None:
    expected = hflm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    model = ours(folders[kind], batch_size)
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for pair, (value, greedy), (wanted, wanted_greedy) in zip(PAIRS, found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4), pair
        assert greedy == wanted_greedy, pair
    assert len({round(value, 3) for value, _ in found}) > 15  # else equality would say little
    assert model.truncated == 2


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["text", "mm1"])
def test_rolling_log_likelihoods_equal_lm_evals_own(hflm: Any, folders: dict[str, Path], kind: str, batch_size: int) -> None:
    texts = [("a red square",), ("a blue square, " * 30,), ("x",), ("",)]
    expected = hflm.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    found = ours(folders[kind], batch_size).loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert found[1] < -500  # several windows


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["text", "mm1"])
def test_greedy_texts_equal_lm_evals_own(hflm: Any, folders: dict[str, Path], kind: str, batch_size: int) -> None:
    free = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    prompts = [prompt for prompt in PROMPTS if prompt]  # HFLM cannot generate from nothing
    first = hflm.generate_until(requests(*[(prompt, free) for prompt in prompts]), disable_tqdm=True)
    assert len(set(first)) == len(prompts)
    stop = free | {"until": [first[0][5:7], first[1][9:11]], "max_gen_toks": 20}
    asked = requests(*[(prompt, kwargs) for prompt in prompts for kwargs in (free, stop)])
    expected = hflm.generate_until(asked, disable_tqdm=True)
    model = ours(folders[kind], batch_size)
    assert model.generate_until(asked, disable_tqdm=True) == expected
    assert any(len(cut) < len(whole) for whole, cut in zip(expected[::2], expected[1::2], strict=True))
    assert model.truncated == 2


def test_a_prompt_may_be_empty_and_must_leave_room(folders: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mm1-ablations[textcore]'")
    model = ours(folders["mm1"], 4)
    assert model.generate_until(requests(("", {"until": [], "max_gen_toks": 5})), disable_tqdm=True)[0]
    with pytest.raises(UserError, match="max_gen_toks=256: the model has 64 positions"):
        model.generate_until(requests(("a", {"until": ["\n"]})))
    with pytest.raises(UserError, match="longer than the model's 64 positions"):
        model.loglikelihood(requests(("a", " long" * 80)), disable_tqdm=True)


def test_a_text_cannot_forge_an_image_mark(folders: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mm1-ablations[textcore]'")
    model = ours(folders["mm1"], 4)
    ids = model.tok_encode("see <image> and <|endoftext|>")
    assert not {image_token_id(tokenizer()), tokenizer().eos_token_id} & set(ids)
    assert tokenizer().decode(ids) == "see <image> and <|endoftext|>"


def test_settings_that_cannot_work_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mm1-ablations[textcore]'")
    from eval.adapters.lm_eval import MM1LM

    with pytest.raises(UserError, match="batch_size=auto"):
        MM1LM(str(folders["text"]), batch_size="auto")
    with pytest.raises(UserError, match="dtype=float8"):
        MM1LM(str(folders["text"]), dtype="float8")
    with pytest.raises(UserError, match=r"nowhere.*no run\.json"):
        MM1LM(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no model's configuration"):
        MM1LM(str(tmp_path))


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_the_models_own_values_are_those_of_a_plain_forward_pass(folders: dict[str, Path], kind: str) -> None:
    """Independent of lm-eval: unpadded, one by one; also with learned positions, which padding must not move."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer()), "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    absolute = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()
    model = decoding.load(folders["text"], "cpu").model if kind == "rotary" else absolute
    sequences = [tokenizer().encode(f"a {colour} square" + " and" * i) for i, colour in enumerate(COLOURS)]
    scored = [decoding.Scored(tuple(ids), 1 + i % 3) for i, ids in enumerate(sequences)]
    found = decoding.log_likelihoods(model, scored, device="cpu", batch_size=5, pad_id=1)
    for request, (value, greedy) in zip(scored, found, strict=True):
        with torch.inference_mode():
            steps = model(torch.tensor([request.ids])).logits[0, :-1].log_softmax(-1)[-request.count :]
        wanted = torch.tensor(request.ids[-request.count :])
        assert value == pytest.approx(float(steps.gather(1, wanted[:, None]).sum()), abs=1e-4)
        assert greedy == bool((steps.argmax(-1) == wanted).all())


def test_lm_evals_command_line_runs_a_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mm1-ablations[textcore]'")
    rows = [{"question": f"a {colour} square?", "colours": COLOURS[:3], "gold": i % 3} for i, colour in enumerate(COLOURS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "made_up_colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "colours",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "colours.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "eval.adapters.lm_eval", "run", "--model", "mm1", "--tasks", "made_up_colours"]
    command += ["--model_args", f"pretrained={folders['mm1']}", "--device", "cpu", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "made_up_colours" in done.stdout
    assert "acc" in done.stdout


# ------------------------------------------------------------------------------------------------------------ lmms-eval

LMMS_UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.new("RGB", (20, 12), colour) for colour in doc["pictures"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]
"""
LMMS_RUN = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

folder, model, shots, *tasks = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
results = simple_evaluate(
    model="mm1", model_args=f"pretrained={model},device=cpu", tasks=tasks, batch_size=3, task_manager=manager,
    num_fewshot=int(shots), bootstrap_iters=0, force_simple=True,
)
answers = {}
for name, samples in results["samples"].items():
    answers[name] = [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
print("ANSWERS" + json.dumps({"answers": answers, "results": results["results"]}, default=str))
"""


@pytest.fixture(scope="session")
def lmms_python() -> str:
    """A python that has lmms-eval: MM1_LMMS_EVAL_PYTHON, or this one."""
    chosen = os.environ.get("MM1_LMMS_EVAL_PYTHON", sys.executable)
    found = subprocess.run([chosen, "-c", "import lmms_eval.evaluator"], capture_output=True, text=True, check=False)
    if found.returncode:
        assert chosen == sys.executable, f"MM1_LMMS_EVAL_PYTHON={chosen} cannot import lmms-eval:\n{found.stderr}"
        pytest.skip("lmms-eval is not installed here, and MM1_LMMS_EVAL_PYTHON names no python that has it: docs/textcore.md")
    return chosen


LMMS_ROWS = [
    {"text": "a red square is", "pictures": ["red"], "answer": "x", "choices": COLOURS[:3], "gold": 1},
    {"text": "<image>is green and <image>is", "pictures": ["green", "blue"], "answer": "x", "choices": COLOURS[:3], "gold": 0},
    {"text": "no picture", "pictures": [], "answer": "x", "choices": [" and", " or"], "gold": 0},
    {"text": "first", "pictures": ["black", "white", "red"], "answer": "x", "choices": COLOURS[3:7], "gold": 2},
]


def lmms_run(python: str, model: Path, folder: Path, shots: int, *tasks: str) -> subprocess.CompletedProcess[str]:
    rows = "".join(json.dumps(row) + "\n" for row in LMMS_ROWS)
    (folder / "rows.jsonl").write_text(rows)
    (folder / "utils.py").write_text(LMMS_UTILS)
    (folder / "run.py").write_text(LMMS_RUN)
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
        "fewshot_split: test\nfewshot_config:\n  sampler: default\n"
        "doc_to_visual: !function utils.doc_to_visual\ndoc_to_text: !function utils.doc_to_text\n"
    )
    (folder / "said.yaml").write_text(
        f"task: made_up_said\n{shared}output_type: generate_until\ndoc_to_target: answer\n"
        "generation_kwargs:\n  until: ['s']\n  max_new_tokens: 9\n  temperature: 0\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "chosen.yaml").write_text(
        f"task: made_up_chosen\n{shared}output_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [python, str(folder / "run.py"), str(folder), str(model), str(shots), *tasks]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def lmms_parts(row: dict[str, Any]) -> list[Any]:
    """What the row's prompt must be, written out."""
    pictures = []
    for colour in row["pictures"]:
        buffer = io.BytesIO()
        Image.new("RGB", (20, 12), colour).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    if "<image>" in row["text"]:
        return [pictures[0], "is green and ", pictures[1], "is"]
    return [*pictures, row["text"]]


def test_lmms_eval_runs_a_checkpoint(lmms_python: str, folders: dict[str, Path], tmp_path: Path) -> None:
    done = lmms_run(lmms_python, folders["mm1"], tmp_path, 0, "made_up_said", "made_up_chosen")
    assert "ANSWERS" in done.stdout, done.stderr[-3000:]
    output = json.loads(done.stdout.partition("ANSWERS")[2])
    model, tokens = load_model(folders["mm1"], "cpu", "float32")
    made = Generator(model, tokens, ImageFeatures(model, "cpu"), stop=("s",), max_new_tokens=9)
    wanted = [made.answer([Request(lmms_parts(row), ())])[0].text for row in LMMS_ROWS]
    assert [said[0] for said in output["answers"]["made_up_said"]] == wanted
    assert len(set(wanted)) == len(wanted)
    hits = 0
    for row, answers in zip(LMMS_ROWS, output["answers"]["made_up_chosen"], strict=True):
        totals = plain_totals(model, tokens, lmms_parts(row), [" " + choice for choice in row["choices"]])
        assert [-value for value, _ in answers] == pytest.approx(totals, abs=1e-3)
        hits += totals.index(max(totals)) == row["gold"]
    assert output["results"]["made_up_chosen"]["acc,none"] == pytest.approx(hits / len(LMMS_ROWS))


def plain_totals(model: Any, tokens: Any, parts: list[Any], continuations: list[str]) -> list[float]:
    """Summed log-probabilities by one unpadded forward pass each."""
    totals = []
    features = ImageFeatures(model, "cpu")
    for continuation in continuations:
        ids, _ = encode_parts(parts, tokens, model.config.num_image_tokens)
        more = tokens.encode(continuation)
        images = features.get([part for part in parts if not isinstance(part, str)])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + more]), image_features=images).logits[0].log_softmax(-1)
        totals.append(float(logits[len(ids) - 1 : -1].gather(1, torch.tensor(more)[:, None]).sum()))
    return totals


def test_lmms_evals_lost_pictures_are_refused(lmms_python: str, folders: dict[str, Path], tmp_path: Path) -> None:
    done = lmms_run(lmms_python, folders["mm1"], tmp_path, 2, "made_up_said")
    assert "ANSWERS" not in done.stdout
    assert "It loses those of few-shot demonstrations" in done.stderr
