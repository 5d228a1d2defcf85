"""What a model still knows of data that it should have forgotten, and what it has kept of the rest.

Read all figures beside those of a model that never saw the data: forgetting is not an accuracy of zero, but no
difference from that model. A forget set that stands out by its low confidence is as visible as one that is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.errors import CalibrationError, MethodError
from lamella.extras import require
from lamella.measure import DISTANCES
from lamella.measure.labelled import Data, batches, is_pair, outputs
from lamella.stack import share

BATCH = 256  # inputs that run together
CONSPICUOUS = 0.1  # of membership: this far below the retrained model, what was forgotten stands out


@dataclass(frozen=True)
class Responses:
    """What a model says to some data, sample by sample.

    Attributes:
        correct: whether the label is the likeliest class; of a sequence, the share of its tokens [samples].
        loss: in nats, of a sequence the mean over its tokens [samples].
        entropy: of the distribution over classes, nats [samples].
        classifier: True where a sample has one label, False for sequences.
    """

    correct: NDArray[np.float64]
    loss: NDArray[np.float64]
    entropy: NDArray[np.float64]
    classifier: bool

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(min(float(self.loss.mean()), 700.0))  # beyond, a float has no number


@torch.no_grad()
def answers(model: nn.Module, data: Data) -> Responses:
    """What a model says to some data, in eval mode; it is not changed.

    Args:
        model: a model or a view.
        data: see :mod:`lamella.measure.labelled`; with labels.

    Raises:
        CalibrationError: for no data, or labels out of range.
    """
    calm = share(model).eval()
    columns: list[list[Tensor]] = [[], [], []]
    classifier, seen = True, 0
    for batch in batches(data, BATCH):
        classifier = is_pair(batch)
        for logits, labels in outputs(calm, batch, seen):
            if labels is None:
                raise CalibrationError("answers are judged by labels: give (inputs, labels)")
            p = torch.log_softmax(logits.double(), dim=-1)
            right = (p.argmax(-1) == labels).double()
            each = (right, cross_entropy(p, labels, reduction="none"), -(p.exp() * p).sum(-1))
            for column, values in zip(columns, each, strict=True):
                column.append((values if classifier else values.mean()[None]).cpu())
            seen += len(labels) if classifier else 1
    if not seen:
        raise CalibrationError("there are no samples to measure on: give some")
    correct, loss, entropy = (torch.cat(column).numpy() for column in columns)
    return Responses(correct, loss, entropy, classifier)


def membership(retain: Responses, test: Responses, forget: Responses) -> float:
    """The share of the forget set that a membership attack takes for training data.

    A logistic regression, both classes weighing the same, on a single feature: the entropy of the model's distribution.
    It learns on retained training samples against test samples. A model that never saw the forget set gives the number
    to compare with, which is not 0.

    Raises:
        LamellaError: when scikit-learn is missing.
    """
    check_scikit_learn()
    from sklearn.linear_model import LogisticRegression

    known = np.concatenate([retain.entropy, test.entropy])[:, None]
    member = np.repeat([1, 0], [len(retain.entropy), len(test.entropy)])
    attack = LogisticRegression(class_weight="balanced").fit(known, member)
    return float(attack.predict(forget.entropy[:, None]).mean())


def check_scikit_learn() -> None:
    """Raise a :class:`LamellaError` when scikit-learn is not installed."""
    require("sklearn", "select", "membership inference")


@torch.no_grad()
def zrf(model: nn.Module, untrained: nn.Module, data: Data) -> float:
    """ZRF: 1 - the mean Jensen-Shannon divergence, in bits, from a model with random weights; 1 for no difference.

    Args:
        untrained: a model of the same architecture that never learnt, such as :func:`untrained_like` makes.
        data: the forget set.
    """
    calm = [share(each).eval() for each in (model, untrained)]
    total = count = 0.0
    for batch in batches(data, BATCH):
        both = [outputs(each, batch) for each in calm]
        for (ours, labels), (theirs, _) in zip(*both, strict=True):
            distance = DISTANCES["jsd"].at_positions(
                ours.float(), torch.log_softmax(theirs.float(), dim=-1), torch.zeros(0) if labels is None else labels
            )
            total += float(distance.double().sum()) / math.log(2)
            count += len(distance)
    if not count:
        raise CalibrationError("there are no samples to measure on: give some")
    return 1 - total / count


def untrained_like(model: Any, seed: int = 0) -> Any:
    """A model of the same architecture with random weights.

    Args:
        model: a transformers model, or any module whose parts can draw their weights anew (``reset_parameters``).
        seed: of the weights; the global random state stays as it was.
    """
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        if hasattr(model, "config"):
            return type(model)(copy.deepcopy(model.config)).to(next(model.parameters()).device).eval()
        fresh = copy.deepcopy(model)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return fresh.eval()
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class Forgetting:
    """The figures of one model.

    Attributes:
        forget, retain, test: accuracy and loss (nats) on each set; None where a set was not given.
        membership: the share of the forget set that looks like training data; None without retained and test data.
        zrf: 1 where the forget set means as little as to random weights; None where that was not asked for.
    """

    forget: dict[str, float]
    retain: dict[str, float] | None = None
    test: dict[str, float] | None = None
    membership: float | None = None
    zrf: float | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        forget: Data,
        retain: Data | None = None,
        test: Data | None = None,
        untrained: nn.Module | None = None,
    ) -> Forgetting:
        """Measure a model.

        Args:
            forget: what it should not know.
            retain: training data that it should still know.
            test: data that it never saw; with them and retained data, membership is measured too.
            untrained: a model with random weights, for ZRF.
        """
        said = {
            name: answers(model, data)
            for name, data in (("forget", forget), ("retain", retain), ("test", test))
            if data is not None
        }
        told = {name: {"accuracy": each.accuracy, "loss": float(each.loss.mean())} for name, each in said.items()}
        share = membership(said["retain"], said["test"], said["forget"]) if len(said) == 3 else None
        distance = None if untrained is None else zrf(model, untrained, forget)
        return cls(told["forget"], told.get("retain"), told.get("test"), share, distance)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Guard:
    """Whether an edit has kept what it must keep.

    Attributes:
        measure: ``accuracy`` of a classifier, ``perplexity`` of a decoder.
        before, after: on the guard's data.
        most: the most that it may lose: so much accuracy, or this share of perplexity on top.
    """

    measure: str
    before: float
    after: float
    most: float

    @classmethod
    def of(cls, model: nn.Module, changed: nn.Module, data: Data, most: float) -> Guard:
        """Compare a changed model with its original on retained data, better such as no edit has seen.

        Raises:
            MethodError: for a loss below 0.
        """
        if not most >= 0:
            raise MethodError(f"max_drop {most}: give the most that may be lost, from 0 on")
        first, second = (answers(each, data) for each in (model, changed))
        measure = "accuracy" if first.classifier else "perplexity"
        return cls(measure, getattr(first, measure), getattr(second, measure), most)

    @property
    def lost(self) -> float:
        return self.before - self.after if self.measure == "accuracy" else self.after / self.before - 1

    @property
    def kept(self) -> bool:
        return self.lost <= self.most

    def __str__(self) -> str:
        moved = f"{self.measure} on retained data goes from {self.before:.4g} to {self.after:.4g}"
        return f"{moved}, {self.lost:+.3g} lost where {self.most:g} may be"


def judged(
    models: Mapping[str, Any], forget: Data, retain: Data | None, test: Data | None, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """The figures of several versions of a model, ``before`` and ``after`` among them, and what must be said of them.

    Args:
        forget, retain, test: see :meth:`Forgetting.of`.
        seed: of the random weights for ZRF.
    """
    untrained = untrained_like(models["before"], seed)
    figures = {
        name: Forgetting.of(each, forget=forget, retain=retain, test=test, untrained=untrained)
        for name, each in models.items()
    }
    notes = []
    after, other = figures["after"].membership, figures["retrained"].membership if "retrained" in figures else None
    if after is not None and other is not None and other - after > CONSPICUOUS:
        notes.append(
            f"Membership is {other - after:.2f} below that of the retrained model: what was forgotten is conspicuous."
        )
    return {name: each.as_dict() for name, each in figures.items()}, notes
