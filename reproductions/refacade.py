"""Refacade at small scale: textured solids with known ground truth in any texture, in pixel space.

A texture remover learns to render solids in plain grey (E1). A video transformer with a control branch learns to draw a
solid whose reference is itself, once unchanged and once jigsawed, and is evaluated on the same texture from another
solid, beside baselines without training (E2); the premises are that a model of unchanged references copies them, and
that its images are better than the unchanged ones, on a pilot seed. The same network learns from edges instead of the
plain twin (E4). Solids, textures and lights are drawn independently, test data is never trained on, and all differences
are paired over seeds and test solids.

E1 and E2 have 500 test solids, since the gain differs more between solids than between seeds, and the others 128. E2
has 48 pixels, the others 32. To fit into about two hours, its transformer has 0.4 million weights, and is trained for
1,000 steps of 8 solids, where 3,000 of 16 were planned: the premises decide whether that is enough. Its tokens have 4
pixels: the 108 values of one of 6 do not fit into its 64 channels, so that it could not remove the noise.

With --further: other structure inputs of E4; a student learns to remove textures in three steps, and to draw solids
from noise alone in three steps (E5); a branch learns beside a frozen base, at layers chosen in several ways with equal
numbers of parameters within 5 % (E3); and a network that is trained on clips is followed along the true flow. An arm
that no claim needs more of has one seed.

    python reproductions/refacade.py            # about two hours on one core; an interrupted run resumes
    python reproductions/refacade.py --further  # E3, E5, clips and the rest of E4: about an hour
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
    sample_latents,
    train_branch,
    train_remover,
)
from lamella.methods.refacade.clips import of_object
from lamella.methods.refacade.flow import BaseLoss, Length, task
from lamella.methods.refacade.jigsaw import Puzzle, centre_object
from lamella.methods.refacade.nano import SHAPE, every_second, random_network
from lamella.methods.refacade.objects import TURN
from lamella.methods.refacade.recipe import transfer_sample
from lamella.methods.refacade.remover import euler
from lamella.report.figures import Bars
from lamella.results.record import together
from lamella.train import TrainConfig, fit

RES, LARGER, DILATE = 32, 48, 3  # pixels of E2 are the larger ones
FRAMES = 3  # frames per clip
DRAWN = 4  # images drawn from noise per test solid
TOGETHER = 64  # solids that are drawn at once
OTHERS = 8  # references of other solids, with which a leak is compared
ABOVE = 1e-9  # smallest value that differs from 0
COPIES = 0.1  # dB by which a model of unchanged references must be better with the object's own
RAW, JIGSAW = "raw", "jigsaw"
JUDGED = ("test", "unseen")  # known shapes and textures, and a held-out torus and bricks
REFERENCES = {"own": ("own", "test"), "cross": ("cross", "test"), "cross, unseen": ("cross", "unseen")}
IDENTITY, COLOURS = "nothing: identity", "nothing: mean, std"
TRUE, REMOVER = "untextured (true)", "untextured (remover)"
BETTER = f"{REMOVER}, judged with true ones"
STRUCTURES = (REMOVER, "canny", "luminance", "depth", TRUE)
SETS = ("every second", "all", "first third", "last third", "planned")
# Hidden sizes for which the branches have equal numbers of parameters within 5 %.
HIDDEN = {"every second": 192, "all": 7, "first third": 384, "last third": 384, "planned": 384}


@dataclass(frozen=True)
class Size:
    """Scale of the experiment: solids, steps of each training, sampling steps and seeds."""

    solids: int = 3000
    tests: int = 128
    judged: int = 500
    removal: int = 600
    distilling: int = 150
    matching: int = 60
    copying: int = 1000
    copying_batch: int = 8
    base: int = 1200
    branch: int = 400
    structure: int = 600
    batch: int = 16
    drawing: int = 20
    copied: int = 8
    removers: int = 8
    jigsaws: int = 6
    seeds: int = 3
    sets: Sequence[str] = SETS


FULL = Size()
QUICK = Size(
    solids=16, tests=3, judged=4, removal=6, distilling=1, matching=1, copying=3, copying_batch=4, base=3, branch=2,
    structure=2, batch=4, drawing=3, copied=2, removers=1, jigsaws=1, seeds=1, sets=SETS[:2],
)  # fmt: skip


@cache
def solids(part: str, count: int, frames: int = 1, res: int = RES) -> Sequence[TexturedObject]:
    return tuple(islice(objects(part, 0, res, frames), count))  # type: ignore[arg-type]


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


def removed(work: Path, size: Size, seed: int) -> dict[str, dict[str, list[float]]]:
    """Run E1: the PSNR of a remover and of baselines inside each mask against the true plain twin, by test split."""
    remover = remover_of(work, size, seed)
    # the best constant of the training solids, since that of the tests would use the ground truth
    level = fmean(float(each.untextured[0, 0][each.mask[0, 0] > 0].mean()) for each in solids("train", 200))
    found = {}
    for part in JUDGED:
        tests, (seen, truth) = solids(part, size.judged), twins_of(part, size.judged)
        luminance = (seen * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(dim=1, keepdim=True)
        outputs = {
            "identity": seen,
            "luminance": luminance.expand_as(seen),
            "constant": torch.full_like(seen, level),
            **{f"{steps} steps": remover.remove_texture(seen, noise(seed), steps) for steps in (1, 3, 10)},
        }
        found[part] = {name: inside(each, truth, tests) for name, each in outputs.items()}
    return found


def noise(seed: int) -> torch.Generator:
    """Return the generator of a remover's noise, the same for all."""
    return torch.Generator().manual_seed(seed)


def twins_of(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Return foregrounds and plain twins of test solids [count, 3, 1, res, res]."""
    samples = removal_samples(base_of(random_network(SHAPE)), [of_object(each) for each in solids(part, count)])
    foregrounds, plain = (batched([each[name] for each in samples]) for name in ("foreground", "untextured"))
    return foregrounds, plain


def distilled(work: Path, size: Size, seed: int) -> dict[str, dict[str, list[float]]]:
    """Run E5: a remover of three steps, its teacher with three and fifty, and a student, as in E1."""
    remover = remover_of(work, size, seed)
    lessons = removal_samples(
        base_of(random_network(SHAPE)), [of_object(each) for each in solids("train", size.solids)]
    )
    how = config(size.distilling, size.batch, seed, 1e-4)
    student, _ = distil(remover, lessons, how, Work().directory("run"))
    found = {}
    for part in JUDGED:
        tests, (seen, truth) = solids(part, size.tests), twins_of(part, size.tests)
        outputs = {f"{steps} steps": remover.remove_texture(seen, noise(seed), steps) for steps in (3, 50)}
        outputs["student, 3 steps"] = student.remove_texture(seen, noise(seed), 3)
        found[part] = {name: inside(each, truth, tests) for name, each in outputs.items()}
    return found


def inside(ours: Tensor, truth: Tensor, tests: Sequence[TexturedObject]) -> list[float]:
    """Return the PSNR within each mask."""
    return [
        judge.psnr(judge.unit(one[:, 0]), judge.unit(other[:, 0]), each.mask[0, 0] > 0)
        for one, other, each in zip(ours, truth, tests, strict=True)
    ]


# E2 to E4: transfer


def structure(name: str, each: TexturedObject, image: Any, remover: TextureRemover | None, number: int) -> Tensor:
    """Return the structure input of an image of a solid [3, 1, res, res]."""
    mask = torch.from_numpy(each.mask)
    seen = torch.from_numpy(image) * mask
    if name == TRUE:
        return torch.from_numpy(each.untextured).movedim(1, 0)
    if name == "depth":
        return torch.from_numpy(each.depth).expand(-1, 3, -1, -1).movedim(1, 0)
    if remover is not None and name == REMOVER:
        return remover.remove_texture(seen.movedim(1, 0)[None], torch.Generator().manual_seed(number))[0]
    grey = judge.grey(judge.unit(seen[0]))
    shown = canny(grey, sigma=1.0).astype(np.float32) if name == "canny" else grey.astype(np.float32)
    return (torch.from_numpy(shown) * 2 - 1).expand(3, 1, -1, -1).clone()


@lru_cache(maxsize=1)
def lessons(work: Path, size: Size, name: str, frames: int = 1, res: int = RES) -> Sequence[dict[str, Tensor]]:
    """Return the training data of a transfer with some structure input, which is the same for all seeds."""
    base = base_of(random_network(SHAPE))
    remover = remover_of(work, size, 0) if name == REMOVER else None
    found = []
    for number, each in enumerate(solids("train", size.solids, frames, res)):
        clip, mask = torch.from_numpy(each.composite), torch.from_numpy(each.mask)
        own = (torch.from_numpy(each.own[0]), torch.from_numpy(each.own[1]))
        plain = structure(name, each, each.composite, remover, number)
        found.append(transfer_sample(base, clip, mask, plain, own, DILATE))
    return found


def transfer(
    seed: int,
    samples: Sequence[dict[str, Tensor]],
    jigsaw: Jigsaw | None,
    steps: int,
    batch: int,
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
        config(steps, batch, seed),
        out=Work().directory("run"),
        trainable=lambda name: True,
    )
    both.requires_grad_(False).eval()
    return base, branch


def shown(pair: tuple[Any, Any], jigsaw: Jigsaw | None, number: int) -> Puzzle:
    image, where = (torch.from_numpy(each) for each in pair)
    if jigsaw is None:
        return Puzzle(*centre_object(image, where), False, 0, 0)
    return jigsaw(image, where, np.random.default_rng(number), smallest=image.shape[-1] // 8)  # a token


@torch.no_grad()
def drawn(
    base: Base, branch: ControlBranch, tests: Sequence[TexturedObject], twins: Sequence[Tensor], which: str, **how: Any
) -> Tensor:
    """Draw the tests with their own or a cross reference [tests, 3, frames, res, res]."""
    found = [
        conditions(
            base, torch.from_numpy(each.composite), torch.from_numpy(each.mask), plain,
            shown(getattr(each, which), how["jigsaw"], number), DILATE,
        )
        for number, (each, plain) in enumerate(zip(tests, twins, strict=True))
    ]  # fmt: skip
    generator, settings = torch.Generator().manual_seed(how["seed"]), SamplerSettings(steps=how["steps"], guidance=1.0)
    parts = []
    for start in range(0, len(found), TOGETHER):
        some = Conditions(*(torch.cat(each) for each in zip(*found[start : start + TOGETHER], strict=True)))
        parts.append(sample_latents(base, branch, some, settings, generator))
    return torch.cat(parts)


def measured(images: Tensor, tests: Sequence[TexturedObject], which: str) -> dict[str, list[float]]:
    """Return all metrics of images [tests, 3, res, res], by test."""
    references = [
        judge.unit(centre_object(*(torch.from_numpy(part) for part in getattr(each, which)))[0]) for each in tests
    ]
    found = []
    for number, (image, each) in enumerate(zip(images, tests, strict=True)):
        ours, truth, mask = judge.unit(image), judge.unit(each.composite[0]), each.mask[0, 0] > 0
        others = [references[(number + step) % len(tests)] for step in range(1, min(OTHERS, len(tests) - 1) + 1)]
        hole = dilate_mask(torch.from_numpy(each.mask), DILATE)[0, 0].numpy() > 0
        mean, contrast = judge.colour_error(ours, mask, truth, mask)
        found.append({
            "PSNR": judge.psnr(ours, truth, mask),
            "colour mean": mean,
            "contrast": contrast,
            "1 - GLCM": 1 - judge.glcm_similarity(ours, mask, truth, mask),
            "spectrum": judge.spectrum_error(ours, mask, truth, mask),
            "leak": judge.leak(ours, mask, [references[number], *others], 0),
            "background": judge.psnr(ours, truth, ~hole),
        })  # fmt: skip
    return {name: [each[name] for each in found] for name in found[0]}


def means(found: dict[str, list[float]]) -> list[float]:
    return [fmean(each) for each in found.values()]


def of_references(size: Size) -> list[tuple[str, str, Sequence[TexturedObject]]]:
    """Return the name, the kind and the solids of each test of E2; fewer solids of unseen shapes, without a claim."""
    counts = {"test": size.judged, "unseen": size.tests}
    return [(name, which, solids(part, counts[part], 1, LARGER)) for name, (which, part) in REFERENCES.items()]


def copied(work: Path, size: Size, seed: int, kind: str) -> dict[str, dict[str, list[float]]]:
    """Run E2: a model trained on unchanged or jigsawed references, with own and cross references."""
    jigsaw = Jigsaw() if kind == JIGSAW else None
    samples = lessons(work, size, TRUE, 1, LARGER)
    base, branch = transfer(seed, samples, jigsaw, size.copying, size.copying_batch)
    found = {}
    for name, which, tests in of_references(size):
        twins = [structure(TRUE, each, each.composite, None, 0) for each in tests]
        images = drawn(base, branch, tests, twins, which, jigsaw=jigsaw, seed=seed, steps=size.copied)
        found[name] = measured(images[:, :, 0], tests, which)
    return found


def unlearnt(size: Size, kind: str) -> dict[str, list[float]]:
    """Evaluate baselines without training, on an image of the solid in another texture, as means.

    The image is left unchanged, or its object gets the mean and the standard deviation of the reference's colours.
    """
    found = {}
    for name, which, tests in of_references(size):
        changed = [recoloured(each, which) if kind == COLOURS else torch.from_numpy(each.donor[0]) for each in tests]
        found[name] = means(measured(batched(changed), tests, which))
    return found


def recoloured(each: TexturedObject, which: str) -> Tensor:
    """Give a solid in another texture the mean and standard deviation of its reference's colours [3, res, res]."""
    image, mask = torch.from_numpy(each.donor[0]), torch.from_numpy(each.mask[0])
    shown, where = (torch.from_numpy(part) for part in getattr(each, which))
    ours, theirs = image[:, mask[0] > 0], shown[:, where[0] > 0]  # [3, pixels]
    mean, deviation = (part.view(3, 1, 1) for part in (ours.mean(dim=1), ours.std(dim=1)))
    other, spread = (part.view(3, 1, 1) for part in (theirs.mean(dim=1), theirs.std(dim=1)))
    changed = (image - mean) / deviation.clamp_min(ABOVE) * spread + other
    return torch.where(mask > 0, changed.clamp(-1, 1), image)


def structured(work: Path, size: Size, seed: int, name: str) -> dict[str, dict[str, list[float]]]:
    """Run E4: cross references, with structure inputs computed from the solid in another texture.

    A model trained on the remover's structure is also tested with the true one.
    """
    remover = remover_of(work, size, 0)
    base, branch = transfer(seed, lessons(work, size, name), Jigsaw(), size.structure, size.batch)
    tests, found = solids("test", size.tests), {}
    for title, shows in {name: name, BETTER: TRUE}.items() if name == REMOVER else ((name, name),):
        twins = [structure(shows, each, each.donor, remover, number) for number, each in enumerate(tests)]
        images = drawn(base, branch, tests, twins, "cross", jigsaw=Jigsaw(), seed=seed, steps=size.drawing)
        found[title] = measured(images[:, :, 0], tests, "cross")
    return found


def moving(work: Path, size: Size) -> dict[str, list[float]]:
    """Return the warp error of a network trained on clips, when it draws a clip and when it draws single frames.

    The warp error of the ground truth, in which light moves, is reported as well. An image without texture has a low
    warp error too, so the standard deviation of the object's colours is reported beside it.
    """
    base, branch = transfer(0, lessons(work, size, TRUE, FRAMES), Jigsaw(), size.branch // 2, size.batch)
    tests = solids("test", size.tests, FRAMES)
    how = {"jigsaw": Jigsaw(), "steps": size.drawing}
    clips = [torch.from_numpy(each.composite).movedim(1, 0) for each in tests]
    frames = [
        [each._replace(composite=each.composite[n : n + 1], mask=each.mask[n : n + 1]) for each in tests]
        for n in range(FRAMES)
    ]
    twins = [structure(TRUE, each, each.composite, None, 0) for each in tests]
    one_by_one = [
        drawn(base, branch, part, [each[:, n : n + 1] for each in twins], "cross", seed=n, **how)
        for n, part in enumerate(frames)
    ]
    found = {
        "the truth": batched(clips),
        "clips": drawn(base, branch, tests, twins, "cross", seed=0, **how),
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

    def velocity(self, z_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the velocity; all conditions are ignored."""
        return base_of(self.network).velocity(z_t, t, torch.ones_like(z_t[:, :, :1]))


def unconditional(work: Path, size: Size, seed: int) -> dict[str, float]:
    """Run E5 where distillation can gain: images of the base, and those of a student of three steps."""
    teacher = Drawing(frozen_base(work, size))
    shape = [{"foreground": torch.zeros(3, 1, RES, RES)}] * size.solids  # all inputs of the student here
    how = config(size.matching, size.batch, seed, 5e-5)  # with solids of the training split
    student, _ = distil(teacher, shape, how, Work().directory("run"))  # type: ignore[arg-type]
    truth = batched([torch.from_numpy(each.composite).movedim(1, 0) for each in solids("test", DRAWN * size.tests)])
    start = torch.randn(truth.shape, generator=noise(seed))

    @torch.no_grad()
    def distance(network: Any, steps: int) -> float:
        images = [euler(lambda z, t: network.velocity(z, t, z), part, steps) for part in start.split(64)]
        return energy_distance(torch.cat(images).flatten(1), truth.flatten(1))

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
    twins = [structure(TRUE, each, each.composite, None, 0) for each in tests]
    images = drawn(base, branch.eval(), tests, twins, "cross", jigsaw=Jigsaw(), seed=seed, steps=size.drawing)
    found = {name: fmean(each) for name, each in measured(images[:, :, 0], tests, "cross").items()}
    last = [point.loss for point in log.train][-max(1, len(log.train) // 5) :]
    parameters = float(sum(each.numel() for each in branch.parameters()))
    return found | {"loss": fmean(last), "parameters": parameters}


# The experiment


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    run.data = (
        f"{size.solids} textured solids of {RES} x {RES} pixels to learn from, and of {LARGER} x {LARGER} in E2; "
        f"{size.judged} to judge E1 and E2 on, else {size.tests}"
    )
    if run.variant != "further":
        of_remover(run, size)
        of_structure(run, size, STRUCTURES[:2], size.seeds)
        of_jigsaw(run, size)
    if run.variant:
        of_students(run, size)
        of_layers(run, size)
        of_base(run, size)
        of_clips(run, size)
    if run.variant == "further":
        of_structure(run, size, STRUCTURES, 1)


def of_remover(run: Run, size: Size) -> None:
    seeds = range(size.removers)
    found = [run.arm(f"remover, {seed}", removed, run.work, size, seed) for seed in seeds]
    rows = [[name, *(fmean(fmean(each[part][name]) for each in found) for part in JUDGED)] for name in found[0]["test"]]
    heads = ["", "dB", "dB, unseen shape and texture"]
    run.table(f"E1: plain twins, PSNR inside the mask against the true ones, {len(seeds)} seeds", heads, rows)
    psnr = {name: np.array([each["test"][name] for each in found]) for name in found[0]["test"]}
    baseline = max(("luminance", "constant"), key=lambda name: psnr[name].mean())
    gain = Measured.over_seeds_and_items(psnr["3 steps"] - psnr[baseline])
    run.main("E1: remover over luminance or a constant", "at least 4 dB", gain, gain.at_least(4))


def of_students(run: Run, size: Size) -> None:
    found = [run.arm(f"student, {seed}", distilled, run.work, size, seed) for seed in range(size.seeds)]
    rows = [[name, *(fmean(fmean(each[part][name]) for each in found) for part in JUDGED)] for name in found[0]["test"]]
    run.table("E5: plain twins, PSNR inside the mask against the true ones", ["", "dB", "dB, unseen"], rows)
    psnr = {name: np.array([each["test"][name] for each in found]) for name in found[0]["test"]}
    behind = Measured.over_seeds_and_items(psnr["50 steps"] - psnr["student, 3 steps"])
    run.further("E5: 50-step teacher less the 3-step student", "at most 1 dB", behind, behind.at_most(1))
    ahead = Measured.over_seeds_and_items(psnr["student, 3 steps"] - psnr["3 steps"])
    run.further("E5: student over the teacher's 3 steps", "above 0 dB", ahead, ahead.at_least(ABOVE))


def of_base(run: Run, size: Size) -> None:
    both = [run.arm(f"unconditional, {seed}", unconditional, run.work, size, seed) for seed in range(size.seeds)]
    rows = [[name, fmean(each[name] for each in both)] for name in both[0]]
    run.table("E5: what the base draws from noise, energy distance to unseen composites", ["", "distance"], rows)
    ratio = Measured.over_seeds([each["student, 3 steps"] / each["3 steps"] for each in both])
    run.further(
        "E5: of the base, distance of student over the teacher's 3 steps", "below 1", ratio, ratio.at_most(1 - ABOVE)
    )


def of_jigsaw(run: Run, size: Size) -> None:
    def copies(kind: str, seed: int) -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = run.arm(f"{kind}, {seed}", copied, run.work, size, seed, kind)
        return found

    if not run.quick:
        pilot = copies(RAW, 0)
        gap = Measured.over_seeds_and_items([np.subtract(pilot["own"]["PSNR"], pilot["cross"]["PSNR"])])
        name = "E2: a pilot of unchanged references copies them: own - cross"
        run.premise(name, f"at least {COPIES} dB", gap, gap.at_least(COPIES))
        image = run.arm(IDENTITY, unlearnt, size, IDENTITY)["own"]
        over = fmean(pilot["own"]["PSNR"]) - dict(zip(pilot["own"], image, strict=True))["PSNR"]
        run.premise("E2: PSNR of the pilot with own references, over the unchanged image", "above 0 dB", over, over > 0)
    seeds = range(1, 1 + size.jigsaws)
    run.freeze(
        "differences of raw and jigsawed references, mean over seeds and test solids", seeds,
        steps=size.copying, batch=size.copying_batch, pixels=LARGER, solids=size.solids, tests=size.judged, lr=2e-3,
    )  # fmt: skip
    found = {kind: [copies(kind, seed) for seed in seeds] for kind in (RAW, JIGSAW)}
    rows = [
        [kind, which, *np.mean([means(each[which]) for each in found[kind]], axis=0).tolist()]
        for kind in found
        for which in REFERENCES
    ]
    for kind in (IDENTITY, COLOURS):
        without = run.arm(kind, unlearnt, size, kind)
        rows += [[kind, which, *without[which]] for which in REFERENCES]
    heads = ["trained on", "judged on", *found[RAW][0]["own"]]
    run.table(f"E2: references as they are, or jigsawed, {len(seeds)} seeds, {size.judged} solids", heads, rows)
    bars = {kind: [row[2] for row in rows if row[0] == kind] for kind in (*found, IDENTITY, COLOURS)}
    run.figure("refacade-references", Bars("reference", "PSNR of the object, dB", bars, tuple(REFERENCES)))

    def values(kind: str, which: str, name: str) -> Any:  # [seeds, solids]
        return np.array([each[which][name] for each in found[kind]])

    gaps = {kind: values(kind, "own", "PSNR") - values(kind, "cross", "PSNR") for kind in found}
    copies_too = Measured.over_seeds_and_items(gaps[RAW])
    run.further("E2: gap of unchanged references, own - cross", "above 0 dB", copies_too, copies_too.at_least(ABOVE))
    smaller = Measured.over_seeds_and_items(gaps[RAW] - 1.5 * gaps[JIGSAW])
    run.main("E2: gap of raw less 1.5 times that of jigsaw", "at least 0 dB", smaller, smaller.at_least(0))
    raw, cut = (values(kind, "cross", "contrast") for kind in (RAW, JIGSAW))
    lower = Measured.over_seeds_and_items((raw - cut) / raw.mean(axis=1, keepdims=True))
    run.main("E2: error of contrast on cross references, lower by", "at least 0.05", lower, lower.at_least(0.05))
    less = Measured.over_seeds_and_items(values(RAW, "cross", "leak") - values(JIGSAW, "cross", "leak"))
    run.further("E2: structure that leaks, raw less jigsaw", "above 0", less, less.at_least(ABOVE))


TEXTURE = ("contrast", "1 - GLCM", "spectrum")


def of_structure(run: Run, size: Size, structures: Sequence[str], seeds: int) -> None:
    found: dict[str, list[dict[str, list[float]]]] = {}
    for name in structures:
        for seed in range(seeds):
            for title, each in run.arm(f"{name}, {seed}", structured, run.work, size, seed, name).items():
                found.setdefault(title, []).append(each)
    names = list(found["canny"][0])
    rows = [[name, *np.mean(list(map(means, each)), axis=0).tolist()] for name, each in found.items()]
    run.table(f"E4: cross references, by the structure condition, {seeds} seeds", ["structure", *names], rows)

    def over(name: str) -> Measured:
        """Return the texture errors of the plain twin relative to another structure: the geometric mean of three."""
        both = zip(found[REMOVER], found[name], strict=True)
        ratios = [[np.log(fmean(ours[m]) / fmean(theirs[m])) for m in TEXTURE] for ours, theirs in both]
        return Measured.over_seeds([float(np.mean(each)) for each in ratios]).exp()

    if run.variant != "further":
        edges = over("canny")
        run.main("E4: texture error of the plain twin over edges", "at most 0.9", edges, edges.at_most(0.9))
        return
    others = {name: over(name) for name in found if name not in (TRUE, BETTER, REMOVER)}
    closest = max(others, key=lambda name: others[name].figure)
    best = together([each.at_most(1 - ABOVE) for each in others.values()])
    nearest = f"{others[closest]} of {closest}"
    run.further("E4: the plain twin is best: its texture error over the closest other's", "below 1", nearest, best)


def of_layers(run: Run, size: Size) -> None:
    sensitive = run.arm("sensitivity", planned, run.work, size)
    rows = [[layer, *each] for layer, each in enumerate(zip(sensitive["output"], sensitive["loss"], strict=True))]
    run.table("E3: what a push at each layer changes", ["layer", "output", "loss"], rows)
    found = {
        name: [
            run.arm(f"{name}, {seed}", beside, run.work, size, seed, name, sensitive["output"])
            for seed in range(size.seeds if name == "every second" else 1)
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
    raise SystemExit(
        main(experiment, quick="few steps and solids, one seed", further="only E3, E5, clips and the rest of E4")
    )
