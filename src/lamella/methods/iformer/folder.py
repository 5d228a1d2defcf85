"""Folders written by the commands: a network, the data needed to rebuild it, and its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.errors import CheckpointError, reason_of
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.modules import LayerPlan, LocalAttention
from lamella.methods.iformer.network import StageShape
from lamella.plan.filling import fill
from lamella.reading import parse_json, read_text
from lamella.train import TrainingLog

SCHEMA = "lamella.iformer/1"
NETWORK, LOG, WEIGHTS = "network.json", "log.json", "model.safetensors"
LARGEST = 1 << 14  # pixels on a side


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a network's images; see :class:`~lamella.methods.iformer.vision.Vision`.

    Attributes:
        name: name of the network.
        size: height and width in pixels.
        channels: 1 for greyscale, 3 for colour.
        mean: mean of each channel.
        std: standard deviation of each channel.
        crop: fraction of the image side that is used.
    """

    name: str
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float

    def check(self) -> None:
        """Check that images can be prepared with these values.

        Raises:
            ValueError: for invalid values.
        """
        plain = (*self.mean, *self.std, self.crop)
        if (
            len(self.mean) != self.channels
            or len(self.std) != self.channels
            or not all(0 <= each <= 1 for each in plain)
        ):
            raise ValueError("mean, std and crop of the images are missing or invalid")
        if self.crop < 0.1 or not min(self.std) > 0 or not all(1 <= side <= LARGEST for side in self.size):
            raise ValueError("crop, std or size of the images is out of range")


def with_paths(geometry: Geometry, layers: Sequence[LayerPlan], kernel: int) -> Any:
    """Build a vision transformer with local paths and new weights.

    Args:
        geometry: geometry of the original.
        layers: plan of each layer.
        kernel: side of the convolutions.
    """
    model = geometry.build()
    for layer, block in zip(layers, model.blocks, strict=True):
        if layer.conv:
            block.attn = local(block.attn, geometry, layer, kernel)
    return model


def local(attn: Any, geometry: Geometry, layer: LayerPlan, kernel: int) -> LocalAttention:
    """Build the replacement of an attention, with new weights and with its norms of Q and K.

    Args:
        attn: timm's attention.
        geometry: geometry of the network.
        layer: plan of the layer.
        kernel: side of the convolutions.
    """
    norms = (attn.q_norm, attn.k_norm)
    return LocalAttention(
        geometry.width, attn.head_dim, layer, geometry.grid, prefix=geometry.prefix, kernel=kernel,
        qkv_bias=geometry.qkv_bias, norms=norms,
    )  # fmt: skip


def network(shape: StageShape, size: tuple[int, int], channels: int, classes: int, drop_path: float = 0.0) -> nn.Module:
    """Build an iFormer with new weights, which also works with timm's tools.

    Args:
        shape: its shape.
        size: height and width of the images in pixels.
        channels: channels of the images.
        classes: number of classes.
        drop_path: stochastic depth rate of the last layer.
    """
    from lamella.methods.iformer.backbone import Backbone  # importing timm takes a second

    return Backbone(shape, img_size=size, in_chans=channels, num_classes=classes, drop_path_rate=drop_path)


def ramped(
    document: Mapping[str, Any], weights: dict[str, Tensor], preprocessing: Preprocessing, log: TrainingLog | None
) -> dict[str, Any]:
    """Rebuild a vision transformer with local paths from its document and its weights.

    Args:
        document: the document.
        weights: the weights.
        preprocessing: preprocessing.
        log: training log, if it was healed.

    Returns:
        The fields of the result.

    Raises:
        ValueError: for an invalid document.
    """
    geometry = _strict(Geometry, document["geometry"])
    layers = _strict(tuple[LayerPlan, ...], document["layers"])
    kernel, origin = _strict(int, document["kernel"]), _strict(str, document["origin"])
    geometry.check("it")
    if (geometry.size, geometry.channels) != (preprocessing.size, preprocessing.channels):
        raise ValueError("its geometry is for another image size than its preprocessing")
    if geometry.depth != len(layers) or geometry.depth > len(weights):
        raise ValueError("the number of layers differs from its geometry")
    whole = geometry.width // geometry.heads
    for each in layers:
        kept = sorted(set(each.kept))
        if list(each.kept) != kept or any(not 0 <= head < geometry.heads for head in kept):
            raise ValueError("it keeps heads that do not exist")
        if each.conv != (geometry.heads - len(kept)) * whole:
            raise ValueError("its numbers of heads and channels do not add up")
    with torch.device("meta"):
        model = with_paths(geometry, layers, kernel)
    fill(model, weights, WEIGHTS)
    return {"model": model, "geometry": geometry, "layers": layers, "kernel": kernel, "origin": origin, "log": log}


def classifier(
    document: Mapping[str, Any], weights: dict[str, Tensor], preprocessing: Preprocessing, log: TrainingLog | None
) -> dict[str, Any]:
    """Rebuild a trained iFormer from its document and its weights.

    Args:
        document: the document.
        weights: the weights.
        preprocessing: preprocessing.
        log: training log.

    Returns:
        The fields of the result.

    Raises:
        ValueError: for an invalid document.
    """
    shape, classes = _strict(StageShape, document["shape"]), _strict(int, document["classes"])
    if sum(shape.depths) > len(weights) or classes < 1 or log is None:
        raise ValueError("its sizes do not fit its weights")
    with torch.device("meta"):
        model = network(shape, preprocessing.size, preprocessing.channels, classes)
    fill(model, weights, WEIGHTS)
    return {"model": model, "shape": shape, "classes": classes, "log": log}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"ramped": ramped, "classifier": classifier}


def kind_of(folder: Path) -> str:
    """Read the kind of the network in a folder.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        kind = str(parse_json(read_text(folder / NETWORK))["kind"])
        KINDS[kind]
    except Exception:  # the file may hold anything
        raise CheckpointError(f"{folder}: {NETWORK} is not valid: give a folder written by iformer") from None
    return kind


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], Preprocessing]:
    """Read the network in a folder.

    Args:
        folder: the folder.
        kind: expected kind of network.

    Returns:
        The fields of the result, including ``model``, and the preprocessing.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    try:
        document = parse_json(read_text(folder / NETWORK, "give a folder written by iformer"))
        if not isinstance(document, dict) or (document.get("schema"), document.get("kind")) != (SCHEMA, kind):
            raise ValueError(f"{NETWORK} does not have schema {SCHEMA} and kind {kind}")
        log = TrainingLog.read(folder / LOG) if (folder / LOG).is_file() else None
        preprocessing = _strict(Preprocessing, document["looks"])
        parts = KINDS[kind](document, load_file(folder / WEIGHTS), preprocessing, log)
        preprocessing.check()
        return parts, preprocessing
    except Exception as error:  # each part raises its own error for a damaged file
        reason = reason_of(error)
        raise CheckpointError(f"{folder}: not a network of iformer ({reason}): give a folder written by it") from None


def write_folder(
    folder: Path,
    kind: str,
    model: nn.Module,
    preprocessing: Preprocessing,
    document: Mapping[str, Any],
    log: TrainingLog | None,
) -> None:
    """Write a network with the data needed to read it.

    Args:
        folder: the folder.
        kind: kind of network.
        model: the network.
        preprocessing: preprocessing.
        document: further fields of the document.
        log: training log, if it was trained.
    """
    save_file({name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()},
              folder / WEIGHTS)  # fmt: skip
    content = {"schema": SCHEMA, "kind": kind, "looks": asdict(preprocessing), **document}
    (folder / NETWORK).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if log is not None:
        log.write(folder / LOG)


def _strict(kind: Any, value: Any) -> Any:
    """Validate a value of a document against a type, without conversion."""
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
