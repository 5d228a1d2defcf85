"""The tokenizer of the synthetic shapes: one token per word, and the special tokens that models need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lamella.zoo.worlds.language import WORDS

PAD, BOS, EOS, UNKNOWN, MASK = "<pad>", "<bos>", "<eos>", "<unk>", "<mask>"
IMAGE = "<image>"
SPECIAL_NAMES = {  # their names in transformers
    "image_token": IMAGE,
    "video_token": "<video>",
    "vision_start_token": "<vision>",
    "vision_end_token": "</vision>",
}
SPECIAL = (PAD, BOS, EOS, UNKNOWN, MASK, *SPECIAL_NAMES.values())


def word_tokenizer(further: Sequence[str] = ()) -> Any:
    """Return a tokenizer for all text about shapes; rows begin with ``<bos>``.

    It decodes to words separated by spaces, as answers are written.

    Args:
        further: additional words, such as :data:`lamella.zoo.worlds.GLYPH_WORDS`.
    """
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS, *further))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        mask_token=MASK,
        extra_special_tokens=SPECIAL_NAMES,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
