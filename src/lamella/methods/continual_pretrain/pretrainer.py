"""A model that goes from dataset to dataset: schedules, replay of the past, and held-out loss on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Le

from lamella.errors import MethodError, TrainingError
from lamella.methods.continual_pretrain.curves import LossCurves, Stage, Stream
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

# The paper's, with its rate at 405M parameters (1.2e-4 at 10B).
TRAINING = TrainConfig(steps=200, lr=3e-4, schedule="rewarm", betas=(0.9, 0.95), weight_decay=0.1, eval_every=50)
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "rewarm": rewarm,
    "infinite": infinite,
    "wsd": warmup_stable_decay,
    "cosine": partial(rewarm, floor=0.0, warmup=0.03),
    "constant": constant,
}
WEAK, STRONG = 0.05, 0.25  # the paper's alpha for English after English, and for German after English
STRONG_SHIFT = 0.25  # ours: a shift is strong when new text costs this much more than old text, relative to old text


class ContinualPretrainer:
    """A model that goes from dataset to dataset.

    Made again with the same arguments after a kill, and given the same datasets, it goes on from its checkpoints.

    Args:
        stack: the model; it is not changed.
        out: a folder for the runs of all stages.
        plan: what the model runs under; the whole model when left out.
        config: of each dataset's training, but for its steps. Its schedule is a name of :data:`SCHEDULES`, whose shape
            starts anew at each dataset, but for ``infinite``, which warms up and cools down during the first dataset
            and then stays constant; or a function from a dataset's steps to a schedule, which starts anew too; or a
            :class:`lamella.train.Schedule` that goes on through all. Its lr is eta_max, for the named ones; the paper
            takes that of pre-training. Its seed is that of replay too, which draws anew at each stage.
        replay: alpha, or ``auto`` for 5 % after a weak and 25 % after a strong shift. The first dataset has no past.
        reset_optimizer: begin each dataset with a fresh optimizer; left out: where its schedule starts anew.
        lora: rank of adapters to train in place of all parameters.
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
        self.streams: dict[str, Stream] = {}
        self.remembered: set[str] = set()
        self.mixture: dict[str, float] = {}  # p: each dataset's share of all that was consumed
        self.consumed = 0  # N, in samples

    def remember(self, stream: Stream, samples: int | None = None) -> None:
        """Take a dataset as consumed before this run: pre-training data, or a sample of it.

        Args:
            stream: all of its samples may be replayed.
            samples: how many the model has seen of such data, which sets its share once there are several datasets;
                the stream's own number when left out.
        """
        count = len(stream.samples) if samples is None else samples
        self.mixture = past_mixture(self.mixture, self.consumed, stream.name, count, 0.0)
        self.consumed += count
        self.streams[stream.name] = stream
        self.remembered.add(stream.name)

    def watch(self, stream: Stream) -> None:
        """Measure the held-out loss of a dataset too, though nothing of it is replayed.

        Args:
            stream: only its held-out samples count.
        """
        self.streams[stream.name] = stream

    def fit(self, stream: Stream, steps: int, **changes: Any) -> Stage:
        """Train on one dataset.

        Args:
            stream: the dataset; one that comes back goes on in its order.
            steps: optimizer steps, replayed samples included: replay costs no more compute.
            changes: of the config, for this dataset alone, such as ``save_every``.
        """
        number, start = len(self.curves.stages), self.steps
        fraction, shift = self._fraction(stream)
        past = self._past(fraction, number)
        folder = self.out / f"{number + 1}-{stream.name}"
        keeps = not self.reset_optimizer and number > 0
        feed = Feed(stream.samples, replay=past, skip=len(self._seen(stream.name)))
        log = self._run(
            self.model,
            stream,
            feed,
            self._config(steps, self._scheduled(steps, start), changes),
            out=folder,
            after=self.curves.stages[-1].folder if keeps else None,
        )
        size = math.prod(log.settings[name] for name in ("batch", "accumulate", "processes"))
        order = feed.order(steps, size, self.config.seed)
        alpha = fraction if past else 0.0
        self.curves.stages.append(Stage(stream.name, start, start + steps, folder, alpha, shift, order.consumed, log))
        self.mixture = past_mixture(self.mixture, self.consumed, stream.name, steps * size, alpha)
        self.consumed += steps * size
        self.streams[stream.name] = stream
        return self.curves.stages[-1]

    def anneal(self, steps: int, **changes: Any) -> Healed:
        """A branch of an infinite schedule whose rate falls to its lowest, for use; the run itself stays where it is.

        Args:
            steps: of the anneal, on the newest dataset and with the same replay; the paper takes 15 % of a run.
            changes: of the config, for this branch alone.

        Returns:
            The branch's model; its log continues the held-out curves.
        """
        schedule = self._going_on()
        if not isinstance(schedule, Infinite) or not self.curves.stages:
            raise TrainingError("only an infinite schedule has something to anneal, after its first dataset")
        stage = self.curves.stages[-1]
        if stage.end < schedule.cooled:
            raise TrainingError(f"the cool-down lasts to step {schedule.cooled}, and this is {stage.end}: anneal later")
        branch, lora = self._copy()
        stream, number = self.streams[stage.name], len(self.curves.stages)
        falling = replace(schedule, anneal=stage.end, end=stage.end + steps).after(stage.end)
        log = self._run(
            branch,
            stream,
            Feed(stream.samples, replay=self._past(stage.replayed, number), skip=len(self._seen(stage.name))),
            self._config(steps, falling, changes),
            out=self.out / f"{number}-{stage.name}-annealed-{steps}",
            after=stage.folder,
        )
        return self._healed(branch, lora, log)

    def healed(self) -> Healed:
        """The model as it is now, adapters merged, with the log of its last stage."""
        if not self.curves.stages:
            raise TrainingError("nothing was trained yet: call fit first")
        return self._healed(*self._copy(), self.curves.stages[-1].log)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.curves.stages[-1].end if self.curves.stages else 0

    def _run(
        self, model: Any, stream: Stream, feed: Feed, config: TrainConfig, *, out: Path, after: Path | None
    ) -> TrainingLog:
        known = {**self.streams, stream.name: stream}
        lora = self.lora and [self.lora.scale, list(self.lora.modules)]
        return fit(
            model,
            feed,
            Task(response_loss),
            config,
            out=out,
            trainable=self._trains,
            held_out={name: each.held_out for name, each in known.items() if each.held_out},
            after=after,
            settings={"plan": self.plan.digest, "lora": lora},
        )

    def _config(self, steps: int, schedule: Schedule, changes: dict[str, Any]) -> TrainConfig:
        return replace(self.config.with_schedule(schedule), steps=steps, **changes)

    def _trains(self, name: str) -> bool:
        return _trains(name) if self.lora is None else self.lora.trains(name)

    def _going_on(self) -> Schedule | None:
        """The schedule that all datasets share, if there is one and its length is known."""
        if isinstance(self.schedule, Infinite):
            return replace(self.schedule, anneal=None, end=None)
        if self.schedule == "infinite" and self.curves.stages:
            return replace(self.config, steps=self.curves.stages[0].end).shaped(infinite, anneal=None)
        return self.schedule if isinstance(self.schedule, Schedule) else None

    def _scheduled(self, steps: int, start: int) -> Schedule:
        """The rates of the next stage."""
        if shared := self._going_on():
            return shared.after(start)
        if isinstance(self.schedule, str):
            options = {"anneal": None} if self.schedule == "infinite" else {}
            return replace(self.config, steps=steps).shaped(SCHEDULES[self.schedule], **options)
        return cast(Callable[[int], Schedule], self.schedule)(steps)

    def _past(self, fraction: float, number: int) -> Replay | None:
        """What stage ``number`` replays, in an order that no other stage has."""
        if not self.mixture or fraction == 0:
            return None
        samples = {name: self.streams[name].samples for name in self.mixture}
        seen = {name: self._seen(name) for name in self.mixture if name not in self.remembered}
        return Replay(samples, fraction, self.mixture, seen, seed=1000 * self.config.seed + number)

    def _seen(self, name: str) -> list[int]:
        """The samples of a dataset that this run has consumed, in their order."""
        return [index for stage in self.curves.stages if stage.name == name for index in stage.consumed]

    def _fraction(self, stream: Stream) -> tuple[float, tuple[float, float] | None]:
        """Alpha, and where it is measured, the losses that it comes from."""
        if not self.mixture:
            return 0.0, None
        if self.replay != "auto":
            return float(self.replay), None
        known = {name: share for name, share in self.mixture.items() if self.streams[name].held_out}
        if not known or not stream.held_out:
            raise TrainingError("replay 'auto' measures the shift on held-out samples: give each stream some")
        was_training = self.model.training
        self.model.eval()
        batch = self.config.batch
        old = sum(
            share * mean_loss(self.model, self.streams[name].held_out, batch=batch) for name, share in known.items()
        )
        old /= sum(known.values())
        new = mean_loss(self.model, stream.held_out, batch=batch)
        self.model.train(was_training)
        return (STRONG if new > (1 + STRONG_SHIFT) * old else WEAK), (new, old)

    def _view(self, stack: Stack, plan: Plan) -> tuple[Any, Lora | None]:
        """A view with tensors of its own for all that trains."""
        view = apply(stack, plan)
        if self.rank is None:
            own(view, _trains)
            return view, None
        _check_adaptable(self.plan)
        return view, add_lora(view, self.rank, 2 * self.rank, seed=self.config.seed)

    def _copy(self) -> tuple[Any, Lora | None]:
        """The model as it is now; what happens to it does not reach the run."""
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
        """The plan with what its networks have learnt."""
        return with_modules_of(self.plan, self.stack, view, self.out)


def _trains(name: str) -> bool:
    """All of the model, and nothing of what decides which parts of it run."""
    return not name.startswith("lamella_policy.")


def _check_adaptable(plan: Plan) -> None:
    layers = [run.layer for run in plan.runs("prefill")]
    if plan.is_static and len(set(layers)) < len(layers):
        raise TrainingError("the adapters of a layer that runs twice would differ: train all parameters, without lora")
