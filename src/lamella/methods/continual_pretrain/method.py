r"""Continual pre-training: train on new data at a full learning rate while replaying a fraction of the old data.

Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv 2403.08763.

    re-warming   rate  /\\__ /\\__ /\\__      one cosine per dataset, fresh optimizer; the loss rises while re-warming
    infinite     rate  /\\__________\\       no re-warming; each model to deploy is an annealed branch, and the next
                       D0 | D1 | D2          dataset continues from before the anneal, with the same optimizer
    replay       a fraction alpha of every batch is past data, in place of new data

The same recipe heals a model after surgery: the plan's view is trained on text, and a sample of the original training
data is replayed so that it keeps what the new text lacks. The held-out loss is measured on every dataset seen so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge

from lamella.data import Passages
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.continual_pretrain.curves import ContinualDataset
from lamella.methods.continual_pretrain.pretrainer import TRAINING, ContinualPretrainer, Fraction
from lamella.plan import Plan
from lamella.registry import method
from lamella.stack import Stack
from lamella.train import Healed, Sample, TrainConfig, TrainingLog, infinite

ANNEAL = 0.85  # fraction of a single run with an infinite schedule at which its anneal begins


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
    """Train a model on new data at a full learning rate while replaying a fraction of the old data.

    For one dataset; :class:`ContinualPretrainer` handles several.

    Args:
        stack: the model; it is not changed.
        train: the new data, in blocks.
        plan: plan under which the model is trained; if None, the whole model.
        past: a sample of the model's original training data, to replay; if None, nothing is replayed.
        held_out: held-out samples ``new`` and ``old``, for the curves and for ``replay=auto``; the old ones measure
            forgetting even if nothing is replayed.
        config: training configuration. Its lr is eta_max; the paper uses that of pre-training. Its schedule is
            ``rewarm``: warm up to lr and decay to a tenth; ``infinite``, with an anneal at the end; ``wsd``: warm up,
                stay
            constant, anneal; ``cosine``, down to 0; or ``constant``. Replay adds no steps.
        replay: alpha, the replayed fraction; ``auto`` measures whether the shift is weak (5 %) or strong (25 %).
        lora: rank of LoRA adapters; if None, all parameters are trained.
        work: folder from which an interrupted run resumes.

    Returns:
        The healed model, its plan and the training log.

    Raises:
        MethodError: for options that do not fit together.
        TrainingError: if training cannot start, or the loss is not finite.
    """
    if past is None and replay != "auto":
        raise MethodError(f"replay {replay:g} needs past data: give past as well, or leave replay at auto")
    held_out = held_out or {}
    config = config.with_steps(len(train))
    steps = main = config.steps or 1
    if config.schedule == "infinite":
        if steps < 2:
            raise MethodError(f"steps {steps}: an infinite schedule and its anneal need at least 2")
        if config.shard:
            raise MethodError("the anneal of an infinite schedule does not support --shard: choose another schedule")
        main = min(round(ANNEAL * steps), steps - 1)
        config = config.with_schedule(config.shaped(infinite, anneal=None))
    run = ContinualPretrainer(stack, out=work.directory(), plan=plan, config=config, replay=replay, lora=lora)
    old = ContinualDataset("old", past or (), held_out.get("old", ()))
    if past is None:
        run.watch(old)
    else:
        run.remember(old)
    run.fit(ContinualDataset("new", train, held_out.get("new", ())), main)
    if main == steps:
        return run.healed()
    branch = run.anneal(steps - main)
    return replace(branch, log=_joined(run.curves.stages[-1].log, branch.log, main))


def _joined(first: TrainingLog, second: TrainingLog, steps: int) -> TrainingLog:
    """Concatenate the log of a run of ``steps`` steps and that of the run that continued it."""
    train, held_out = (
        [replace(point, step=point.step + steps) for point in curve] for curve in (second.train, second.held_out)
    )
    return TrainingLog(first.settings, first.train + train, first.held_out + held_out[1:])
