"""What trains: the base, the remover and the control branch by flow matching, the remover once more by distillation.

    z_t = (1 - t) z_0 + t eps,  t ~ U(0, 1)        L = | v(z_t, t, ...) - (eps - z_0) |^2, a mean over elements

Of the transfer model the branch alone trains, and the reference is the object's own first frame, jigsawed: nobody needs
pictures of one object in two textures.

Distribution matching distillation (DMD), of a teacher to a student of few steps:

    x = G(z), three steps, a gradient through the last;  x_t = (1 - t) x + t eps
    mu_r = x_t - t v_teacher(x_t),  mu_f = x_t - t v_fake(x_t)
    g = (mu_f - mu_r) / mean |x - mu_r|            L = 1/2 | x - sg(x - g) |^2;  v_fake by flow matching on x

g says where to go only while the fake keeps up with what the student draws, so the fake learns at a higher rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lamella.errors import MethodError, TrainingError
from lamella.methods.refacade.base import Base
from lamella.methods.refacade.conditions import control, dilated, mask_latent, reference
from lamella.methods.refacade.flow import WHOLE, Length, flow_loss, noised, task
from lamella.methods.refacade.jigsaw import Jigsaw, Puzzle, centred
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.remover import MOST, STEPS, TextureRemover, euler
from lamella.train import TrainConfig, TrainingLog, adamw, fit

TRANSFER = TrainConfig(steps=18_000, lr=1e-5, schedule="constant", warmup=0, batch=4)
REMOVAL = TrainConfig(steps=18_000, lr=1e-5, schedule="constant", warmup=0, batch=4)
DISTILLING = TrainConfig(steps=300, lr=1e-5, schedule="constant", warmup=0, batch=4, log_every=5)
FASTER = 10.0  # the fake's learning rate over the student's
NOISES = 64  # of a clip, drawn once, as plain twins for training


# The remover


class RemoverLoss:
    """From a foreground to its plain twin."""

    def __init__(self, length: Length = WHOLE) -> None:
        self.length = length

    def __call__(self, remover: TextureRemover, batch: Mapping[str, Tensor]) -> Tensor:
        seen = self.length(batch)
        return flow_loss(lambda z, t: remover.velocity(z, t, seen["foreground"]), seen["untextured"])


def train_remover(
    remover: TextureRemover, samples: Sequence[Mapping[str, Tensor]], config: TrainConfig, out: Path, alone: float = 0.0
) -> TrainingLog:
    """Train a remover on pairs of latents ``foreground`` and ``untextured`` [C, F', h, w], in place."""
    settings = {"alone": alone}
    return fit(
        remover, samples, task(RemoverLoss(Length(alone))), config, out=out, trainable=remover.trains, settings=settings
    )


# The control branch


def transfer_sample(
    base: Base, frames: Tensor, mask: Tensor, z_unt: Tensor, own: tuple[Tensor, Tensor], dilate: int
) -> dict[str, Tensor]:
    """A clip as the branch learns from it; its reference is jigsawed anew at each step.

    Args:
        own: its first frame's object on white, and where that is.
    """
    hole = dilated(mask, dilate)
    background, clean = base.encode(frames * (1 - hole)), base.encode(frames)
    told = mask_latent(hole, base.spatial, clean.shape[1]).to(clean)
    return {
        "clean": clean.cpu(),
        "c": control(background, z_unt.to(clean), told).cpu(),
        "own": own[0][:, None],
        "where": own[1][:, None],
    }


class TransferLoss:
    """The branch's loss on clips whose own texture is the reference.

    Args:
        base: frozen.
        jigsaw: of the reference; None shows it as it is, in the middle of white.
        length: see there.
    """

    def __init__(self, base: Base, jigsaw: Jigsaw | None, length: Length = WHOLE) -> None:
        self.base, self.jigsaw, self.length = base, jigsaw, length

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        base = self.base
        seen = self.length(batch)
        drawn = np.random.default_rng(int(torch.randint(2**62, ())))  # torch's state is in the checkpoint
        pairs = zip(seen["own"][:, :, 0].cpu(), seen["where"][:, :, 0].cpu(), strict=True)
        puzzles = [self.shown(image, where, drawn) for image, where in pairs]
        told = [referred(base, puzzle) for puzzle in puzzles]
        ref, c_r = (torch.stack(each) for each in zip(*told, strict=True))
        branch = next(each for each in model.modules() if isinstance(each, ControlBranch))
        with branch.attached(base.network, seen["c"], c_r):
            return flow_loss(lambda z, t: base.velocity(z, t, ref), seen["clean"])

    def shown(self, image: Tensor, where: Tensor, drawn: np.random.Generator) -> Puzzle:
        """The reference of this time."""
        if self.jigsaw is None:
            return Puzzle(*centred(image, where), False, 0, 0)
        return self.jigsaw.for_training(image, where, drawn, smallest=self.base.token)


def referred(base: Base, puzzle: Puzzle) -> tuple[Tensor, Tensor]:
    """A reference as frame 0 [C, 1, h, w] and as c_r [channels, 1, h, w]."""
    shown = base.encode(puzzle.image[None])
    return shown, reference(shown, mask_latent(puzzle.mask[None], base.spatial, 1).to(shown))


def train_branch(
    base: Base,
    branch: ControlBranch,
    samples: Sequence[Mapping[str, Tensor]],
    config: TrainConfig,
    out: Path,
    *,
    jigsaw: Jigsaw | None = Jigsaw(),  # noqa: B008, frozen
    alone: float = 0.0,
) -> TrainingLog:
    """Train a branch, in place; the base stays as it is."""
    base.network.requires_grad_(False)
    settings = {"base": base.digest, "jigsaw": None if jigsaw is None else vars(jigsaw), "alone": alone}
    loss = TransferLoss(base, jigsaw, Length(alone))
    return fit(
        branch, samples, task(loss, (base.network,)), config, out=out, trainable=lambda name: True, settings=settings
    )


# Distillation


class Pair(nn.Module):
    """A student, and the fake that follows what the student draws.

    Args:
        teacher: both begin as it.
    """

    def __init__(self, teacher: TextureRemover) -> None:
        super().__init__()
        self.student, self.fake = copy.deepcopy(teacher), copy.deepcopy(teacher)

    def trains(self, name: str) -> bool:
        """Which parameters learn."""
        return self.student.trains(name.partition(".")[2])


class Distillation:
    """DMD's two losses in one: their gradients meet nowhere.

    Args:
        teacher: stays as it is.
        steps: of the student.
    """

    def __init__(self, teacher: TextureRemover, steps: int = STEPS) -> None:
        self.teacher, self.steps = teacher, steps

    def __call__(self, pair: Pair, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        told = batch["foreground"]
        x = euler(lambda z, t: pair.student.velocity(z, t, told), torch.randn_like(told), self.steps, True)
        with torch.no_grad():
            x_t, t, _ = noised(x)
            g = self.direction(pair.fake, x, x_t, t, told)
        matching = 0.5 * (x - (x - g).detach()).square().mean()
        fake = flow_loss(lambda z, t: pair.fake.velocity(z, t, told), x.detach())
        return matching + fake, {"matching": g.abs().mean(), "fake": fake.detach()}

    def direction(self, fake: TextureRemover, x: Tensor, x_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """g, by which the fake's prediction of clean data is away from the teacher's."""
        share = t.view(-1, *[1] * (x.ndim - 1))
        mu_r = x_t - share * self.teacher.velocity(x_t, t, told)
        mu_f = x_t - share * fake.velocity(x_t, t, told)
        scale = (x - mu_r).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (mu_f - mu_r) / scale.clamp_min(1e-6)


def at_two_rates(
    pair: Pair, trained: Mapping[str, nn.Parameter], config: TrainConfig, faster: float
) -> torch.optim.Optimizer:
    """AdamW, by which the fake learns so many times as fast as the student."""
    groups = []
    for part, rate in (("student.", 1.0), ("fake.", faster)):
        own = adamw(pair, {name: each for name, each in trained.items() if name.startswith(part)}, config)
        groups += [group | {"lr": rate} for group in own.param_groups]
    return torch.optim.AdamW(groups, lr=1.0, betas=config.betas)


def distil(
    teacher: TextureRemover,
    samples: Sequence[Mapping[str, Tensor]],
    config: TrainConfig,
    out: Path,
    steps: int = STEPS,
    faster: float = FASTER,
) -> tuple[TextureRemover, TrainingLog]:
    """A student of so many steps on latents ``foreground`` [C, F', h, w], and the log of its training.

    Args:
        faster: the fake's learning rate over the student's, which is the config's. At one rate the fake lags behind
            what the student draws, and leads it away from the teacher. DMD2 gives the fake five updates for each of the
            student's instead, and each such step costs more than three of these.

    Raises:
        MethodError: for a number of steps or a rate out of range.
        TrainingError: when there is nothing to learn from.
    """
    if not 1 <= steps <= MOST:
        raise MethodError(f"removal {steps}: give 1 to {MOST} steps")
    if not 0 < faster < math.inf:
        raise MethodError(f"faster {faster:g}: give the fake's learning rate over the student's, above 0")
    if not samples:
        raise TrainingError("there are no objects to distil on: give some")
    pair = Pair(teacher)
    teacher.requires_grad_(False)
    loss = Distillation(teacher, steps)
    log = fit(
        pair, samples, task(loss, (teacher,)), config, out=out, trainable=pair.trains,
        optimizer=partial(at_two_rates, faster=faster), settings={"student": steps, "faster": faster},
    )  # fmt: skip
    pair.student.steps = steps
    return pair.student.eval(), log
