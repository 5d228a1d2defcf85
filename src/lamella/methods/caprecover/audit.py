"""The class audit: every cut, attacker and defence, with attackers who know the defence and attackers who do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lamella.data import Captioned, Encoded, Lazy, batches
from lamella.errors import CalibrationError
from lamella.files import Finished, Work
from lamella.methods.caprecover.attackers import ATTACKERS, AttackerKind, LinearProbe, nearest
from lamella.methods.caprecover.convergence import HELD_OUT, LONGEST, Strength, train_to_convergence
from lamella.methods.caprecover.guard import LinkDefence, scales
from lamella.methods.caprecover.victim import Victim
from lamella.progress import tracker
from lamella.train import TrainConfig, supervised

RATES = (1e-2, 1e-3)  # at the published one, 1e-4, attackers with few parameters need tens of thousands of steps
BATCH = 64
ALIGNED = 0.5  # weight of the published alignment with text vectors
EVALUATION_REQUEST = 2**62  # first request number of the evaluation; training uses smaller ones


@dataclass(frozen=True)
class AuditData:
    """Training data of the attackers and test data of the audit.

    Attributes:
        train: features of each training image, by cut, loaded on access.
        train_labels: classes of the training images [images].
        test: features of each test image, by cut, loaded on access.
        test_labels: classes of the test images [images].
        scale: standard deviation of the features, by cut.
    """

    train: Mapping[str, Sequence[Tensor]]
    train_labels: Tensor
    test: Mapping[str, Sequence[Tensor]]
    test_labels: Tensor
    scale: Mapping[str, float]

    @classmethod
    def of(
        cls,
        victim: Victim,
        train: Sequence[Captioned],
        test: Sequence[Captioned],
        cuts: Sequence[str],
        work: Work = Work(),
        depends: Any = None,
    ) -> AuditData:
        """Run the victim once on all images and record its features.

        Args:
            victim: the split model.
            train: the attacker's images.
            test: images on which attackers are evaluated.
            cuts: names of the cuts.
            work: folder in which an interrupted run finds the features recorded so far.
            depends: JSON values that identify the victim and the images.

        Raises:
            CalibrationError: for images without classes, or too few of them.
        """
        if any(each.label is None for each in (*train, *test)):
            raise CalibrationError(
                "these images have no classes: give a folder with one subfolder per class, or recover captions"
            )
        if len(train) < 2 * HELD_OUT or not test:
            raise CalibrationError(
                f"{len(train)} images for the attacker and {len(test)} for the evaluation are too few: give more"
            )
        ours = record_features(victim, train, cuts, work, "attacker", depends)
        theirs = record_features(victim, test, cuts, work, "judge", depends)
        labels = [torch.tensor([each.label for each in part]) for part in (train, test)]
        return cls(ours, labels[0], theirs, labels[1], scales(ours))

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(torch.cat([self.train_labels, self.test_labels]).max()) + 1

    @property
    def majority(self) -> float:
        """The accuracy of always predicting the most frequent class of the training images."""
        longest = self.train_labels.bincount().argmax()
        return float((self.test_labels == longest).double().mean())

    def shuffled(self, seed: int) -> AuditData:
        """Assign the training features to other images: attackers trained on them can only learn the prior.

        Args:
            seed: random seed of the permutation.
        """
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(seed))
        return replace(self, train={cut: Lazy(order.tolist(), each.__getitem__) for cut, each in self.train.items()})


def record_features(
    victim: Victim,
    images: Sequence[Captioned],
    cuts: Sequence[str],
    work: Work = Work(),
    name: str = "features",
    depends: Any = None,
) -> dict[str, Sequence[Tensor]]:
    """Record the features of each image at each cut; those of one batch at one cut are in memory at once.

    Args:
        victim: the split model.
        images: the images.
        cuts: names of the cuts.
        work: folder in which an interrupted run finds the features recorded so far.
        name: name of the recording.
        depends: JSON values that identify the victim and the images.

    Returns:
        The features of each image, by cut.
    """

    def encode(some: list[Captioned], keep: Callable[[str, Tensor], None]) -> None:
        victim.pass_features(victim.prepare(some), cuts, keep)

    return dict(Encoded.columns(images, encode, cuts, work, name, [list(cuts), depends], BATCH))


class AttackLoss:
    """The loss of an attacker on the transmitted features, with fresh noise of the defence in every step.

    Args:
        guard: the defence.
        cut: name of the cut.
        scale: standard deviation of the features at the cut.
        texts: a vector for each class [classes, width] with which the first layer of a linear attacker is aligned.
    """

    def __init__(self, guard: LinkDefence, cut: str, scale: float, texts: Tensor | None = None) -> None:
        self.guard, self.cut, self.scale, self.texts = guard, cut, scale, texts

    def __call__(self, attacker: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of an attacker on a batch of features ``x`` and classes ``y``."""
        request = int(torch.randint(EVALUATION_REQUEST, ()))
        sent = self.guard.send(self.cut, batch["x"], self.scale, request)
        if self.texts is None or not isinstance(attacker, LinearProbe):
            return cross_entropy(attacker(sent), batch["y"])
        v = attacker.first(attacker.standardise(sent).flatten(1))
        generator = cosine_similarity(v, self.texts[batch["y"]]).mean()
        return cross_entropy(attacker.second(v), batch["y"]) - ALIGNED * generator


class TrainedAttacker(NamedTuple):
    """An attacker with the length of its training.

    Attributes:
        model: the attacker, in evaluation mode.
        strength: how long it was trained.
    """

    model: nn.Module
    strength: Strength


def train_attacker(
    sets: AuditData,
    cut: str,
    attacker: AttackerKind,
    guard: LinkDefence,
    config: TrainConfig,
    out: Path,
    texts: Tensor | None = None,
) -> TrainedAttacker:
    """Train an attacker who knows the defence until it stops improving on held-out images.

    Args:
        sets: the data.
        cut: name of the cut.
        attacker: kind of attacker.
        guard: the defence.
        config: training configuration; see :func:`lamella.methods.caprecover.convergence.train_to_convergence`.
        out: folder for checkpoints.
        texts: a vector for each class [classes, width], see :class:`AttackLoss`.
    """
    features, labels = sets.train[cut], sets.train_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rank = {} if texts is None or attacker != "linear" else {"rank": texts.shape[1]}
        model = ATTACKERS[attacker](features[0].shape, sets.classes, **rank)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed)).tolist()
    strength = train_to_convergence(
        model,
        Lazy(order, lambda row: {"x": features[row], "y": labels[row]}),
        supervised(AttackLoss(guard, cut, sets.scale[cut], texts)),
        replace(config, save_every=LONGEST),
        out,
        rates=RATES,
        trainable=lambda name: True,
        settings={"guard": str(guard), "cut": cut, "attacker": attacker},
    )
    return TrainedAttacker(model.eval(), strength)


@torch.no_grad()
def accuracy(model: nn.Module, sets: AuditData, cut: str, guard: LinkDefence) -> float:
    """Return the accuracy of an attacker on test images, with request numbers not used in training.

    Args:
        model: the attacker.
        sets: the data.
        cut: name of the cut.
        guard: the defence.
    """
    right = 0
    parts = zip(batches(sets.test[cut], BATCH, torch.stack), sets.test_labels.split(BATCH), strict=True)
    for number, (features, labels) in enumerate(parts):
        sent = guard.send(cut, features, sets.scale[cut], EVALUATION_REQUEST + number)
        right += int((model(sent).argmax(1) == labels).sum())
    return right / len(sets.test_labels)


def run_attacks(
    sets: AuditData,
    *,
    cuts: Sequence[str],
    attackers: Sequence[AttackerKind],
    guards: Sequence[LinkDefence],
    seeds: Sequence[int],
    config: TrainConfig,
    work: Work,
    depends: Any,
    texts: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate all attackers; an interrupted run resumes after the last finished one.

    Args:
        sets: the data.
        cuts: names of the cuts.
        attackers: kinds of attackers.
        guards: the defences.
        seeds: random seeds of the attackers.
        config: training configuration.
        work: folder for checkpoints and results.
        depends: JSON values that identify the data and the configuration.
        texts: a vector for each class [classes, width], see :class:`AttackLoss`.

    Returns:
        For each cut, attacker and defence the accuracy of attackers who know the defence (``adaptive``) and who do not
        (``static``), with an interval over seeds; and the mean number of steps of the former, and whether all of them
        had stopped improving (``converged``).
    """
    known = Finished(work.journal("attackers"), depends)
    found: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    folder = work.directory("attackers")

    def attack(cut: str, attacker: AttackerKind, seed: int) -> dict[str, dict[str, Any]]:
        def of(guard: LinkDefence) -> TrainedAttacker:
            name = f"{cut}-{attacker}-{guard}-{seed}".replace(":", "-")
            return train_attacker(sets, cut, attacker, guard, replace(config, seed=seed), folder / name, texts)

        clean = of(LinkDefence())
        scores = {}
        for guard in guards:
            knows = clean if guard.kind == "none" else of(guard)
            both = {"adaptive": knows, "static": clean}
            shares = {name: accuracy(each.model, sets, cut, guard) for name, each in both.items()}
            scores[str(guard)] = shares | knows.strength._asdict()
        return scores

    with tracker("attacking", len(cuts) * len(attackers) * len(seeds)) as count:
        for cut in cuts:
            for attacker in attackers:
                for seed in seeds:
                    name = f"{cut} {attacker} {seed}"
                    found[cut, attacker, seed] = known.once(name, partial(attack, cut, attacker, seed))
                    count()
    rows = []
    for cut, attacker, guard in product(cuts, attackers, guards):
        each = [found[cut, attacker, seed][str(guard)] for seed in seeds]
        scores = {who: interval([one[who] for one in each]) for who in WHO}
        strength = {"steps": fmean(one["steps"] for one in each), "converged": all(one["converged"] for one in each)}
        rows.append({"cut": cut, "attacker": attacker, "guard": str(guard), **scores, **strength})
    return rows


WHO = ("adaptive", "static")


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds with its 95 % interval by Student's t, and the values.

    Args:
        values: one value per seed.
    """
    mean = float(np.mean(values))
    half = 0.0
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def measure_defences(
    victim: Victim, x: Tensor, labels: Tensor, cuts: Sequence[str], guards: Sequence[LinkDefence]
) -> list[dict[str, Any]]:
    """Measure the cost of each defence at each cut: bytes sent, task accuracy, and change of the output.

    Args:
        victim: the split model.
        x: preprocessed images.
        labels: their classes.
        cuts: names of the cuts.
        guards: the defences.
    """
    plain = victim.output(x)
    rows = []
    for cut in cuts:
        spread, shape = _spread_and_shape(victim, x, cut)
        for guard in guards:

            def link(name: str, values: Tensor, guard: LinkDefence = guard, spread: float = spread) -> Tensor:
                sent = guard.send(name, values, spread, EVALUATION_REQUEST)
                return guard.receive(name, sent, spread, EVALUATION_REQUEST)

            found = victim.output_through(x, [cut], link)
            rows.append(
                {
                    "cut": cut,
                    "guard": str(guard),
                    "shape": list(shape[1:]),
                    "bytes": guard.sent(shape),
                    "ratio": guard.ratio(spread),
                    "output_change": float((found - plain).abs().max()),
                    "task": float((found.argmax(1) == labels).double().mean()) if plain.ndim == 2 else None,
                }
            )
    return rows


def _spread_and_shape(victim: Victim, x: Tensor, cut: str) -> tuple[float, torch.Size]:
    """Return the standard deviation and the shape of the features at a cut, which are not kept."""
    features = victim.features(x, [cut])
    return scales(features)[cut], features[cut].shape


def nearest_accuracy(sets: AuditData, cut: str) -> float:
    """Return the accuracy of the retrieval baseline: the class of the attacker's most similar image.

    Args:
        sets: the data.
        cut: name of the cut.
    """
    near = nearest(sets.train[cut], sets.test[cut])
    return float((sets.train_labels[near] == sets.test_labels).double().mean())


def recommend_cut(
    attacks: Sequence[Mapping[str, Any]],
    links: Sequence[Mapping[str, Any]],
    *,
    max_leak: float,
    max_bytes: float | None,
    max_task_loss: float = 0.01,
) -> dict[str, Any] | None:
    """Return the earliest cut (the least work for the device), with a defence, that satisfies all limits.

    A cut with an attacker that was still improving when its training ended satisfies none.

    Args:
        attacks: results of the attackers, see :func:`run_attacks`.
        links: costs of the defences, see :func:`measure_defences`.
        max_leak: maximum accuracy of the strongest attacker, at the upper end of its interval.
        max_bytes: maximum number of bytes per request; None for no limit.
        max_task_loss: maximum loss of task accuracy.

    Returns:
        The row of ``links`` with its leak, or None if there is none.
    """
    whole = max((row["task"] or 0.0) for row in links)
    for row in links:
        here = [each for each in attacks if (each["cut"], each["guard"]) == (row["cut"], row["guard"])]
        leak = max(each[who]["high"] for each in here for who in WHO)
        is_sure = all(each["converged"] for each in here)
        fits = max_bytes is None or row["bytes"] <= max_bytes
        if is_sure and leak <= max_leak and fits and (row["task"] is None or row["task"] >= whole - max_task_loss):
            return dict(row) | {"leak": leak}
    return None
