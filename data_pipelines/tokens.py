"""Text and images -> token ids. Training and evaluation share this one function, so that a prompt looks like what was trained on.

    [image, "a red circle"]  ->  <image> * M, "a", " red", " circle"       M = image tokens of the connector

Text spans are tokenised one by one: what stands before an image never changes how the text after it is cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines.document import Image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A transformers tokeniser from a local folder, with an end-of-text token and an <image> token (added if it lacks one).

    Raises UserError where there is none, where it has no end-of-text token, and where a text could write its <image> token.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokeniser (no tokenizer_config.json). Set decoder.tokenizer to a folder that does.")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokeniser has no end-of-text token, which separates documents. Set eos_token in its config."
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if image_token_id(tokenizer) in Encoder(tokenizer, 0).text(IMAGE_TOKEN):
        raise UserError(
            f'{folder}: a text that contains {IMAGE_TOKEN!r} becomes the image mark, where no image stands. Set "special": true '
            f"for {IMAGE_TOKEN!r} among the added_tokens of its tokenizer.json."
        )
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]


class Encoder:
    """Documents and prompts -> token ids, with `num_image_tokens` image marks where an image stands.

    Special tokens written out in the text ("<image>", "<|endoftext|>") are encoded as ordinary characters: a document cannot
    forge an image mark or its own end. The tokenizers library is called directly where the tokeniser is one of its own:
    transformers' wrapper costs more than encoding a caption does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_image_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._marks = [image_token_id(tokenizer)] * num_image_tokens
        self._fast: Any = None

    def text(self, text: str) -> list[int]:
        if not self._tokenizer.is_fast:
            return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self._fast is None:
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = True
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def __call__(self, parts: Sequence[str | Image | Any]) -> tuple[list[int], list[int]]:
        """(ids, the position of each image's first token); anything in `parts` that is not a string counts as an image."""
        ids: list[int] = []
        starts: list[int] = []
        for part in parts:
            if isinstance(part, str):
                if part:
                    ids += self.text(part)
            else:
                starts.append(len(ids))
                ids += self._marks
        return ids, starts

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fast": None}


def encode_parts(
    parts: Sequence[str | Image | Any], tokenizer: PreTrainedTokenizerBase, num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Encoder for once: (token ids, the position of each image's first token)."""
    return Encoder(tokenizer, num_image_tokens)(parts)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Twelve hex digits over all that turns text into ids: one fingerprint, the same ids of every text."""
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab().items()))  # type: ignore[attr-defined]
    return hashlib.sha256(f"{content}{tokenizer.eos_token_id}{image_token_id(tokenizer)}".encode()).hexdigest()[:12]
