"""SLAB: norms that become batch norms and fold away, and attention without a softmax (Guo et al., arXiv 2405.11582).

A norm needs statistics of every token while the model runs; a batch norm does not, and folds into what reads it. Put
there at once it spoils a trained model, so the change is gradual::

    PRepBN(X) = gamma Norm(X) + (1 - gamma) (BN(X) + eta X)      gamma: 1 -> 0 over T optimizer steps  (modules.py)
    refresh: mu, sigma^2 once more     merge: W <- W diag(A), b <- b + W B, and the norm is gone        (transition.py)

Attention without a softmax, which the paper puts into the high-resolution stages of vision models, is a network of its
own (``LinearAttention``). Of a trained decoder the norms whose tokens are most alike can be folded with no training at
all: ``fold``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn

from lamella.data import Passages, Text
from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.slab.recipe import Schedule, counted, free_sites, without_norms
from lamella.methods.slab.sites import Site
from lamella.methods.slab.transition import constancy, fold_before, sizes
from lamella.plan import ModelReference, Plan
from lamella.plan.entries import RewriteReference
from lamella.registry import command, method
from lamella.results import Edit, Trained
from lamella.stack import Stack, share
from lamella.train import TrainConfig

SLUG = "slab"
TRAINING = TrainConfig(lr=5e-4, schedule="cosine", warmup=0.05, weight_decay=0.05, clip=5.0)
Order = Literal["constancy", "depth", "random"]


@method(
    "slab",
    paper="2405.11582",
    purpose="rewrite",
    on=("llama", "mistral", "qwen2", "qwen3", "smollm3", "ministral", "gpt2", "gpt_neox", "opt"),
    brief={"passes": 1},
)
def slab(
    stack: Stack,
    train: Passages,
    *,
    norms: Schedule = Schedule(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train a decoder until it needs no norms: they become batch norms step by step, and are folded away.

    Args:
        stack: a decoder whose norms stand before what reads them; it is not changed.
        train: text to train on.
        norms: how they go.
        config: of the training: the paper's rate, decay and clipping, and one pass, when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The model without norms. A norm stays whose reader is tied to another weight, as a head to its embedding.

    Raises:
        ArchitectureError: for a model of which it is not known what reads behind its norms.
        TrainingError: when training cannot start or stay finite: try a larger ``share``.
    """
    sites, tied = free_sites(stack)
    if not sites:
        raise MethodError(f"{stack.name} has no norm that folds: all that read one are tied")
    built, log, folded = without_norms(stack, train, sites, norms, config, work.directory("run"))
    found = result_of(stack, built, sites)
    findings: dict[str, Any] = {"sites": [s.path for s in sites], "kept": [s.path for s in tied], "folding": folded}
    return Trained(stack=found[0], plan=found[1], log=log, findings=findings)


@command(
    "slab",
    "fold",
    on=("llama", "mistral", "qwen2", "qwen3", "smollm3", "ministral"),
    brief={"count": 3},
)
def fold(
    stack: Stack,
    calibration: Text,
    *,
    count: Annotated[int, Ge(1)] = 4,
    by: Order = "constancy",
    seed: int = 0,
) -> Edit:
    """Fold the norms of a decoder whose tokens are most alike into what reads them, without training.

    Such a norm divides by nearly one number; it is the mean over the calibration text, the first token of each row
    aside. Whether tokens are alike is asked of all: where the first is a hundred times as large as the others, which
    many models have it be, a norm that goes takes with it what they look at.

    Args:
        stack: a decoder with RMSNorms; it is not changed.
        calibration: text.
        count: how many norms.
        by: which: those whose tokens' RMS varies least, the first by ``depth``, or by chance.
        seed: of the chance.

    Returns:
        The model without these norms; how much the RMS varies at each.

    Raises:
        MethodError: for norms that subtract a mean, or more of them than there are.
    """
    sites, tied = free_sites(stack)
    wrong = next((s.path for s in sites if isinstance(stack.model.get_submodule(s.path), nn.LayerNorm)), None)
    if wrong is not None:
        raise MethodError(f"{wrong} subtracts a mean, which no scale does: convert the model with pre-rmsnorm first")
    if count > len(sites):
        raise MethodError(f"count {count}: {stack.name} has {len(sites)} norms that fold, so give 1 to {len(sites)}")
    ids = calibration["input_ids"].to(stack.device)
    varies, divides = spreads(stack, sites, ids)
    chosen = ordered(sites, varies, by, seed)[:count]
    found = result_of(stack, folded(stack.model, chosen, divides), chosen)
    rows = [{"site": s.path, "varies": varies[s.path], "folded": s in chosen} for s in sites]
    return Edit(stack=found[0], plan=found[1], findings={"norms": rows, "kept": [s.path for s in tied]})


def spreads(stack: Stack, sites: list[Site], ids: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """How much the RMS of tokens varies at each norm, and by what it divides: the harmonic mean of the RMS.

    The first token of each row counts in the one and not in the other.
    """
    with torch.no_grad():
        rms = sizes(stack.model, sites, lambda: stack.model(input_ids=ids, use_cache=False))
    later = counted({"input_ids": ids}).flatten()
    return constancy(rms), {path: float(1 / (1 / each[later]).mean()) for path, each in rms.items()}


def folded(model: nn.Module, sites: Sequence[Site], divides: Mapping[str, float]) -> Any:
    """A view of a model without these norms: each is a gain over one number, in what reads it."""
    built = share(model)
    for site in sites:
        gain = built.get_submodule(site.path).weight.double()
        for path in site.readers:
            fold_before(built.get_submodule(path), gain / divides[site.path], torch.zeros_like(gain))
        built.set_submodule(site.path, nn.Identity())
    return built


def ordered(sites: list[Site], varies: dict[str, float], by: Order, seed: int) -> list[Site]:
    """Norms in the order in which they go."""
    if by == "depth":
        return sites
    if by == "random":
        return [sites[each] for each in np.random.default_rng(seed).permutation(len(sites))]
    return sorted(sites, key=lambda site: varies[site.path])


def result_of(stack: Stack, built: Any, sites: list[Site]) -> tuple[Stack, Plan]:
    """A model without some norms as one that has them, unused, and the plan that takes them out."""
    host = share(built)
    for site in sites:
        host.set_submodule(site.path, share(stack.model.get_submodule(site.path)))
    found = Stack(host, name=f"{stack.name}, folded", stack=stack.stack)
    gone = [site.path for site in sites]
    rewrite = RewriteReference(name=SLUG, params={"gone": gone})
    return found, Plan(model=ModelReference.of(found), rewrite=rewrite)
