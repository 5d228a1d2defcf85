"""The input: a model that is split, its first part on a device and the rest on a server.

    x --h_1--> F_1 --h_2--> ... --h_k--> F_k ~~~ the link ~~~> h_{k+1} ... --> output

A cut is a module behind which the output depends on nothing but what the module gives. That is not believed but tried:
with another x in front and F_k put in its place, the output must be that of x.
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
LARGEST_SIDE = 8192  # pixels of an image that a model reads
Send = Callable[[str, Tensor], Tensor]  # from the name of a cut and what is sent there to what arrives


@dataclass(frozen=True, eq=False)
class Victim(View):
    """A trained model with the places where it may be cut. It is frozen, and in evaluation mode.

    Attributes:
        model: any torch module; its output is a tensor, or has ``logits`` or ``pooler_output``.
        cuts: by name, the path of the module behind which it is cut, in the order in which they run.
        prepare: from pictures to what the model reads.
        name: what to call it.
        seen: digests of the pictures that it was trained on, where they are known: nobody attacks with those.
    """

    source_help = (
        "a transformers model that reads images, CLIP among them, or a timm model, such as its folder; or digits, a "
        "small network that is built in"
    )
    noun = "model that reads images"
    libraries = ("transformers", "timm")
    classes = (PROJECTED,)
    names = (digits.NAME,)
    example = Fixture(digits.NAME)

    model: Any
    cuts: Mapping[str, str]
    prepare: Callable[[Sequence[Captioned]], Tensor]
    name: str = "victim"
    seen: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def built_in(cls, name: str) -> Victim:
        """``digits``, which is trained on scikit-learn's digits when it is first asked for."""
        model, seen = digits.victim()
        return cls(model, digits.CUTS, digits.prepare, name, seen)

    @classmethod
    def of(cls, model: Any) -> Victim:
        """The layers of a transformers model that reads images; of one that writes about them, those of its tower.

        CLIP's tower is cut behind what it has pooled, too, and behind the projection to where texts lie; a timm model
        behind its stages and what it has pooled.

        Raises:
            ArchitectureError: for one that reads no images, or more of them than their pixels.
        """
        model = open_model(model)
        if model.library == "timm":
            return of_timm(model.model, model.name)
        stack = model.stacks.get("vision") or next(iter(model.stacks.values()))
        if stack.architecture.modality != "image":
            raise ArchitectureError(f"{model.name} reads no images: see `lamella run caprecover tokens`")
        whole = len(model.stacks) == 1
        network, layers = (model.model, _path(stack)) if whole else (stack.base, stack.architecture.layers)
        if "pixel_values" not in signature(network.forward).parameters:
            raise ArchitectureError(f"the tower of {model.name} reads more than pixels: give a tower by itself")
        cuts = {f"layers.{layer}": f"{layers}.{layer}" for layer in range(len(stack))}
        if type(network).__name__ == PROJECTED:
            cuts |= {"pooled": "vision_model.post_layernorm", "projected": "visual_projection"}
        return cls(network.eval(), cuts, partial(_processed, _reader(model, stack)), model.name)

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        parameters = sum(each.numel() for each in self.model.parameters())
        return {"name": self.name, "parameters": parameters, "sha256": fingerprint.state(self.model)}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Cuts by their names, all of them where none is named.

        Raises:
            MethodError: for a name that it does not have.
        """
        wrong = next((name for name in names if name not in self.cuts), None)
        if wrong is not None:
            raise MethodError(f"{self.name} has no cut '{wrong}': it has {', '.join(self.cuts)}")
        return list(names) or list(self.cuts)

    def unseen(self, pictures: CaptionedImages) -> list[Captioned]:
        """Those pictures that it was not trained on, as far as is known."""
        return [each for each in pictures.items if not self.seen or digits.digest(each) not in self.seen]

    # Running it

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor:
        """What it says [batch, classes], or what it makes of pictures."""
        return _told(self.model(x.to(self.device))).cpu()

    @torch.no_grad()
    def features(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """What leaves the device at each of these cuts [batch, ...]."""
        seen: dict[str, Tensor] = {}

        def look(name: str, given: Tensor) -> Tensor:
            seen[name] = given.cpu()
            return given

        with self.through(names, look):
            self.model(x.to(self.device))
        return {name: seen[name] for name in names}

    @torch.no_grad()
    def received(self, x: Tensor, names: Sequence[str], link: Send) -> Tensor:
        """What it says when what is sent at these cuts arrives as ``link`` makes it."""
        with self.through(names, link):
            return _told(self.model(x.to(self.device))).cpu()

    @contextmanager
    def through(self, names: Sequence[str], link: Send) -> Iterator[None]:
        """Let what the modules of these cuts give pass through a link."""

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
        """Check that the output depends on what is sent at a cut, and on nothing else of the front.

        Raises:
            ArchitectureError: for a place that is passed by.
        """
        expected = self.output(x)
        scale = float(expected.abs().max()) or 1.0
        for name in names:
            real = self.features(x, [name])[name].to(self.device)
            found = self.received(x.flip(0), [name], partial(_in_place, real))
            if float((found - expected).abs().max()) > SAME * scale:
                raise ArchitectureError(
                    f"{self.name} cannot be cut at {name}: its output reads what comes before, too; choose another"
                )


def _in_place(real: Tensor, name: str, given: Tensor) -> Tensor:
    return real


def _told(out: Any) -> Tensor:
    """The tensor among what a model gives."""
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            found: Tensor = getattr(out, name)
            return found
    first: Tensor = out[0]
    return first


def _path(stack: Stack) -> str:
    """Where the layers of a stack are in its model."""
    return ".".join(filter(None, (stack.architecture.base, stack.architecture.layers)))


def _reader(model: Model, stack: Stack) -> Any:
    """A model's own image processor, or that of a ViT of its size."""
    if model.path is not None and (own := _beside(model.path)) is not None:
        return own
    size = stack.config.image_size
    if type(model.model).__name__ == PROJECTED:
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return ViTImageProcessor(size={"height": size, "width": size})


def _beside(folder: Path) -> Any:
    """The image processor in a model's folder; None where there is none.

    Raises:
        CheckpointError: for one that is damaged, or makes images larger than any model reads.
    """
    if not (folder / PROCESSOR).is_file():
        return None
    try:
        found = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name in ("size", "crop_size", "pad_size"):
            sides = [side for side in dict(getattr(found, name, None) or {}).values() if side is not None]
            if not all(0 < side <= LARGEST_SIDE for side in sides):
                raise ValueError(f"{name} is {sides}; give 1 to {LARGEST_SIDE} pixels")
        _processed(found, [Captioned(np.zeros((8, 8, 3), np.uint8))])
    except Exception as error:  # of a damaged file, anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{folder / PROCESSOR}: no image processor ({reason[:160]}): get the file again"
        ) from None
    return found


def _processed(reader: Any, pictures: Sequence[Captioned]) -> Tensor:
    """Pictures as an image processor makes them."""
    found: Tensor = reader([each.picture for each in pictures], return_tensors="pt")["pixel_values"]
    return found


def of_timm(model: Any, name: str = "victim") -> Victim:
    """The stages of a timm model in memory: those of its features, and what it has pooled.

    Args:
        name: what to call it.
    """
    stages = {each["module"]: each["module"] for each in getattr(model, "feature_info", [])}
    if not stages:
        raise ArchitectureError(f"{type(model).__name__} of timm names no stages: make a Victim of its modules")
    if hasattr(model, "global_pool") and isinstance(model.global_pool, nn.Module):
        stages["pooled"] = "global_pool"
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)  # of a ViT of another size than usual
    asked = {} if sides is None else {"input_size": (3, *sides)}
    data = require("timm.data", "vision", "scaling pictures")
    transform = data.create_transform(**data.resolve_data_config(asked, model=model))
    image = require("PIL.Image", "vision", "scaling pictures")

    def prepare(pictures: Sequence[Captioned]) -> Tensor:
        return torch.stack([transform(image.fromarray(each.picture)) for each in pictures])

    return Victim(model.eval(), stages, prepare, name)
