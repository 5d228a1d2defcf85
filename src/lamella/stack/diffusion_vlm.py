"""A masked-diffusion model that reads images: LLaVA's vision tower and projector in front of LLaDA or Dream.

    LLaDA-V (You et al., 2025, arXiv 2505.16933)     around LLaDA; every pass computes the whole sequence
    LaViDa (Li et al., 2025, arXiv 2505.16839)       around Dream; image and question are encoded once, and kept

Images are at their placeholders; the language model is a complete model, ``model.language_model``. A large image is
read as LLaVA-OneVision reads it: as a whole and in a grid of tiles, from which padding is removed, with a vector at the
end of every row::

    whole image    n positions
    grid           tiles side by side, without padding, each row followed by ``image_newline``
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from lamella.errors import ArchitectureError
from lamella.stack.diffusion import DreamForMaskedLM, LLaDAForMaskedLM
from lamella.stack.diffusion_config import LlavaDiffusionConfig

TOLERANCE = 1.1  # factor by which a grid may exceed its limit in height and width, as in LLaVA-OneVision
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
        if config.image_grid_pinpoints is not None:
            self.image_newline = nn.Parameter(torch.randn(text.hidden_size) * text.hidden_size**-0.5)
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

    def features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, batch_num_images: Tensor | None = None
    ) -> Tensor:
        """Return the features of images that the language model reads.

        Args:
            pixel_values: images [images, channels, height, width], or with tiles [images, tiles, channels, height,
                width].
            image_sizes: original height and width of each image [images, 2], for tiles.
            batch_num_images: number of images in each row; only an image that is alone in its row is cut into tiles.

        Returns:
            Features [images, positions, hidden]; with tiles [positions, hidden], those of all images in turn.
        """
        if self.config.image_grid_pinpoints is None:
            return self._features(pixel_values)
        assert image_sizes is not None
        vision: Any = self.config.vision_config
        pinpoints, size = self.config.image_grid_pinpoints, vision.image_size
        numbers = [1] * len(image_sizes) if batch_num_images is None else batch_num_images.tolist()
        is_alone = [number == 1 for number in numbers for _ in range(number)]
        counts = [
            image_size_to_num_patches(each.tolist(), pinpoints, size) if alone else 1
            for each, alone in zip(image_sizes, is_alone, strict=True)
        ]
        every = torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])
        tiles = self._pooled(self._features(every)).split(counts)
        return torch.cat([self._packed(each, size) for each, size in zip(tiles, image_sizes.tolist(), strict=True)])

    def _pooled(self, tiles: Tensor) -> Tensor:
        """Return the features of tiles [tiles, positions, hidden], interpolated to fewer positions."""
        factor, side = self.config.image_pooling, math.isqrt(tiles.shape[1])
        if factor == 1:
            return tiles
        grid = tiles.transpose(1, 2).unflatten(2, (side, side))
        return interpolate(grid, size=[math.ceil(side / factor)] * 2, mode="bilinear").flatten(2).transpose(1, 2)

    def _packed(self, tiles: Tensor, size: list[int]) -> Tensor:
        """Return the positions of an image [positions, hidden] from those of the whole and its tiles.

        Args:
            tiles: features [1 + tiles, positions, hidden].
            size: original height and width of the image.
        """
        whole, newline = tiles[0], self.image_newline.to(tiles)
        if len(tiles) == 1:
            return torch.cat([whole, newline[None]])
        side, config, vision = math.isqrt(tiles.shape[1]), self.config, cast(Any, self.config.vision_config)
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        grid = tiles[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))  # [rows, columns, side, side, hidden]
        grid = unpad_image(grid.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), size)  # [hidden, height, width]
        height, width = grid.shape[1:]
        factor = 0.0 if config.max_tiles is None else math.sqrt(height * width / (config.max_tiles * side**2))
        if factor > TOLERANCE:
            grid = interpolate(grid[None], [int(height // factor), int(width // factor)], mode="bilinear")[0]
        grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
        return torch.cat([whole, grid.flatten(1).T])

    def _features(self, pixel_values: Tensor) -> Tensor:
        """Return the projected features of images or tiles [images, positions, hidden]."""
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
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        image_features: Tensor | None = None,
        **given: Any,
    ) -> BaseModelOutput:
        """Return the final states; see :meth:`LlavaDiffusion.forward`."""
        h = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self.features(pixel_values, image_sizes, batch_num_images)
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

    def encoded(
        self,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        **prompt: Any,
    ) -> dict[str, Any]:
        """Return a prompt's inputs apart from its tokens, with images encoded once for all passes.

        Args:
            pixel_values: images; see :meth:`LlavaDiffusionModel.features`. None for a prompt without images.
            image_sizes: their original sizes, if they are cut into tiles.
            batch_num_images: number of images in each row.
            prompt: the other inputs.
        """
        if pixel_values is None:
            return prompt
        return prompt | {"image_features": self.model.features(pixel_values, image_sizes, batch_num_images)}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
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
            pixel_values: the images, in the order of their placeholders; see :meth:`LlavaDiffusionModel.features`.
            image_sizes: their original sizes, if they are cut into tiles.
            batch_num_images: number of images in each row.
            image_features: instead of images, their features from :meth:`encoded`.
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
            image_sizes=image_sizes,
            batch_num_images=batch_num_images,
            image_features=image_features,
            position_ids=position_ids,
            **given,
        )
        states = out.last_hidden_state if logits_to_keep is None else out.last_hidden_state[:, logits_to_keep]
        return MaskedLMOutput(logits=self.get_output_embeddings()(states), hidden_states=out.hidden_states)
