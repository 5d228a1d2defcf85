"""Models of timm and torchvision, by name or from a folder written by timm.

A model is created from the installed library's registry, with random weights or those of a safetensors file. Nothing is
downloaded, and nothing in a folder is executed.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from lamella.errors import ArchitectureError, CheckpointError, MethodError, reason_of
from lamella.extras import require
from lamella.needs import current_recorder
from lamella.plan.checkpoint import SINGLE, read_header, read_json
from lamella.plan.filling import at_most, fill, load_network
from lamella.zoo.configs import CONFIG

LARGEST = 1 << 14  # of the numbers among the arguments of a timm model
MOST_CLASSES = 1 << 20
TEXTS = ("act_layer", "global_pool", "norm_layer")  # names among the arguments of a timm model
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
_NAME = re.compile(r"(timm|torchvision):([^@]*)(?:@(.+))?", re.DOTALL)


class LibraryName(NamedTuple):
    """A model by its name in a library, such as ``timm:resnet18`` or ``torchvision:resnet18@weights.safetensors``."""

    library: str
    name: str
    weights: Path | None


def parse_name(model: str | Path) -> LibraryName | None:
    """Return the parts of ``LIBRARY:NAME`` or ``LIBRARY:NAME@FILE``; None for anything else.

    Raises:
        CheckpointError: for weights that are missing, or not a safetensors file.
    """
    match = _NAME.fullmatch(str(model))
    if match is None:
        return None
    library, name, file = match.groups()
    weights = None if file is None else Path(file).expanduser()
    if weights is not None and (weights.suffix != ".safetensors" or not weights.is_file()):
        raise CheckpointError(f"{file} is not a safetensors file, as needed for the weights of {library}:{name}")
    return LibraryName(library, name, weights)


def build_named(model: LibraryName) -> nn.Module:
    """Return a model by its name, in evaluation mode: with random weights, or those of its file.

    Raises:
        ArchitectureError: for a model that the library does not have.
        CheckpointError: for weights of another model.
        LamellaError: if the library is not installed.
    """
    build = {"timm": _timm_builder, "torchvision": _torchvision_builder}[model.library](model.name)
    if model.weights is not None:
        return load_network(build, model.weights)
    with nullcontext() if current_recorder() is None else init_empty_weights():
        return build().eval()


def _timm_builder(name: str) -> Callable[[], nn.Module]:
    timm = require("timm", "vision", "a model of timm")
    if not timm.is_model(name):  # also excludes names that make timm download or execute something
        raise _unknown("timm", name, timm.list_models())
    return partial(timm.create_model, name, pretrained=False)


def _torchvision_builder(name: str) -> Callable[[], nn.Module]:
    models = require("torchvision.models", "vision", "a model of torchvision")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    build = models.get_model_builder(name)
    weights = [each for each in ("weights", "weights_backbone") if each in inspect.signature(build).parameters]
    return partial(build, **dict.fromkeys(weights))  # the default of a backbone's weights is to download them


def _unknown(library: str, name: str, known: Collection[str]) -> ArchitectureError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else f": give one that it has, such as {min(known)}"
    return ArchitectureError(f"{library} has no model '{name}'{hint}")


def open_timm(folder: Path) -> nn.Module:
    """Return the model in a folder with the layout of timm's models on the hub, in evaluation mode.

    Of its ``config.json``, only the model's name, its sizes and its image preprocessing are used, and nothing that
    would make timm download or execute anything.

    Raises:
        CheckpointError: for a folder that is damaged, or a config that does not fit the weights.
        LamellaError: if timm is not installed.
    """
    timm = require("timm", "vision", "a model of timm")
    file = folder / SINGLE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {SINGLE}: give a timm model with safetensors weights")
    try:
        config = read_json(folder / CONFIG)
        name, arguments = config["architecture"], config.get("model_args") or {}
        if not isinstance(name, str) or not timm.is_model(name):
            raise ValueError(f"timm has no model '{name}'")
        wrong = next((key for key, value in arguments.items() if not _is_argument(key, value)), None)
        if wrong is not None:
            raise ValueError(f"its {wrong} is not a valid size")
        images = config.get("pretrained_cfg", config)  # older configs have them at the top level
        images = {key: images[key] for key in _IMAGES if images.get(key) is not None}
        wrong = next((key for key, value in images.items() if not _IMAGES[key](value)), None)
        if wrong is not None:
            raise ValueError(f"its {wrong} is out of range")
        if "num_classes" in config:
            if type(config["num_classes"]) is not int or not 0 <= config["num_classes"] <= MOST_CLASSES:
                raise ValueError("its num_classes is out of range")
            arguments = arguments | {"num_classes": config["num_classes"]}
        limit = 2 * len(read_header(file))  # a model may replace parts of itself while it is built

        def build() -> nn.Module:
            with at_most(limit, folder / CONFIG):
                return timm.create_model(name, pretrained=False, pretrained_cfg_overlay=images, **arguments)

        return load_network(build, file)
    except Exception as error:  # a damaged config can cause errors of any type in timm
        raise CheckpointError(
            f"{folder}: not a timm model ({reason_of(error)}): give a folder written by timm"
        ) from None


def timm_features(name: str, weights: Path | None = None, *, pretrained: bool = False) -> Any:
    """Return a timm network that outputs the feature maps of its stages.

    Args:
        name: of the network.
        weights: a safetensors file with the weights of the whole network, or of its stages; random by default.
        pretrained: use the weights that timm downloads.

    Raises:
        MethodError: for a network that timm does not have, or that has no stages.
        CheckpointError: for weights of another network.
        LamellaError: if timm is not installed.
    """
    timm = require("timm", "vision", "a network of timm")
    if not timm.is_model(name):  # also excludes names that make timm download or execute something
        raise MethodError(f"timm has no network '{name}': give one that it has (timm.list_models() in Python)")
    try:
        network = timm.create_model(name, features_only=True, pretrained=pretrained)
    except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
        raise MethodError(f"{name} has no feature maps of stages ({error}): choose another network") from None
    if weights is not None:
        try:
            stored = load_file(weights)
            # timm renames stages.0 to stages_0 in feature extractors
            whole = {each: each if each in stored else each.replace("_", ".", 1) for each in network.state_dict()}
            fill(network, {each: stored[key] for each, key in whole.items() if key in stored}, weights.name)
        except Exception as error:  # a damaged file can cause errors of several types
            raise CheckpointError(
                f"{weights}: not weights of {name} ({reason_of(error)}): give its weights, as safetensors"
            ) from None
    return network


def _is_argument(key: str, value: Any) -> bool:
    """Return whether an argument of a timm model is a value or list of values in range, a switch or an allowed name."""
    if isinstance(value, list):
        return len(value) <= 64 and all(_is_between(each, 0, LARGEST) for each in value)
    is_name = isinstance(value, str) and key in TEXTS
    return value is None or isinstance(value, bool) or is_name or _is_between(value, 0, LARGEST)


def _is_between(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and least <= value <= most


def _are_between(values: Any, least: float, most: float) -> bool:
    return isinstance(values, list) and 0 < len(values) <= 64 and all(_is_between(each, least, most) for each in values)


_IMAGES: dict[str, Callable[[Any], bool]] = {  # image preprocessing, with timm's names and the valid values
    "input_size": lambda value: _are_between(value, 1, LARGEST) and len(value) == 3,
    "mean": lambda value: _are_between(value, 0, 1),
    "std": lambda value: _are_between(value, 1e-6, 1),
    "interpolation": lambda value: value in INTERPOLATIONS,
    "crop_pct": lambda value: _is_between(value, 0.1, 1.2),
}
