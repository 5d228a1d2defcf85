"""KORE: put new knowledge into a model along directions that its old inputs do not excite.

Jiang et al., "KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and
Constraints", arXiv 2510.19316.

    0  augment  one image and one text to a tree of conversations: `kore augment`     tree.py
    1  C        of what every linear map reads of old samples                         covariance.py
    2  U_n      the r directions with the smallest eigenvalues of C                   nullspace.py
    3  A0, B0   from W U_n U_n^T
    4  train    y = W x + B' A0 x,  A0 frozen, B' = B - B0 from 0                     as a LoRA, of scale 1
                and LLaVA's projector, as a whole                                     projector.py
    5  merge    W + B' A0

The paper trains y = W_res x + B A0 x with W_res = W - B0 A0 and B from B0. Where A0 is frozen and nothing decays, that
is the same: both begin at W, and B and B - B0 have one gradient, so Adam takes one way. ``form="residual"`` is the
paper's own, which changes the weights while it trains. Freezing A0 is what retains: with A0 trained too, the first
steps leave the null space.

Of a model that reads images, the maps of its text are adapted; its vision tower and its head stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
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
from lamella.methods.kore.nullspace import WEAK, Basis, Factors, null_basis, on_basis
from lamella.methods.kore.projector import projector_of, state_of, two_rates
from lamella.plan import ModelReference, Plan
from lamella.plan.fingerprint import revision
from lamella.progress import notify, track
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

TRAINING = TrainConfig(lr=2e-4)  # the authors' scripts: a cosine, 3 % of warm-up, no decay
Form = Literal["lora", "residual"]


@dataclass(frozen=True)
class Constraint:
    """Along how many directions the model may change.

    Attributes:
        r: how many; left out, B has as many numbers as a LoRA of rank ``match`` in both halves.
        match: the rank of that LoRA; the paper's 128, which makes 235 of LLaVA-7B.
        freeze: keep A0 as it is, as the paper does; else it trains too, which retains little.
        form: ``lora`` beside the weights as they are, or the paper's ``residual``, which gives the same result.
        balanced: in C, let the positions of images weigh as much as all text; the paper counts each token once.
        projector: the rate of the projector between tower and text, in that of the adapters: the paper's 2e-5 by 2e-4,
            for LLaVA. 0 leaves it as it is.
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
    """Learn samples along directions that old ones do not excite; the result is an ordinary LoRA adapter.

    Args:
        stack: a decoder, or the text of a model that reads images; it is not changed.
        train: new text, in blocks, every token of which carries loss; or images with text, whose answers do, such as
            ``kore augment`` makes.
        old: text, or images with text, that stands for what the model shall keep doing: a few hundred windows or rows.
            Nothing trains on it.
        plan: what the model runs under while it trains; the whole model when left out.
        covariance: a file of an earlier round, to which these old samples are added.
        save_covariance: keep what was measured in this file, for any rank and for the next round, be it from this model
            on or from the one that comes out.
        constraint: along how many directions.
        targets: the last parts of the names of linear maps, such as ``q_proj``; all of a layer when left out.
        config: of the training; its seed is that of the order of samples.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The adapter, the model with it merged, and for each linear map the energy of old samples on its directions.

    Raises:
        MethodError: for a rank above the size of a map, a file of other weights, or a plan in which a layer runs twice.
        ArchitectureError: for a model that does not continue text.
        CalibrationError: for old samples that are empty or too short.
        TrainingError: when training cannot start or stay finite.
    """
    _check(constraint, config)
    causal_stack(stack)
    plan = plan or Plan(model=ModelReference.of(stack), provenance={"method": "kore"})
    running = sites_of(plan.running("inputs"), stack.positions)
    view = apply(stack, plan)
    names = linear_at(view, targets or None, running)
    r = _rank(view, names, constraint)

    measured = input_covariance(view, names, old, balanced=constraint.balanced)
    if covariance is not None:
        measured = Covariance.read(covariance, measured.base) + measured
    split = split_weights(view, names, measured, r)
    notes = _notes(split, measured, r)
    for note in notes if processes.is_first() else ():
        notify(f"kore: {note}")
    lora = beside(view, names, split, r, running, constraint.form, config.seed)
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
            "numbers": _numbers(split),
            "projector": projector,
            "energy": {name: each.energy for name, each in split.items()},
        },
        notes=notes,
    )


def _check(constraint: Constraint, config: TrainConfig) -> None:
    if constraint.form == "residual" and config.weight_decay:
        raise MethodError("weight decay would pull B to 0 and not to where it began: leave it out, or take form lora")
    if constraint.form == "residual" and not constraint.freeze:
        raise MethodError("what is left of a weight holds one A0: freeze it, or take form lora")


def weight_of(module: nn.Module) -> Tensor:
    """W [m, n] of a linear map, GPT-2's too."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _rank(view: Any, names: tuple[str, ...], constraint: Constraint) -> int:
    weights = {name: weight_of(view.get_submodule(name)) for name in names}
    shapes = {name: (weight.shape[1], len(weight)) for name, weight in weights.items()}
    least = min(shapes, key=lambda name: shapes[name][0])
    r = equal_rank(shapes, constraint.match) if constraint.r is None else constraint.r
    if r > shapes[least][0]:
        raise MethodError(f"r {r}: {least} reads {shapes[least][0]} numbers; give a rank from 1 to that")
    return r


def split_weights(view: Any, names: tuple[str, ...], measured: Covariance, r: int) -> dict[str, Factors]:
    """A0, B0 and the energy of each map; maps that read the same share one basis."""

    @cache
    def basis(matrix: str) -> Basis:
        return null_basis(measured.matrices[matrix], r)

    found = {}
    for name in track(names, "directions that old samples do not excite"):
        measured.of(name)
        found[name] = on_basis(weight_of(view.get_submodule(name)).detach(), basis(measured.reads[name]))
    return found


@torch.no_grad()
def beside(
    view: Any, names: tuple[str, ...], split: dict[str, Factors], r: int, sites: list[str], form: Form, seed: int
) -> Lora:
    """Adapters of scale 1 beside the maps of a view: A = A0, and B = 0, or B0 beside what is left of the weight."""
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
def restore(lora: Lora, split: dict[str, Factors]) -> None:
    """From W_res x + B A0 x back to W x + (B - B0) A0 x."""
    for name in lora.modules:
        module, (a, b, *_) = lora.view.get_submodule(name), split[name]
        base = module.get_base_layer()
        whole = b @ a
        base.weight += (whole.T if isinstance(base, Conv1D) else whole).to(base.weight.dtype)
        module.lora_B[ADAPTER].weight.sub_(b)


def _numbers(split: dict[str, Factors]) -> dict[str, int]:
    """How many there are on directions that are not empty: of a map with fewer outputs than r, as many as outputs."""
    live = [(each, min(len(each.a), len(each.b))) for each in split.values()]
    return {"A0": sum(r * each.a.shape[1] for each, r in live), "B": sum(r * len(each.b) for each, r in live)}


def _notes(split: dict[str, Factors], measured: Covariance, r: int) -> list[str]:
    notes = []
    weak = [each for each in split.values() if each.energy > WEAK]
    if weak:
        notes.append(
            f"In {len(weak)} of {len(split)} linear maps the {r} directions hold more than {WEAK:.0%} of what old "
            f"samples excite ({fmean(each.energy for each in weak):.1%} on average): these samples allow a rank of "
            f"{min(each.allows for each in weak)} in all of them, which retains more."
        )
    short = [len(c) for c in measured.matrices.values() if measured.tokens < len(c)]
    if short:
        notes.append(
            f"{measured.tokens} tokens of old samples excite as many directions at most, and {len(short)} inputs have "
            f"{min(short)} or more: which of the rest are null, they cannot tell. Give {max(short)} tokens or more."
        )
    return notes
