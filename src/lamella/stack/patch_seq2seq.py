"""An encoder-decoder that reads images, similar to OFA: one encoder over patches and words, and one decoder.

    [ patch patch ... patch | where is the circle ? ]  ->  encoder  ->  decoder  ->  row one column two

OFA (Wang et al., 2022, arXiv 2202.03052) has a ResNet in front and its own positions; here a linear patch embedding
makes a position of each patch, with learned rows and columns, and the encoder-decoder is BART's or T5's of
transformers. Everything else, such as images at their placeholders and the methods of ``generate``, is Florence-2's
code.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.florence2.modeling_florence2 import (
    Florence2ForConditionalGeneration,
    Florence2Model,
    Florence2PreTrainedModel,
)

from lamella.errors import ArchitectureError
from lamella.stack.patch_config import PatchSeq2SeqConfig


class PatchFront(nn.Module):
    """Embeds images as positions: [images, 3, size, size] -> [images, patches, hidden]."""

    def __init__(self, config: PatchSeq2SeqConfig) -> None:
        super().__init__()
        d, side = config.text_config.hidden_size, config.image_size // config.patch_size  # type: ignore[union-attr]
        self.patches = nn.Conv2d(3, d, kernel_size=config.patch_size, stride=config.patch_size)
        self.row, self.column = nn.Embedding(side, d), nn.Embedding(side, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the embedded patches [images, patches, hidden]."""
        h = self.patches(pixel_values).permute(0, 2, 3, 1)  # [images, rows, columns, hidden]
        if h.shape[1:3] != (len(self.row.weight), len(self.column.weight)):
            given, side = list(pixel_values.shape[-2:]), len(self.row.weight) * self.patches.stride[0]
            raise ArchitectureError(f"pixel_values of {given} pixels: this model reads {side} x {side}")
        return self.norm((h + self.row.weight[:, None] + self.column.weight).flatten(1, 2))


class PatchSeq2SeqModel(Florence2Model):
    """The patch embedding and the encoder-decoder, up to the final states."""

    config_class = PatchSeq2SeqConfig

    def __init__(self, config: PatchSeq2SeqConfig) -> None:
        Florence2PreTrainedModel.__init__(self, config)
        self.front = PatchFront(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return what the encoder reads of images, as ``pooler_output`` [images, patches, hidden]."""
        return BaseModelOutputWithPooling(pooler_output=self.front(pixel_values))

    def get_placeholder_mask(self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Return the placeholders of images in the prompts [batch, time, 1] bool.

        Args:
            input_ids: token ids of the prompts `[batch, time]`.
            inputs_embeds: their embeddings `[batch, time, hidden]`; not used.
            image_features: embedded patches `[images, patches, hidden]`.
        """
        marks: Tensor = input_ids == self.config.image_token_id
        self.check_images(input_ids, image_features)
        return marks[..., None]

    def check_images(self, input_ids: Tensor, image_features: Tensor | None = None) -> None:
        """Check that images fill their placeholders.

        Args:
            input_ids: tokens [batch, time].
            image_features: features of the images [images, patches, hidden]; None without images.

        Raises:
            ArchitectureError: if there are more or fewer images.
        """
        expected = int((input_ids == self.config.image_token_id).sum())
        found = 0 if image_features is None else image_features.shape[:-1].numel()
        if expected != found:
            raise ArchitectureError(
                f"the prompts have {expected} placeholder positions for images, but the images fill {found}: give "
                "pixel_values for every image, as the processor makes them"
            )

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **given: Any) -> Any:
        """Run Florence-2's forward, with images for all placeholders or none.

        Args:
            input_ids: tokens of the encoder [batch, time].
            pixel_values: images [images, 3, size, size].
            given: other arguments of Florence-2.
        """
        if input_ids is not None and pixel_values is None and given.get("encoder_outputs") is None:
            self.check_images(input_ids)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **given)


class PatchSeq2Seq(Florence2ForConditionalGeneration):
    """Generates text about images and text; it is called like Florence-2.

    ``input_ids`` have ``image_token_id`` at the positions of patches, ``pixel_values`` [images, 3, size, size] are the
    images in the order of their placeholders, and the decoder reads ``labels`` or the tokens of ``generate``.
    Placeholders without images, or images without placeholders, are an :class:`ArchitectureError`.
    """

    config_class = PatchSeq2SeqConfig

    def __init__(self, config: PatchSeq2SeqConfig) -> None:
        Florence2PreTrainedModel.__init__(self, config)
        self.model = PatchSeq2SeqModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> dict[str, Any]:
        if model_kwargs.get("pixel_values") is None and model_kwargs.get("encoder_outputs") is None:
            self.model.check_images(inputs_tensor)
        made: dict[str, Any] = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, *rest, **more
        )
        return made
