"""Continual pre-training: learn from new data at a full learning rate, and replay a little of the old.

Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv 2403.08763.

    re-warming   rate  /\\__ /\\__ /\\__      one cosine for each dataset, fresh optimizer; loss rises while re-warming
    infinite     rate  /\\__________\\       no re-warming; each model to deploy is a branch that is annealed, and the
                       D0 | D1 | D2          next dataset goes on from before the anneal, with the optimizer kept
    replay       a share alpha of every batch comes from the past, in place of new data

After surgery the same recipe heals: the plan's view learns from text again, and a sample of what the model was trained
on is replayed so that it keeps what the new text lacks. Held-out loss is measured on every dataset seen so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge

from lamella.data import Passages
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.continual_pretrain.curves import Stream
from lamella.methods.continual_pretrain.pretrainer import TRAINING, ContinualPretrainer, Fraction
from lamella.plan import Plan
from lamella.registry import method
from lamella.stack import Stack
from lamella.train import Healed, Sample, TrainConfig, TrainingLog, infinite

ANNEAL = 0.85  # of an infinite schedule for one run, where its anneal begins


@method("continual-pretrain", paper="2403.08763", purpose="heal", brief={"replay": 0.5})
def continual_pretrain(
    stack: Stack,
    train: Passages,
    plan: Plan | None = None,
    past: Passages | None = None,
    *,
    held_out: Mapping[str, Sequence[Sample]] | None = None,
    config: TrainConfig = TRAINING,
    replay: Fraction = "auto",
    lora: Annotated[int, Ge(1)] | None = None,
    work: Work = Work(),
) -> Healed:
    """Train a model on new data at a full learning rate while replaying a share of the old.

    One dataset; :class:`ContinualPretrainer` goes through several.

    Args:
        stack: the model; it is not changed.
        train: the new data, in blocks.
        plan: what the model runs under while it trains; the whole model when left out.
        past: a sample of what the model was trained on, to replay; None: nothing is replayed.
        held_out: samples called ``new`` and ``old`` that nothing trains on, for the curves and for ``replay=auto``; the
            old ones show what is forgotten also where nothing is replayed.
        config: of the training. Its lr is eta_max; the paper takes that of pre-training. Its schedule is ``rewarm`` up
            to lr and decay to a tenth; ``infinite`` with its anneal at the end; ``wsd``: warm up, stay, anneal;
            ``cosine`` down to 0; ``constant``. Replay adds no steps.
        replay: alpha, the replayed share; ``auto`` measures whether the shift is weak (5 %) or strong (25 %).
        lora: rank of adapters to train in place of all parameters.
        work: where an interrupted run goes on from.

    Raises:
        TrainingError: when training cannot start or stay finite.
    """
    if past is None and replay != "auto":
        raise MethodError(f"replay {replay:g} needs past samples to replay")
    held_out = held_out or {}
    config = config.with_steps(len(train))
    steps = main = config.steps or 1
    if config.schedule == "infinite":
        if steps < 2:
            raise MethodError(f"steps {steps}: an infinite schedule and its anneal need 2 at least")
        if config.shard:
            raise MethodError("an infinite schedule's anneal cannot be split over processes: take another schedule")
        main = min(round(ANNEAL * steps), steps - 1)
        config = config.with_schedule(config.shaped(infinite, anneal=None))
    run = ContinualPretrainer(stack, out=work.directory(), plan=plan, config=config, replay=replay, lora=lora)
    old = Stream("old", past or (), held_out.get("old", ()))
    if past is None:
        run.watch(old)
    else:
        run.remember(old)
    run.fit(Stream("new", train, held_out.get("new", ())), main)
    if main == steps:
        return run.healed()
    branch = run.anneal(steps - main)
    return replace(branch, log=_joined(run.curves.stages[-1].log, branch.log, main))


def _joined(first: TrainingLog, second: TrainingLog, steps: int) -> TrainingLog:
    """The log of a run of so many steps, and that of the run that went on from it."""
    train, held_out = (
        [replace(point, step=point.step + steps) for point in curve] for curve in (second.train, second.held_out)
    )
    return TrainingLog(first.settings, first.train + train, first.held_out + held_out[1:])
