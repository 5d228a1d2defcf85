"""A masked-diffusion model that reads images: LLaVA's vision tower and projector in front of LLaDA or Dream.

    LLaDA-V (You et al., 2025, arXiv 2505.16933)     around LLaDA; every pass computes the whole sequence
    LaViDa (Li et al., 2025, arXiv 2505.16839)       around Dream; image and question are encoded once, and kept

Images are at their placeholders; the language model is a complete model, ``model.language_model``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel

from lamella.errors import ArchitectureError
from lamella.stack.diffusion import DreamForMaskedLM, LLaDAForMaskedLM
from lamella.stack.diffusion_config import LlavaDiffusionConfig

LANGUAGE_MODELS: dict[str, Any] = {"llada": LLaDAForMaskedLM, "Dream": DreamForMaskedLM}


class LlavaDiffusionModel(LlavaModel):
    """Vision tower, projector and language model, up to the final states."""

    config_class = LlavaDiffusionConfig

    def __init__(self, config: LlavaDiffusionConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        text: Any = config.text_config
        if text.model_type not in LANGUAGE_MODELS:
            known = " or ".join(LANGUAGE_MODELS)
            raise ArchitectureError(f"text_config: a {text.model_type} does not predict masked tokens: give {known}")
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = LANGUAGE_MODELS[text.model_type](text)
        self.post_init()

    @property
    def layered(self) -> Any:
        """The module that runs the layers of the language model."""
        inside = self.language_model.model
        return inside["transformer"] if isinstance(inside, nn.ModuleDict) else inside

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.language_model.set_input_embeddings(value)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the features of images that the language model reads [images, positions, hidden]."""
        config = self.config
        features: Any = self.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )
        return torch.stack(features.pooler_output)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **given: Any,
    ) -> BaseModelOutput:
        """Return the final states; see :meth:`LlavaDiffusion.forward`."""
        h = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self.features(pixel_values)
        marks = input_ids == self.config.image_token_id
        expected, found = int(marks.sum()), 0 if image_features is None else image_features.shape[:-1].numel()
        if expected != found:
            raise ArchitectureError(
                f"the prompts have {expected} placeholder positions for images, but the images fill {found}: give "
                "pixel_values for every image, as the processor makes them"
            )
        if image_features is not None:
            h = h.masked_scatter(marks[..., None], image_features.to(h.dtype))
        out: BaseModelOutput = self.layered(inputs_embeds=h, **given)
        return out


class LlavaDiffusion(LlavaPreTrainedModel):
    """A model that predicts masked tokens of answers about images; see :class:`.diffusion.LLaDAForMaskedLM`."""

    config_class = LlavaDiffusionConfig

    def __init__(self, config: LlavaDiffusionConfig) -> None:
        super().__init__(config)
        self.model = LlavaDiffusionModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output projection."""
        return self.model.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        self.model.language_model.set_output_embeddings(value)

    def encoded(self, pixel_values: Tensor | None = None, **prompt: Any) -> dict[str, Any]:
        """Return a prompt's inputs apart from its tokens, with images encoded once for all passes.

        Args:
            pixel_values: images [images, channels, height, width]; None for a prompt without images.
            prompt: the other inputs.
        """
        return prompt if pixel_values is None else prompt | {"image_features": self.model.features(pixel_values)}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        **given: Any,
    ) -> MaskedLMOutput:
        """Return the logits of every position [batch, time, vocabulary].

        Args:
            input_ids: tokens [batch, time]: ``image_token_id`` at placeholders of images, ``mask_token_id`` at masks.
            attention_mask: 0 at padding [batch, columns], or which tokens each token sees, bool [batch, 1, time,
                columns].
            pixel_values: the images, in the order of their placeholders [images, channels, height, width].
            image_features: instead of images, their features from :meth:`encoded` [images, positions, hidden].
            position_ids: position of each token [batch, time].
            logits_to_keep: positions whose logits are computed; all if None.
            given: other arguments, such as ``cache``.

        Raises:
            ArchitectureError: if images do not fill their placeholders.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_features=image_features,
            position_ids=position_ids,
            **given,
        )
        states = out.last_hidden_state if logits_to_keep is None else out.last_hidden_state[:, logits_to_keep]
        return MaskedLMOutput(logits=self.get_output_embeddings()(states), hidden_states=out.hidden_states)
