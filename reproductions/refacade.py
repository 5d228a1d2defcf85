"""Refacade at small scale: textured solids with known ground truth in any texture, in pixel space.

A texture remover learns to render solids in plain grey, and a student learns to do so in three steps (E1, E5). A video
transformer with a control branch learns to draw a solid whose reference is itself, once unchanged and once jigsawed,
and is evaluated on the same texture from another solid, also with a held-out shape and texture, beside baselines
without training (E2); with other structure inputs than the plain twin (E4); and as a branch beside a frozen base, at
layers chosen in several ways with equal numbers of parameters within 5 % (E3). Backgrounds are measured before pasting.
Solids, textures and lights are drawn independently, and test data is never trained on.

The paths of a remover are almost straight, and three plain steps are enough for it: the gain of distillation is
measured on E3's base, which generates images from noise alone. All experiments use 32 pixels, 2,000 training solids and
64 test solids, and a transformer of 0.4 million weights: smaller than the 48 pixels, 3,000 and 128 solids and 1.5
million weights that were planned. All arms but the last draw one frame; the last one is trained on clips, and its
texture is followed along the true flow. An arm that no claim needs more of has one seed.

    python reproductions/refacade.py            # about two hours and a quarter on one core; an interrupted run resumes
    python reproductions/refacade.py --quick    # few steps and solids, one seed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import diffusers
import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from safetensors.torch import load_file, save_file
from skimage.feature import canny
from torch import Tensor, nn

from lamella.files import Work, replacing
from lamella.methods.refacade import (
    Base,
    Conditions,
    ControlBranch,
    Jigsaw,
    SamplerSettings,
    TexturedObject,
    TextureRemover,
    TransferLoss,
    conditions,
    dilate_mask,
    distil,
    hint_sensitivity,
    judge,
    most_sensitive,
    objects,
    removal_samples,
    retexture,
    sample_latents,
    train_branch,
    train_remover,
    transfer_samples,
)
from lamella.methods.refacade.clips import of_object
from lamella.methods.refacade.flow import BaseLoss, Length, task
from lamella.methods.refacade.jigsaw import Puzzle, centre_object
from lamella.methods.refacade.nano import SHAPE, every_second, random_network
from lamella.methods.refacade.objects import TURN
from lamella.methods.refacade.recipe import transfer_sample
from lamella.methods.refacade.remover import euler
from lamella.results.record import together
from lamella.train import TrainConfig, fit

RES, DILATE = 32, 3
FRAMES = 3  # frames per clip
DRAWN = 4  # images drawn from noise per test solid
ABOVE = 1e-9  # smallest value that differs from 0
RAW, JIGSAW = "raw", "jigsaw"
JUDGED = ("test", "unseen")  # known shapes and textures, and a held-out torus and bricks
REFERENCES = {"own": ("own", "test"), "cross": ("cross", "test"), "cross, unseen": ("cross", "unseen")}
IDENTITY, COLOURS = "nothing: identity", "nothing: mean, std"
TRUE, REMOVER = "untextured (true)", "untextured (remover)"
BETTER = f"{REMOVER}, judged with true ones"
STRUCTURES = (REMOVER, "luminance", "canny", "depth", TRUE)
SETS = ("every second", "all", "first third", "last third", "planned")
# Hidden sizes for which the branches have equal numbers of parameters within 5 %.
HIDDEN = {"every second": 192, "all": 7, "first third": 384, "last third": 384, "planned": 384}


@dataclass(frozen=True)
class Size:
    """Scale of the experiment: solids, steps of each training, and sampling steps."""

    solids: int
    tests: int
    removal: int
    distilling: int
    matching: int
    copying: int
    base: int
    branch: int
    structure: int
    batch: int
    drawing: int
    seeds: Sequence[int]
    sets: Sequence[str]
    structures: Sequence[str]


FULL = Size(2000, 64, 600, 150, 60, 3000, 1200, 400, 600, 16, 20, (0, 1, 2), SETS, STRUCTURES)
QUICK = Size(16, 3, 6, 1, 1, 3, 3, 2, 2, 4, 3, (0,), SETS[:2], (REMOVER, "canny"))


@cache
def solids(part: str, count: int, frames: int = 1) -> Sequence[TexturedObject]:
    return tuple(islice(objects(part, 0, RES, frames), count))  # type: ignore[arg-type]


def config(steps: int, batch: int, seed: int, lr: float = 2e-3) -> TrainConfig:
    return TrainConfig(steps=steps, lr=lr, schedule="cosine", warmup=0.1, batch=batch, seed=seed, save_every=steps)


def base_of(network: Any) -> Base:
    return Base(network, None, "reproduction")


def batched(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts))


# E1 and E5: the remover and its student


def kept(network: nn.Module, file: Path, train: Callable[[], Any]) -> None:
    """Load a network's weights from a file in the run's folder; train the network first if there is no file."""
    if not file.exists():
        train()
        with replacing(file) as partial:
            save_file({name: each.contiguous() for name, each in network.state_dict().items()}, partial)
    network.load_state_dict(load_file(file))
    network.requires_grad_(False).eval()


def remover_of(work: Path, size: Size, seed: int) -> TextureRemover:
    """Return a remover, which the next arm loads again."""

    def train() -> None:
        clips = [of_object(each) for each in solids("train", size.solids)]
        samples = removal_samples(base, clips)
        train_remover(network, samples, config(size.removal, 3 * size.batch // 2, seed), Work().directory("run"))

    base = base_of(random_network(SHAPE))
    torch.manual_seed(seed)
    network = TextureRemover.fresh(base)
    kept(network, work / f"remover-{seed}.safetensors", train)
    return network


def removed(work: Path, size: Size, seed: int) -> dict[str, dict[str, float]]:
    """Return the PSNR inside the mask against the true plain twin, by test split.

    Baselines, the remover and its student are compared.
    """
    remover, base = remover_of(work, size, seed), base_of(random_network(SHAPE))
    lessons = removal_samples(base, [of_object(each) for each in solids("train", size.solids)])
    student, _ = distil(remover, lessons, config(size.distilling, size.batch, seed, 1e-4), Work().directory("run"))
    # the best constant of the training solids, since that of the tests would use the ground truth
    masks = [torch.from_numpy(each.mask)[:, 0] > 0 for each in solids("train", 200)]
    level = fmean(float(each["untextured"][0][mask].mean()) for each, mask in zip(lessons[:200], masks, strict=False))
    found = {}
    for part in JUDGED:
        tests = solids(part, size.tests)
        samples = removal_samples(base, [of_object(each) for each in tests])
        seen, truth = (batched([each[name] for each in samples]) for name in ("foreground", "untextured"))
        luminance = (seen * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(dim=1, keepdim=True)
        noise = lambda: torch.Generator().manual_seed(seed)  # noqa: E731, the same for all
        said = {
            "identity": seen,
            "luminance": luminance.expand_as(seen),
            "constant": torch.full_like(seen, level),
            **{f"{steps} steps": remover.removed(seen, noise(), steps) for steps in (1, 3, 10, 50)},
            "student, 3 steps": student.removed(seen, noise(), 3),
        }
        found[part] = {name: inside(each, truth, tests) for name, each in said.items()}
    return found


def inside(said: Tensor, truth: Tensor, tests: Sequence[TexturedObject]) -> float:
    """Return the mean PSNR within the masks."""
    return fmean(
        judge.psnr(judge.unit(ours[:, 0]), judge.unit(theirs[:, 0]), each.mask[0, 0] > 0)
        for ours, theirs, each in zip(said, truth, tests, strict=True)
    )


# E2 to E4: transfer


def structure(name: str, each: TexturedObject, picture: Any, remover: TextureRemover | None, number: int) -> Tensor:
    """Return the structure input of an image of a solid [3, 1, res, res]."""
    mask = torch.from_numpy(each.mask)
    seen = torch.from_numpy(picture) * mask
    if name == TRUE:
        return torch.from_numpy(each.untextured).movedim(1, 0)
    if name == "depth":
        return torch.from_numpy(each.depth).expand(-1, 3, -1, -1).movedim(1, 0)
    if remover is not None and name == REMOVER:
        return remover.removed(seen.movedim(1, 0)[None], torch.Generator().manual_seed(number))[0]
    grey = judge.grey(judge.unit(seen[0]))
    shown = canny(grey, sigma=1.0).astype(np.float32) if name == "canny" else grey.astype(np.float32)
    return (torch.from_numpy(shown) * 2 - 1).expand(3, 1, -1, -1).clone()


@lru_cache(maxsize=1)
def lessons(work: Path, size: Size, name: str, frames: int = 1) -> Sequence[dict[str, Tensor]]:
    """Return the training data of a transfer with some structure input, which is the same for all seeds."""
    base = base_of(random_network(SHAPE))
    remover = remover_of(work, size, 0) if name == REMOVER else None
    found = []
    for number, each in enumerate(solids("train", size.solids, frames)):
        clip, mask = torch.from_numpy(each.composite), torch.from_numpy(each.mask)
        own = (torch.from_numpy(each.own[0]), torch.from_numpy(each.own[1]))
        told = structure(name, each, each.composite, remover, number)
        found.append(transfer_sample(base, clip, mask, told, own, DILATE))
    return found


def transfer(
    size: Size, seed: int, samples: Sequence[dict[str, Tensor]], jigsaw: Jigsaw | None, steps: int
) -> tuple[Base, ControlBranch]:
    """Train a transformer and a branch jointly."""
    torch.manual_seed(seed)
    base = base_of(random_network(SHAPE, seed).requires_grad_(True))
    branch = ControlBranch(base.network, every_second(base.depth), *base.control_channels)
    both = nn.ModuleDict({"network": base.network, "branch": branch})
    loss = TransferLoss(base, jigsaw)
    fit(
        both,
        samples,
        task(loss),
        config(steps, size.batch, seed),
        out=Work().directory("run"),
        trainable=lambda name: True,
    )
    both.requires_grad_(False).eval()
    return base, branch


def shown(pair: tuple[Any, Any], jigsaw: Jigsaw | None, number: int) -> Puzzle:
    image, where = (torch.from_numpy(each) for each in pair)
    if jigsaw is None:
        return Puzzle(*centre_object(image, where), False, 0, 0)
    return jigsaw(image, where, np.random.default_rng(number), smallest=4)


@torch.no_grad()
def drawn(
    base: Base, branch: ControlBranch, tests: Sequence[TexturedObject], told: Sequence[Tensor], which: str, **how: Any
) -> Tensor:
    """Draw the tests with their own or a cross reference [tests, 3, frames, res, res]."""
    found = [
        conditions(
            base, torch.from_numpy(each.composite), torch.from_numpy(each.mask), plain,
            shown(getattr(each, which), how["jigsaw"], number), DILATE,
        )
        for number, (each, plain) in enumerate(zip(tests, told, strict=True))
    ]  # fmt: skip
    all_told = Conditions(*(torch.cat(each) for each in zip(*found, strict=True)))
    generator = torch.Generator().manual_seed(how["seed"])
    return sample_latents(base, branch, all_told, SamplerSettings(steps=how["steps"], guidance=1.0), generator)


def measured(pictures: Tensor, tests: Sequence[TexturedObject], which: str) -> dict[str, float]:
    """Return all metrics of images [tests, 3, res, res], as means over the tests."""
    references = [
        judge.unit(centre_object(*(torch.from_numpy(part) for part in getattr(each, which)))[0]) for each in tests
    ]
    found = []
    for number, (picture, each) in enumerate(zip(pictures, tests, strict=True)):
        ours, truth, mask = judge.unit(picture), judge.unit(each.composite[0]), each.mask[0, 0] > 0
        hole = dilate_mask(torch.from_numpy(each.mask), DILATE)[0, 0].numpy() > 0
        mean, contrast = judge.colour_error(ours, mask, truth, mask)
        found.append({
            "PSNR": judge.psnr(ours, truth, mask),
            "colour mean": mean,
            "contrast": contrast,
            "1 - GLCM": 1 - judge.glcm_similarity(ours, mask, truth, mask),
            "spectrum": judge.spectrum_error(ours, mask, truth, mask),
            "leak": judge.leak(ours, mask, references, number),
            "background": judge.psnr(ours, truth, ~hole),
        })  # fmt: skip
    return {name: fmean(each[name] for each in found) for name in found[0]}


def copied(work: Path, size: Size, seed: int, kind: str) -> dict[str, dict[str, float]]:
    """Run E2: a model trained on unchanged or jigsawed references, with own and cross references."""
    jigsaw = Jigsaw() if kind == JIGSAW else None
    base, branch = transfer(size, seed, lessons(work, size, TRUE), jigsaw, size.copying)
    found = {}
    for name, (which, part) in REFERENCES.items():
        tests = solids(part, size.tests)
        told = [structure(TRUE, each, each.composite, None, 0) for each in tests]
        pictures = drawn(base, branch, tests, told, which, jigsaw=jigsaw, seed=seed, steps=size.drawing)
        found[name] = measured(pictures[:, :, 0], tests, which)
    return found


def unlearnt(size: Size, kind: str) -> dict[str, dict[str, float]]:
    """Evaluate baselines without training, on an image of the solid in another texture.

    The image is left unchanged, or its object gets the mean and the standard deviation of the reference's colours.
    """
    found = {}
    for name, (which, part) in REFERENCES.items():
        tests = solids(part, size.tests)
        pictures = batched([torch.from_numpy(each.donor[0]) for each in tests])
        if kind == COLOURS:
            pictures = batched([recoloured(each, which) for each in tests])
        found[name] = measured(pictures, tests, which)
    return found


def recoloured(each: TexturedObject, which: str) -> Tensor:
    """Give a solid in another texture the mean and standard deviation of its reference's colours [3, res, res]."""
    picture, mask = torch.from_numpy(each.donor[0]), torch.from_numpy(each.mask[0])
    shown, where = (torch.from_numpy(part) for part in getattr(each, which))
    ours, theirs = picture[:, mask[0] > 0], shown[:, where[0] > 0]  # [3, pixels]
    mean, deviation = (part.view(3, 1, 1) for part in (ours.mean(dim=1), ours.std(dim=1)))
    other, spread = (part.view(3, 1, 1) for part in (theirs.mean(dim=1), theirs.std(dim=1)))
    changed = (picture - mean) / deviation.clamp_min(ABOVE) * spread + other
    return torch.where(mask > 0, changed.clamp(-1, 1), picture)


def structured(work: Path, size: Size, seed: int, name: str) -> dict[str, dict[str, float]]:
    """Run E4: cross references, with structure inputs computed from the solid in another texture.

    A model trained on the remover's structure is also tested with the true one.
    """
    remover = remover_of(work, size, 0)
    base, branch = transfer(size, seed, lessons(work, size, name), Jigsaw(), size.structure)
    tests, found = solids("test", size.tests), {}
    for title, shows in {name: name, BETTER: TRUE}.items() if name == REMOVER else ((name, name),):
        told = [structure(shows, each, each.donor, remover, number) for number, each in enumerate(tests)]
        pictures = drawn(base, branch, tests, told, "cross", jigsaw=Jigsaw(), seed=seed, steps=size.drawing)
        found[title] = measured(pictures[:, :, 0], tests, "cross")
    return found


def moving(work: Path, size: Size) -> dict[str, list[float]]:
    """Return the warp error of a network trained on clips, when it draws a clip and when it draws single frames.

    The warp error of the ground truth, in which light moves, is reported as well. An image without texture has a low
    warp error too, so the standard deviation of the object's colours is reported beside it.
    """
    base, branch = transfer(size, 0, lessons(work, size, TRUE, FRAMES), Jigsaw(), size.branch // 2)
    tests = solids("test", size.tests, FRAMES)
    how = {"jigsaw": Jigsaw(), "steps": size.drawing}
    clips = [torch.from_numpy(each.composite).movedim(1, 0) for each in tests]
    frames = [
        [each._replace(composite=each.composite[n : n + 1], mask=each.mask[n : n + 1]) for each in tests]
        for n in range(FRAMES)
    ]
    told = [structure(TRUE, each, each.composite, None, 0) for each in tests]
    one_by_one = [
        drawn(base, branch, part, [each[:, n : n + 1] for each in told], "cross", seed=n, **how)
        for n, part in enumerate(frames)
    ]
    found = {
        "the truth": batched(clips),
        "clips": drawn(base, branch, tests, told, "cross", seed=0, **how),
        "frames, one by one": torch.cat(one_by_one, dim=2),
    }
    measures: dict[str, list[float]] = {}
    for name, each_drawn in found.items():
        shown_clips = [judge.unit(clip.movedim(1, 0)) for clip in each_drawn]  # [frames, res, res, 3]
        masks = [each.mask[:, 0] > 0 for each in tests]
        errors = [
            judge.warp_error(clip, mask, each.centre, TURN)
            for clip, mask, each in zip(shown_clips, masks, tests, strict=True)
        ]
        spread = [float(clip[mask].std(axis=0).mean()) for clip, mask in zip(shown_clips, masks, strict=True)]
        measures[name] = [fmean(errors), fmean(spread)]
    return measures


def frozen_base(work: Path, size: Size) -> Base:
    """Train E3's base, which models images without conditions; the next arm loads it again."""

    def train() -> None:
        samples = [{"clean": torch.from_numpy(each.composite).movedim(1, 0)} for each in solids("train", size.solids)]
        loss, how = BaseLoss(base_of(network).velocity, Length()), config(size.base, size.batch, 0)
        fit(network, samples, task(loss), how, out=Work().directory("run"), trainable=lambda name: True)

    network = random_network(SHAPE)
    kept(network, work / "base.safetensors", train)
    return base_of(network)


class Drawing(nn.Module):
    """The base as a teacher of images from noise alone, with the interface of a remover."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.network = base.network

    def trains(self, name: str) -> bool:
        return True

    def velocity(self, z_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """Return the velocity; all conditions are ignored."""
        return base_of(self.network).velocity(z_t, t, torch.ones_like(z_t[:, :, :1]))


def unconditional(work: Path, size: Size, seed: int) -> dict[str, float]:
    """Run E5 where distillation can gain: images of the base, and those of a student of three steps."""
    teacher = Drawing(frozen_base(work, size))
    shape = [{"foreground": torch.zeros(3, 1, RES, RES)}] * size.solids  # all inputs of the student here
    how = config(size.matching, size.batch, seed, 5e-5)  # with solids of the training split
    student, _ = distil(teacher, shape, how, Work().directory("run"))  # type: ignore[arg-type]
    truth = batched([torch.from_numpy(each.composite).movedim(1, 0) for each in solids("test", DRAWN * size.tests)])
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def distance(network: Any, steps: int) -> float:
        pictures = [euler(lambda z, t: network.velocity(z, t, z), part, steps) for part in noise.split(64)]
        return energy_distance(torch.cat(pictures).flatten(1), truth.flatten(1))

    found = {f"{steps} steps": distance(teacher, steps) for steps in (1, 3, 50)}
    return found | {"student, 3 steps": distance(student, 3)}


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| of two samples [rows, width], 0 for equal distributions only."""
    between = torch.cdist(x, y).mean()
    within = [torch.cdist(each, each).sum() / (len(each) * (len(each) - 1)) for each in (x, y)]
    return float(2 * between - within[0] - within[1])


def planned(work: Path, size: Size) -> dict[str, list[float]]:
    """Return the sensitivity of each layer of the base to hints."""
    clean = batched([torch.from_numpy(each.composite).movedim(1, 0) for each in solids("train", min(64, size.solids))])
    return hint_sensitivity(frozen_base(work, size), clean, draws=4, seed=0, work=Work())


def beside(work: Path, size: Size, seed: int, name: str, sensitive: Sequence[float]) -> dict[str, float]:
    """Run E3: a branch at some layers of the frozen base."""
    base = frozen_base(work, size)
    third = base.depth // 3
    layers = {
        "every second": every_second(base.depth),
        "all": range(base.depth),
        "first third": range(third),
        "last third": range(base.depth - third, base.depth),
        "planned": most_sensitive(sensitive, third),
    }[name]
    torch.manual_seed(seed)
    branch = ControlBranch(base.network, list(layers), *base.control_channels, HIDDEN[name])
    samples = lessons(work, size, TRUE)
    log = train_branch(base, branch, samples, config(size.branch, size.batch, seed, 1e-3), Work().directory("run"))
    tests = solids("test", size.tests)
    told = [structure(TRUE, each, each.composite, None, 0) for each in tests]
    pictures = drawn(base, branch.eval(), tests, told, "cross", jigsaw=Jigsaw(), seed=seed, steps=size.drawing)
    found = measured(pictures[:, :, 0], tests, "cross")
    last = [point.loss for point in log.train][-max(1, len(log.train) // 5) :]
    parameters = float(sum(each.numel() for each in branch.parameters()))
    return found | {"loss": fmean(last), "parameters": parameters}


# Exactness


@torch.no_grad()
def exactness(run: Run) -> None:
    base = base_of(random_network(SHAPE))
    branch = ControlBranch(base.network, every_second(base.depth), *base.control_channels)
    video, ref = base.control_channels
    torch.manual_seed(0)
    z, t, white = torch.randn(2, 3, 2, 16, 16), torch.rand(2), torch.randn(2, 3, 1, 16, 16)
    c, c_r = torch.randn(2, video, 2, 16, 16), torch.randn(2, ref, 1, 16, 16)
    before = {name: each.clone() for name, each in base.network.state_dict().items()}
    alone = base.velocity(z, t, white)
    with branch.attached(base.network, c, c_r):
        apart = float((base.velocity(z, t, white) - alone).abs().max())
    run.exact("an untrained branch has no effect", "at most 1e-6", apart, apart <= 1e-6)
    for each in branch.parameters():
        each.add_(0.05 * torch.randn(each.shape))
    with branch.attached(base.network, c, c_r, 0.0):
        same = torch.equal(base.velocity(z, t, white), alone)
    run.exact(
        "without hints the output is the base's, after training too", "bitwise equal", "yes" if same else "no", same
    )
    after = base.network.state_dict()
    same = all(torch.equal(each, after[name]) for name, each in before.items())
    same &= torch.equal(base.velocity(z, t, white), alone)
    run.exact("removed, the base is as it was", "bitwise equal", "yes" if same else "no", same)


def smoke(run: Run) -> None:
    """Run the whole pipeline on Wan's own classes with random weights."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 12,
             "freq_dim": 16, "ffn_dim": 40, "num_layers": 2}  # fmt: skip
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    network = diffusers.WanTransformer3DModel(**sizes).requires_grad_(False).eval()
    base = Base(network, autoencoder.eval(), "tiny Wan")
    remover = TextureRemover.fresh(base).eval()
    solid, other = (of_object(next(objects(part, 0, RES, 5))) for part in ("train", "test"))  # type: ignore[arg-type]
    samples = transfer_samples(base, remover, [solid])
    branch = ControlBranch(network, [0], *base.control_channels)
    train_branch(base, branch, samples, config(2, 1, 0, 1e-3), Work().directory("run"))
    before = base.digest
    cross = (torch.where(other.mask[0] > 0, other.frames[0], 1.0), other.mask[0])
    both = [
        retexture(
            base, branch, remover, (solid.frames, solid.mask), cross, sampling=SamplerSettings(steps=2, scale=scale)
        )
        for scale in (1.0, 0.0)
    ]
    right = all(each.frames.shape == solid.frames.shape for each in both)
    run.exact("Wan's classes, from end to end", "frames of the clip's shape", "yes" if right else "no", right)
    changed = not torch.equal(both[0].frames, both[1].frames)
    run.exact("control on and off", "differ", "differ" if changed else "alike", changed)
    same = Base(network, None, "again").digest == before
    run.exact("the base after the context", "bitwise equal", "as before" if same else "changed", same)


# The experiment


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = f"{size.solids} textured solids of {RES} x {RES} pixels to learn from, {size.tests} to judge on"
    run.part("exactness", exactness)
    run.part("smoke", smoke)
    of_remover(run, size)
    of_jigsaw(run, size)
    of_structure(run, size)
    of_layers(run, size)
    of_base(run, size)
    of_clips(run, size)


def of_remover(run: Run, size: Size) -> None:
    both = [run.arm(f"remover, {seed}", removed, run.work, size, seed) for seed in size.seeds]
    rows = [[name, *(fmean(each[part][name] for each in both) for part in JUDGED)] for name in both[0]["test"]]
    heads = ["", "dB", "dB, unseen shape and texture"]
    run.table("E1 and E5: plain twins, PSNR inside the mask against the true ones", heads, rows)
    found = [each["test"] for each in both]
    gain = Measured.over_seeds([each["3 steps"] - max(each["luminance"], each["constant"]) for each in found])
    run.main("E1: remover over luminance or a constant", "at least 4 dB", gain, gain.at_least(4))
    behind = Measured.over_seeds([each["50 steps"] - each["student, 3 steps"] for each in found])
    run.further("E5: 3-step student minus the 50-step teacher", "at most 1 dB", behind, behind.at_most(1))
    ahead = Measured.over_seeds([each["student, 3 steps"] - each["3 steps"] for each in found])
    run.further("E5: student over the teacher's 3 steps", "above 0 dB", ahead, ahead.at_least(ABOVE))


def of_base(run: Run, size: Size) -> None:
    both = [run.arm(f"unconditional, {seed}", unconditional, run.work, size, seed) for seed in size.seeds]
    rows = [[name, fmean(each[name] for each in both)] for name in both[0]]
    run.table("E5: what the base draws from noise, energy distance to unseen composites", ["", "distance"], rows)
    ratio = Measured.over_seeds([each["student, 3 steps"] / each["3 steps"] for each in both])
    run.further(
        "E5: of the base, distance of student over the teacher's 3 steps", "below 1", ratio, ratio.at_most(1 - ABOVE)
    )


def of_jigsaw(run: Run, size: Size) -> None:
    found = {
        kind: [run.arm(f"{kind}, {seed}", copied, run.work, size, seed, kind) for seed in size.seeds]
        for kind in (RAW, JIGSAW)
    }
    names = list(found[RAW][0]["own"])
    rows = [
        [kind, which, *(fmean(each[which][name] for each in found[kind]) for name in names)]
        for kind in (RAW, JIGSAW)
        for which in REFERENCES
    ]
    for kind in (IDENTITY, COLOURS):
        without = run.arm(kind, unlearnt, size, kind)
        rows += [[kind, which, *without[which].values()] for which in REFERENCES]
    run.table("E2: references as they are, or jigsawed", ["trained on", "judged on", *names], rows)
    gaps = {kind: [each["own"]["PSNR"] - each["cross"]["PSNR"] for each in found[kind]] for kind in found}
    raw = Measured.over_seeds(gaps[RAW])
    run.exact("E2, premise: raw references are copied: own - cross", "above 0 dB", raw, raw.at_least(ABOVE) is True)
    smaller = Measured.over_seeds([ours - 1.5 * theirs for ours, theirs in zip(gaps[RAW], gaps[JIGSAW], strict=True)])
    run.main("E2: gap of raw less 1.5 times that of jigsaw", "at least 0 dB", smaller, smaller.at_least(0))
    lower = Measured.over_seeds([
        1 - ours["cross"]["contrast"] / theirs["cross"]["contrast"]
        for ours, theirs in zip(found[JIGSAW], found[RAW], strict=True)
    ])  # fmt: skip
    run.main("E2: error of contrast on cross references, lower by", "at least 0.05", lower, lower.at_least(0.05))
    less = Measured.over_seeds([
        theirs["cross"]["leak"] - ours["cross"]["leak"]
        for ours, theirs in zip(found[JIGSAW], found[RAW], strict=True)
    ])  # fmt: skip
    run.further("E2: structure that leaks, raw less jigsaw", "above 0", less, less.at_least(ABOVE))


TEXTURE = ("contrast", "1 - GLCM", "spectrum")


def of_structure(run: Run, size: Size) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    for name in size.structures:
        for seed in size.seeds[:1] if name == TRUE else size.seeds:  # it is reported without a claim
            for title, each in run.arm(f"{name}, {seed}", structured, run.work, size, seed, name).items():
                found.setdefault(title, []).append(each)
    names = list(found["canny"][0])
    rows = [[name, len(each), *(fmean(one[m] for one in each) for m in names)] for name, each in found.items()]
    run.table("E4: cross references, by the structure condition", ["structure", "seeds", *names], rows)

    def over(name: str) -> Measured:
        """Return the texture errors of the plain twin relative to another structure: the geometric mean of three."""
        both = zip(found[REMOVER], found[name], strict=True)
        ratios = [[ours[m] / theirs[m] for m in TEXTURE] for ours, theirs in both]
        return Measured.over_seeds([float(np.exp(np.mean(np.log(each)))) for each in ratios])

    edges = over("canny")
    run.main("E4: texture error of the plain twin over edges", "at most 0.9", edges, edges.at_most(0.9))
    others = {name: over(name) for name in found if name not in (TRUE, BETTER, REMOVER)}
    closest = max(others, key=lambda name: others[name].figure)
    best = together([each.at_most(1 - ABOVE) for each in others.values()])
    said = f"{others[closest]} of {closest}"
    run.further("E4: the plain twin is best: its texture error over the closest other's", "below 1", said, best)


def of_layers(run: Run, size: Size) -> None:
    sensitive = run.arm("sensitivity", planned, run.work, size)
    rows = [[layer, *each] for layer, each in enumerate(zip(sensitive["output"], sensitive["loss"], strict=True))]
    run.table("E3: what a push at each layer changes", ["layer", "output", "loss"], rows)
    found = {
        name: [
            run.arm(f"{name}, {seed}", beside, run.work, size, seed, name, sensitive["output"])
            for seed in (size.seeds if name == "every second" else size.seeds[:1])
        ]
        for name in size.sets
    }
    names = ["parameters", "loss", "PSNR", "contrast", "1 - GLCM", "background"]
    rows = [[name, len(each), *(fmean(one[m] for one in each) for m in names)] for name, each in found.items()]
    run.table("E3: a branch beside the frozen base, on cross references", ["layers", "seeds", *names], rows)
    sizes = [each[0]["parameters"] for each in found.values()]
    apart = max(sizes) / min(sizes) - 1
    run.exact("E3: parameters of the branches", "as many, within 5 %", f"{apart:.2%}", apart <= 0.05)
    background = Measured.over_seeds([each["background"] for each in found["every second"]])
    run.further("E3: background before pasting", "at least 30 dB", background, background.at_least(30))


def of_clips(run: Run, size: Size) -> None:
    found = run.arm("clips", moving, run.work, size)
    rows = [[name, 1000 * error, spread] for name, (error, spread) in found.items()]
    title = f"Clips of {FRAMES} frames on cross references, one seed"
    run.table(title, ["", "warp error along the true flow, thousandths", "deviation of colours"], rows)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="few steps and solids, one seed"))
