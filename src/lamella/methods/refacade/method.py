"""Refaçade: editing objects with a given reference texture (Huang et al., CVPR 2026, arXiv 2512.04534).

An object in a picture or a video gets the texture of a reference, and keeps its shape, shading and motion::

    object on grey    -> texture remover, 3 steps ----> plain twin     what is left of the object     (remover.py)
    reference         -> jigsaw ----------------------> cells, mixed   what is left of the reference  (jigsaw.py)
    background, twin, mask | reference -> control branch -> hints      at chosen layers               (modules.py)
    [reference | noise] -> frozen video transformer + hints -> v       20 steps with guidance         (sampler.py)

Two decouplers make it work: edges and depth still carry the old texture, and a reference as it is carries its own
outline. In training the reference is the object itself, jigsawed, so no pictures of one object in two textures are
needed (recipe.py). Which layers get hints is measured (sensitivity.py). The base is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.refacade import judge
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.conditions import dilated
from lamella.methods.refacade.frames import Frames, Masks, Reference, eight_bit, signed
from lamella.methods.refacade.jigsaw import Jigsaw, centred
from lamella.methods.refacade.lessons import Objects, foregrounds, latents, removal_samples, transfer_samples
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.recipe import DISTILLING, REMOVAL, TRANSFER, train_branch, train_remover
from lamella.methods.refacade.recipe import distil as distilled
from lamella.methods.refacade.remover import STEPS, UNET, TextureRemover
from lamella.methods.refacade.result import BUILT_IN, Remover, Retextured, Retexturer
from lamella.methods.refacade.sampler import Sampling, retextured
from lamella.methods.refacade.sensitivity import hint_sensitivity, most_sensitive
from lamella.progress import notify
from lamella.registry import command, method
from lamella.report.images import png_base64
from lamella.results import Study
from lamella.train import TrainConfig

SHOWN, TALLEST = 4, 192  # frames in the report, and their height in pixels, at most


@method("refacade", paper="2512.04534", purpose="vision", on="any", brief={"steps": 2, "reference_mask": None})
def refacade(
    model: Retexturer,
    image: Frames,
    mask: Masks,
    reference: Reference,
    reference_mask: Masks | None = None,
    base: Base | None = None,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008, frozen
    jigsaw: Jigsaw = Jigsaw(),  # noqa: B008, frozen
    seed: int = 0,
) -> Retextured:
    """Give an object in a picture or a video the texture of a reference.

    Args:
        model: a control branch with its remover; the built-in one, which knows textured objects alone, when left out.
        image: a picture or a video.
        mask: where the object is in it.
        reference: shows the texture.
        reference_mask: where the object of the reference is; what is neither white nor transparent when left out.
        base: the video transformer that the branch belongs to; a built-in branch brings its own.
        sampling: how pictures are drawn.
        jigsaw: how the reference is cut.
        seed: of all noise, and of the jigsaw.

    Returns:
        The frames, with the plain twin and the reference as the network was shown them.

    Raises:
        CalibrationError: for masks or references of other sizes.
        MethodError: for another base, or pictures that do not fit it.
    """
    base = base or own_base(model)
    branch, remover = model.branch(base), model.remover.to(base.network.device)
    notes = []
    if model.built_in:
        notify(
            "refacade: the built-in model draws textured solids of 32 x 32 pixels; train one for pictures of your own."
        )
        notes.append("Drawn by the built-in model, which knows small textured solids alone.")
    height, width = base.size_for(*image.pixels.shape[1:3])
    if (height, width) != image.pixels.shape[1:3]:
        given = "{} x {}".format(*image.pixels.shape[1:3])
        notes.append(f"The picture of {given} pixels was worked on in {height} x {width}.")
    count = (len(image.pixels) - 1) // base.temporal * base.temporal + 1
    if count < len(image.pixels):
        notes.append(
            f"The last {len(image.pixels) - count} frames are left out: there are {base.temporal} to a latent."
        )
    frames = image.fitted(height, width)[:count]
    where = mask.fitted(image, height, width)[:count]
    shown = canvas(reference if reference_mask is None else reference.masked(reference_mask), height, width)
    drawn = retextured(base, branch, remover, (frames, where), shown, sampling=sampling, jigsaw=jigsaw, seed=seed)
    if drawn.puzzle.fallback:
        notes.append(
            "The reference is not jigsawed, since less than four of its cells are whole: its outline may show in the "
            "result. Give a larger object, or a smaller --ratio."
        )
    hole = dilated(where, sampling.dilate) > 0
    made = torch.where(hole, drawn.frames, frames) if sampling.paste else drawn.frames
    outside = ~hole[:, 0].numpy()
    findings: dict[str, Any] = {
        "size": [height, width],
        "frames": count,
        "fallback": drawn.puzzle.fallback,
        "cells": drawn.puzzle.cells,
        "side": drawn.puzzle.side,
        "background": judge.psnr(judge.unit(drawn.frames), judge.unit(frames), outside) if outside.any() else None,
        "strips": {
            "before": strip(frames),
            "without texture": strip(drawn.untextured),
            "the reference, jigsawed": strip(drawn.puzzle.image[None]),
            "result": strip(made),
        },
    }
    parts = {"frames": made, "untextured": drawn.untextured, "reference": drawn.puzzle.image[None]}
    pictures: dict[str, Any] = {name: eight_bit(each) for name, each in parts.items()}
    return Retextured(findings=findings, notes=notes, **pictures)


def own_base(model: Retexturer) -> Base:
    """The built-in base of a branch.

    Raises:
        MethodError: for a branch of another one.
    """
    if model.adapter.name not in BUILT_IN:
        raise MethodError(f"the branch belongs to the base '{model.adapter.name}': say where that is with --base")
    return Base.open(model.adapter.name)


def canvas(reference: Reference, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A reference's object in the middle of white, in the size of the frames."""
    return centred(signed(reference.picture), torch.from_numpy(reference.shown)[None].float(), (height, width))


def strip(frames: Tensor) -> str:
    """Some frames side by side, as the report shows them."""
    some = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)
    step = -(-frames.shape[-2] // TALLEST)
    return png_base64(eight_bit(frames[some])[:, ::step, ::step])


@dataclass(frozen=True)
class Place:
    """Where hints are added.

    Attributes:
        layers: of the base, such as those that `layers` has found; every second one, as in the paper, when left out.
        hidden: width of the branch's feed-forward maps; the base's when left out.
    """

    layers: tuple[int, ...] | None = None
    hidden: Annotated[int, Ge(1), Le(2**17)] | None = None


@command("refacade", "train", on="any", brief={"steps": 2, "batch": 2, "save_every": 1, "layers": (0, 3), "count": 4})
def train(
    base: Base,
    objects: Objects,
    remover: Remover,
    *,
    place: Place = Place(),
    jigsaw: Jigsaw = Jigsaw(),  # noqa: B008, frozen
    dilate: Annotated[int, Ge(0)] = 3,
    config: TrainConfig = TRANSFER,
    work: Work = Work(),
) -> Retexturer:
    """Train a control branch beside a frozen video transformer, on objects that are their own reference.

    Args:
        base: the video transformer; it is not changed.
        objects: clips, with masks.
        remover: takes texture away.
        place: where hints are added.
        jigsaw: what cells must be filled with; their size is drawn by chance.
        dilate: r: the hole in the background reaches so many pixels beyond the object.
        config: of the training; the paper's rate, and the 18,000 steps of its first stage, when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The branch, as an adapter, with the remover.

    Raises:
        CalibrationError: for clips that cannot be used.
        MethodError: for layers that there are not, or a remover of another kind of latents.
        TrainingError: when training cannot start, go on or stay finite.
    """
    check_remover(base, remover.network)
    layers = range(0, base.depth, 2) if place.layers is None else place.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch = ControlBranch(base.network, list(layers), *base.control_channels, place.hidden)
    network = remover.network.to(base.network.device)
    samples = transfer_samples(base, network, objects.fitted(base), dilate, config.seed, work, objects.describe())
    log = train_branch(base, branch.to(base.network.device), samples, config, work.directory("run"), jigsaw=jigsaw)
    sizes = {"parameters": size(branch), "parameters of the base": size(base.network), "layers": branch.layers}
    return Retexturer.of(base, branch.eval(), network, log=log, findings={**sizes, "loss": losses(log)})


@command("refacade", "remover", on="any", brief={"steps": 2, "batch": 2, "save_every": 1, "count": 4})
def remover(base: Base, objects: Objects, *, config: TrainConfig = REMOVAL, work: Work = Work()) -> Remover:
    """Train a texture remover on objects that are known with and without texture.

    Args:
        base: on whose latents it works: of a VACE pipeline its control blocks train, else blocks that begin as copies
            of every second layer; beside a base of pixels it is a small UNet.
        objects: clips, with masks and plain twins.
        config: of the training; the paper's 18,000 steps when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The remover, as diffusers writes networks.

    Raises:
        CalibrationError: for clips without plain twins.
        TrainingError: when training cannot start, go on or stay finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = TextureRemover.fresh(base).to(base.network.device)
    samples = removal_samples(base, objects.fitted(base), work, objects.describe())
    log = train_remover(network, samples, config, work.directory("run"))
    return Remover(network=network.eval(), log=log, findings={"parameters": size(network), "loss": losses(log)})


@command("refacade", "distil", on="any", brief={"steps": 2, "batch": 2, "save_every": 1, "count": 4})
def distil(
    remover: Remover,
    objects: Objects,
    base: Base,
    *,
    removal: int = STEPS,
    config: TrainConfig = DISTILLING,
    work: Work = Work(),
) -> Remover:
    """Teach a texture remover to need a few steps, by distribution matching distillation.

    Args:
        remover: the teacher, of many steps; it is not changed.
        objects: clips, with masks; plain twins are not needed.
        base: on whose latents it works.
        removal: steps of the student.
        config: of the training; the paper's 300 steps when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The student.

    Raises:
        CalibrationError: for clips that cannot be used.
        MethodError: for a remover of another kind of latents.
        TrainingError: when training cannot start, go on or stay finite.
    """
    check_remover(base, remover.network)
    samples = foregrounds(base, objects.fitted(base), work, objects.describe())
    teacher = remover.network.to(base.network.device)
    student, log = distilled(teacher, samples, config, work.directory("run"), removal)
    found = {"parameters": size(student), "removal": removal, "loss": losses(log)}
    return Remover(network=student, log=log, findings=found)


@command("refacade", "layers", on="any", brief={"draws": 2, "count": 4})
def layers(
    base: Base,
    objects: Objects,
    *,
    share: Annotated[float, Gt(0), Le(1)] = 0.5,
    draws: int = 4,
    seed: int = 0,
    work: Work = Work(),
) -> Study:
    """Measure at which layers of a video transformer a hint does most.

    Args:
        base: the video transformer; it is not changed.
        objects: clips to measure on.
        share: of the layers that shall get hints.
        draws: times, noises and directions for each clip.
        seed: of them.
        work: where an interrupted run goes on from.

    Returns:
        What a push at each layer changes, the layers where that is most, and every second one beside them.

    Raises:
        MethodError: for values out of range.
    """
    clean = latents(base, objects.fitted(base), work, objects.describe())
    found = hint_sensitivity(base, clean, draws=draws, seed=seed, work=work)
    chosen = most_sensitive(found["output"], max(1, round(share * base.depth)))
    return Study(findings={**found, "chosen": chosen, "every second": list(range(0, base.depth, 2))})


def check_remover(base: Base, network: TextureRemover) -> None:
    """Check that a remover is of a base's latents.

    Raises:
        MethodError: when it is not.
    """
    channels = network.network.config.out_channels
    if channels != base.channels or (network.kind == UNET) != (base.vae is None):
        raise MethodError(
            f"the remover is of {channels} channels, and {base.name} has {base.channels}: give --remover one that "
            "`lamella run refacade remover` has trained on this base"
        )


def size(network: Any) -> int:
    """Its parameters."""
    return sum(each.numel() for each in network.parameters())


def losses(log: Any) -> list[float]:
    return [point.loss for point in log.train]
