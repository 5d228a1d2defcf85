"""Evaluation of a model on data that it should have forgotten, and on the rest.

Compare all figures with those of a model that never saw the data: the aim of forgetting is not an accuracy of zero, but
no difference from that model. A forget set that stands out by low confidence is as detectable as one that is known.
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

BATCH = 256  # inputs per batch
CONSPICUOUS = 0.1  # of membership: this far below the retrained model, the forget set stands out


@dataclass(frozen=True)
class Responses:
    """The predictions of a model, by sample.

    Attributes:
        correct: whether the label is the most likely class; for a sequence, the fraction of its tokens `[samples]`.
        loss: in nats, for a sequence the mean over its tokens `[samples]`.
        entropy: of the distribution over classes, in nats `[samples]`.
        classifier: True if a sample has one label, False for sequences.
    """

    correct: NDArray[np.float64]
    loss: NDArray[np.float64]
    entropy: NDArray[np.float64]
    classifier: bool

    @property
    def accuracy(self) -> float:
        """The mean accuracy."""
        return float(self.correct.mean())

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(min(float(self.loss.mean()), 700.0))  # larger values overflow a float


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> Responses:
    """Evaluate a model on labelled data, in eval mode; it is not changed.

    Args:
        model: a model or a view.
        data: see :mod:`lamella.measure.labelled`; with labels.

    Raises:
        CalibrationError: for no data, or labels out of range.
    """
    frozen = share(model).eval()
    columns: list[list[Tensor]] = [[], [], []]
    classifier, count = True, 0
    for batch in batches(data, BATCH):
        classifier = is_pair(batch)
        for logits, labels in outputs(frozen, batch, count):
            if labels is None:
                raise CalibrationError("the evaluation needs labels: give (inputs, labels)")
            p = torch.log_softmax(logits.double(), dim=-1)
            correct_ = (p.argmax(-1) == labels).double()
            each = (correct_, cross_entropy(p, labels, reduction="none"), -(p.exp() * p).sum(-1))
            for column, values in zip(columns, each, strict=True):
                column.append((values if classifier else values.mean()[None]).cpu())
            count += len(labels) if classifier else 1
    if not count:
        raise CalibrationError("there are no samples to measure on: give some")
    correct, loss, entropy = (torch.cat(column).numpy() for column in columns)
    return Responses(correct, loss, entropy, classifier)


def membership(retain: Responses, test: Responses, forget: Responses) -> float:
    """Return the fraction of the forget set that a membership attack classifies as training data.

    The attack is a logistic regression with balanced classes on a single feature, the entropy of the model's
    distribution. It is trained on retained training samples and test samples. The reference is the value of a model
    that never saw the forget set, which is not 0.

    Args:
        retain: the predictions for retained training data.
        test: the predictions for unseen data.
        forget: the predictions for the forget set.

    Raises:
        LamellaError: if scikit-learn is missing.
    """
    check_scikit_learn()
    from sklearn.linear_model import LogisticRegression

    known = np.concatenate([retain.entropy, test.entropy])[:, None]
    member = np.repeat([1, 0], [len(retain.entropy), len(test.entropy)])
    attack = LogisticRegression(class_weight="balanced").fit(known, member)
    return float(attack.predict(forget.entropy[:, None]).mean())


def check_scikit_learn() -> None:
    """Raise a :class:`LamellaError` if scikit-learn is not installed."""
    require("sklearn", "select", "membership inference")


@torch.no_grad()
def zrf(model: nn.Module, untrained: nn.Module, data: Data) -> float:
    """Return ZRF, 1 - the mean Jensen-Shannon divergence in bits from an untrained model; 1 for no difference.

    Args:
        model: the model.
        untrained: an untrained model of the same architecture, such as from :func:`untrained_like`.
        data: the forget set.
    """
    frozen = [share(each).eval() for each in (model, untrained)]
    total = count = 0.0
    for batch in batches(data, BATCH):
        pairs = [outputs(each, batch) for each in frozen]
        for (ours, labels), (theirs, _) in zip(*pairs, strict=True):
            distance = DISTANCES["jsd"].at_positions(
                ours.float(), torch.log_softmax(theirs.float(), dim=-1), torch.zeros(0) if labels is None else labels
            )
            total += float(distance.double().sum()) / math.log(2)
            count += len(distance)
    if not count:
        raise CalibrationError("there are no samples to measure on: give some")
    return 1 - total / count


def untrained_like(model: Any, seed: int = 0) -> Any:
    """Create a model of the same architecture with random weights.

    Args:
        model: a transformers model, or any module whose submodules have ``reset_parameters``.
        seed: random seed of the weights; the global random state is unchanged.
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
        forget: accuracy and loss (nats) on the forget set.
        retain: the same on retained data, if given.
        test: the same on unseen data, if given.
        membership: the fraction of the forget set that looks like training data; None without retained and test data.
        zrf: 1 if the forget set means as little as to random weights; None if it was not measured.
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
            model: the model.
            forget: the data that it should not know.
            retain: training data that it should still know.
            test: unseen data; together with retained data, membership is measured too.
            untrained: a model with random weights, for ZRF.
        """
        responses = {
            name: evaluate(model, data)
            for name, data in (("forget", forget), ("retain", retain), ("test", test))
            if data is not None
        }
        figures = {
            name: {"accuracy": each.accuracy, "loss": float(each.loss.mean())} for name, each in responses.items()
        }
        share = membership(responses["retain"], responses["test"], responses["forget"]) if len(responses) == 3 else None
        distance = None if untrained is None else zrf(model, untrained, forget)
        return cls(figures["forget"], figures.get("retain"), figures.get("test"), share, distance)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class RetentionGuard:
    """Comparison of an edited model with its original on retained data.

    Attributes:
        measure: ``accuracy`` of a classifier, ``perplexity`` of a decoder.
        before: on the guard's data, before the edit.
        after: on the guard's data, after the edit.
        most: the maximum loss: of accuracy, or the relative increase of perplexity.
    """

    measure: str
    before: float
    after: float
    most: float

    @classmethod
    def of(cls, model: nn.Module, changed: nn.Module, data: Data, most: float) -> RetentionGuard:
        """Compare a changed model with its original on retained data, preferably data that the edit has not used.

        Args:
            model: the original.
            changed: the edited model.
            data: the retained data.
            most: the maximum loss.

        Raises:
            MethodError: for a maximum below 0.
        """
        if not most >= 0:
            raise MethodError(f"max_drop {most}: give a maximum loss of at least 0")
        first, second = (evaluate(each, data) for each in (model, changed))
        measure = "accuracy" if first.classifier else "perplexity"
        return cls(measure, getattr(first, measure), getattr(second, measure), most)

    @property
    def lost(self) -> float:
        """The loss of accuracy, or the relative increase of perplexity."""
        return self.before - self.after if self.measure == "accuracy" else self.after / self.before - 1

    @property
    def passed(self) -> bool:
        """Whether the loss is within the limit."""
        return self.lost <= self.most

    def __str__(self) -> str:
        change = f"{self.measure} on retained data goes from {self.before:.4g} to {self.after:.4g}"
        return f"{change}, a loss of {self.lost:+.3g} where at most {self.most:g} is allowed"


def evaluate_models(
    models: Mapping[str, Any], forget: Data, retain: Data | None, test: Data | None, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate several versions of a model, ``before`` and ``after`` among them, and return the figures and notes.

    Args:
        models: the models by name.
        forget: the forget set.
        retain: retained training data, if any.
        test: unseen data, if any.
        seed: random seed of the untrained model for ZRF.
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
            f"Membership is {other - after:.2f} below that of the retrained model: the forgotten data is conspicuous."
        )
    return {name: each.as_dict() for name, each in figures.items()}, notes
