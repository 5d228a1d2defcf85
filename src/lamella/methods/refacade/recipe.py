"""Training: the base, the remover and the control branch by flow matching, and distillation of the remover.

    z_t = (1 - t) z_0 + t eps,  t ~ U(0, 1)        L = | v(z_t, t, ...) - (eps - z_0) |^2, a mean over elements

Of the transfer model only the branch is trained, and the reference is the object's own first frame, jigsawed: no images
of one object in two textures are needed.

Distribution matching distillation (DMD), of a teacher to a student of few steps:

    x = G(z), three steps, a gradient through the last;  x_t = (1 - t) x + t eps
    mu_r = x_t - t v_teacher(x_t),  mu_f = x_t - t v_fake(x_t)
    g = (mu_f - mu_r) / mean |x - mu_r|            L = 1/2 | x - sg(x - g) |^2;  v_fake by flow matching on x

g is a valid direction only while the fake follows the student's distribution, so the fake has a higher learning rate.
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
from lamella.methods.refacade.conditions import control, dilate_mask, mask_latent, reference
from lamella.methods.refacade.flow import WHOLE, Length, add_noise, flow_loss, task
from lamella.methods.refacade.jigsaw import Jigsaw, Puzzle, centre_object
from lamella.methods.refacade.modules import ControlBranch
from lamella.methods.refacade.remover import MOST, STEPS, TextureRemover, euler
from lamella.train import TrainConfig, TrainingLog, adamw, fit

TRANSFER = TrainConfig(steps=18_000, lr=1e-5, schedule="constant", warmup=0, batch=4)
REMOVAL = TrainConfig(steps=18_000, lr=1e-5, schedule="constant", warmup=0, batch=4)
DISTILLING = TrainConfig(steps=300, lr=1e-5, schedule="constant", warmup=0, batch=4, log_every=5)
FASTER = 10.0  # learning rate of the fake over that of the student
NOISES = 64  # noises per clip


# The remover


class RemoverLoss:
    """The flow-matching loss of the remover, from a foreground to its untextured version.

    Args:
        length: draws the number of frames of each batch; defaults to all frames.
    """

    def __init__(self, length: Length = WHOLE) -> None:
        self.length = length

    def __call__(self, remover: TextureRemover, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        batch_frames = self.length(batch)
        return flow_loss(lambda z, t: remover.velocity(z, t, batch_frames["foreground"]), batch_frames["untextured"])


def train_remover(
    remover: TextureRemover,
    samples: Sequence[Mapping[str, Tensor]],
    config: TrainConfig,
    out: Path,
    alone: float = 0.0,
) -> TrainingLog:
    """Train a remover on pairs of latents ``foreground`` and ``untextured`` [C, F', h, w], in place.

    Args:
        remover: the remover.
        samples: the pairs.
        config: training settings.
        out: folder of the run.
        alone: fraction of the batches with the first frame only.
    """
    settings, loss = {"alone": alone}, task(RemoverLoss(Length(alone)))
    return fit(remover, samples, loss, config, out=out, trainable=remover.trains, settings=settings)


# The control branch


def transfer_sample(
    base: Base, frames: Tensor, mask: Tensor, z_unt: Tensor, own: tuple[Tensor, Tensor], dilate: int
) -> dict[str, Tensor]:
    """Return a training sample of the branch; its reference is jigsawed again in each step.

    Args:
        base: the video transformer.
        frames: in [-1, 1] [frames, 3, height, width].
        mask: mask of the object [frames, 1, height, width].
        z_unt: latent of the untextured object [C, F', h, w].
        own: the object of the first frame on white, and its mask.
        dilate: r, the dilation of the hole in pixels.
    """
    hole = dilate_mask(mask, dilate)
    background, clean = base.encode(frames * (1 - hole)), base.encode(frames)
    hole_latent = mask_latent(hole, base.spatial, clean.shape[1]).to(clean)
    return {
        "clean": clean.cpu(),
        "c": control(background, z_unt.to(clean), hole_latent).cpu(),
        "own": own[0][:, None],
        "where": own[1][:, None],
    }


class TransferLoss:
    """The loss of the branch on clips whose own texture is the reference.

    Args:
        base: the frozen video transformer.
        jigsaw: jigsaw of the reference; None uses the unchanged object, centred on white.
        length: draws the number of frames of a batch.
    """

    def __init__(self, base: Base, jigsaw: Jigsaw | None, length: Length = WHOLE) -> None:
        self.base, self.jigsaw, self.length = base, jigsaw, length

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        base = self.base
        batch_frames = self.length(batch)
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # torch's state is in the checkpoint
        pairs = zip(batch_frames["own"][:, :, 0].cpu(), batch_frames["where"][:, :, 0].cpu(), strict=True)
        puzzles = [self.reference_of_step(image, where, rng) for image, where in pairs]
        conditions = [reference_condition(base, puzzle) for puzzle in puzzles]
        ref, c_r = (torch.stack(each) for each in zip(*conditions, strict=True))
        branch = next(each for each in model.modules() if isinstance(each, ControlBranch))
        with branch.attached(base.network, batch_frames["c"], c_r):
            return flow_loss(lambda z, t: base.velocity(z, t, ref), batch_frames["clean"])

    def reference_of_step(self, image: Tensor, where: Tensor, rng: np.random.Generator) -> Puzzle:
        """Return the reference of one clip in a training step: its object after the jigsaw, or unchanged.

        Args:
            image: first frame in [-1, 1] [3, height, width].
            where: mask of the object [1, height, width].
            rng: random number generator.
        """
        if self.jigsaw is None:
            return Puzzle(*centre_object(image, where), False, 0, 0)
        return self.jigsaw.for_training(image, where, rng, smallest=self.base.token)


def reference_condition(base: Base, puzzle: Puzzle) -> tuple[Tensor, Tensor]:
    """Return a reference as frame 0 [C, 1, h, w] and as c_r [channels, 1, h, w].

    Args:
        base: the video transformer.
        puzzle: the reference image with its mask.
    """
    latent = base.encode(puzzle.image[None])
    return latent, reference(latent, mask_latent(puzzle.mask[None], base.spatial, 1).to(latent))


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
    """Train a branch in place, with a frozen base.

    Args:
        base: the video transformer.
        branch: the branch.
        samples: samples of :func:`transfer_sample`.
        config: training settings.
        out: folder of the run.
        jigsaw: jigsaw of the reference, or None.
        alone: fraction of the batches with the first frame only.
    """
    base.network.requires_grad_(False)
    settings = {"base": base.digest, "jigsaw": None if jigsaw is None else vars(jigsaw), "alone": alone}
    loss = task(TransferLoss(base, jigsaw, Length(alone)), (base.network,))
    return fit(branch, samples, loss, config, out=out, trainable=lambda name: True, settings=settings)


# Distillation


class StudentAndFake(nn.Module):
    """A student, and the fake network that follows the student's distribution.

    Args:
        teacher: initial weights of both.
    """

    def __init__(self, teacher: TextureRemover) -> None:
        super().__init__()
        self.student, self.fake = copy.deepcopy(teacher), copy.deepcopy(teacher)

    def trains(self, name: str) -> bool:
        """Return whether a parameter is trained."""
        return self.student.trains(name.partition(".")[2])


class DmdLoss:
    """Both losses of DMD; no parameter gets gradients from both.

    Args:
        teacher: the frozen teacher.
        steps: number of steps of the student.
    """

    def __init__(self, teacher: TextureRemover, steps: int = STEPS) -> None:
        self.teacher, self.steps = teacher, steps

    def __call__(self, pair: StudentAndFake, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both losses, and its parts."""
        condition = batch["foreground"]
        x = euler(lambda z, t: pair.student.velocity(z, t, condition), torch.randn_like(condition), self.steps, True)
        with torch.no_grad():
            x_t, t, _ = add_noise(x)
            g = self.direction(pair.fake, x, x_t, t, condition)
        matching = 0.5 * (x - (x - g).detach()).square().mean()
        fake = flow_loss(lambda z, t: pair.fake.velocity(z, t, condition), x.detach())
        return matching + fake, {"matching": g.abs().mean(), "fake": fake.detach()}

    def direction(self, fake: TextureRemover, x: Tensor, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return g, the normalised difference between the fake's and the teacher's predictions of clean data.

        Args:
            fake: the fake network.
            x: samples of the student.
            x_t: noisy samples.
            t: times.
            condition: foregrounds.
        """
        time = t.view(-1, *[1] * (x.ndim - 1))
        mu_r = x_t - time * self.teacher.velocity(x_t, t, condition)
        mu_f = x_t - time * fake.velocity(x_t, t, condition)
        scale = (x - mu_r).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (mu_f - mu_r) / scale.clamp_min(1e-6)


def two_rate_adamw(
    pair: StudentAndFake, trained: Mapping[str, nn.Parameter], config: TrainConfig, faster: float
) -> torch.optim.Optimizer:
    """Create AdamW for a student and a fake, each with its own learning rate.

    Args:
        pair: the two networks.
        trained: the trained parameters by name.
        config: training settings.
        faster: learning rate of the fake over that of the student.
    """
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
    """Train a student of a few steps on latents ``foreground`` [C, F', h, w].

    Args:
        teacher: the teacher.
        samples: the latents.
        config: training settings.
        out: folder of the run.
        steps: number of steps of the student.
        faster: learning rate of the fake over that of the student, which is the config's. At equal rates the fake lags
            behind the student's distribution, and leads it away from the teacher. DMD2 instead takes five updates of
            the fake per update of the student, which costs more than three times as much per step.

    Returns:
        The student, and the log of its training.

    Raises:
        MethodError: for a number of steps or a rate out of range.
        TrainingError: without samples.
    """
    if not 1 <= steps <= MOST:
        raise MethodError(f"removal {steps}: give 1 to {MOST} steps")
    if not 0 < faster < math.inf:
        raise MethodError(f"faster {faster:g}: give the ratio of the learning rates of fake and student, above 0")
    if not samples:
        raise TrainingError("there are no objects to distil on: give at least one")
    pair = StudentAndFake(teacher)
    teacher.requires_grad_(False)
    loss = DmdLoss(teacher, steps)
    log = fit(
        pair, samples, task(loss, (teacher,)), config, out=out, trainable=pair.trains,
        optimizer=partial(two_rate_adamw, faster=faster), settings={"student": steps, "faster": faster},
    )  # fmt: skip
    pair.student.steps = steps
    return pair.student.eval(), log
