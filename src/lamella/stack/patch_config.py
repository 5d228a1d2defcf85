"""The config of an encoder-decoder that reads images through a linear patch embedding."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class PatchSeq2SeqConfig(PreTrainedConfig):
    """The config of :class:`lamella.stack.patch_seq2seq.PatchSeq2Seq`.

    Attributes:
        text_config: config of the encoder-decoder, BART's or T5's.
        image_size: side of the square images in pixels.
        patch_size: side of the square patches in pixels.
        image_token_id: the token at the position of one patch.
        initializer_range: standard deviation of the initial weights outside the encoder-decoder.
    """

    model_type = "patch_seq2seq"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="bart")}  # noqa: RUF012

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_size: int = 32
    patch_size: int = 4
    image_token_id: int = 5
    initializer_range: float = 0.02
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
