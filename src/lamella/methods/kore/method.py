"""KORE: add new knowledge to a model along directions that its old inputs do not excite.

Jiang et al., "KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and
Constraints", arXiv 2510.19316.

    0  augment  one image and one text to a tree of conversations: `kore augment`     tree.py
    1  C        covariance of every linear layer's input on old samples               covariance.py
    2  U_n      the r directions with the smallest eigenvalues of C                   nullspace.py
    3  A0, B0   from W U_n U_n^T
    4  train    y = W x + B' A0 x,  A0 frozen, B' = B - B0 from 0                     as a LoRA, of scale 1
                and LLaVA's projector, in full                                        projector.py
    5  merge    W + B' A0

The paper trains y = W_res x + B A0 x with W_res = W - B0 A0 and B from B0. With A0 frozen and without weight decay,
both are equivalent: both start at W, and B and B - B0 have the same gradient, so Adam takes the same steps.
``form="residual"`` is the paper's own form, which changes the weights during training. Freezing A0 is what retains old
knowledge: with A0 trained too, the first steps leave the null space.

For a vision-language model, the linear layers of its text model are adapted; its vision tower and its head are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella import processes
from lamella.data import ImageText, Passages, Text
from lamella.errors import MethodError
from lamella.evaluate.fidelity import causal_stack
from lamella.files import Work
from lamella.methods.kore.covariance import Covariance, equal_rank, input_covariance
from lamella.methods.kore.nullspace import WEAK, LowRankFactors, null_basis, on_basis
from lamella.methods.kore.projector import projector_of, state_of, two_rates
from lamella.plan import ModelReference, Plan
from lamella.plan.fingerprint import revision
from lamella.progress import notify, tracker
from lamella.registry import method
from lamella.results import Tuned
from lamella.runtime import apply
from lamella.stack import Stack, sites_of
from lamella.train import (
    Lora,
    Task,
    TrainConfig,
    adamw,
    add_lora,
    batching,
    fit,
    linear_at,
    merge,
    own,
    response_loss,
)
from lamella.train.lora import ADAPTER

TRAINING = TrainConfig(lr=2e-4)  # the authors' scripts: cosine schedule, 3 % warm-up, no weight decay
Form = Literal["lora", "residual"]


@dataclass(frozen=True)
class Constraint:
    """The directions along which the model may change.

    Attributes:
        r: number of directions; by default, B has as many parameters as both factors of a LoRA of rank ``match``.
        match: the rank of that LoRA; the paper's 128, which gives 235 for LLaVA-7B.
        freeze: freeze A0, as in the paper; otherwise it trains too, which retains little.
        form: ``lora`` beside the unchanged weights, or the paper's ``residual``, which gives the same result.
        balanced: in C, give image positions as much weight as all text; the paper counts each token once.
        projector: learning rate of the projector between vision tower and text model, relative to that of the adapters:
            the paper's 2e-5 / 2e-4, for LLaVA. 0 freezes it.
    """

    r: Annotated[int, Ge(1)] | None = None
    match: Annotated[int, Ge(1)] = 128
    freeze: bool = True
    form: Form = "lora"
    balanced: bool = False
    projector: Annotated[float, Ge(0)] = 0.1


@method("kore", paper="2510.19316", purpose="adapt", brief={"r": 4, "steps": 3})
def kore(
    stack: Stack,
    train: Passages | ImageText,
    old: Text | ImageText,
    plan: Plan | None = None,
    *,
    covariance: Path | None = None,
    save_covariance: Path | None = None,
    constraint: Constraint = Constraint(),
    targets: tuple[str, ...] = (),
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Tuned:
    """Train on new samples along directions that old ones do not excite; the result is an ordinary LoRA adapter.

    Args:
        stack: a decoder, or the text model of a vision-language model; it is not changed.
        train: new text in blocks, with loss on every token; or images with text, with loss on the answers, such as
            ``kore augment`` makes.
        old: text, or images with text, that represents the behaviour to keep: some hundreds of windows or rows. It is
            not trained on.
        plan: plan under which the model runs during training; defaults to the whole model.
        covariance: a file of an earlier round, to which these old samples are added.
        save_covariance: file for the measured covariances, for any rank and for the next round, with this model or the
            resulting one.
        constraint: the directions along which the model may change.
        targets: last parts of the names of linear layers, such as ``q_proj``; defaults to all of a layer.
        config: training settings; the seed determines the order of samples.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        The adapter, the merged model, and for each linear layer the energy of old samples on its directions.

    Raises:
        MethodError: for a rank above the size of a layer, a file of other weights, or a plan in which a layer runs
            twice.
        ArchitectureError: for a model that does not continue text.
        CalibrationError: for old samples that are empty or too short.
        TrainingError: when training cannot start or does not stay finite.
    """
    _check(constraint, config)
    causal_stack(stack)
    plan = plan or Plan(model=ModelReference.of(stack), provenance={"method": "kore"})
    running = sites_of(plan.running("inputs"), stack.positions)
    view = apply(stack, plan)
    names = linear_at(view, targets or None, running)
    r = _rank(view, names, constraint)

    folder = work.directory("covariance")
    measured = input_covariance(view, names, old, balanced=constraint.balanced, folder=folder)
    if covariance is not None:
        measured = Covariance.read(covariance, measured.base) + measured
    split = split_weights(view, names, measured, r)
    notes = _notes(split, measured, r)
    for note in notes if processes.is_first() else ():
        notify(f"kore: {note}")
    lora = add_adapters(view, names, split, r, running, constraint.form, config.seed)
    halves = (".lora_B.",) if constraint.freeze else (".lora_A.", ".lora_B.")
    projector = projector_of(stack) if constraint.projector and isinstance(train, ImageText) else ""
    if projector:
        own(view, lambda name: name.startswith(f"{projector}."))
    log = fit(
        view,
        train,
        Task(response_loss, collate=batching(train)),
        config,
        out=work.directory() / "run",
        trainable=lambda name: name.startswith(f"{projector}.") or any(half in name for half in halves),
        optimizer=partial(two_rates, projector=projector, share=constraint.projector) if projector else adamw,
        settings={
            "plan": plan.digest,
            "r": r,
            "modules": list(names),
            "base": lora.base,
            "projector": [projector, constraint.projector] if projector else "",
        },
    )
    if constraint.form == "residual":
        restore(lora, split)
    adapter = lora.adapter()
    if projector:
        adapter = replace(adapter, whole={projector: state_of(view.get_submodule(projector))})
    merged = merge(stack, adapter)
    if save_covariance is not None:
        replace(measured, later=(*measured.later, revision(apply(merged, plan)))).save(save_covariance)
    return Tuned(
        stack=merged,
        plan=plan,
        log=log,
        adapter=adapter,
        findings={
            "r": r,
            "tokens": measured.tokens,
            "image tokens": measured.images,
            "parameters": _parameters(split),
            "projector": projector,
            "energy": {name: each.energy for name, each in split.items()},
        },
        notes=notes,
    )


def _check(constraint: Constraint, config: TrainConfig) -> None:
    if constraint.form == "residual" and config.weight_decay:
        raise MethodError("weight decay would pull B to 0 instead of B0: set it to 0, or use form lora")
    if constraint.form == "residual" and not constraint.freeze:
        raise MethodError("the residual weight depends on A0: freeze it, or use form lora")


def weight_of(module: nn.Module) -> Tensor:
    """The weight W [m, n] of a linear layer, including GPT-2's Conv1D."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _rank(view: Any, names: tuple[str, ...], constraint: Constraint) -> int:
    weights = {name: weight_of(view.get_submodule(name)) for name in names}
    shapes = {name: (weight.shape[1], len(weight)) for name, weight in weights.items()}
    least = min(shapes, key=lambda name: shapes[name][0])
    r = equal_rank(shapes, constraint.match) if constraint.r is None else constraint.r
    if r > shapes[least][0]:
        raise MethodError(f"r {r}: {least} has {shapes[least][0]} inputs: give a rank between 1 and that")
    return r


def split_weights(view: Any, names: tuple[str, ...], measured: Covariance, r: int) -> dict[str, LowRankFactors]:
    """Compute A0, B0 and the energy of each linear layer; layers with the same input share one basis.

    Args:
        view: the model.
        names: names of its linear layers.
        measured: covariances of their inputs.
        r: number of directions.
    """
    found = {}
    with tracker("null-space directions", len(names)) as count:
        for matrix in dict.fromkeys(measured.reads[name] for name in names):
            basis = null_basis(measured.of(matrix), r)
            for name in (each for each in names if measured.reads[each] == matrix):
                found[name] = on_basis(weight_of(view.get_submodule(name)).detach(), basis)
                count()
    return {name: found[name] for name in names}


@torch.no_grad()
def add_adapters(
    view: Any, names: tuple[str, ...], split: dict[str, LowRankFactors], r: int, sites: list[str], form: Form, seed: int
) -> Lora:
    """Add adapters of scale 1 to the linear layers: A = A0, and B = 0, or B = B0 beside the residual weight.

    Args:
        view: the model, changed in place.
        names: names of its linear layers.
        split: factors of each layer.
        r: number of directions.
        sites: sites of the adapters.
        form: ``lora`` or ``residual``.
        seed: random seed.
    """
    lora = add_lora(view, r, alpha=r, targets=names, sites=sites, seed=seed)
    for name in names:
        module, (a, b, *_) = view.get_submodule(name), split[name]
        module.lora_A[ADAPTER].weight.copy_(a)
        if form == "residual":
            base = module.get_base_layer()
            rest = (weight_of(base).float() - b @ a).to(base.weight.dtype)
            base.weight = nn.Parameter(rest.T.contiguous() if isinstance(base, Conv1D) else rest, requires_grad=False)
            module.lora_B[ADAPTER].weight.copy_(b)
    return lora


@torch.no_grad()
def restore(lora: Lora, split: dict[str, LowRankFactors]) -> None:
    """Convert W_res x + B A0 x back to W x + (B - B0) A0 x, in place.

    Args:
        lora: the adapters.
        split: factors of each layer.
    """
    for name in lora.modules:
        module, (a, b, *_) = lora.view.get_submodule(name), split[name]
        base = module.get_base_layer()
        whole = b @ a
        base.weight += (whole.T if isinstance(base, Conv1D) else whole).to(base.weight.dtype)
        module.lora_B[ADAPTER].weight.sub_(b)


def _parameters(split: dict[str, LowRankFactors]) -> dict[str, int]:
    """Number of parameters on non-empty directions; a layer with fewer outputs than r has fewer directions."""
    live = [(each, min(len(each.a), len(each.b))) for each in split.values()]
    return {"A0": sum(r * each.a.shape[1] for each, r in live), "B": sum(r * len(each.b) for each, r in live)}


def _notes(split: dict[str, LowRankFactors], measured: Covariance, r: int) -> list[str]:
    notes = []
    weak = [each for each in split.values() if each.energy > WEAK]
    if weak:
        notes.append(
            f"In {len(weak)} of {len(split)} linear layers, the {r} directions contain more than {WEAK:.0%} of the "
            f"energy of old samples ({fmean(each.energy for each in weak):.1%} on average): these samples allow a rank "
            f"of {min(each.allows for each in weak)} in all of them, which retains more."
        )
    short = [len(c) for c in measured.matrices.values() if measured.tokens < len(c)]
    if short:
        notes.append(
            f"{measured.tokens} tokens of old samples excite at most as many directions, but {len(short)} inputs have "
            f"{min(short)} or more: the null space is not determined. Give at least {max(short)} tokens."
        )
    return notes
