"""The tokenizer a corpus brings: byte-level BPE, trained on the corpus's own training text, saved as a transformers tokenizer.

Byte-level, so that no text is ever out of vocabulary. Ids 0-2 are the special tokens: <|endoftext|> (begins and ends documents),
<|pad|>, and <image>, which stands once for every image token of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs.errors import UserError

END_OF_TEXT, PAD, IMAGE = "<|endoftext|>", "<|pad|>", "<image>"
SMALLEST_VOCABULARY = 256 + 3


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train on `texts` and write the tokenizer's files into `folder`. The same texts in the same order give the same files.

    Raises UserError when `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and 3 special tokens need {SMALLEST_VOCABULARY}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return folder
