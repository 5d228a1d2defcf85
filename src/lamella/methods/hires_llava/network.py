"""A model of LLaVA's kind that reads an image as slices: transformers' own, with what HiRes-LLaVA puts into it.

    image --slicing--> tiles --tower, with SliceRestore in some layers--> features --sampler--> projector--\\
                                                                                                           text
    [ view ... view END | cell cell cell END | cell cell cell END | where is the cup ? ] -> language model -> answer

The processor counts the positions that an image takes, ``generate`` and training are LLaVA's. A checkpoint says
``"model_type": "hires_llava"`` and is opened by ``lamella.open``, and by transformers once this module is imported.
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
from lamella.methods.hires_llava.slicing import Slices, Slicing
from lamella.stack import register_architecture
from lamella.stack.architectures import ASSEMBLIES
from lamella.stack.entry import Sublayer
from lamella.stack.sublayers import without
from lamella.stack.towers import clip_attn, clip_mlp

SamplerName = Literal["mine", "learnt", "all", "pool", "shuffle", "convolution"]
TOWERS = ("clip_vision_model", "siglip_vision_model")  # whose layers are known
PLACE = "slice_restore"  # of a layer: the network in it


class HiResLlavaConfig(LlavaConfig):
    """LLaVA's config, and what is done to slices.

    Attributes:
        most_slices, overlap, view, order, window: see :class:`lamella.methods.hires_llava.Slicing`.
        restored: the layers of the tower with a SliceRestore adapter.
        branches, confined: of these; see :class:`lamella.methods.hires_llava.SliceRestore`.
        sampler: ``mine`` for the paper's, ``all`` for none, or a baseline.
        scope: what a query of ``mine`` sees.
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
    """Attention with its residual addition, and behind it what mixes the slices."""
    h = clip_attn(layer, h, without(call, "slices"))
    network, slices = getattr(layer, PLACE), call.get("slices")
    return h if network is None or slices is None else network(h, slices)


def _forward(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **call: Any) -> Tensor:
    return clip_mlp(layer, restored_attn(layer, hidden_states, {"attention_mask": attention_mask, **call}), call)


@cache
def _restoring(kind: Any) -> Any:
    """A layer of the tower that is told where its tiles lie."""
    return type(f"Restoring{kind.__name__}", (kind,), {"forward": _forward})


class HiResLlavaModel(LlavaModel):
    """Tower, sampler, projector and language model, up to the final states."""

    config_class = HiResLlavaConfig

    slicing: Slicing

    def __init__(self, config: HiResLlavaConfig) -> None:
        super().__init__(config)
        self.install()

    def install(self) -> None:
        """Put fresh networks where the config says, in the place of those that are there.

        Raises:
            ArchitectureError: for a tower whose layers are not known.
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
                module._is_hf_initialized = True  # or transformers would draw what begins at zero

    @property
    def layers(self) -> Any:
        """Of the tower."""
        return self.vision_tower.get_submodule("encoder.layers")

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """What the language model reads of each image.

        Args:
            pixel_values: views and slices [images, tiles, 3, side, side]; what an image has fewer of is not read.
            image_sizes: height and width of the images in their grids, in pixels [images, 2].

        Returns:
            ``pooler_output``: of each image [tokens, hidden].

        Raises:
            ArchitectureError: for tiles without sizes, as of LLaVA's own processor.
        """
        if image_sizes is None or pixel_values.ndim != 5:
            raise ArchitectureError(
                "hires-llava: pixel_values are tiles [images, tiles, 3, side, side] with image_sizes: use the "
                "processor that lies beside the model"
            )
        grids = tuple(self.slicing.known(*size) for size in torch.as_tensor(image_sizes).tolist())
        slices = Slices(self.slicing, grids)
        counts = [after - before for before, after in zip(slices.starts, slices.starts[1:], strict=False)]
        tiles = torch.cat([each[:count] for each, count in zip(pixel_values, counts, strict=True)])
        features = self.features(tiles, slices)
        return BaseModelOutputWithPooling(pooler_output=self._read(features, slices))  # type: ignore[arg-type]

    def features(self, tiles: Tensor, slices: Slices | None) -> Tensor:
        """What the tower makes of tiles, on the layers that the config names [tiles, across, across, features].

        Args:
            tiles: [tiles, 3, side, side].
            slices: where they lie; None: nowhere beside each other.
        """
        given = {} if slices is None else {"slices": slices}
        states = self.vision_tower(tiles, output_hidden_states=True, **given).hidden_states
        chosen: Any = self.config.vision_feature_layer
        h = torch.cat([states[each] for each in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1)
        across = self.slicing.across
        return h[:, h.shape[1] - across**2 :].unflatten(1, (across, across))

    def _read(self, features: Tensor, slices: Slices) -> list[Tensor]:
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
    """Writes text about images of any size; called as LLaVA is, with ``image_sizes`` beside ``pixel_values``."""

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
    """How many layers of the tower there are up to where the language model reads."""
    count = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    return max(each if each >= 0 else count + 1 + each for each in ([chosen] if isinstance(chosen, int) else chosen))


def _checked(config: Any) -> Sequence[int]:
    """The layers with adapters.

    Raises:
        MethodError: for one that there is not, or behind what the language model reads; and for slices that overlap,
            which make no map.
    """
    layers, most = config.restored or [], read_layers(config)
    wrong = [each for each in layers if not 0 <= each < most]
    if wrong or len(set(layers)) < len(layers):
        raise MethodError(f"hires-llava: adapters in layers {layers}: give different ones from 0 to {most - 1}")
    if layers and config.overlap:
        raise MethodError("hires-llava: slices that overlap make no map to be mixed: leave overlap or restored out")
    return layers


def sliced(model: Any, processor: Any, seed: int = 0, **settings: Any) -> tuple[HiResLlava, HiResLlavaProcessor]:
    """A model of LLaVA's kind that reads slices, whose new networks are fresh; nothing of the given one changes.

    Args:
        model: of LLaVA's class, or one that reads slices already, of which it takes what still fits.
        processor: its own.
        seed: of the fresh networks.
        settings: of :class:`HiResLlavaConfig`.

    Returns:
        The model, whose weights are copies, in evaluation mode, and its processor.

    Raises:
        ArchitectureError: for another kind of model.
        MethodError: for settings that do not fit.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ArchitectureError(f"hires-llava works on models of LLaVA's class; this is a {type(model).__name__}")
    said = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        said.pop(name, None)
    made: Any = copy.deepcopy(model)
    made.__class__, made.model.__class__ = HiResLlava, HiResLlavaModel
    made.__dict__.pop("_weight_conversions", None)  # by which a LLaVA is written under the names of older ones
    config = HiResLlavaConfig(**said | settings)
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
