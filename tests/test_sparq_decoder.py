"""SparQ attention inside transformers decoders: masks, causal limits, shared prefixes, generate, other architectures.

The reference is a decoder whose attention function *is* the definition (tests/sparq.py), over transformers' own cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from configs.errors import UserError
from mm1.attention.register import attention_name, decoder_of, make_cache, use_sparq
from mm1.attention.sparq import SparqSettings
from tests.models import LLAMA, tiny_model
from tests.sparq import group_step

SETTINGS = SparqSettings(r=3, k=12, dense_below=0)
VOCABULARY = 61


def llama(**changes: Any) -> Any:
    return decoder({**LLAMA, "vocab_size": VOCABULARY, "tie_word_embeddings": False} | changes)


def decoder(config: dict[str, Any]) -> Any:
    """In float64, with weights large enough for attention to have favourites, and for them to decide the next token."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).double().eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name or "query_key" in name:
            weight.data.mul_(15)
        elif "v_proj" in name or "o_proj" in name or "attention.dense" in name:
            weight.data.mul_(6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int, length: int, padding: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return ids(rows, length, seed) * mask, mask


def run(model: Any, steps: list[Tensor], mask: Tensor, cache: Any) -> list[Tensor]:
    """Logits of consecutive forward passes; mask covers all of them."""
    logits, done = [], mask.shape[1] - sum(step.shape[1] for step in steps)
    for step in steps:
        end = done + step.shape[1]
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, done:]
        with torch.no_grad():
            output = model(input_ids=step, attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache)
        logits.append(output.logits)
        done = end
    return logits


def by_definition(settings: SparqSettings, most: int = 16) -> None:
    """Registers "definition": what "sparq" must compute."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, heads, n, _ = query.shape
        if n == key.shape[2] or n > most:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        output = torch.zeros_like(query)
        for b in range(batch):
            for i in range(n):
                seen = torch.arange(key.shape[2]) <= key.shape[2] - n + i
                if attention_mask is not None:
                    seen = attention_mask[b, 0, i]
                for h in range(key.shape[1]):
                    group = slice(h * heads // key.shape[1], (h + 1) * heads // key.shape[1])
                    output[b, group, i] = group_step(query[b, group, i], key[b, h, seen], value[b, h, seen], settings).y
        return output.transpose(1, 2), None

    AttentionInterface.register("definition", attention)
    AttentionMaskInterface.register("definition", sdpa_mask)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, group="logits", reallocate=False, local=2)])
def test_a_left_padded_batch_decodes_by_the_definition(settings: SparqSettings) -> None:
    """A dense prompt, five tokens at once, then single ones; a row of 10 tokens starts below k and grows beyond it."""
    model = llama()
    prompt, mask = left_padded(3, 30, [0, 7, 20])
    steps = [prompt, ids(3, 5, 1), ids(3, 1, 2), ids(3, 1, 3)]
    mask = torch.cat([mask, mask.new_ones(3, 7)], 1)
    by_definition(settings)
    model.set_attn_implementation("definition")
    expected = run(model, steps, mask, DynamicCache(config=model.config))
    model.set_attn_implementation("sdpa")
    dense = run(model, steps, mask, DynamicCache(config=model.config))
    got = run(model, steps, mask, use_sparq(model, settings))
    real = mask[:, :30].bool()
    assert (got[0] - dense[0])[real].abs().max() < 1e-9
    for step in (1, 2, 3):
        assert (got[step] - expected[step]).abs().max() < 1e-9
        assert (got[step] - dense[step]).abs().max() > 1e-3


def test_a_row_decodes_in_a_padded_batch_as_it_does_alone() -> None:
    model = llama()
    prompt, mask = left_padded(3, 40, [0, 11, 27])
    steps = [prompt, ids(3, 4, 1), ids(3, 1, 2)]
    mask = torch.cat([mask, mask.new_ones(3, 5)], 1)
    together = run(model, steps, mask, use_sparq(model, SETTINGS))
    for b, padding in enumerate([0, 11, 27]):
        alone = [steps[0][b : b + 1, padding:], steps[1][b : b + 1], steps[2][b : b + 1]]
        logits = run(model, alone, mask[b : b + 1, padding:], make_cache(model, SETTINGS, 1))
        for one, all_rows in zip(logits, together, strict=True):
            assert (one[0] - all_rows[b, -one.shape[1] :]).abs().max() < 1e-9


def test_padding_on_the_right_of_what_comes_last_can_be_taken_off_again() -> None:
    """As options of unequal length are compared: their padded ends are cropped, and the row goes on as if they had never been."""
    model = llama()
    use_sparq(model)
    prompt, ones = ids(2, 30), torch.ones(2, 30, dtype=torch.int64)
    options, real = ids(2, 4, 1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    cache = make_cache(model, SETTINGS)
    run(model, [prompt], ones, cache)
    scored = run(model, [options], torch.cat([ones, real], 1), cache)[0]
    cache.crop(-4)
    on = run(model, [ids(2, 1, 2)], torch.cat([ones, ones[:, :1]], 1), cache)[0]
    for b, count in enumerate((4, 2)):
        alone = make_cache(model, SETTINGS)
        run(model, [prompt[b : b + 1]], ones[:1], alone)
        single = run(model, [options[b : b + 1, :count]], torch.ones(1, 30 + count), alone)[0]
        assert (single[0] - scored[b, :count]).abs().max() < 1e-9
        alone.crop(-count)
        assert (run(model, [ids(2, 1, 2)[b : b + 1]], torch.ones(1, 31), alone)[0][0] - on[b]).abs().max() < 1e-9


@pytest.mark.parametrize("shared", [False, True])
def test_below_the_threshold_it_is_dense_to_the_bit(shared: bool) -> None:
    model = llama().float()
    use_sparq(model)
    prompt, mask = (ids(1, 30), torch.ones(1, 30, dtype=torch.int64)) if shared else left_padded(3, 30, [0, 7, 20])
    steps = [ids(3, 5, 1), ids(3, 1, 2)]
    results = []
    every = [replace(SETTINGS, k=64), *(replace(SETTINGS, dense_below=length) for length in (64, 36, 20))]
    for settings in (None, *every):
        cache: Any = make_cache(model, settings)
        run(model, [prompt], mask, cache)
        if shared:
            cache = cache.branch(3)
        full = torch.cat([mask.expand(3, -1), torch.ones(3, 6, dtype=torch.int64)], 1)
        results.append(run(model, steps, full, cache))
    for other in results[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[3][0][1 - shared :], results[0][0][1 - shared :])
    assert not torch.equal(results[3][1], results[0][1])  # 36 tokens and more
    if not shared:  # 11 to 16 tokens beside rows that are sparse
        assert [torch.equal(results[4][0][b], results[0][0][b]) for b in range(3)] == [False, False, True]


@pytest.mark.parametrize("suffix", ["sparse", "dense"])
@pytest.mark.parametrize("settings", [None, SETTINGS], ids=["dense", "sparq"])
def test_a_shared_prefix_gives_what_a_cache_for_each_row_gives(settings: SparqSettings | None, suffix: str) -> None:
    """Suffixes of 20, 16 and 3 tokens, padded on the left behind a prefix of 25. 20 at once are a prompt to a plain cache, so the
    reference feeds them in pieces."""
    model = llama()
    settings = settings and replace(settings, suffix=suffix)
    use_sparq(model)
    lengths = [20, 16, 3]
    prefix, ones = ids(1, 25), torch.ones(3, 25, dtype=torch.int64)
    questions, mask = left_padded(3, 20, [20 - n for n in lengths], 1)
    after = [ids(3, 1, 2), ids(3, 1, 3)]
    base = make_cache(model, settings)
    run(model, [prefix], ones[:1], base)
    branch = base.branch(3)
    full = torch.cat([ones, mask, ones[:, :2]], 1)
    got = run(model, [questions, *after], full, branch)
    for b, n in enumerate(lengths):
        alone = make_cache(model, settings)
        question = questions[b : b + 1, 20 - n :]
        pieces = [question] if suffix == "dense" else list(question.split(16, 1))
        steps = [prefix, *pieces, *[step[b : b + 1] for step in after]]
        logits = torch.cat(run(model, steps, torch.ones(1, 27 + n), alone)[1:], 1)
        assert (logits[0, :n] - got[0][b, 20 - n :]).abs().max() < 1e-9
        assert (logits[0, n:] - torch.cat(got[1:], 1)[b]).abs().max() < 1e-9
    # and the question is sparse where it should be
    dense = make_cache(model, None)
    run(model, [prefix], ones[:1], dense)
    change = (run(model, [questions], full[:, :45], dense.branch(3))[0] - got[0])[mask.bool()].abs().max()
    assert (change > 1e-3) == (settings is not None and suffix == "sparse")


@pytest.mark.parametrize("suffix", ["sparse", "dense"])
def test_a_prompts_question_is_sparse_whatever_the_other_rows_are(suffix: str) -> None:
    """Demonstrations and question in one forward pass of a left-padded batch, as if each row had been fed in two."""
    model, settings = llama(), replace(SETTINGS, suffix=suffix)
    use_sparq(model)
    padding, questions = [0, 9, 28], [20, 5, 3]
    prompt, mask = left_padded(3, 40, padding)
    full, after = torch.cat([mask, mask[:, -1:]], 1), ids(3, 1, 1)
    cache = make_cache(model, settings)
    cache.questions(questions)
    got = run(model, [prompt, after], full, cache)
    for b, (pad, question) in enumerate(zip(padding, questions, strict=True)):
        demonstrations, asked = prompt[b : b + 1, pad : 40 - question], prompt[b : b + 1, 40 - question :]
        pieces = [asked] if suffix == "dense" else list(asked.split(16, 1))
        alone = make_cache(model, settings)
        logits = torch.cat(run(model, [demonstrations, *pieces, after[b : b + 1]], torch.ones(1, 41 - pad), alone), 1)
        assert (logits[0, : 40 - pad] - got[0][b, pad:]).abs().max() < 1e-9
        assert (logits[0, -1] - got[1][b, 0]).abs().max() < 1e-9
    assert all(layer.questions is None for layer in cache.layers)  # said for one forward pass
    plain = run(model, [prompt, after], full, make_cache(model, settings))
    changed = [float((a - b).abs().max()) > 1e-3 for a, b in zip(plain[0], got[0], strict=True)]
    assert changed == [suffix == "sparse", suffix == "sparse", False]  # the last has k tokens
    cache = make_cache(model, SETTINGS)
    cache.questions([3, 3])
    with pytest.raises(UserError, match="2 lengths for a batch of 3"):
        run(model, [prompt], mask, cache)


def test_a_left_padded_prefix_can_be_shared() -> None:
    model = llama()
    use_sparq(model)
    prefix, mask = left_padded(1, 25, [6])
    step, logits = ids(2, 3, 1), []
    for padding in (0, 6):
        base = make_cache(model, SETTINGS)
        run(model, [prefix[:, padding:]], mask[:, padding:], base)
        full = torch.cat([mask[:, padding:].expand(2, -1), mask.new_ones(2, 3)], 1)
        logits.append(run(model, [step], full, base.branch(2))[0])
    assert (logits[0] - logits[1]).abs().max() < 1e-9
    hidden = full.clone()
    hidden[1, 3] = 0
    with pytest.raises(UserError, match="hides tokens of the prefix"):
        run(model, [step], hidden, base.branch(2))


def test_more_than_sixteen_at_once_are_a_prompt() -> None:
    model = llama()
    for n in (16, 17):
        steps, mask = [ids(2, 20), ids(2, n, 1)], torch.ones(2, 20 + n, dtype=torch.int64)
        use_sparq(model)
        change = run(model, steps, mask, make_cache(model, SETTINGS))[1] - run(model, steps, mask, make_cache(model, None))[1]
        assert (change.abs().max() > 1e-3) == (n == 16)


def test_generate_is_transformers_own_where_nothing_is_left_out() -> None:
    """Greedy, beams (reorder), several sequences a prompt, and speculation by prompt lookup (crop)."""
    model = llama()
    prompt, mask = left_padded(2, 20, [0, 9])
    modes: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
    every = replace(SETTINGS, k=60)
    for mode in modes:
        arguments = {"inputs": prompt, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False} | mode
        model.set_attn_implementation("sdpa")
        assert torch.equal(model.generate(**arguments), model.generate(**arguments, past_key_values=use_sparq(model, every)))
        sparse = model.generate(**arguments, past_key_values=use_sparq(model, SETTINGS))
        model.set_attn_implementation("sdpa")
        assert not torch.equal(sparse, model.generate(**arguments))
    repeated = ids(1, 8).repeat(1, 3)
    plain = model.generate(repeated, max_new_tokens=16, do_sample=False)
    model.set_attn_implementation("sdpa")
    lookup = {"max_new_tokens": 16, "do_sample": False, "prompt_lookup_num_tokens": 4}
    assert torch.equal(plain, model.generate(repeated, past_key_values=use_sparq(model, every), **lookup))
    greedy = model.generate(repeated, max_new_tokens=16, do_sample=False, past_key_values=make_cache(model, SETTINGS))
    assert torch.equal(greedy, model.generate(repeated, past_key_values=make_cache(model, SETTINGS), **lookup))


def test_generate_goes_on_from_a_branch() -> None:
    model = llama()
    use_sparq(model)
    prefix, questions = ids(1, 25), ids(2, 6, 1)
    whole = torch.cat([prefix.expand(2, -1), questions], 1)
    base = make_cache(model, SETTINGS)
    run(model, [prefix], torch.ones(1, 25), base)
    for rows in ([0], [1], [0, 1]):
        got = model.generate(whole[rows], past_key_values=base.branch(len(rows)), max_new_tokens=8, do_sample=False)
        cache = make_cache(model, SETTINGS)
        run(model, [prefix.expand(len(rows), -1)], torch.ones(len(rows), 25), cache)
        assert torch.equal(got, model.generate(whole[rows], past_key_values=cache, max_new_tokens=8, do_sample=False))


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
        {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": None},
        {"model_type": "gpt_neox"},
        {"model_type": "olmo2", "num_key_value_heads": 4},
        {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 20,
         "layer_types": ["sliding_attention", "full_attention"]},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_other_architectures(config: dict[str, Any]) -> None:
    model = decoder(SMALL | config)
    prompt, mask = left_padded(2, 30, [0, 9])
    steps, mask = [prompt, ids(2, 3, 1), ids(2, 1, 2)], torch.cat([mask, mask.new_ones(2, 4)], 1)
    dense = run(model, steps, mask, DynamicCache(config=model.config))
    every = run(model, steps, mask, use_sparq(model, replace(SETTINGS, k=60)))
    some = run(model, steps, mask, make_cache(model, SETTINGS))
    for a, b, c in list(zip(dense, every, some, strict=True))[1:]:
        assert (a - b).abs().max() < 1e-9
        assert (a - c).abs().max() > 1e-4


def test_the_suites_own_model_decodes_sparsely_and_keeps_its_encoders_attention() -> None:
    model = tiny_model().eval()
    encoder = model.image_encoder.tower.config._attn_implementation if hasattr(model.image_encoder, "tower") else None
    prompt = torch.randint(10, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    prompt[:, 3:7] = model.config.image_token_id
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    arguments: dict[str, Any] = {
        "inputs": prompt, "images": images, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False,
    }  # fmt: skip
    dense = model.generate(**arguments)
    cache = use_sparq(model, SparqSettings(r=4, k=64, dense_below=0))
    assert torch.equal(dense, model.generate(**arguments, past_key_values=cache))
    assert cache.get_seq_length() == 45
    assert decoder_of(model).config._attn_implementation == attention_name(SETTINGS) == "sparq"
    if encoder is not None:
        assert model.image_encoder.tower.config._attn_implementation == encoder
    sparse = model.generate(**arguments, past_key_values=make_cache(model, SparqSettings(r=1, k=1, local=0, dense_below=0)))
    assert sparse.shape == dense.shape


def test_what_it_cannot_do_is_refused() -> None:
    model, prompt, ones = llama(), ids(1, 20), torch.ones(1, 20, dtype=torch.int64)
    use_sparq(model)
    with pytest.raises(UserError, match=r"decodes from a SparqCache"):
        run(model, [prompt, ids(1, 1)], torch.ones(1, 21), DynamicCache(config=model.config))
    gap = torch.ones(1, 22, dtype=torch.int64)
    gap[0, 20] = 0
    with pytest.raises(UserError, match="row 0 of the attention mask has gaps"):
        run(model, [prompt, ids(1, 1), ids(1, 1)], gap, make_cache(model, SETTINGS))
    with pytest.raises(UserError, match="made for 2 rows got a batch of 1"):
        run(model, [prompt], ones, make_cache(model, SETTINGS, 2))
    with pytest.raises(UserError, match="inference"):
        model(prompt, past_key_values=make_cache(model, SETTINGS))
    added = torch.zeros(1, 1, 1, 21, dtype=torch.float64)
    cache = make_cache(model, SETTINGS)
    run(model, [prompt], ones, cache)
    with torch.no_grad(), pytest.raises(UserError, match="boolean mask"):
        model(ids(1, 1), attention_mask=added, past_key_values=cache)
    windows = decoder(SMALL | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 8})
    with pytest.raises(UserError, match="no layer attends to all tokens"):
        use_sparq(windows)
    capped = decoder(SMALL | {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8})
    with torch.no_grad(), pytest.raises(UserError, match="softcap"):
        capped(prompt, past_key_values=use_sparq(capped, SETTINGS))


def test_without_a_cache_it_is_sdpa() -> None:
    """Training, and losses of whole sequences."""
    model, prompt = llama(), ids(2, 20)
    expected = model(prompt, use_cache=False).logits
    use_sparq(model)
    assert torch.equal(model(prompt, use_cache=False).logits, expected)
