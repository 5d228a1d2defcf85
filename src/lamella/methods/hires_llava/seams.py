"""Measure how far slices diverge layer by layer, and where an adapter helps most.

    s(l) = mean 1 - cos of neighbours across a seam  -  mean 1 - cos of neighbours inside a slice

Because slices are encoded separately, s rises: neighbours on both sides of a seam diverge. Adapters are placed in the
layers whose attention increases s most; all adapters have one size. A linear probe is a second measurement: how well
the class of an object is recognised from its own patches, for objects on a seam and objects inside a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lamella.data.images import Image
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.methods.hires_llava.entities import CUTS, RADIUS, EntityQuestion, middle
from lamella.methods.hires_llava.network import HiResLlava, HiResLlavaProcessor, read_layers
from lamella.methods.hires_llava.slicing import TileLayout, merge
from lamella.progress import track

BATCH = 16  # images in one pass


class Seams(NamedTuple):
    """Distances of neighbouring patches, before the first layer and after each layer.

    Attributes:
        across, inside: mean cosine distances of neighbours across seams, and inside slices [layers + 1].
    """

    across: list[float]
    inside: list[float]

    @property
    def scores(self) -> list[float]:
        """s, before the first layer and after each layer."""
        return [a - b for a, b in zip(self.across, self.inside, strict=True)]

    def rising(self, count: int, layers: int) -> list[int]:
        """Select the layers in which s rises most.

        Args:
            count: number of layers to select.
            layers: number of leading layers to select from.

        Returns:
            The layers in ascending order.
        """
        rises = np.diff(self.scores)[:layers]
        return sorted(np.argsort(-rises, kind="stable")[:count].tolist())


@torch.no_grad()
def patch_maps(model: HiResLlava, processor: HiResLlavaProcessor, images: Sequence[Image]) -> list[list[Tensor]]:
    """Record the vision tower's patch features before the first layer and after each layer, as one map per image.

    Args:
        model: a model that uses slices.
        processor: its processor.
        images: the images.

    Returns:
        For each image, in the order of layers, [rows * h, columns * w, width], without padding.
    """
    pillow = require("PIL.Image", "vision", "reading images")
    found: list[list[Tensor]] = []
    for start in track(range(0, len(images), BATCH), "hires-llava: recording features"):
        shown = [pillow.fromarray(each) for each in images[start : start + BATCH]]
        made = processor.image_processor(shown, return_tensors="pt")
        grids = tuple(model.model.slicing.known(*size) for size in made["image_sizes"].tolist())
        slices = TileLayout(model.model.slicing, grids)
        counts = np.diff(slices.starts)
        tiles = torch.cat([each[:count] for each, count in zip(made["pixel_values"], counts, strict=True)])
        states = model.model.vision_tower(
            tiles.to(model.device, model.dtype), output_hidden_states=True, slices=slices
        ).hidden_states
        found += _maps([each.float().cpu() for each in states], slices)
    return found


def _maps(states: Sequence[Tensor], slices: TileLayout) -> list[list[Tensor]]:
    across, patch = slices.slicing.across, slices.slicing.patch
    maps = []
    for image, grid in enumerate(slices.grids):
        start, end = slices.starts[image] + slices.shown, slices.starts[image + 1]
        height, width = -(-grid.height // patch), -(-grid.width // patch)
        of_image = []
        for h in states:
            patches = h[start:end, h.shape[1] - across**2 :].unflatten(1, (across, across))
            of_image.append(merge(patches[None], grid.rows, grid.columns)[0, :height, :width])
        maps.append(of_image)
    return maps


def compare_neighbours(maps: Sequence[Sequence[Tensor]], across: int) -> Seams:
    """Average the distances of neighbours over images.

    Args:
        maps: output of :func:`patch_maps`.
        across: patches per side of a slice.

    Returns:
        The distances of every layer.

    Raises:
        CalibrationError: for images of one slice each.
    """
    if not any(max(of_image[0].shape[:2]) > across for of_image in maps):
        raise CalibrationError(
            f"no image has a seam: give images larger than the {across} x {across} patches of a slice"
        )
    layers = len(maps[0])
    sums = np.zeros((2, layers, 2))  # seam or inside; distances and their number
    for of_image in maps:
        for layer, f in enumerate(of_image):
            for axis in (0, 1):
                far = 1 - cosine_similarity(
                    f.narrow(axis, 0, f.shape[axis] - 1), f.narrow(axis, 1, f.shape[axis] - 1), -1
                )
                seam = (torch.arange(1, f.shape[axis]) % across == 0).nonzero()[:, 0]
                rest = (torch.arange(1, f.shape[axis]) % across != 0).nonzero()[:, 0]
                for kind, those in enumerate((seam, rest)):
                    chosen = far.index_select(axis, those)
                    sums[kind, layer] += chosen.double().sum().item(), chosen.numel()
    means = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return Seams(means[0].tolist(), means[1].tolist())


def probe_entities(
    maps: Sequence[Sequence[Tensor]], questions: Sequence[EntityQuestion], slicing: Any, seed: int = 0
) -> dict[str, list[float | None]]:
    """Train linear probes that classify an entity from the mean of its own patches, after each layer.

    The probe is trained on half of the images, with entities at all positions, and tested on the other half.

    Args:
        maps: features of images of entities, two slices per side.
        questions: the questions about them.
        slicing: how they were cut.
        seed: random seed of the halves.

    Returns:
        By the number of seams that cut the entity, the accuracy before the first layer and after each layer.

    Raises:
        CalibrationError: for too few questions.
    """
    linear = require("sklearn.linear_model", "vision", "linear probes")
    names = np.array([each.about.entity for each in questions])
    cuts = np.array([each.cut for each in questions])
    learns = np.random.default_rng(seed).permutation(len(names)) % 2 == 0
    if len(set(names[learns])) < 2:
        raise CalibrationError(f"{len(names)} questions have fewer than two classes for the probe: give more")
    found: dict[str, list[float | None]] = {cut: [] for cut in CUTS}
    for layer in track(range(len(maps[0])), "hires-llava: probes"):
        x = np.stack(
            [_of_thing(of_image[layer], each, slicing) for of_image, each in zip(maps, questions, strict=True)]
        )
        x = (x - x[learns].mean(0)) / (x[learns].std(0) + 1e-6)
        probe = linear.LogisticRegression(max_iter=200).fit(x[learns], names[learns])
        right = probe.predict(x) == names
        for cut in CUTS:
            judged = right[~learns & (cuts == cut)]
            found[cut].append(float(judged.mean()) if len(judged) else None)
    return found


def _of_thing(f: Tensor, each: EntityQuestion, slicing: Any) -> Any:
    """The mean of the patches that an entity covers [width]."""
    down, along = (value * slicing.across for value in middle(each.about))
    reach = RADIUS[1] * slicing.across
    at = torch.arange(2 * slicing.across) + 0.5
    return f[(at - down).abs() <= reach][:, (at - along).abs() <= reach].mean((0, 1)).numpy()


def select_layers(seams: Seams, count: int, model: HiResLlava) -> list[int]:
    """Select the layers for ``count`` adapters.

    Args:
        seams: measured distances.
        count: number of adapters.
        model: the model.
    """
    return seams.rising(count, read_layers(model.config))
