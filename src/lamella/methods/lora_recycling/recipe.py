"""What trains: coefficients beside frozen adapters, the target's own adapter, or coefficients by search alone.

The numbers are the paper's: coefficients at a rate of 5e-2 for 100 steps of 8 examples, a cosine with 10 % warm-up, the
held-out loss every 10 steps, the best point restored; a target LoRA at 3e-4 for 400 steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lamella.data import Sample
from lamella.data.samples import NO_LOSS
from lamella.extras import require
from lamella.methods.lora_recycling.modules import Activation, Granularity, Init, Mixture, attach, groups
from lamella.plan.fingerprint import revision
from lamella.stack import Stack, share
from lamella.train import (
    Adapter,
    EarlyStopping,
    Task,
    TrainConfig,
    TrainingLog,
    add_lora,
    fit,
    response_loss,
    scored_states,
)
from lamella.train.task import Batch

FITTING = TrainConfig(steps=100, lr=5e-2, schedule="cosine", warmup=0.1, batch=8, eval_every=10)
PI_RATE = 1e-4  # of pi-Tuning, which trains adapters too
FRESH = 0.01  # the spread of A in pi-Tuning's own adapter; its B is zero
PATIENCE = 20  # evaluations without improvement; the paper's
BOUND, START = 1.5, 0.5  # of LoraHub's weights; the first step of the search (ours)
SPARE = 0.05  # LoraHub's price of a unit of mean |w|
Objective = Literal["labels", "entropy"]
Job = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Mixing:
    """How coefficients are made.

    Attributes:
        granularity: what shares one: the whole ``model``, a ``layer``, a ``sublayer``, nothing but the ``module``
            itself, or each ``rank`` on its own; the paper's best is per module.
        activation: from a weight w to its coefficient: ``leaky_relu`` with slope 0.01, the paper's best; ``identity``,
            ``square``, ``softmax`` over the adapters, or ``sigmoid``.
        init: of w: ``zero``, the paper's best, which starts at the model itself; ``equal``, 1/sqrt(N); ``uniform``,
            ``normal``, or ``target``.
        objective: ``labels`` is the cross-entropy of the answers; ``entropy`` that of what the model says after the
            prompt, which needs no answers (AdaMerging's own).
    """

    granularity: Granularity = "module"
    activation: Activation = "leaky_relu"
    init: Init = "zero"
    objective: Objective = "labels"


@dataclass(frozen=True)
class Target:
    """The target LoRA: what a user would train without a pool.

    Attributes:
        target_r: its rank; the paper's 64.
        target_alpha: its output is scaled by alpha / r; the paper's 16.
        target_dropout: on its input; the paper's 0.1.
        target_lr: its highest rate; the paper's 3e-4.
        target_steps: the paper's 400.
    """

    target_r: Annotated[int, Ge(1)] = 64
    target_alpha: Annotated[int, Ge(1)] = 16
    target_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    target_lr: Annotated[float, Gt(0)] = 3e-4
    target_steps: Annotated[int, Ge(1)] = 400


def entropy_loss(model: Any, batch: Batch) -> Tensor:
    """The mean entropy of what a model says right after each prompt, in nats; answers are not looked at."""
    first = batch["prompt_lengths"]
    labels = torch.full_like(batch["labels"], NO_LOSS)
    rows = torch.arange(len(first), device=labels.device)
    labels[rows, first] = batch["input_ids"][rows, first]  # marks the place alone
    states, _ = scored_states(model, {**batch, "labels": labels})
    said = torch.log_softmax(Stack(model).logits(states).float(), dim=-1)
    return -(said.exp() * said).sum(-1).mean()


LOSSES: dict[str, Job] = {"labels": response_loss, "entropy": entropy_loss}


def mixture(stack: Stack, adapters: Sequence[Adapter], mixing: Mixing, seed: int) -> Mixture:
    """A view of a model with adapters and their coefficients beside its linear maps."""
    group = groups(stack, mixing.granularity)
    how: dict[str, Any] = {name: getattr(mixing, name) for name in ("granularity", "activation", "init")}
    found = attach(share(stack.model), adapters, group, seed=seed, **how)
    return replace(found, base=found.base or revision(stack.model))


def adaptive(
    stack: Stack,
    adapters: Sequence[Adapter],
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    mixing: Mixing,
    config: TrainConfig,
    *,
    out: Path,
) -> tuple[Mixture, TrainingLog]:
    """Fit the coefficients of frozen adapters, and restore those of the lowest held-out loss.

    Args:
        stack: the model; it is not changed.
        adapters: the target's own first, where it takes part.
        samples, held_out: of the target task.
        mixing: how coefficients are made.
        config: of the training.
        out: a folder for checkpoints.
    """
    found = mixture(stack, adapters, mixing, config.seed)
    task = Task(LOSSES[mixing.objective], weight=_rows if mixing.objective == "entropy" else Task.weight)
    log = fit(found.model, samples, task, config, out=out, trainable=found.trains, held_out=held_out,
              hooks=[EarlyStopping(PATIENCE)],
              settings={"mixing": asdict(mixing), "modules": list(found.modules)})  # fmt: skip
    return found, log


def _rows(batch: Batch) -> int:
    return len(batch["input_ids"])


def pi_tuning(
    stack: Stack,
    neighbours: Sequence[Adapter],
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    config: TrainConfig,
    *,
    out: Path,
) -> tuple[Mixture, TrainingLog]:
    """Train a fresh adapter, its neighbours and their softmax weights together, at a rate of 1e-4.

    Args:
        neighbours: the closest members of the pool; the fresh adapter has the rank of the first.
    """
    fresh = _fresh(neighbours, config.seed)
    found = mixture(stack, [fresh, *neighbours], Mixing(activation="softmax", init="equal"), config.seed)
    config = replace(config, lr=PI_RATE)
    log = fit(found.model, samples, Task(response_loss), config, out=out, trainable=found.trains_all, held_out=held_out,
              hooks=[EarlyStopping(PATIENCE)])  # fmt: skip
    return found, log


def _fresh(neighbours: Sequence[Adapter], seed: int) -> Adapter:
    """An adapter of all modules that a neighbour has: A small and random, B zero."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for each in neighbours:
        for name, (a, b) in each.pairs.items():
            if name not in pairs:
                pairs[name] = (FRESH * torch.randn(a.shape, generator=generator), torch.zeros(b.shape))
    return Adapter(pairs, dict.fromkeys(pairs, 1.0), neighbours[0].transposed, neighbours[0].base)


def target_lora(
    stack: Stack,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    target: Target,
    config: TrainConfig,
    *,
    out: Path,
    weight_decay: float = 0.0,
) -> tuple[Adapter, TrainingLog]:
    """Train a LoRA on the examples alone, with the same batches, schedule and choice of the best point."""
    view = share(stack.model)
    lora = add_lora(view, target.target_r, target.target_alpha, target.target_dropout,
                    sites=[f"layers.{each}" for each in range(len(stack))], seed=config.seed)  # fmt: skip
    config = replace(config, lr=target.target_lr, steps=target.target_steps, weight_decay=weight_decay)
    log = fit(view, samples, Task(response_loss), config, out=out, trainable=lora.trains, held_out=held_out,
              hooks=[EarlyStopping(PATIENCE)],
              settings={"lora": [lora.scale, list(lora.modules)], "base": lora.base})  # fmt: skip
    return lora.adapter(), log


def lorahub(
    mixed: Mixture, loss: Callable[[Any], float], memo: dict[str, float], *, budget: int = 100, seed: int = 0
) -> list[float]:
    """Search one weight for each adapter without gradients, by CMA-ES between -1.5 and 1.5 (the original has NGOpt).

        f(w) = loss on the examples + 0.05 mean|w|

    The sum is of the D_i, for any ranks; the original adds A's and B's apart, which gives cross terms.

    Args:
        mixed: tied over the whole model, with the identity for activation; left with the best weights.
        loss: of its model on the examples.
        memo: what is known already, by weights.
        budget: evaluations; the paper's 100.
        seed: of the search.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it cannot draw
        cma = require("cma", "recycle", "a search without gradients")
    (weights,) = mixed.tensors.values()

    def price(point: Sequence[float]) -> float:
        name = " ".join(f"{each:.9g}" for each in point)
        if name not in memo:
            weights.data.copy_(torch.tensor(point, dtype=weights.dtype))
            memo[name] = loss(mixed.model) + SPARE * float(weights.abs().mean())
        return memo[name]

    start = [0.0] * len(weights)
    best, least = start, price(start)
    options = {"bounds": [-BOUND, BOUND], "seed": seed + 1, "verbose": -9, "maxfevals": budget - 1}
    if len(start) == 1:
        candidates = [[BOUND * (2 * place / (budget - 1) - 1)] for place in range(budget - 1)]  # CMA-ES needs two
        best = min([start, *candidates], key=price)
    else:
        search = cma.CMAEvolutionStrategy(start, START, options)
        while not search.stop() and search.countevals + search.popsize < budget:
            points = search.ask()
            prices = [price(point) for point in points]
            search.tell(points, prices)
            for point, found in zip(points, prices, strict=True):
                if found < least:
                    best, least = list(point), found
    weights.data.copy_(torch.tensor(best, dtype=weights.dtype))
    return [float(each) for each in best]
