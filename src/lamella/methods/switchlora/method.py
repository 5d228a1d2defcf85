"""SwitchLoRA: low-rank training whose vectors are exchanged in every step, so that the update is of full rank.

Zhou, Wang and Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", arXiv 2406.06564.

    every step   gradients of A and B, clipped
                 exchange about r/40 rows of A and columns of B with their pools; what left goes into W
                 reset the optimizer state of each one's counterpart, which does not move for five steps
                 AdamW with a step count for every vector
    the end      W + (1/r) B A: an ordinary model

LoRA moves a weight within r directions for good. Exchanging a few vectors at a time goes through all directions of the
pools, with gradients and optimizer state of LoRA's size. Embedding, norms and head train whole.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge

from lamella import processes
from lamella.data import Passages
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.switchlora.optimizer import by_vectors
from lamella.methods.switchlora.switching import Frequency, Switching
from lamella.plan import ModelReference, Plan
from lamella.registry import method
from lamella.results import Trained
from lamella.runtime import apply
from lamella.stack import Stack, sites_of
from lamella.train import Task, TrainConfig, add_lora, fit, own, response_loss, with_weights_of

TRAINING = TrainConfig(lr=2e-2)  # the paper's, for a scale of 1 / r
LEAST = 2  # ranks: a single vector could never be exchanged, since its counterpart may not be exchanged with it
QUARTER = 4  # of the stream's width is the paper's rank: 256 of 1024, 512 of 2048
REST = 0.05  # the rate of what trains whole: 1e-3, at which the paper trains models whole
BASE = ".base_layer."  # how peft calls the weights beside adapters
PLACES = 33  # of a spectrum that are shown
VISIBLE = 0.01  # of the largest singular value of an update: smaller ones do not count into its rank


@method("switchlora", paper="2406.06564", purpose="adapt", brief={"steps": 3, "r": 4})
def switchlora(
    stack: Stack,
    train: Passages,
    plan: Plan | None = None,
    *,
    r: Annotated[int, Ge(LEAST)] | None = None,
    rest: Annotated[float, Ge(0)] = REST,
    frequency: Frequency = Frequency(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train a model on text, whole or under a plan, with LoRA's memory and an update of full rank.

    Args:
        stack: a decoder; it is not changed.
        train: text, in blocks, every token of which carries loss.
        plan: what the model runs under while it trains; the whole model when left out.
        r: rank; a quarter of the stream's width when left out. A linear map that is no wider is never exchanged.
        rest: the learning rate of embedding, norms and head, in that of the adapters; 0 leaves them as they are.
        frequency: how often vectors are exchanged.
        config: of the training; weight decay is left out. Its seed is that of the pools, too.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The model with dense weights, and how the update of each linear map is spread over directions.

    Raises:
        MethodError: for a rank that does not fit, or a plan in which a layer runs twice.
        TrainingError: when training cannot start or stay finite.
    """
    width = stack.architecture.sizes_of(stack.config).hidden
    r = max(LEAST, width // QUARTER) if r is None else r
    if r >= width:
        raise MethodError(f"r {r}: give a rank from {LEAST} to {width - 1}, below the stream's width")
    if config.weight_decay:
        raise MethodError("weight decay would move vectors that are frozen: leave it out")
    config = config.with_steps(len(train), processes.count())
    assert config.steps is not None
    plan = plan or Plan(model=ModelReference.of(stack))
    running = sites_of(plan.running("vectors"), stack.positions)
    view = apply(stack, plan)
    lora = add_lora(view, r, alpha=1, sites=running, seed=config.seed)

    def trains(name: str) -> bool:
        return lora.trains(name) or (rest > 0 and not name.startswith("lamella_policy.") and BASE not in name)

    own(view, lambda name: BASE in name or trains(name))
    switching = Switching(lora, frequency, config.steps, config.seed)
    log = fit(
        view,
        train,
        Task(response_loss),
        config,
        out=work.directory() / "run",
        trainable=trains,
        optimizer=by_vectors(rest),
        hooks=[switching],
        settings={"plan": plan.digest, "r": r, "rest": rest, "frequency": str(frequency)},
    )
    lora.merge()
    lora.remove()
    trained = with_weights_of(stack, view)
    notes = [f"{name} is no wider than the rank of {r}: nothing of it was exchanged." for name in switching.still]
    return Trained(stack=trained, plan=plan, log=log, findings={"r": r} | spread(stack, trained, r), notes=notes)


@torch.no_grad()
def spread(before: Stack, after: Stack, r: int) -> dict[str, Any]:
    """Over how many directions the updates of linear maps are spread.

    Args:
        before, after: one model with other weights.
        r: the rank of each step's update.

    Returns:
        ``updates``: of each linear map its rank, and which share of its squared norm lies beyond the r largest
        singular values; ``spectrum``: singular values over the largest at 33 places from the first to the last, the
        mean over all linear maps.
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
        spectra.append((values / values[0])[torch.linspace(0, len(values) - 1, PLACES).round().long()])
    return {"updates": updates, "spectrum": torch.stack(spectra).mean(0).tolist() if spectra else []}
