"""One target task on trial: every way to answer it, each trained on the same examples and judged on the same test."""

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
from lamella.methods.lora_recycling.controls import shuffled
from lamella.methods.lora_recycling.judge import Judged
from lamella.methods.lora_recycling.modules import Mixture
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

HELD_OUT, TESTED = 0.2, 0.25  # of the examples: the paper's 20 of 100; what is set aside where no test is given (ours)
FEW = 20  # below so many examples the same ones train and select, as with the paper's 10
DROPOUT, DECAY = 0.3, 0.05  # of the regularised target LoRA; the paper has 0.2 to 0.5, and 0.01 to 0.1
HUB_BUDGET = 100  # evaluations of LoraHub; the paper's


@dataclass(frozen=True)
class Splits:
    """The examples of a task by what they are for.

    Attributes:
        train: to train on.
        held_out: to choose by.
        test: to judge by; nothing trains on it or is chosen by it.
        set_aside: whether the test is a part of the examples, since none was given.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    test: Sequence[Sample]
    set_aside: bool = False

    @classmethod
    def of(cls, examples: Sequence[Sample], test: Sequence[Sample] | None, seed: int) -> Splits:
        """Split examples at random.

        Raises:
            MethodError: when there are too few of them.
        """
        if len(examples) < 4:
            raise MethodError(f"{len(examples)} examples of the target task: give 4 or more, better 100")
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
class Arm:
    """One way to answer the task.

    Attributes:
        name: of it.
        of_pool: whether weights of the pool are in it.
        adapter: what it adds to the model; None for the model itself.
        held_out, test: what it did on them.
        coefficients: f(w) by module, of N adapters or of each rank; None where there are none.
        log: of what was trained.
    """

    name: str
    of_pool: bool
    adapter: Adapter | None
    held_out: Judged
    test: Judged
    coefficients: Mapping[str, Tensor] | None = None
    log: TrainingLog | None = None


@dataclass
class Trial:
    """A model, a task, and how to train; its methods make the arms.

    Attributes:
        stack: the model; it is not changed.
        splits: of the task.
        how: the coefficients are found: ``adaptive``, ``lorahub`` or ``pi-tuning``.
        mixing, target, config: of what trains.
        work: where an interrupted run goes on from.
        merged: what else decides what is merged, as JSON values: a run of another pool or selection begins anew.
    """

    stack: Stack
    splits: Splits
    how: str
    mixing: Mixing
    target: Target
    config: TrainConfig
    work: Work
    merged: Mapping[str, Any] = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.work.directory()
        parts = (self.splits.train, self.splits.held_out, self.splits.test)
        data = [[each["input_ids"].tolist() for each in part] for part in parts]
        how = [self.how, asdict(self.mixing), asdict(self.target), self.config.as_dict(1)]
        said = [data, revision(self.stack.model), how, dict(self.merged)]
        self.depends = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        self._journal = Journal(self.work.journal("judged"), _is_judged, self.depends)
        self._known = {name: Judged(tuple(exact), tuple(nats)) for name, exact, nats in self._journal.found}

    def judged(self, name: str, make: Callable[[], Any], samples: Sequence[Sample]) -> Judged:
        """What a model does on some samples; ``make`` makes it where that is not known yet."""
        if name not in self._known:
            found = self._known[name] = Judged.of(make(), samples, self.config.batch)
            self._journal.add([name, found.exact, found.nats])
        return self._known[name]

    def member(self, name: str, load: Callable[[], Adapter]) -> Judged:
        """What a member of the pool does on the examples: those to train on, then those to choose by."""
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
    ) -> Arm:
        """One more arm, judged."""
        samples = [*self.splits.held_out, *self.splits.test]
        found = self.judged(name, lambda: self._with(adapter), samples)
        count = len(self.splits.held_out)
        held_out, test = found.of_examples(0, count), found.of_examples(count)
        self.arms.append(Arm(name, of_pool, adapter, held_out, test, coefficients, log))
        return self.arms[-1]

    def _with(self, adapter: Adapter | None) -> Any:
        return (self.stack if adapter is None else merge(self.stack, adapter)).model

    def trained(self, name: str, *, dropout: float | None = None, decay: float = 0.0, shuffle: bool = False) -> Adapter:
        """An arm of its own LoRA, trained on the examples without any pool.

        Args:
            dropout, decay: of a regularised one.
            shuffle: give every prompt the answer of another one: what is learnt is the format alone.
        """
        samples = mismatched(self.splits.train, self.config.seed) if shuffle else self.splits.train
        held_out = mismatched(self.splits.held_out, self.config.seed) if shuffle else self.splits.held_out
        target = self.target if dropout is None else replace(self.target, target_dropout=dropout)
        adapter, log = target_lora(
            self.stack, samples, held_out, target, self.config, out=self.folder / name, weight_decay=decay
        )
        self.add(name, adapter, log=log)
        return adapter

    def mixed(self, name: str, adapters: Sequence[Adapter], *, of_pool: bool = False) -> Arm:
        """An arm of frozen adapters whose coefficients are fitted on the examples."""
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

    def _of_mixture(self, name: str, found: Mixture, of_pool: bool, log: TrainingLog | None) -> Arm:
        return self.add(name, found.adapter(), of_pool=of_pool, coefficients=found.coefficients(), log=log)


def mismatched(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same prompts, each with the answer of another one."""
    order = shuffled(len(samples), seed)
    prompts = [each["input_ids"][: int(each["prompt_lengths"])] for each in samples]
    answers = [each["input_ids"][int(each["prompt_lengths"]) :] for each in samples]
    return pairs([(prompt, answers[place]) for prompt, place in zip(prompts, order, strict=True)])


def _is_judged(line: Any) -> bool:
    match line:
        case [str(), list(exact), list(nats)]:
            return len(exact) == len(nats)
    return False
