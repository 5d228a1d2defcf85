"""The config of OFA, an encoder-decoder over images and text."""

from typing import Any

from transformers import AutoConfig, BartConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class OFAConfig(BartConfig):
    """The config of :class:`lamella.stack.ofa.OFAForConditionalGeneration`: BART's, with images and relative positions.

    Attributes:
        vision_config: config of the ResNet, without the stages that OFA leaves out.
        image_size: side of the square images in pixels that the processor makes; the network reads other sizes as well.
        image_token_index: the token at the position of one patch.
        token_bucket_size: half the number of distances between words that have a bias of their own.
        image_bucket_size: largest number of rows, and of columns, of patches.
    """

    model_type = "ofa_seq2seq"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet")}  # noqa: RUF012

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_size: int = 384
    image_token_index: int = 59457
    token_bucket_size: int = 256
    image_bucket_size: int = 42
    vocab_size: int = 59457
    decoder_start_token_id: int | None = 0
