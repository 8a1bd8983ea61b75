"""Text and images -> token ids. Training and evaluation share this one function, so that a prompt looks like what was trained on.

    [image, "a red circle"]  ->  <image> * M, "a", " red", " circle"       M = image tokens of the connector

Text spans are tokenised one by one: what stands before an image never changes how the text after it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipelines.document import Image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A transformers tokeniser from a local folder, with an end-of-text token and an <image> token (added if it lacks one)."""
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
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]


def encode_parts(
    parts: Sequence[str | Image | Any], tokenizer: PreTrainedTokenizerBase, num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Token ids of a document or prompt, and the position of each image's first token.

    Anything in `parts` that is not a string counts as an image. Special tokens written out in the text ("<image>",
    "<|endoftext|>") are encoded as ordinary characters: a document cannot forge an image mark or its own end.
    """
    ids: list[int] = []
    starts: list[int] = []
    mark = image_token_id(tokenizer)
    for part in parts:
        if isinstance(part, str):
            if part:
                ids += tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
        else:
            starts.append(len(ids))
            ids += [mark] * num_image_tokens
    return ids, starts
