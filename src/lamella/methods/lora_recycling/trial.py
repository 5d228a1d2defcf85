"""A trial of one target task: all arms, trained on the same examples and tested on the same test split."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from lamella.data import Sample
from lamella.errors import MethodError
from lamella.files import Journal, Work
from lamella.methods.lora_recycling.controls import derangement
from lamella.methods.lora_recycling.judge import AnswerScores
from lamella.methods.lora_recycling.modules import AdapterMixture
from lamella.methods.lora_recycling.recipe import (
    Mixing,
    Target,
    adaptive,
    lorahub,
    mixture,
    pi_tuning,
    target_lora,
)
from lamella.plan.fingerprint import revision
from lamella.search import Memo
from lamella.stack import Stack
from lamella.train import Adapter, TrainConfig, TrainingLog, mean_loss, merge, pairs

HELD_OUT, TESTED = (
    0.2,
    0.25,
)  # held-out fraction (the paper's 20 of 100); test fraction without a test (Lamella's choice)
FEW = 20  # below this number of examples the same ones train and select, as with the paper's 10
DROPOUT, DECAY = 0.3, 0.05  # of the regularised target LoRA; the paper uses 0.2 to 0.5, and 0.01 to 0.1
HUB_BUDGET = 100  # evaluations of LoraHub; the paper's


@dataclass(frozen=True)
class TaskSplits:
    """The examples of a task, split by purpose.

    Attributes:
        train: training examples.
        held_out: examples for selection.
        test: test examples, not used for training or selection.
        set_aside: whether the test is a part of the examples, because none was given.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    test: Sequence[Sample]
    set_aside: bool = False

    @classmethod
    def of(cls, examples: Sequence[Sample], test: Sequence[Sample] | None, seed: int) -> TaskSplits:
        """Split examples at random.

        Args:
            examples: the examples.
            test: test examples, or None.
            seed: random seed.

        Raises:
            MethodError: for too few examples.
        """
        if len(examples) < 4:
            raise MethodError(f"{len(examples)} examples of the target task: give at least 4, better 100")
        order = list(examples)
        random.Random(seed).shuffle(order)
        set_aside = test is None
        if test is None:
            count = max(1, round(TESTED * len(order)))
            test, order = order[:count], order[count:]
        held_out = order[: round(HELD_OUT * len(order))] if len(order) >= FEW else order
        train = order[len(held_out) :] if len(order) >= FEW else order
        return cls(train, held_out, test, set_aside)


@dataclass(frozen=True)
class TrialArm:
    """One way to solve the task.

    Attributes:
        name: its name.
        of_pool: whether it uses weights of the pool.
        adapter: its adapter; None for the original model. That of fitted coefficients is in a file of the work folder.
        held_out, test: its results on these splits.
        coefficients: f(w) by module, of N adapters or of each rank; None without coefficients.
        log: training log.
    """

    name: str
    of_pool: bool
    adapter: Adapter | None
    held_out: AnswerScores
    test: AnswerScores
    coefficients: Mapping[str, Tensor] | None = None
    log: TrainingLog | None = None


@dataclass
class Trial:
    """A model, a task, and training settings; its methods create the arms.

    Attributes:
        stack: the model; it is not changed.
        splits: splits of the task.
        how: method for the coefficients: ``adaptive``, ``lorahub`` or ``pi-tuning``.
        mixing, target, config: training settings.
        work: folder from which an interrupted run resumes.
        merged: further settings of the merge, as JSON values: a run with another pool or selection starts again.
    """

    stack: Stack
    splits: TaskSplits
    how: str
    mixing: Mixing
    target: Target
    config: TrainConfig
    work: Work
    merged: Mapping[str, Any] = field(default_factory=dict)
    arms: list[TrialArm] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.work.directory()
        parts = (self.splits.train, self.splits.held_out, self.splits.test)
        data = [[each["input_ids"].tolist() for each in part] for part in parts]
        how = [self.how, asdict(self.mixing), asdict(self.target), self.config.as_dict(1)]
        content = [data, revision(self.stack.model), how, dict(self.merged)]
        self.depends = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._journal = Journal(self.work.journal("judged"), _is_judged, self.depends)
        self._known = {name: AnswerScores(tuple(exact), tuple(nats)) for name, exact, nats in self._journal.found}

    def judged(self, name: str, make: Callable[[], Any], samples: Sequence[Sample]) -> AnswerScores:
        """Evaluate a model on some samples; ``make`` is only called if the result is not known.

        Args:
            name: key of the result in the journal.
            make: creates the model.
            samples: the samples.
        """
        if name not in self._known:
            found = self._known[name] = AnswerScores.of(make(), samples, self.config.batch)
            self._journal.add([name, found.exact, found.nats])
        return self._known[name]

    def member(self, name: str, load: Callable[[], Adapter]) -> AnswerScores:
        """Evaluate a member of the pool on the training examples and then the held-out ones.

        Args:
            name: name of the member.
            load: loads it.
        """
        samples = [*self.splits.train, *self.splits.held_out]
        return self.judged(f"member {name}", lambda: merge(self.stack, load()).model, samples)

    def add(
        self,
        name: str,
        adapter: Adapter | None,
        *,
        of_pool: bool = False,
        coefficients: Mapping[str, Tensor] | None = None,
        log: TrainingLog | None = None,
    ) -> TrialArm:
        """Evaluate an arm and add it.

        Args:
            name: its name.
            adapter: its adapter; None for the original model.
            of_pool: whether it uses weights of the pool.
            coefficients: its coefficients.
            log: its training log.

        Returns:
            The arm.
        """
        samples = [*self.splits.held_out, *self.splits.test]
        found = self.judged(name, lambda: self._with(adapter), samples)
        count = len(self.splits.held_out)
        held_out, test = found.of_examples(0, count), found.of_examples(count)
        self.arms.append(TrialArm(name, of_pool, adapter, held_out, test, coefficients, log))
        return self.arms[-1]

    def _with(self, adapter: Adapter | None) -> Any:
        return (self.stack if adapter is None else merge(self.stack, adapter)).model

    def trained(self, name: str, *, dropout: float | None = None, decay: float = 0.0, shuffle: bool = False) -> Adapter:
        """Add an arm with its own LoRA, trained on the examples without a pool.

        Args:
            name: its name.
            dropout: dropout of a regularised one; None for the default.
            decay: weight decay of a regularised one.
            shuffle: give every prompt the answer of another one, so that only the format can be learned.

        Returns:
            The adapter.
        """
        samples = mismatch_answers(self.splits.train, self.config.seed) if shuffle else self.splits.train
        held_out = mismatch_answers(self.splits.held_out, self.config.seed) if shuffle else self.splits.held_out
        target = self.target if dropout is None else replace(self.target, target_dropout=dropout)
        adapter, log = target_lora(
            self.stack, samples, held_out, target, self.config, out=self.folder / name, weight_decay=decay
        )
        self.add(name, adapter, log=log)
        return adapter

    def mixed(self, name: str, adapters: Sequence[Adapter], *, of_pool: bool = False) -> TrialArm:
        """Add an arm with frozen adapters whose coefficients are fitted on the examples.

        Args:
            name: its name.
            adapters: the adapters.
            of_pool: whether they belong to the pool.

        Returns:
            The arm.
        """
        out, splits = self.folder / name, self.splits
        log = None
        if self.how == "lorahub":
            found = mixture(self.stack, adapters, Mixing("model", "identity", "zero"), self.config.seed)
            memo = Memo(self.work.journal(f"search {name}"), {"arm": name, "depends": self.depends})
            everything = list({id(each): each for each in (*splits.train, *splits.held_out)}.values())

            def loss(model: Any) -> float:
                return mean_loss(model, everything, batch=self.config.batch)

            lorahub(found, loss, memo, budget=HUB_BUDGET, seed=self.config.seed)
        elif self.how == "pi-tuning":
            found, log = pi_tuning(self.stack, adapters, splits.train, splits.held_out, self.config, out=out)
        else:
            found, log = adaptive(
                self.stack, adapters, splits.train, splits.held_out, self.mixing, self.config, out=out
            )
        return self._of_mixture(name, found, of_pool, log)

    def _of_mixture(self, name: str, found: AdapterMixture, of_pool: bool, log: TrainingLog | None) -> TrialArm:
        adapter = found.adapter().stored(self.work.directory("adapters") / f"{name}.safetensors")
        return self.add(name, adapter, of_pool=of_pool, coefficients=found.coefficients(), log=log)


def mismatch_answers(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same prompts, each with the answer of another one.

    Args:
        samples: the examples.
        seed: random seed.
    """
    order = derangement(len(samples), seed)
    prompts = [each["input_ids"][: int(each["prompt_lengths"])] for each in samples]
    answers = [each["input_ids"][int(each["prompt_lengths"]) :] for each in samples]
    return pairs([(prompt, answers[index]) for prompt, index in zip(prompts, order, strict=True)])


def _is_judged(line: Any) -> bool:
    match line:
        case [str(), list(exact), list(nats)]:
            return len(exact) == len(nats)
    return False
