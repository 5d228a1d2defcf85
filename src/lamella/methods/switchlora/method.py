"""SwitchLoRA: low-rank training with vectors that are exchanged in every step, so that the update has full rank.

Zhou, Wang and Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", arXiv 2406.06564.

    every step   gradients of A and B, clipped
                 exchange about r/40 rows of A and columns of B with their pools; W compensates for the change
                 reset the optimizer state of their counterparts, which are frozen for five steps
                 AdamW with a step count for every vector
    the end      W + (1/r) B A: an ordinary model

LoRA restricts the update of a weight to r fixed directions. Exchanging a few vectors at a time visits all directions of
the pools, with gradients and optimizer state of LoRA's size. Embedding, norms and head are trained in full.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge

from lamella import processes
from lamella.data import Passages
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.switchlora.optimizer import per_vector
from lamella.methods.switchlora.switching import ExchangeFrequency, SwitchHook
from lamella.plan import ModelReference, Plan
from lamella.registry import method
from lamella.results import Trained
from lamella.runtime import apply
from lamella.stack import Stack, sites_of
from lamella.train import Task, TrainConfig, add_lora, fit, own, response_loss, with_weights_of

TRAINING = TrainConfig(lr=2e-2)  # the paper's rate, for a scale of 1 / r
MIN_RANK = 2  # a single vector could never be exchanged, since its counterpart must not be exchanged at the same time
RANK_DIVISOR = 4  # the paper's rank is a quarter of the hidden size: 256 of 1024, 512 of 2048
REST = 0.05  # relative rate of the other parameters: 1e-3, at which the paper trains full models
BASE = ".base_layer."  # peft's name of the weights that are adapted
SPECTRUM_POINTS = 33  # singular values of a spectrum to report
VISIBLE = 0.01  # singular values below this fraction of the largest do not count towards the rank


@method("switchlora", paper="2406.06564", purpose="adapt", brief={"steps": 3, "r": 4})
def switchlora(
    stack: Stack,
    train: Passages,
    plan: Plan | None = None,
    *,
    r: Annotated[int, Ge(MIN_RANK)] | None = None,
    rest: Annotated[float, Ge(0)] = REST,
    frequency: ExchangeFrequency = ExchangeFrequency(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train a model on text, whole or under a plan, with LoRA's memory and an update of full rank.

    Args:
        stack: a decoder; it is not changed.
        train: text, in blocks, all tokens of which have loss.
        plan: the plan under which the model runs in training; the whole model if omitted.
        r: rank; a quarter of the hidden size if omitted. Linear layers that are not larger are never exchanged.
        rest: learning rate of embedding, norms and head, relative to that of the adapters; 0 freezes them.
        frequency: how often vectors are exchanged.
        config: settings of the training; weight decay is not supported. Its seed is also that of the pools.
        work: the directory from which an interrupted run resumes, bit-exact.

    Returns:
        The model with dense weights, and the spectrum of the update of each linear layer.

    Raises:
        MethodError: for a rank that does not fit, or a plan in which a layer runs twice.
        TrainingError: if training cannot start or diverges.
    """
    width = stack.architecture.sizes_of(stack.config).hidden
    r = max(MIN_RANK, width // RANK_DIVISOR) if r is None else r
    if r >= width:
        raise MethodError(f"r {r}: give a rank from {MIN_RANK} to {width - 1}, below the hidden size")
    if config.weight_decay:
        raise MethodError("weight decay would change frozen vectors: set weight_decay to 0")
    config = config.with_steps(len(train), processes.count())
    assert config.steps is not None
    plan = plan or Plan(model=ModelReference.of(stack))
    sites = sites_of(plan.running("vectors"), stack.positions)
    view = apply(stack, plan)
    lora = add_lora(view, r, alpha=1, sites=sites, seed=config.seed)

    def trains(name: str) -> bool:
        return lora.trains(name) or (rest > 0 and not name.startswith("lamella_policy.") and BASE not in name)

    own(view, lambda name: BASE in name or trains(name))
    pools = work.directory(f"pools-{processes.local_rank()}")
    switching = SwitchHook(lora, frequency, config.steps, config.seed, pools)
    log = fit(
        view,
        train,
        Task(response_loss),
        config,
        out=work.directory() / "run",
        trainable=trains,
        optimizer=per_vector(rest),
        hooks=[switching],
        settings={"plan": plan.digest, "r": r, "rest": rest, "frequency": str(frequency)},
    )
    lora.merge()
    lora.remove()
    trained = with_weights_of(stack, view)
    notes = [
        f"{name} is not larger than the rank of {r}: its vectors were not exchanged." for name in switching.unswitched
    ]
    return Trained(stack=trained, plan=plan, log=log, findings={"r": r} | spread(stack, trained, r), notes=notes)


@torch.no_grad()
def spread(before: Stack, after: Stack, r: int) -> dict[str, Any]:
    """Measure the rank and the spectrum of the updates of linear layers.

    Args:
        before: the original model.
        after: the model with other weights.
        r: the rank of each step's update.

    Returns:
        ``updates``: for each linear layer its rank, and the fraction of its squared norm beyond the r largest singular
        values; ``spectrum``: singular values relative to the largest at 33 positions from the first to the last,
        averaged over all linear layers.
    """
    updates, spectra = {}, []
    new = dict(after.model.named_parameters())
    for name, old in before.model.named_parameters():
        if not name.startswith(before.architecture.prefix) or old.ndim != 2 or torch.equal(new[name], old):
            continue
        values = torch.linalg.svdvals((new[name] - old).float())
        squares = values.double().square()
        updates[name.removesuffix(".weight")] = {
            "rank": int((values > VISIBLE * values[0]).sum()),
            "of": len(values),
            "beyond": float(squares[r:].sum() / squares.sum()),
        }
        spectra.append((values / values[0])[torch.linspace(0, len(values) - 1, SPECTRUM_POINTS).round().long()])
    return {"updates": updates, "spectrum": torch.stack(spectra).mean(0).tolist() if spectra else []}
