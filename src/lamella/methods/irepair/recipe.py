"""The training of IRepair: what is trained on and held out, how the layer is chosen, and the plan that comes out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from lamella.data import own_texts
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.irepair.losses import bad_loss, preference_loss, repair_loss
from lamella.methods.irepair.sensitivity import layer_parameters, sensitivity
from lamella.methods.irepair.slices import BestSlices, Choices, Choose, Example, Roles, Slices, by_role, count_examples
from lamella.plan import ModelReference, Plan, replace_edit
from lamella.signature import Named
from lamella.stack import Stack, share
from lamella.train import (
    Constant,
    Feed,
    Hook,
    Sample,
    Task,
    TrainConfig,
    TrainingLog,
    blocks,
    collate,
    constant,
    fit,
    response_loss,
)
from lamella.train.runs import model_digest

TRAINING = TrainConfig(lr=5e-5, schedule="constant", warmup=150, clip=0.5, eval_every=10, seed=202)
BASELINES: dict[str, dict[str, Any]] = {  # what the paper compares with, as options of this method
    "dapt": {"select": "all", "beta": 1.0, "gamma": 0.0},
    "dapt-kl": {"select": "all"},
    "dpo": {"select": "all", "objective": "dpo"},
}
ONE_SHOT = 500  # batches from which the fixed layer is chosen
HELD_OUT = 0.2  # at most this share of the pairs is held out
OWN_TOKENS = 101  # the most of a text that the model writes to be held to


@dataclass(frozen=True)
class RepairSettings:
    """How a model is repaired, beside the numbers of its training.

    Attributes:
        select: the layer of each step, by its sensitivity to bad text: max (the method), or to compare with min,
            random, or fixed (the strongest of the model as it was); all trains all parameters, head and embedding too.
        objective: repair, or dpo to compare with.
        beta: weight of the loss on good text.
        gamma: weight of the KL; 0 is the paper's IRepair (Free), and needs no utility text.
        validation: how many pairs, and utility texts, are held out to stop by; a fifth of the pairs at most.
        patience: validations without improvement after which training stops.
        per_layer_bias_correction: RMSprop knows nothing of a layer that is chosen for the first time, so its first step
            is ten times as long as others, however late. False is the published behaviour; True corrects it.
        per_parameter: divide sensitivities by the root of a layer's size, for stacks whose layers differ.
    """

    select: Literal["max", "min", "random", "fixed", "all"] = "max"
    objective: Literal["repair", "dpo"] = "repair"
    beta: Annotated[float, Ge(0)] = 0.5
    gamma: Annotated[float, Ge(0)] = 1.0
    validation: Annotated[int, Ge(0)] = 64
    patience: Annotated[int, Ge(1)] = 30
    per_layer_bias_correction: Annotated[bool, Named("bias-correction")] = False
    per_parameter: bool = False

    @property
    def leashed(self) -> bool:
        """Whether utility text is held to."""
        return self.objective == "repair" and self.gamma > 0

    def as_dict(self) -> dict[str, Any]:
        """For the record of a run, beside what it says of the held-out examples."""
        names = ("select", "objective", "beta", "gamma", "patience", "per_parameter")
        told = {name: getattr(self, name) for name in names}
        return {"method": "irepair", **told, "bias_correction": self.per_layer_bias_correction}


PAPERS = RepairSettings()


def repair(
    stack: Stack,
    good: Sequence[Sample],
    bad: Sequence[Sample],
    *,
    utility: Sequence[Sample] | None = None,
    settings: RepairSettings = PAPERS,
    config: TrainConfig = TRAINING,
    hooks: Sequence[Hook] = (),
    work: Work = Work(),
) -> Plan:
    """The plan alone, on token samples, which nothing judges; see :func:`~lamella.methods.irepair.method.irepair`.

    Killed, the same call goes on from the last checkpoint in ``work`` with the same result. Training is in float32,
    with RMSprop, one pass over the pairs by default.

    Args:
        stack: the opened model; it is not changed, and is the reference of the KL.
        good, bad: wanted and unwanted continuations, a good one for each bad one with the same prompt; made with
            :func:`lamella.train.pairs`. The paper has the loss on the prompt too (``loss_on="all"``).
        utility: text in general, whose distribution is to stay; left out, as many texts as are seen, which the model
            writes itself from its start token. Text of another kind would pull the model there.
        settings: how the layer is chosen, and what is trained for.
        config: of the training; a batch is of pairs, and of as many utility texts. The seed, the authors' 202, is also
            that of what is held out and drawn.
        hooks: what else looks on, with the model as it is then; see :class:`lamella.train.Hook`.
        work: for the tensors, ``trace.json`` (see :class:`~lamella.methods.irepair.slices.Trace`) and, in
            ``training``, the checkpoints and ``log.json``.

    Returns:
        A plan that replaces the tensors of the layers that were touched, and says which step chose which.

    Raises:
        MethodError: for pairs that do not fit together, or a model that is no decoder.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    _check(stack, good, bad, utility)
    folder = work.directory()
    feed, held_out, config = _fed(stack, good, bad, utility, settings, config)
    reference = share(stack.model).eval()
    policy = copy.deepcopy(stack.model).float()  # small steps would be lost in half precision
    slices = Slices(
        [dict(policy.named_parameters())] if settings.select == "all" else layer_parameters(Stack(policy)),
        _chooser(settings.select, Stack(reference), feed.samples, config),
        bad_loss if settings.select in ("max", "min") else None,
        per_parameter=settings.per_parameter,
        bias_correction=settings.per_layer_bias_correction,
    )
    best = BestSlices(slices, settings.patience)
    inside = {each for own in slices.slices for each in own.values()}
    trained = {name for name, each in policy.named_parameters(remove_duplicate=False) if each in inside}
    log = fit(
        policy,
        feed,
        Task(_loss(settings, reference), by_role, count_examples, dropout=False, frozen=(reference,)),
        _warming(config),
        out=folder / "training",
        trainable=trained.__contains__,
        optimizer=slices.optimizer,
        held_out=held_out,
        hooks=[slices, *([best] if held_out else []), *hooks],
        settings={**settings.as_dict(), "start": model_digest(policy, ())},
    )
    slices.trace.write(folder / "trace.json")
    return _plan(stack, policy, folder, log, slices.trace, settings.select)


def _fed(
    stack: Stack,
    good: Sequence[Sample],
    bad: Sequence[Sample],
    utility: Sequence[Sample] | None,
    settings: RepairSettings,
    config: TrainConfig,
) -> tuple[Feed, list[Example], TrainConfig]:
    """What is trained on, what is held out, and the config with its number of steps."""
    pairs: list[Example] = [{"good": wanted, "bad": unwanted} for wanted, unwanted in zip(good, bad, strict=True)]
    pairs, held_out = _split(pairs, min(settings.validation, int(HELD_OUT * len(pairs))), config.seed)
    config = config.with_steps(len(pairs))
    if not settings.leashed:
        return Feed(pairs), held_out, config
    if utility is None:
        assert config.steps is not None
        count = min(len(good), config.steps * config.batch * config.accumulate + len(held_out))
        written = own_texts(stack.model, count, OWN_TOKENS, seed=config.seed)
        utility = [blocks(text[None], loss_on="all")[0] for text in written]
    texts, held_texts = _split([{"utility": each} for each in utility], len(held_out), config.seed)
    held_out = [{**pair, **held_texts[n % len(held_texts)]} for n, pair in enumerate(held_out)]
    return Feed(pairs, along=[texts]), held_out, config


def _loss(settings: RepairSettings, reference: Any) -> Callable[[Any, Roles], tuple[Tensor, Mapping[str, Tensor]]]:
    if settings.objective == "dpo":
        return partial(preference_loss, reference=reference)
    return partial(repair_loss, reference=reference, beta=settings.beta, gamma=settings.gamma)


def _warming(config: TrainConfig) -> TrainConfig:
    """The config with the authors' rate, which rises over so many steps and stays; others are taken as they are."""
    if config.schedule != "constant":
        return config
    rate = config.shaped(constant)
    assert isinstance(rate, Constant) and config.steps is not None
    if config.steps < rate.warmup:
        warnings.warn(
            f"the warm-up of {rate.warmup} steps is longer than the {config.steps} steps of this run, so the rate only "
            f"reaches {rate(config.steps):.2g}: give a shorter warmup, or more pairs",
            stacklevel=3,
        )
    return config.with_schedule(rate)


def _chooser(select: str, stack: Stack, pairs: Sequence[Example], config: TrainConfig) -> Choose:
    """From the step and the sensitivities to a layer."""
    if select == "max":
        return lambda step, norms: int(np.argmax(norms))
    if select == "min":
        return lambda step, norms: int(np.argmin(norms))
    if select == "random":
        draw = torch.Generator().manual_seed(config.seed)
        drawn = torch.randint(len(stack), (config.steps or 1,), generator=draw).tolist()
        return lambda step, norms: drawn[step - 1]
    if select == "all":
        return lambda step, norms: 0
    size = config.batch
    rows = [pair["bad"] for pair in pairs[: ONE_SHOT * size]]
    batches = [
        {name: each.to(stack.device) for name, each in collate(rows[begin : begin + size]).items()}
        for begin in range(0, len(rows), size)
    ]
    strongest = int(np.argmax(sensitivity(stack, batches, response_loss, average="gradients").values))
    return lambda step, norms: strongest


def _plan(stack: Stack, policy: Any, folder: Path, log: TrainingLog, trace: Choices, select: str) -> Plan:
    """The plan that replaces what was changed, with what was measured."""
    original = dict(stack.model.named_parameters())
    ours = {name: each.detach().to(original[name].dtype) for name, each in policy.named_parameters()}
    changed = {name: each for name, each in ours.items() if not torch.equal(each, original[name].detach())}
    edits = [replace_edit(stack, changed, folder, "irepair")] if changed else []
    if not changed and log.held_out:
        warnings.warn(
            "no step lowered the loss on held-out pairs, so the model stays as it is: lower lr, or give more pairs",
            stacklevel=3,
        )
    best = min(log.held_out, key=lambda point: point.loss, default=None)
    measured = {
        "steps": len(trace.chosen),
        "best_step": len(trace.chosen) if best is None else best.step,
        "chosen": {} if select == "all" else {f"layers.{layer}": trace.chosen.count(layer) for layer in trace.touched},
        "tensors": len(changed),
        "parameters": sum(each.numel() for each in changed.values()),
        "held_out": [{"step": point.step, "loss": point.loss, **point.parts} for point in log.held_out],
    }
    provenance = {"settings": dict(log.settings), "measured": measured, "trace": "trace.json"}
    return Plan(model=ModelReference.of(stack), weights=edits, provenance=provenance)


def _split(items: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """What is left, and ``count`` that are held out."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(count, len(items) - 1)
    return [items[n] for n in order[held:]], [items[n] for n in order[:held]]


def _check(stack: Stack, good: Sequence[Sample], bad: Sequence[Sample], utility: Sequence[Sample] | None) -> None:
    if not stack.architecture.causal:
        raise MethodError(f"irepair works on decoders; {stack.name} is a {stack.architecture.name}")
    if len(good) != len(bad) or len(good) < 2:
        raise MethodError(
            f"{len(good)} good and {len(bad)} bad continuations: give a good one for each bad one, 2 or more"
        )
    if utility is not None and len(utility) < 2:
        raise MethodError(f"{len(utility)} utility texts: give 2 or more, or leave them out for the model's own")
    for number, (wanted, unwanted) in enumerate(zip(good, bad, strict=True)):
        prompts = [each["input_ids"][: int(each["prompt_lengths"])] for each in (wanted, unwanted)]
        if len(prompts[0]) == 0 or not torch.equal(*prompts):
            raise MethodError(
                f"pair {number}: the prompt is missing, or not the same for both: start both with one prompt"
            )
    context = getattr(stack.config, "max_position_embeddings", None)
    for name, samples in {"good": good, "bad": bad, "utility": utility or ()}.items():
        for number, sample in enumerate(samples):
            if context is not None and len(sample["input_ids"]) > context:
                raise MethodError(
                    f"{name} text {number} has {len(sample['input_ids'])} tokens, and {stack.name} takes {context}: "
                    "cut it, or leave it out"
                )
