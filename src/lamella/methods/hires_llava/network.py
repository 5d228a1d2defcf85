"""A LLaVA-type model that processes an image as slices: transformers' own model with the modules of HiRes-LLaVA.

    image --slicing--> tiles --tower, with SliceRestore in some layers--> features --sampler--> projector--+
                                                                                                            |
    [ view ... view END | cell cell cell END | cell cell cell END | where is the cup ? ] -> language model -> answer

The processor computes the number of tokens of an image; ``generate`` and training are LLaVA's. A checkpoint has
``"model_type": "hires_llava"`` and is loaded by ``lamella.open``, and by transformers once this module is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from lamella.errors import ArchitectureError, MethodError
from lamella.methods.hires_llava.baselines import WINDOWED, LearntQueries
from lamella.methods.hires_llava.modules import SelfMiningSampler, SliceRestore
from lamella.methods.hires_llava.processor import (
    HiResLlavaImageProcessor,
    HiResLlavaProcessor,
    processor_for,
    slicing_of,
)
from lamella.methods.hires_llava.slicing import Slicing, TileLayout
from lamella.stack import register_architecture
from lamella.stack.architectures import ASSEMBLIES
from lamella.stack.entry import Sublayer
from lamella.stack.sublayers import without
from lamella.stack.towers import clip_attn, clip_mlp

SamplerName = Literal["mine", "learnt", "all", "pool", "shuffle", "convolution"]
TOWERS = ("clip_vision_model", "siglip_vision_model")  # supported vision towers
PLACE = "slice_restore"  # attribute of a layer: its adapter


class HiResLlavaConfig(LlavaConfig):
    """LLaVA's config with the settings of the slices.

    Attributes:
        most_slices, overlap, view, order, window: see :class:`lamella.methods.hires_llava.Slicing`.
        restored: the layers of the vision tower with a SliceRestore adapter.
        branches, confined: of the adapters; see :class:`lamella.methods.hires_llava.SliceRestore`.
        sampler: ``mine`` for the paper's, ``all`` for none, or a baseline.
        scope: context of a query of ``mine``.
    """

    model_type = "hires_llava"

    most_slices: int = 16
    overlap: int = 0
    view: str = "whole"
    order: str = "raster"
    window: int = 2
    restored: list[int] | None = None
    branches: str = "both"
    confined: bool = False
    sampler: str = "mine"
    scope: str = "window"


def restored_attn(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Attention with its residual addition, followed by the adapter.

    Args:
        layer: the layer of the vision tower.
        h: hidden states [tiles, tokens, width].
        call: keyword arguments of the layer, with ``slices``.
    """
    h = clip_attn(layer, h, without(call, "slices"))
    network, slices = getattr(layer, PLACE), call.get("slices")
    return h if network is None or slices is None else network(h, slices)


def _forward(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **call: Any) -> Tensor:
    return clip_mlp(layer, restored_attn(layer, hidden_states, {"attention_mask": attention_mask, **call}), call)


@cache
def _restoring(kind: Any) -> Any:
    """Subclass a layer of the vision tower so that it takes the layout of its tiles."""
    return type(f"Restoring{kind.__name__}", (kind,), {"forward": _forward})


class HiResLlavaModel(LlavaModel):
    """Vision tower, sampler, projector and language model, up to the final hidden states."""

    config_class = HiResLlavaConfig

    slicing: Slicing

    def __init__(self, config: HiResLlavaConfig) -> None:
        super().__init__(config)
        self.install()

    def install(self) -> None:
        """Create new modules as the config defines them, replacing existing ones.

        Raises:
            ArchitectureError: for an unsupported vision tower.
            MethodError: for settings that do not fit.
        """
        config: Any = self.config
        tower = config.vision_config
        if tower.model_type not in TOWERS:
            known = " or ".join(TOWERS)
            raise ArchitectureError(f"hires-llava: slices cannot be mixed in a {tower.model_type}: give {known}")
        self.slicing = slicing_of(config)
        restored = _checked(config)
        for number, layer in enumerate(self.layers):
            if not hasattr(layer, PLACE):
                kind: Any = type(layer)
                layer.__class__ = _restoring(kind)
            mixes = SliceRestore(tower.hidden_size, config.branches, confined=config.confined)
            layer.register_module(PLACE, mixes if number in restored else None)
        self.sampler = _sampler(config, self.multi_modal_projector.linear_1.in_features, self.slicing)
        text = config.text_config.hidden_size
        self.row_end, self.view_end = (nn.Parameter(0.02 * torch.randn(text)) for _ in range(2))
        for network in (self.sampler, *(getattr(layer, PLACE) for layer in self.layers)):
            for module in () if network is None else network.modules():
                module._is_hf_initialized = True  # or transformers would re-initialise zero-initialised weights

    @property
    def layers(self) -> Any:
        """The layers of the vision tower."""
        return self.vision_tower.get_submodule("encoder.layers")

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Compute the image tokens for the language model.

        Args:
            pixel_values: views and slices [images, tiles, 3, side, side], padded to the image with most tiles.
            image_sizes: height and width of the images in their grids, in pixels [images, 2].

        Returns:
            ``pooler_output``: for each image [tokens, hidden].

        Raises:
            ArchitectureError: for tiles without sizes, such as those of LLaVA's own processor.
        """
        if image_sizes is None or pixel_values.ndim != 5:
            raise ArchitectureError(
                "hires-llava: pixel_values must be tiles [images, tiles, 3, side, side] with image_sizes: use the "
                "processor saved with the model"
            )
        grids = tuple(self.slicing.known(*size) for size in torch.as_tensor(image_sizes).tolist())
        slices = TileLayout(self.slicing, grids)
        counts = [after - before for before, after in zip(slices.starts, slices.starts[1:], strict=False)]
        tiles = torch.cat([each[:count] for each, count in zip(pixel_values, counts, strict=True)])
        features = self.features(tiles, slices)
        return BaseModelOutputWithPooling(pooler_output=self._read(features, slices))  # type: ignore[arg-type]

    def features(self, tiles: Tensor, slices: TileLayout | None) -> Tensor:
        """Run the vision tower and select the configured layers.

        Args:
            tiles: [tiles, 3, side, side].
            slices: layout of the tiles; None if they are not adjacent.

        Returns:
            [tiles, across, across, features].
        """
        layout = {} if slices is None else {"slices": slices}
        states = self.vision_tower(tiles, output_hidden_states=True, **layout).hidden_states
        chosen: Any = self.config.vision_feature_layer
        h = torch.cat([states[each] for each in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1)
        across = self.slicing.across
        return h[:, h.shape[1] - across**2 :].unflatten(1, (across, across))

    def _read(self, features: Tensor, slices: TileLayout) -> list[Tensor]:
        real = torch.ones(features.shape[:3], dtype=torch.bool)
        for _, tiles, those in slices.groups:
            real[tiles.flatten()] = those.flatten(0, 1)
        cells = self.multi_modal_projector(self.sampler(features, real.to(features.device)))
        whole = cells
        if slices.slicing.view == "whole" and len(slices.views):
            whole = self.multi_modal_projector(features[slices.views.to(features.device)])
        found = []
        for image, grid in enumerate(slices.grids):
            start, end = slices.starts[image] + slices.shown, slices.starts[image + 1]
            read = torch.tensor(slices.slicing.reading(grid), device=cells.device)
            tokens = torch.cat([cells[start:end].flatten(0, 2), self.row_end[None]])[read]  # END is the last one
            if slices.shown:
                view = whole[image] if slices.slicing.view == "whole" else cells[start - 1]
                tokens = torch.cat([view.flatten(0, 1), self.view_end[None], tokens])
            found.append(tokens)
        return found


class HiResLlava(LlavaForConditionalGeneration):
    """Vision-language model for images of any size; called like LLaVA, with ``image_sizes`` beside ``pixel_values``."""

    config_class = HiResLlavaConfig

    def __init__(self, config: HiResLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = HiResLlavaModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class Whole(nn.Module):
    """No sampler: every patch is a token."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Return ``x``."""
        return x


def _sampler(config: Any, width: int, slicing: Slicing) -> nn.Module:
    if config.sampler == "mine":
        return SelfMiningSampler(width, slicing.window, config.scope)
    if config.sampler == "learnt":
        return LearntQueries(width, slicing.cells)
    if config.sampler == "all":
        return Whole()
    if config.sampler not in WINDOWED:
        raise MethodError(
            f"hires-llava: no sampler '{config.sampler}': choose one of {', '.join(get_args(SamplerName))}"
        )
    made: nn.Module = WINDOWED[config.sampler](width, slicing.window)
    return made


def read_layers(config: Any) -> int:
    """Number of layers of the vision tower up to the one whose features the language model uses."""
    count = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    return max(each if each >= 0 else count + 1 + each for each in ([chosen] if isinstance(chosen, int) else chosen))


def _checked(config: Any) -> Sequence[int]:
    """Return the layers with adapters.

    Raises:
        MethodError: for layers that do not exist or come after the features used by the language model, and for
            overlapping slices, which form no map.
    """
    layers, most = config.restored or [], read_layers(config)
    wrong = [each for each in layers if not 0 <= each < most]
    if wrong or len(set(layers)) < len(layers):
        raise MethodError(
            f"hires-llava: adapters in layers {layers}: layers must be different and between 0 and {most - 1}"
        )
    if layers and config.overlap:
        raise MethodError("hires-llava: overlapping slices cannot be mixed: set overlap to 0 or use no adapters")
    return layers


def with_slices(model: Any, processor: Any, seed: int = 0, **settings: Any) -> tuple[HiResLlava, HiResLlavaProcessor]:
    """Convert a LLaVA-type model into one that uses slices, with new modules; the given model is not changed.

    Args:
        model: a model of LLaVA's class, or one that already uses slices, whose weights are kept where their shapes
            match.
        processor: its processor.
        seed: random seed of the new modules.
        settings: fields of :class:`HiResLlavaConfig`.

    Returns:
        The model, with copied weights and in evaluation mode, and its processor.

    Raises:
        ArchitectureError: for another class of model.
        MethodError: for settings that do not fit.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ArchitectureError(f"hires-llava works on models of LLaVA's class; this is a {type(model).__name__}")
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    made: Any = copy.deepcopy(model)
    made.__class__, made.model.__class__ = HiResLlava, HiResLlavaModel
    made.__dict__.pop("_weight_conversions", None)  # by which a LLaVA is written under the names of older ones
    config = HiResLlavaConfig(**values | settings)
    config.vision_config, config.text_config = made.model.vision_tower.config, made.model.language_model.config
    made.config = made.model.config = config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made.model.install()
    made.to(model.device, model.dtype)
    had, fresh = model.state_dict(), made.state_dict()
    fits = {name: each for name, each in had.items() if name in fresh and each.shape == fresh[name].shape}
    made.load_state_dict(fits, strict=False)
    return made.eval(), processor_for(config, processor)


AutoConfig.register("hires_llava", HiResLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(HiResLlavaConfig, HiResLlava, exist_ok=True)
AutoImageProcessor.register(HiResLlavaConfig, image_processor_classes={"torchvision": HiResLlavaImageProcessor},
                            exist_ok=True)  # fmt: skip
AutoProcessor.register(HiResLlavaConfig, HiResLlavaProcessor, exist_ok=True)

_VISION, _TEXT = ASSEMBLIES["llava"].stacks
_ATTN = Sublayer("attn", restored_attn, ("self_attn", "layer_norm1", PLACE), "self_attn.out_proj")
_MLP = Sublayer("mlp", clip_mlp, ("mlp", "layer_norm2"), "mlp.fc2")
register_architecture(
    replace(
        ASSEMBLIES["llava"],
        name="hires_llava",
        stacks=(replace(_VISION, changes={**_VISION.changes, "sublayers": (_ATTN, _MLP)}), _TEXT),  # type: ignore[arg-type, union-attr]
    )
)
