"""The input: a model that is split between a device and a server.

    x --h_1--> F_1 --h_2--> ... --h_k--> F_k ~~~ the link ~~~> h_{k+1} ... --> output

A cut is a module such that the rest of the model depends only on its output. This is verified: with another x in front
and F_k inserted, the output must be that of the original x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPImageProcessor, ViTImageProcessor

from lamella.data import Captioned, CaptionedImages
from lamella.errors import ArchitectureError, CheckpointError, MethodError
from lamella.extras import require
from lamella.methods.caprecover import digits
from lamella.plan import fingerprint
from lamella.signature import Fixture
from lamella.stack import PROJECTED, Model, Stack
from lamella.zoo import open_model
from lamella.zoo.views import View

PROCESSOR, SAME = "preprocessor_config.json", 1e-5
LARGEST_SIDE = 8192  # maximum image size in pixels
Send = Callable[[str, Tensor], Tensor]  # from the name of a cut and transmitted features to received features


@dataclass(frozen=True, eq=False)
class Victim(View):
    """A trained model with its possible cuts, frozen and in evaluation mode.

    Attributes:
        model: any torch module; its output is a tensor, or has ``logits`` or ``pooler_output``.
        cuts: path of the module after which the model is cut, by name of the cut, in order of execution.
        prepare: converts images to the model's input.
        name: name of the model, for messages.
        training_digests: digests of its known training images, which are excluded from the audit.
    """

    source_help = (
        "a vision model of transformers (including CLIP) or timm, such as its folder; or `digits`, a small built-in "
        "network"
    )
    noun = "vision model"
    libraries = ("transformers", "timm")
    classes = (PROJECTED,)
    names = (digits.NAME,)
    example = Fixture(digits.NAME)

    model: Any
    cuts: Mapping[str, str]
    prepare: Callable[[Sequence[Captioned]], Tensor]
    name: str = "victim"
    training_digests: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def built_in(cls, name: str) -> Victim:
        """Return ``digits``, which is trained on scikit-learn's digits at first use."""
        model, features = digits.victim()
        return cls(model, digits.CUTS, digits.prepare, name, features)

    @classmethod
    def of(cls, model: Any) -> Victim:
        """Create a victim whose cuts are the layers of a vision model, or of the vision tower of a multimodal model.

        CLIP's vision tower can also be cut after pooling and after the projection; a timm model after its stages and
        after pooling.

        Args:
            model: the model.

        Raises:
            ArchitectureError: if the model takes no images, or other inputs beside pixels.
        """
        model = open_model(model)
        if model.library == "timm":
            return of_timm(model.model, model.name)
        stack = model.stacks.get("vision") or next(iter(model.stacks.values()))
        if stack.architecture.modality != "image":
            raise ArchitectureError(f"{model.name} takes no images: see `lamella run caprecover tokens`")
        whole = len(model.stacks) == 1
        network, layers = (model.model, _path(stack)) if whole else (stack.base, stack.architecture.layers)
        if "pixel_values" not in signature(network.forward).parameters:
            raise ArchitectureError(
                f"the vision tower of {model.name} takes other inputs beside pixels: give a vision model by itself"
            )
        cuts = {f"layers.{layer}": f"{layers}.{layer}" for layer in range(len(stack))}
        if type(network).__name__ == PROJECTED:
            cuts |= {"pooled": "vision_model.post_layernorm", "projected": "visual_projection"}
        return cls(network.eval(), cuts, partial(_preprocess, _image_processor(model, stack)), model.name)

    def describe(self) -> dict[str, Any]:
        """Return the provenance of the model."""
        parameters = sum(each.numel() for each in self.model.parameters())
        return {"name": self.name, "parameters": parameters, "sha256": fingerprint.state(self.model)}

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device

    def select_cuts(self, names: Sequence[str]) -> list[str]:
        """Return cuts by name, or all cuts if no name is given.

        Raises:
            MethodError: for an unknown name.
        """
        wrong = next((name for name in names if name not in self.cuts), None)
        if wrong is not None:
            raise MethodError(f"{self.name} has no cut '{wrong}': it has {', '.join(self.cuts)}")
        return list(names) or list(self.cuts)

    def unseen(self, images: CaptionedImages) -> list[Captioned]:
        """Return the images that are not known to be training images of the model."""
        return [
            each
            for each in images.items
            if not self.training_digests or digits.digest(each) not in self.training_digests
        ]

    # Execution

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor:
        """Return the output of the model [batch, classes] or [batch, width]."""
        return _output_tensor(self.model(x.to(self.device))).cpu()

    @torch.no_grad()
    def features(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the features at each of these cuts [batch, ...].

        Args:
            x: preprocessed images.
            names: names of the cuts.
        """
        features: dict[str, Tensor] = {}
        self.pass_features(x, names, features.__setitem__)
        return {name: features[name] for name in names}

    @torch.no_grad()
    def pass_features(self, x: Tensor, names: Sequence[str], receive: Callable[[str, Tensor], None]) -> None:
        """Pass the features at each of these cuts to a function as soon as they are computed, and keep none.

        Args:
            x: preprocessed images.
            names: names of the cuts.
            receive: function of the name of a cut and its features [batch, ...].
        """

        def look(name: str, values: Tensor) -> Tensor:
            receive(name, values.cpu())
            return values

        with self.through(names, look):
            self.model(x.to(self.device))

    @torch.no_grad()
    def output_through(self, x: Tensor, names: Sequence[str], link: Send) -> Tensor:
        """Return the output when the features at these cuts pass through ``link``.

        Args:
            x: preprocessed images.
            names: names of the cuts.
            link: function from cut and features to the received features.
        """
        with self.through(names, link):
            return _output_tensor(self.model(x.to(self.device))).cpu()

    @contextmanager
    def through(self, names: Sequence[str], link: Send) -> Iterator[None]:
        """Pass the outputs of the modules at these cuts through a link, within the context.

        Args:
            names: names of the cuts.
            link: function from the name of a cut and its features to the received features.
        """

        def sent(name: str, module: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, Tensor):
                return link(name, out)
            return (link(name, out[0]), *out[1:])

        hooks = [self.model.get_submodule(self.cuts[name]).register_forward_hook(partial(sent, name)) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def check_cuts(self, x: Tensor, names: Sequence[str]) -> None:
        """Check that the output depends on the features at each cut and on nothing else before it.

        Args:
            x: preprocessed images.
            names: names of the cuts.

        Raises:
            ArchitectureError: for a cut that is bypassed.
        """
        expected = self.output(x)
        scale = float(expected.abs().max()) or 1.0
        for name in names:
            real = self.features(x, [name])[name].to(self.device)
            found = self.output_through(x.flip(0), [name], partial(_in_place, real))
            if float((found - expected).abs().max()) > SAME * scale:
                raise ArchitectureError(
                    f"{self.name} cannot be cut at {name}: later layers use earlier features too; choose another cut"
                )


def _in_place(real: Tensor, name: str, values: Tensor) -> Tensor:
    return real


def _output_tensor(out: Any) -> Tensor:
    """Return the output tensor of a model's output."""
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            found: Tensor = getattr(out, name)
            return found
    first: Tensor = out[0]
    return first


def _path(stack: Stack) -> str:
    """Return the path of a stack's layers in its model."""
    return ".".join(filter(None, (stack.architecture.base, stack.architecture.layers)))


def _image_processor(model: Model, stack: Stack) -> Any:
    """Return a model's own image processor, or that of a ViT of its size."""
    if model.path is not None and (own := _saved_processor(model.path)) is not None:
        return own
    size = stack.config.image_size
    if type(model.model).__name__ == PROJECTED:
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return ViTImageProcessor(size={"height": size, "width": size})


def _saved_processor(folder: Path) -> Any:
    """Load the image processor in a model's folder; None if there is none.

    Raises:
        CheckpointError: if it is damaged, or produces images larger than any model takes.
    """
    if not (folder / PROCESSOR).is_file():
        return None
    try:
        found = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name in ("size", "crop_size", "pad_size"):
            sides = [side for side in dict(getattr(found, name, None) or {}).values() if side is not None]
            if not all(0 < side <= LARGEST_SIDE for side in sides):
                raise ValueError(f"{name} is {sides}; give 1 to {LARGEST_SIDE} pixels")
        _preprocess(found, [Captioned(np.zeros((8, 8, 3), np.uint8))])
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{folder / PROCESSOR}: not a valid image processor ({reason[:160]}): get the file again"
        ) from None
    return found


def _preprocess(processor: Any, images: Sequence[Captioned]) -> Tensor:
    """Preprocess images with an image processor."""
    found: Tensor = processor([each.image for each in images], return_tensors="pt")["pixel_values"]
    return found


def of_timm(model: Any, name: str = "victim") -> Victim:
    """Create a victim from a timm model in memory, with its stages and the pooled features as cuts.

    Args:
        model: the timm model.
        name: its name, for messages.
    """
    stages = {each["module"]: each["module"] for each in getattr(model, "feature_info", [])}
    if not stages:
        raise ArchitectureError(
            f"the timm model {type(model).__name__} defines no stages: construct Victim with the paths of its modules"
        )
    if hasattr(model, "global_pool") and isinstance(model.global_pool, nn.Module):
        stages["pooled"] = "global_pool"
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)  # a ViT with a non-default image size
    attended = {} if sides is None else {"input_size": (3, *sides)}
    data = require("timm.data", "vision", "scaling images")
    transform = data.create_transform(**data.resolve_data_config(attended, model=model))
    image = require("PIL.Image", "vision", "scaling images")

    def prepare(images: Sequence[Captioned]) -> Tensor:
        return torch.stack([transform(image.fromarray(each.image)) for each in images])

    return Victim(model.eval(), stages, prepare, name)
