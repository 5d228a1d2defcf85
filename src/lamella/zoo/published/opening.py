"""Opening a folder in a published layout: its config, weights, tokenizer and processor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor

from lamella.plan import checkpoint
from lamella.plan.filling import fill
from lamella.stack import own_class
from lamella.zoo.published import llava, ofa
from lamella.zoo.published.layout import PublishedLayout

LAYOUTS: dict[str, PublishedLayout] = llava.LAYOUTS | ofa.LAYOUTS  # by the model type in the published config


def is_published(place: Path | str) -> bool:
    """Return whether a folder has one of the layouts of this package.

    Args:
        place: a folder or a hub id.
    """
    if not isinstance(place, Path) or not (place / "config.json").is_file():
        return False
    return _model_type(place) in LAYOUTS


def renamed(name: str, model_type: str) -> str | None:
    """Return what the class that opens a model calls a tensor; None if it does not need the tensor.

    Args:
        name: the published name.
        model_type: the published type of the model.
    """
    for pattern, ours in LAYOUTS[model_type].names.items():
        if re.search(pattern, name):
            return None if ours is None else re.sub(pattern, ours, name)
    return name


def open_weights(place: Path, config: Any, dtype: Any) -> Any:
    """Return the model in a folder.

    Args:
        place: the folder. Without safetensors its pickles are read, by torch's loader for tensors only.
        config: its config; see :func:`config_of`.
        dtype: the precision of its weights.

    Raises:
        CheckpointError: for a tensor that is missing, unknown, or of another shape.
    """
    with init_empty_weights():
        model = own_class(config.model_type)(config)
    model.tie_weights()
    kind = _model_type(place)
    named = ((renamed(name, kind), each) for name, each in _stored(place))
    tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in named if name is not None}
    fill(model, tensors, place).tie_weights()
    return model


def config_of(place: Path) -> Any:
    """Return the config of the model in a folder.

    Args:
        place: the folder.

    Raises:
        CheckpointError: for settings that no published checkpoint has.
    """
    return _layout(place).config_of(place)


def open_tokens(place: Path) -> Any:
    """Return the tokenizer of a folder, with the placeholder of an image.

    Args:
        place: the folder.
    """
    return _layout(place).open_tokens(place)


def open_processing(place: Path) -> Any:
    """Return the processor of a folder.

    Args:
        place: the folder.
    """
    return _layout(place).open_processing(place)


def _stored(place: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a folder with their published names."""
    if checkpoint.is_safetensors(place):
        for file in sorted({each.file for each in checkpoint.read(place).tensors}):
            yield from load_file(file).items()
    else:
        for file in sorted(place.glob("pytorch_model*.bin")):
            yield from torch.load(file, map_location="cpu", weights_only=True).items()


def _layout(place: Path) -> PublishedLayout:
    return LAYOUTS[_model_type(place)]


def _model_type(place: Path) -> str:
    return str(checkpoint.read_json(place / "config.json").get("model_type"))  # a damaged config may hold anything
