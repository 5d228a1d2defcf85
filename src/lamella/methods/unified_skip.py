"""Unified layer skipping: prompts run at full depth, generated tokens through an evenly spaced subset of the layers.

Liu et al., "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy", arXiv 2404.06954.

    prompt     0 1 2 3 4 5 6 7 ... 29     all layers; the first new token comes from here
    new token  0 . 2 . 4 . 6 . ... 29     the same kept layers for every token of every request

The kept set does not depend on the input, so batches and ordinary KV caches work, and the caches of skipped layers are
freed. The decoder of an encoder-decoder takes such a plan too: its prompt is its initial tokens, mostly the start
token. Without training the quality degrades fast; the paper fine-tunes for each target.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from lamella.data import ImageText, Samples
from lamella.errors import BudgetError, MethodError
from lamella.evaluate.scored import read_inputs
from lamella.files import Work
from lamella.plan import ModelReference, PhasedPath, Plan, PlanSeries, Point
from lamella.registry import command, method
from lamella.runtime import apply, phase_options
from lamella.stack import Stack, last_stack
from lamella.train import NO_LOSS, Healed, Task, TrainConfig, batching, fit, own, response_loss, with_weights_of

TRAINING = TrainConfig(steps=200, lr=2e-5)


def balanced(total: int, keep: int) -> list[int]:
    """Return ``keep`` of the indices 0 to ``total - 1``, evenly spaced and including both ends.

    Args:
        total: number of indices.
        keep: number of indices to return.

    >>> balanced(30, 6)
    [0, 6, 12, 17, 23, 29]

    Raises:
        BudgetError: unless 2 <= keep <= total.
    """
    if not 2 <= keep <= total:
        raise BudgetError(f"cannot keep {keep} of {total} evenly: keep at least 2 and at most {total}")
    return sorted({round(j * (total - 1) / (keep - 1)) for j in range(keep)})


def released_rule(layers: int, keep: int) -> list[int]:
    """Return the kept layers by the rule of the authors' code: multiples of an interval between the two ends.

    Below a speed-up of 2 its interval is 1, and it keeps a contiguous run from the bottom, which is not balanced.

    Args:
        layers: number of layers of the model.
        keep: number of layers to keep.

    >>> released_rule(30, 6)
    [0, 6, 12, 18, 24, 29]

    Raises:
        BudgetError: unless 2 <= keep <= layers.
    """
    if not 2 <= keep <= layers:
        raise BudgetError(f"cannot keep {keep} of {layers} layers: keep at least 2 and at most {layers}")
    interval = layers // (keep - 1)
    kept = {0, layers - 1}
    for layer in range(1, layers - 1):
        if layer % interval == 0 and len(kept) < keep:
            kept.add(layer)
    return sorted(kept)


RULES = {"even": balanced, "release": released_rule}


@command("unified-skip", "tune")
def tune(
    stack: Stack,
    plan: Plan,
    train: Samples | ImageText,
    *,
    config: TrainConfig = TRAINING,
    full_depth_ce: Annotated[float, Ge(0)] = 0.0,
    align_cos: Annotated[float, Ge(0)] = 0.0,
    work: Work = Work(),
) -> Healed:
    """Fine-tune all weights but the embedding, with prompts at full depth and answers through the kept layers.

    The result is only valid with its plan: one checkpoint per target.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        train: prompts with their answers, also about images; the loss is computed on answers alone.
        config: training settings; the learning rate is that of the authors' code.
        full_depth_ce: weight of the cross-entropy of the answers at full depth, which keeps the whole model usable too.
        align_cos: weight of the mean cosine between the hidden states of both depths after each kept layer, on answers.
        work: folder from which an interrupted run resumes.

    Raises:
        MethodError: for a decoder that attends to an encoder, whose samples would be pairs.
    """
    if "cross" in stack.architecture.names:
        raise MethodError(
            f"unified-skip: the {stack.stack} of {stack.name} attends to an encoder and these samples are texts: "
            "train it with a loss of your own (on lamella.parallel(view, inputs, prompt_lengths) in Python)"
        )
    out = work.directory()
    view = apply(stack, plan)
    embedding = stack.base.get_submodule(stack.architecture.embedding).weight
    parameters = stack.model.named_parameters(remove_duplicate=False)
    names = [name for name, each in parameters if each is not embedding]  # nor an output head tied to it
    own(view, names.__contains__)
    kept = [run.layer for run in plan.runs("decode")]

    def loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {"ce": response_loss(model, inputs)}
        total = parts["ce"]
        at_full_depth = inputs | {
            "prompt_lengths": torch.full_like(inputs["prompt_lengths"], inputs["labels"].shape[1])
        }
        if full_depth_ce:
            parts["full depth ce"] = response_loss(model, at_full_depth)
            total = total + full_depth_ce * parts["full depth ce"]
        if align_cos:
            thin, full = (_hidden_states(model, each) for each in (inputs, at_full_depth))
            answers = inputs["labels"] != NO_LOSS
            cosines = [torch.cosine_similarity(thin[k + 1], full[k + 1], dim=-1)[answers].mean() for k in kept]
            parts["cosine"] = torch.stack(cosines).mean()
            total = total - align_cos * parts["cosine"]
        return total, parts

    log = fit(
        view,
        train,
        Task(loss, collate=batching(train)),
        config,
        out=out,
        trainable=names.__contains__,
        settings={"plan": plan.digest, "full_depth_ce": full_depth_ce, "align_cos": align_cos},
    )
    return Healed(stack=with_weights_of(stack, view), plan=plan, log=log)


def _hidden_states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the hidden states before each layer, and the final ones: each [batch, time, hidden]."""
    options = phase_options(model, inputs["prompt_lengths"])
    arguments = read_inputs(model, inputs)
    hidden: tuple[Tensor, ...] = (
        last_stack(model).outputs(arguments, **options, output_hidden_states=True).hidden_states
    )
    return hidden


@method("unified-skip", paper="2404.06954", purpose="skip")
def unified_skip(
    stack: Stack, *, speedup: Annotated[float, Ge(1)] | None = None, rule: Literal["even", "release"] = "even"
) -> PlanSeries:
    """Skip evenly spaced layers while generating; prompts are always processed at full depth.

    Args:
        stack: the opened model of L layers; also the decoder of an encoder-decoder.
        speedup: target speed-up as a ratio of layer counts: floor(L / speedup) layers are kept. Wall-clock speed-up is
            smaller. If omitted, the series holds every number of kept layers from L down to 2.
        rule: ``even``, Lamella's balanced spacing, valid for every target; or ``release``, the rule of the authors'
            code, which degenerates to a contiguous run below a target of 2.

    Returns:
        The series of plans, starting with the whole model.

    Raises:
        BudgetError: for a target that keeps fewer than 2 layers.
    """
    layers = len(stack)
    everything = list(range(layers))
    if speedup is None:
        targets = list(range(layers - 1, 1, -1))
    elif speedup <= layers / 2:
        targets = [int(layers / speedup)]
    else:
        raise BudgetError(f"a speed-up of {speedup} is out of range: {layers} layers allow 1 to {layers / 2:g}")
    if rule == "release" and speedup is not None and targets[0] < layers and layers // (targets[0] - 1) == 1:
        warnings.warn(
            f"at a speed-up of {speedup} the released rule keeps layers 0 to {targets[0] - 2} and the last one: a "
            "contiguous cut, not a balanced one; use rule even",
            stacklevel=3,
        )
    name = stack.architecture.stack
    paths = [PhasedPath(prefill=everything, decode=RULES[rule](layers, keep)) for keep in targets]
    points = [Point(), *(Point(path={name: path}, scores={"kept layers": len(path.decode)}) for path in paths)]
    return PlanSeries(model=ModelReference.of(stack), points=points)
