"""IRepair: at every step, repair only the layer that is most responsible for what a model shall not write.

Imtiaz et al., "IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models",
arXiv 2502.07072.

    slice     s_l = | grad_l L_bad |              how hard the loss on bad continuations pulls at layer l
              l*  = argmax s_l                    one layer, chosen anew at every step
    repair    L   = beta NLL(good) + gamma mean KL( p_0 || p )     p_0 the original, on text in general
    update    layer l* alone: its gradient clipped, one step of RMSprop; every other tensor stays as it is

The gradient of L_bad is a score and never a direction: descending it would make bad text likelier. Which layer is the
strongest moves while the model is repaired, so a layer that is chosen once (``fixed``) can stop helping.

A step costs a full backward for the slice, and a second one from the head down to l*: repairing one layer at a time
saves weights from being moved, not time.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lamella.data import own_texts
from lamella.errors import MethodError
from lamella.methods.irepair.sensitivity import layer_parameters, sensitivity
from lamella.methods.irepair.slices import Batch, Choose, Example, Trace, fit_slices
from lamella.plan import ModelReference, Plan, replace_edit
from lamella.registry import method
from lamella.stack import Stack, share
from lamella.train import Sample, TrainingLog, blocks, collate, dpo_loss, forward_kl, response_loss
from lamella.train.losses import mean_over_positions

Select = Literal["max", "min", "random", "fixed", "all"]
Objective = Literal["repair", "dpo"]

BASELINES: dict[str, dict[str, Any]] = {  # what the paper compares with, as options of this method
    "dapt": {"select": "all", "beta": 1.0, "gamma": 0.0},
    "dapt-kl": {"select": "all"},
    "dpo": {"select": "all", "objective": "dpo"},
}
ONE_SHOT = 500  # batches from which the fixed layer is chosen
HELD_OUT = 0.2  # at most this share of the pairs is held out
OWN_TOKENS = 101  # the most of a text that the model writes to be held to


def bad_loss(model: Any, batch: Batch) -> Tensor:
    """L_bad: minus the mean log probability of bad continuations (and of their prompts, where those carry loss)."""
    return response_loss(model, batch["bad"])


def repair_loss(
    model: Any, batch: Batch, *, reference: Any, beta: float, gamma: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """L = beta NLL(good) + gamma KL(reference || model), with its two parts."""
    parts = {"nll": response_loss(model, batch["good"])}
    loss = beta * parts["nll"]
    if gamma:
        parts["kl"] = utility_kl(model, batch["utility"], reference)
        loss = loss + gamma * parts["kl"]
    return loss, parts


def utility_kl(model: Any, batch: Mapping[str, Tensor], reference: Any) -> Tensor:
    """KL(reference || model) over the whole vocabulary, mean over all positions that are not padding, in nats."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    ours, original = Stack(model), Stack(reference)
    states = ours.hidden(inputs)[real]
    with torch.no_grad():
        original_states = original.hidden(inputs)[real]

    def chunk(states: Tensor, original_states: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = original.logits(original_states)
        return forward_kl(ours.logits(states), theirs)

    return mean_over_positions(chunk, states, original_states)


def preference_loss(model: Any, batch: Batch, *, reference: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """DPO with its usual temperature of 0.1, to compare with."""
    return dpo_loss(model, batch["good"], batch["bad"], reference=reference)


@method(
    "irepair",
    paper="2502.07072",
    purpose="repair",
    verb="repair",
    brief={"steps": 3, "warmup": 1, "lr": 1e-3, "validation": 0},
)
def irepair(
    stack: Stack,
    good: Sequence[Sample],
    bad: Sequence[Sample],
    *,
    utility: Sequence[Sample] | None = None,
    select: Literal["max", "min", "random", "fixed", "all"] = "max",
    objective: Literal["repair", "dpo"] = "repair",
    beta: float = 0.5,
    gamma: float = 1.0,
    lr: float = 5e-5,
    warmup: int = 150,
    clip: float = 0.5,
    batch: int = 4,
    steps: int | None = None,
    validation: int = 64,
    eval_every: int = 40,
    patience: int = 30,
    per_layer_bias_correction: bool = False,
    per_parameter: bool = False,
    seed: int = 202,
    out: Path | None = None,
    after_eval: Callable[[int, Any], None] | None = None,
) -> Plan:
    """Train a bad habit away, at each step in the one layer that its loss pulls at most.

    Killed, the same call goes on from the last checkpoint in ``out`` with the same result. Training is in float32.

    Args:
        stack: the opened model; it is not changed, and is the reference of the KL.
        good, bad: wanted and unwanted continuations, a good one for each bad one with the same prompt; made with
            :func:`lamella.train.pairs`. The paper has the loss on the prompt too (``loss_on="all"``).
        utility: text in general, whose distribution is to stay; left out, as many texts as are seen, which the model
            writes itself from its start token. Text of another kind would pull the model there.
        select: the layer whose sensitivity to bad text is ``max`` (the method), or to compare with ``min``, ``random``,
            or ``fixed``: the strongest of the model as it was; ``all`` trains all parameters, head and embedding too.
        objective: ``repair``, or ``dpo`` to compare with.
        beta, gamma: weights of the two parts; gamma=0 is the paper's IRepair (Free), and needs no utility text.
        lr, warmup, clip: of RMSprop, its linear warm-up in steps, and the largest norm of a gradient.
        batch: pairs, and utility texts, in a step.
        steps: the most steps; one pass over the pairs when left out, as in the paper.
        validation: how many pairs, and utility texts, are held out to stop by; a fifth of the pairs at most.
        eval_every: pairs from one validation to the next.
        patience: validations without improvement after which training stops.
        per_layer_bias_correction: RMSprop knows nothing of a layer that is chosen for the first time, so its first step
            is ten times as long as others, however late. False is the published behaviour; True corrects it.
        per_parameter: divide sensitivities by the root of a layer's size, for stacks whose layers differ.
        seed: of what is held out, the order of pairs and what is drawn; the authors' 202.
        out: a folder for the tensors, ``trace.json`` (see :class:`~lamella.methods.irepair.slices.Trace`) and, in
            ``training``, the checkpoints and ``log.json``; a temporary one when left out.
        after_eval: called before training and at each validation, with the step and the model as it is then.

    Returns:
        A plan that replaces the tensors of the layers that were touched, and says which step chose which.

    Raises:
        MethodError: for pairs that do not fit together, values out of range, or a model that is no decoder.
        TrainingError: when training fails; the last good checkpoint stays.
    """
    _check(stack, good, bad, utility, select, objective, beta, gamma)
    if validation < 0:
        raise MethodError(f"validation={validation}: give how many pairs to hold out, from 0 on")
    folder = Path(tempfile.mkdtemp(prefix="lamella-irepair-")) if out is None else Path(out)
    pairs: list[Example] = [{"good": wanted, "bad": unwanted} for wanted, unwanted in zip(good, bad, strict=True)]
    pairs, held_out = _split(pairs, min(validation, int(HELD_OUT * len(pairs))), seed)
    steps = max(1, len(pairs) // max(batch, 1)) if steps is None else steps
    streams = [pairs]
    if objective == "repair" and gamma > 0:
        if utility is None:
            count = min(len(good), steps * batch + len(held_out))
            utility = [
                blocks(text[None], loss_on="all")[0] for text in own_texts(stack.model, count, OWN_TOKENS, seed=seed)
            ]
        texts, held_texts = _split([{"utility": each} for each in utility], len(held_out), seed)
        held_out = [{**pair, **held_texts[n % len(held_texts)]} for n, pair in enumerate(held_out)]
        streams.append(texts)

    reference = share(stack.model).eval()
    policy = copy.deepcopy(stack.model).float()  # small steps would be lost in half precision
    layers = layer_parameters(Stack(policy))
    slices = [dict(policy.named_parameters())] if select == "all" else layers
    if 0 < steps < warmup:
        warnings.warn(
            f"the warm-up of {warmup} steps is longer than the {steps} steps of this run, so the rate only reaches "
            f"{lr * steps / warmup:.2g}: give a shorter warmup, or more pairs",
            stacklevel=2,
        )
    loss = (
        partial(repair_loss, reference=reference, beta=beta, gamma=gamma)
        if objective == "repair"
        else partial(preference_loss, reference=reference)
    )
    log, trace = fit_slices(
        policy,
        slices,
        streams,
        loss,
        _chooser(select, Stack(reference), pairs, batch, steps, seed),
        out=folder / "training",
        steps=steps,
        lr=lr,
        warmup=warmup,
        clip=clip,
        batch=batch,
        seed=seed,
        score=bad_loss if select in ("max", "min") else None,
        per_parameter=per_parameter,
        bias_correction=per_layer_bias_correction,
        held_out=held_out,
        eval_every=eval_every,
        patience=patience,
        settings={"method": "irepair", "select": select, "objective": objective, "beta": beta, "gamma": gamma},
        after_eval=None if after_eval is None else partial(_show, after_eval, policy),
    )
    trace.write(folder / "trace.json")
    return _plan(stack, policy, folder, log, trace, select)


def _chooser(select: Select, stack: Stack, pairs: list[Example], batch: int, steps: int, seed: int) -> Choose:
    """From the step and the sensitivities to a layer."""
    if select == "max":
        return lambda step, norms: int(np.argmax(norms))
    if select == "min":
        return lambda step, norms: int(np.argmin(norms))
    if select == "random":
        drawn = torch.randint(len(stack), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
        return lambda step, norms: drawn[step - 1]
    if select == "all":
        return lambda step, norms: 0
    rows = [pair["bad"] for pair in pairs[: ONE_SHOT * batch]]
    batches = [
        {name: each.to(stack.device) for name, each in collate(rows[begin : begin + batch]).items()}
        for begin in range(0, len(rows), batch)
    ]
    strongest = int(np.argmax(sensitivity(stack, batches, response_loss, average="gradients").values))
    return lambda step, norms: strongest


def _plan(stack: Stack, policy: Any, folder: Path, log: TrainingLog, trace: Trace, select: Select) -> Plan:
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
    provenance = {"method": "irepair", "options": dict(log.settings), "measured": measured, "trace": "trace.json"}
    return Plan(model=ModelReference.of(stack), weights=edits, provenance=provenance)


def _split(items: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """What is left, and ``count`` that are held out."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(count, len(items) - 1)
    return [items[n] for n in order[held:]], [items[n] for n in order[:held]]


def _show(after_eval: Callable[[int, Any], None], policy: Any, step: int) -> None:
    after_eval(step, policy)


def _check(
    stack: Stack,
    good: Sequence[Sample],
    bad: Sequence[Sample],
    utility: Sequence[Sample] | None,
    select: str,
    objective: str,
    beta: float,
    gamma: float,
) -> None:
    if not stack.architecture.causal:
        raise MethodError(f"irepair works on decoders; {stack.name} is a {stack.architecture.name}")
    if select not in ("max", "min", "random", "fixed", "all"):
        raise MethodError(f"select='{select}': choose max, min, random, fixed or all")
    if objective not in ("repair", "dpo"):
        raise MethodError(f"objective='{objective}': choose repair or dpo")
    if not (beta >= 0 and gamma >= 0 and np.isfinite(beta + gamma)):
        raise MethodError(f"beta={beta:g}, gamma={gamma:g}: give weights from 0 on")
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
