"""Processors of a model that uses slices: they make tiles and compute the number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, CLIPImageProcessor, LlavaProcessor
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

from lamella.errors import MethodError
from lamella.methods.hires_llava.slicing import Slicing, make_tiles


def slicing_of(config: Any) -> Slicing:
    """Read the slicing of a model from its config."""
    tower = config.vision_config
    window = 1 if config.sampler == "all" else config.window
    return Slicing(
        tower.image_size, tower.patch_size, config.most_slices, config.overlap, config.view, window, config.order
    )


OURS = ("most_slices", "overlap", "view", "order", "window", "patch_size")


class HiResImagesKwargs(ImagesKwargs, total=False):
    """Keyword arguments of the image processor."""

    most_slices: int
    overlap: int
    view: str
    order: str
    window: int
    patch_size: int


class HiResLlavaImageProcessor(CLIPImageProcessor):
    """Image processor that makes tiles; see :mod:`lamella.methods.hires_llava.slicing`. ``size`` is that of a slice."""

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012, as transformers has it
    valid_kwargs = HiResImagesKwargs

    most_slices = 16
    overlap = 0
    view = "whole"
    order = "raster"
    window = 2
    patch_size = 14

    @property
    def slicing(self) -> Slicing:
        """How images are cut."""
        order: Any = self.order
        view: Any = self.view
        side = self.size["height"]
        return Slicing(side, self.patch_size, self.most_slices, self.overlap, view, self.window, order)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Tensor],
        *,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any,
        **options: Any,
    ) -> BatchFeature:
        other = next((name for name in OURS if options[name] != getattr(self, name)), None)
        if other is not None:
            raise MethodError(f"hires-llava: {other} is fixed by the model: create another model to change it")
        slicing = self.slicing
        mean: Any = tuple(image_mean)  # hashed
        std: Any = tuple(image_std)
        fill = [255 * each for each in mean] if do_rescale else mean

        def resize(image: Tensor, height: int, width: int) -> Tensor:
            return self.resize(image[None], SizeDict(height=height, width=width), resample=resample)[0]

        tiles, sizes = [], []
        for image in images:
            made, grid = make_tiles(image, slicing, resize, fill)
            tiles.append(self.rescale_and_normalize(made, do_rescale, rescale_factor, do_normalize, mean, std))
            sizes.append([grid.height, grid.width])
        pixels = nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        return BatchFeature({"pixel_values": pixels, "image_sizes": sizes}, tensor_type=return_tensors)


class HiResLlavaProcessor(LlavaProcessor):
    """LLaVA's processor, which inserts as many placeholders as an image of this size has tokens."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """Return the placeholder tokens of one image as text.

        Args:
            image_inputs: output of the image processor.
            image_idx: index of the image in the batch.
        """
        height, width = torch.as_tensor(image_inputs["image_sizes"][image_idx]).tolist()
        marks: str = self.image_token * self.image_processor.slicing.tokens(height, width)
        return marks


def processor_for(config: Any, like: Any) -> HiResLlavaProcessor:
    """Create the processor of a model with the normalisation and the tokenizer of another processor.

    Args:
        config: config of the model.
        like: the other processor.
    """
    slicing = slicing_of(config)
    side = {"height": slicing.side, "width": slicing.side}
    settings: dict[str, Any] = {
        "patch_size": slicing.patch, "most_slices": slicing.most, "overlap": slicing.overlap, "view": slicing.view,
        "order": slicing.order, "window": slicing.window,
    }  # fmt: skip
    settings |= {name: getattr(like.image_processor, name) for name in ("image_mean", "image_std", "resample")}
    images = HiResLlavaImageProcessor(size=side, crop_size=side, **settings)
    return HiResLlavaProcessor(
        images, like.tokenizer, patch_size=slicing.patch, chat_template=getattr(like, "chat_template", None),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )  # fmt: skip
