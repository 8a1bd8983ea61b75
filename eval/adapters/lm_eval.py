"""lm-eval runs a checkpoint of this suite, or any text-only causal language model, as its `LM`.

    python -m eval.adapters.lm_eval run --model mm1 --model_args pretrained=base --tasks piqa --include_path my_tasks

is lm-eval's own command line with the model `mm1` added. From Python: `import eval.adapters.lm_eval`, then `model="mm1"`, or pass
`MM1LM(pretrained=...)` itself. Values equal those of lm-eval's HFLM for the same decoder (tests/test_adapters.py), with two
differences on purpose: sums are float32 whatever the model's dtype, and what is cut from a prompt too long for the model is
counted in `truncated`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from configs.errors import UserError
from data_pipelines.tokens import Encoder
from eval.adapters.decoding import Loaded, Scored, generate, load, log_likelihoods, model_folder

MAX_GEN_TOKS = 256
"""Tokens generated where a task names no number, as in HFLM."""


class MM1LM(TemplateLM):
    """pretrained: a run's name or folder, a save_pretrained folder, or a Loaded model.

    Text is encoded as training encodes it: no special tokens, and marks such as <image> written out in a text are ordinary
    characters. What is scored without a context follows end-of-text, which is where a document begins. For text-only models
    both are the tokeniser's own business, as in HFLM; add_bos_token=True or False overrides it.
    """

    def __init__(
        self,
        pretrained: str | Loaded,
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """Raises UserError for a model, device, dtype or batch size that cannot be used."""
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: give a number from 1 up; sizes are not searched for.")
        if max_batch_size is not None and max_batch_size < int(batch_size):
            raise UserError(f"max_batch_size={max_batch_size} is less than batch_size={batch_size}.")
        self.batch_size = int(batch_size)
        loaded = pretrained if isinstance(pretrained, Loaded) else load(model_folder(pretrained), device, dtype)
        self.model, self.tokenizer, self.ours = loaded.model, loaded.tokenizer, loaded.ours
        self._device = loaded.device
        self.add_bos_token = add_bos_token
        self.max_length = int(max_length or resolve_max_length(self.model.config, self.tokenizer))
        self.truncated = 0
        """Requests whose beginning did not fit and was cut off, since this counter was last set to 0."""
        self._encoder = Encoder(self.tokenizer, 0) if self.ours else None
        pad = self.tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else self.eot_token_id)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if self.ours or bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if self._encoder is not None:
            bos = [int(self.tokenizer.bos_token_id)] if self.add_bos_token and add_special_tokens is None else []
            return bos + self._encoder.text(string)
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            special = False
        return list(self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special})))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"A continuation of {len(continuation)} tokens is longer than the model's {self.max_length} positions."
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            self.truncated += len(ids) < len(context) + len(continuation)
            scored.append(Scored(tuple(ids), len(continuation)))
        with tqdm(total=len(scored), desc="scoring", disable=disable_tqdm, file=sys.stderr) as bar:
            answers = log_likelihoods(
                self.model,
                scored,
                device=self._device,
                batch_size=self.batch_size,
                pad_id=self._pad,
                done=bar.update,  # type: ignore[arg-type]
            )
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text's whole log-likelihood, in windows of the model's length that share one token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a task asks for sampling; text up to the first stop string, which is left out."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm, file=sys.stderr) as bar:
            for numbers in groups.values():
                for batch, answers in self._generate([requests[n].args[0] for n in numbers], requests[numbers[0]].args[1]):
                    for place, text in zip(batch, answers, strict=True):
                        texts[numbers[place]] = text
                        self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
                    bar.update(len(batch))
        return texts

    def _generate(self, contexts: list[str], gen_kwargs: dict[str, Any]) -> Iterable[tuple[list[int], list[str]]]:
        """(positions in `contexts`, their texts), batch by batch, longest first."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, MAX_GEN_TOKS))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stop = [text for text in handle_stop_sequences(options.pop("until", None), eos=end) if text]
        count = int(options.pop("max_gen_toks"))
        if not options.get("do_sample"):
            options = {key: value for key, value in options.items() if key != "temperature"}
        room = self.max_length - count
        if room < 1:
            raise UserError(
                f"max_gen_toks={count}: the model has {self.max_length} positions, which leaves none for the prompt. "
                "Ask for fewer tokens (gen_kwargs max_gen_toks=...)."
            )
        encoded = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        self.truncated += sum(len(ids) > room for ids in encoded)
        order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), contexts[i]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            yield (
                batch,
                generate(
                    self.model,
                    self.tokenizer,
                    [encoded[i][-room:] for i in batch],
                    device=self._device,
                    pad_id=self._pad,
                    stop=stop,
                    max_new_tokens=count,
                    **options,
                ),
            )


if "mm1" not in model_registry:
    model_registry.register("mm1", target="eval.adapters.lm_eval:MM1LM")


def main() -> None:
    """lm-eval's command line, with this suite's models."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
