"""A model trained on several datasets in sequence: schedules, replay, and held-out loss on all datasets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Le

from lamella.errors import MethodError, TrainingError
from lamella.methods.continual_pretrain.curves import ContinualDataset, LossCurves, Stage
from lamella.plan import ModelReference, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import (
    Feed,
    Healed,
    Infinite,
    Lora,
    Replay,
    Schedule,
    Task,
    TrainConfig,
    TrainingLog,
    add_lora,
    constant,
    fit,
    infinite,
    mean_loss,
    own,
    past_mixture,
    response_loss,
    rewarm,
    warmup_stable_decay,
    with_modules_of,
    with_weights_of,
)

Fraction = Annotated[float, Ge(0), Le(1)] | Literal["auto"]

# The paper's configuration, with its learning rate at 405M parameters (1.2e-4 at 10B).
TRAINING = TrainConfig(steps=200, lr=3e-4, schedule="rewarm", betas=(0.9, 0.95), weight_decay=0.1, eval_every=50)
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "rewarm": rewarm,
    "infinite": infinite,
    "wsd": warmup_stable_decay,
    "cosine": partial(rewarm, floor=0.0, warmup=0.03),
    "constant": constant,
}
WEAK, STRONG = 0.05, 0.25  # the paper's alpha for English after English, and for German after English
STRONG_SHIFT = 0.25  # not from the paper: relative excess of the loss on new over old text that counts as strong


class ContinualPretrainer:
    """Train a model on several datasets in sequence.

    Constructed with the same arguments and given the same datasets, an interrupted run resumes from its checkpoints.

    Args:
        stack: the model; it is not changed.
        out: folder for the runs of all stages.
        plan: plan under which the model is trained; if None, the whole model.
        config: training configuration of each dataset, without steps. Its schedule is a name of :data:`SCHEDULES`,
            which restarts at each dataset, except ``infinite``, which warms up and cools down during the first dataset
            and then stays constant; or a function from a dataset's steps to a schedule, which restarts too; or a
            :class:`lamella.train.Schedule` that continues across datasets. For named schedules, lr is eta_max; the
            paper uses that of pre-training. Its seed is also that of replay, which uses another order in each stage.
        replay: alpha, or ``auto`` for 5 % after a weak and 25 % after a strong shift. The first dataset has no past.
        reset_optimizer: start each dataset with a fresh optimizer; if None, only if its schedule restarts.
        lora: rank of LoRA adapters; if None, all parameters are trained.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        out: Path,
        plan: Plan | None = None,
        config: TrainConfig = TRAINING,
        replay: Fraction = "auto",
        reset_optimizer: bool | None = None,
        lora: int | None = None,
    ) -> None:
        schedule = config.schedule
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise MethodError(f"schedule '{schedule}': choose one of {', '.join(SCHEDULES)}")
        if not stack.architecture.causal:
            raise MethodError(f"continual-pretrain works on decoders; {stack.name} is a {stack.architecture.name}")
        self.stack, self.out = stack, Path(out)
        self.plan = plan or Plan(model=ModelReference.of(stack))
        self.config, self.schedule, self.replay = config, schedule, replay
        goes_on = schedule == "infinite" or isinstance(schedule, Schedule)
        self.reset_optimizer = not goes_on if reset_optimizer is None else reset_optimizer
        self.rank = lora
        self.model, self.lora = self._view(stack, self.plan)
        self.curves = LossCurves()
        self.datasets: dict[str, ContinualDataset] = {}
        self.remembered: set[str] = set()
        self.mixture: dict[str, float] = {}  # p: fraction of each dataset among all consumed samples
        self.consumed = 0  # N, in samples

    def remember(self, dataset: ContinualDataset, samples: int | None = None) -> None:
        """Register a dataset as consumed before this run: pre-training data, or a sample of it.

        Args:
            dataset: the dataset; all of its samples may be replayed.
            samples: number of samples of such data that the model has seen, which sets its weight among several
                datasets; by default the size of the dataset.
        """
        count = len(dataset.samples) if samples is None else samples
        self.mixture = past_mixture(self.mixture, self.consumed, dataset.name, count, 0.0)
        self.consumed += count
        self.datasets[dataset.name] = dataset
        self.remembered.add(dataset.name)

    def watch(self, dataset: ContinualDataset) -> None:
        """Measure the held-out loss of a dataset that is not replayed.

        Args:
            dataset: the dataset; only its held-out samples are used.
        """
        self.datasets[dataset.name] = dataset

    def fit(self, dataset: ContinualDataset, steps: int, **changes: Any) -> Stage:
        """Train on one dataset.

        Args:
            dataset: the dataset; a dataset that returns continues in its order.
            steps: number of optimizer steps; replayed samples are included, so replay costs no more compute.
            **changes: changes of the config for this dataset only, such as ``save_every``.
        """
        number, start = len(self.curves.stages), self.steps
        fraction, shift = self._fraction(dataset)
        past = self._past(fraction, number)
        folder = self.out / f"{number + 1}-{dataset.name}"
        keeps = not self.reset_optimizer and number > 0
        feed = Feed(dataset.samples, replay=past, skip=len(self._consumed_of(dataset.name)))
        log = self._run(
            self.model,
            dataset,
            feed,
            self._config(steps, self._stage_schedule(steps, start), changes),
            out=folder,
            after=self.curves.stages[-1].folder if keeps else None,
        )
        size = math.prod(log.settings[name] for name in ("batch", "accumulate", "processes"))
        order = feed.order(steps, size, self.config.seed)
        alpha = fraction if past else 0.0
        self.curves.stages.append(Stage(dataset.name, start, start + steps, folder, alpha, shift, order.consumed, log))
        self.mixture = past_mixture(self.mixture, self.consumed, dataset.name, steps * size, alpha)
        self.consumed += steps * size
        self.datasets[dataset.name] = dataset
        return self.curves.stages[-1]

    def anneal(self, steps: int, **changes: Any) -> Healed:
        """Anneal a branch of an infinite schedule to its lowest rate, for deployment; the run is unchanged.

        Args:
            steps: number of steps, on the newest dataset and with the same replay; the paper uses 15 % of a run.
            **changes: changes of the config for this branch only.

        Returns:
            The model of the branch; its log continues the held-out curves.
        """
        schedule = self._shared_schedule()
        if not isinstance(schedule, Infinite) or not self.curves.stages:
            raise TrainingError("only an infinite schedule can be annealed, after its first dataset")
        stage = self.curves.stages[-1]
        if stage.end < schedule.cooled:
            raise TrainingError(f"the cool-down lasts to step {schedule.cooled}, and this is {stage.end}: anneal later")
        branch, lora = self._copy()
        dataset, number = self.datasets[stage.name], len(self.curves.stages)
        falling = replace(schedule, anneal=stage.end, end=stage.end + steps).after(stage.end)
        log = self._run(
            branch,
            dataset,
            Feed(dataset.samples, replay=self._past(stage.replayed, number), skip=len(self._consumed_of(stage.name))),
            self._config(steps, falling, changes),
            out=self.out / f"{number}-{stage.name}-annealed-{steps}",
            after=stage.folder,
        )
        return self._healed(branch, lora, log)

    def healed(self) -> Healed:
        """Return the current model, with adapters merged, and the log of its last stage."""
        if not self.curves.stages:
            raise TrainingError("nothing was trained yet: call fit first")
        return self._healed(*self._copy(), self.curves.stages[-1].log)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run so far."""
        return self.curves.stages[-1].end if self.curves.stages else 0

    def _run(
        self, model: Any, dataset: ContinualDataset, feed: Feed, config: TrainConfig, *, out: Path, after: Path | None
    ) -> TrainingLog:
        datasets = {**self.datasets, dataset.name: dataset}
        lora = self.lora and [self.lora.scale, list(self.lora.modules)]
        return fit(
            model,
            feed,
            Task(response_loss),
            config,
            out=out,
            trainable=self._trains,
            held_out={name: each.held_out for name, each in datasets.items() if each.held_out},
            after=after,
            settings={"plan": self.plan.digest, "lora": lora},
        )

    def _config(self, steps: int, schedule: Schedule, changes: dict[str, Any]) -> TrainConfig:
        return replace(self.config.with_schedule(schedule), steps=steps, **changes)

    def _trains(self, name: str) -> bool:
        return _trains(name) if self.lora is None else self.lora.trains(name)

    def _shared_schedule(self) -> Schedule | None:
        """Return the schedule that all datasets share, if there is one and its length is known."""
        if isinstance(self.schedule, Infinite):
            return replace(self.schedule, anneal=None, end=None)
        if self.schedule == "infinite" and self.curves.stages:
            return replace(self.config, steps=self.curves.stages[0].end).shaped(infinite, anneal=None)
        return self.schedule if isinstance(self.schedule, Schedule) else None

    def _stage_schedule(self, steps: int, start: int) -> Schedule:
        """Return the schedule of the next stage."""
        if shared := self._shared_schedule():
            return shared.after(start)
        if isinstance(self.schedule, str):
            options = {"anneal": None} if self.schedule == "infinite" else {}
            return replace(self.config, steps=steps).shaped(SCHEDULES[self.schedule], **options)
        return cast(Callable[[int], Schedule], self.schedule)(steps)

    def _past(self, fraction: float, number: int) -> Replay | None:
        """Return the replay of stage ``number``, in an order of its own."""
        if not self.mixture or fraction == 0:
            return None
        samples = {name: self.datasets[name].samples for name in self.mixture}
        seen = {name: self._consumed_of(name) for name in self.mixture if name not in self.remembered}
        return Replay(samples, fraction, self.mixture, seen, seed=1000 * self.config.seed + number)

    def _consumed_of(self, name: str) -> list[int]:
        """Return the indices of a dataset's samples that this run has consumed, in order."""
        return [index for stage in self.curves.stages if stage.name == name for index in stage.consumed]

    def _fraction(self, dataset: ContinualDataset) -> tuple[float, tuple[float, float] | None]:
        """Return alpha, and the losses on new and old data if it was measured."""
        if not self.mixture:
            return 0.0, None
        if self.replay != "auto":
            return float(self.replay), None
        weights = {name: share for name, share in self.mixture.items() if self.datasets[name].held_out}
        if not weights or not dataset.held_out:
            raise TrainingError("replay 'auto' measures the shift on held-out samples: give each dataset some")
        was_training = self.model.training
        self.model.eval()
        batch = self.config.batch
        old = sum(
            share * mean_loss(self.model, self.datasets[name].held_out, batch=batch) for name, share in weights.items()
        )
        old /= sum(weights.values())
        new = mean_loss(self.model, dataset.held_out, batch=batch)
        self.model.train(was_training)
        return (STRONG if new > (1 + STRONG_SHIFT) * old else WEAK), (new, old)

    def _view(self, stack: Stack, plan: Plan) -> tuple[Any, Lora | None]:
        """Create a view that owns all trained tensors."""
        view = apply(stack, plan)
        if self.rank is None:
            own(view, _trains)
            return view, None
        _check_adaptable(self.plan)
        return view, add_lora(view, self.rank, 2 * self.rank, seed=self.config.seed)

    def _copy(self) -> tuple[Any, Lora | None]:
        """Copy the current model; changes of the copy do not reach the run."""
        if self.lora is None:
            return self._view(with_weights_of(self.stack, self.model), self._plan_of(self.model))
        view, lora = self._view(self.stack, self.plan)
        assert lora is not None
        lora.load(self.lora.tensors())
        return view, lora

    def _healed(self, view: Any, lora: Lora | None, log: TrainingLog) -> Healed:
        if lora is not None:
            lora.merge()
            lora.remove()
        return Healed(stack=with_weights_of(self.stack, view), plan=self._plan_of(view), log=log)

    def _plan_of(self, view: Any) -> Plan:
        """Return the plan with the trained tensors of its modules."""
        return with_modules_of(self.plan, self.stack, view, self.out)


def _trains(name: str) -> bool:
    """Return whether a parameter is trained: all of the model except policies."""
    return not name.startswith("lamella_policy.")


def _check_adaptable(plan: Plan) -> None:
    layers = [run.layer for run in plan.runs("prefill")]
    if plan.is_static and len(set(layers)) < len(layers):
        raise TrainingError("the adapters of a layer that runs twice would differ: train all parameters, without lora")
