"""Training of coefficients of frozen adapters and of the target's own adapter, and search without gradients.

The settings are the paper's: coefficients at a learning rate of 5e-2 for 100 steps of 8 examples, a cosine schedule
with 10 % warm-up, the held-out loss every 10 steps, restoring the best point; a target LoRA at 3e-4 for 400 steps.
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
from lamella.methods.lora_recycling.modules import Activation, AdapterMixture, Granularity, Init, attach, groups
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
PI_RATE = 1e-4  # learning rate of pi-Tuning, which trains adapters too
FRESH = 0.01  # standard deviation of A in pi-Tuning's new adapter; its B is zero
PATIENCE = 20  # evaluations without improvement; the paper's
BOUND, START = 1.5, 0.5  # bound of LoraHub's weights; initial step size of the search (Lamella's choice)
SPARE = 0.05  # LoraHub's penalty on mean |w|
Objective = Literal["labels", "entropy"]
Job = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Mixing:
    """Definition of the coefficients.

    Attributes:
        granularity: level of tying: the whole ``model``, a ``layer``, a ``sublayer``, a ``module``, or each ``rank``
            separately; the paper's best is per module.
        activation: function from a weight w to its coefficient: ``leaky_relu`` with slope 0.01, the paper's best;
            ``identity``, ``square``, ``softmax`` over the adapters, or ``sigmoid``.
        init: initial w: ``zero``, the paper's best, which starts at the original model; ``equal``, 1/sqrt(N);
            ``uniform``, ``normal``, or ``target``.
        objective: ``labels`` is the cross-entropy of the answers; ``entropy`` is that of the model's prediction after
            the prompt, which needs no answers (AdaMerging's objective).
    """

    granularity: Granularity = "module"
    activation: Activation = "leaky_relu"
    init: Init = "zero"
    objective: Objective = "labels"


@dataclass(frozen=True)
class Target:
    """Settings of the target LoRA, which a user would train without a pool.

    Attributes:
        target_r: its rank; the paper's 64.
        target_alpha: its output is scaled by alpha / r; the paper's 16.
        target_dropout: dropout on its input; the paper's 0.1.
        target_lr: its highest learning rate; the paper's 3e-4.
        target_steps: number of steps; the paper's 400.
    """

    target_r: Annotated[int, Ge(1)] = 64
    target_alpha: Annotated[int, Ge(1)] = 16
    target_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    target_lr: Annotated[float, Gt(0)] = 3e-4
    target_steps: Annotated[int, Ge(1)] = 400


def entropy_loss(model: Any, batch: Batch) -> Tensor:
    """Mean entropy of the model's prediction right after each prompt, in nats; answers are not used.

    Args:
        model: the model.
        batch: a batch of examples.
    """
    first = batch["prompt_lengths"]
    labels = torch.full_like(batch["labels"], NO_LOSS)
    rows = torch.arange(len(first), device=labels.device)
    labels[rows, first] = batch["input_ids"][rows, first]  # only marks the position
    states, _ = scored_states(model, {**batch, "labels": labels})
    log_probs = torch.log_softmax(Stack(model).logits(states).float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


LOSSES: dict[str, Job] = {"labels": response_loss, "entropy": entropy_loss}


def mixture(stack: Stack, adapters: Sequence[Adapter], mixing: Mixing, seed: int) -> AdapterMixture:
    """Create a view of a model with adapters and their coefficients on its linear layers.

    Args:
        stack: the model.
        adapters: the adapters.
        mixing: definition of the coefficients.
        seed: random seed.
    """
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
) -> tuple[AdapterMixture, TrainingLog]:
    """Train the coefficients of frozen adapters, and restore those of the lowest held-out loss.

    Args:
        stack: the model; it is not changed.
        adapters: the target's own first, if used.
        samples: training examples.
        held_out: held-out examples.
        mixing: definition of the coefficients.
        config: training settings.
        out: folder for checkpoints.

    Returns:
        The model with its adapters, and the training log.
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
) -> tuple[AdapterMixture, TrainingLog]:
    """Train a new adapter, its neighbours and their softmax weights together, at a learning rate of 1e-4.

    Args:
        stack: the model; it is not changed.
        neighbours: the closest members of the pool; the new adapter has the rank of the first.
        samples: training examples.
        held_out: held-out examples.
        config: training settings.
        out: folder for checkpoints.

    Returns:
        The model with its adapters, and the training log.
    """
    fresh = _fresh(neighbours, config.seed)
    found = mixture(stack, [fresh, *neighbours], Mixing(activation="softmax", init="equal"), config.seed)
    config = replace(config, lr=PI_RATE)
    log = fit(found.model, samples, Task(response_loss), config, out=out, trainable=found.trains_all, held_out=held_out,
              hooks=[EarlyStopping(PATIENCE)])  # fmt: skip
    return found, log


def _fresh(neighbours: Sequence[Adapter], seed: int) -> Adapter:
    """A new adapter of all modules that a neighbour has: A small and random, B zero."""
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
    """Train a LoRA on the examples alone, with the same batches, schedule and selection of the best point.

    Args:
        stack: the model; it is not changed.
        samples: training examples.
        held_out: held-out examples.
        target: its settings.
        config: training settings.
        out: folder for checkpoints.
        weight_decay: weight decay.

    Returns:
        The adapter and the training log.
    """
    view = share(stack.model)
    lora = add_lora(view, target.target_r, target.target_alpha, target.target_dropout,
                    sites=[f"layers.{each}" for each in range(len(stack))], seed=config.seed)  # fmt: skip
    config = replace(config, lr=target.target_lr, steps=target.target_steps, weight_decay=weight_decay)
    log = fit(view, samples, Task(response_loss), config, out=out, trainable=lora.trains, held_out=held_out,
              hooks=[EarlyStopping(PATIENCE)],
              settings={"lora": [lora.scale, list(lora.modules)], "base": lora.base})  # fmt: skip
    return lora.adapter(), log


def lorahub(
    mixed: AdapterMixture, loss: Callable[[Any], float], memo: dict[str, float], *, budget: int = 100, seed: int = 0
) -> list[float]:
    """Search one weight per adapter without gradients, by CMA-ES between -1.5 and 1.5 (the original uses NGOpt).

        f(w) = loss on the examples + 0.05 mean|w|

    The sum is of the D_i, for any ranks; the original adds A's and B's separately, which gives cross terms.

    Args:
        mixed: model with one w for all layers and the identity as activation; left with the best weights.
        loss: loss of its model on the examples.
        memo: known values, by weights.
        budget: number of evaluations; the paper's 100.
        seed: random seed of the search.

    Returns:
        The best weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it cannot plot
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
        candidates = [[BOUND * (2 * index / (budget - 1) - 1)] for index in range(budget - 1)]  # CMA-ES needs two
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
