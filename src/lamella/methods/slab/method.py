"""SLAB: norms that become batch norms and fold away, and attention without a softmax (Guo et al., arXiv 2405.11582).

A norm computes statistics of every token at inference; a batch norm does not, and folds into the next linear layer. An
abrupt replacement spoils a trained model, so the change is gradual::

    PRepBN(X) = gamma Norm(X) + (1 - gamma) (BN(X) + eta X)      gamma: 1 -> 0 over T optimizer steps  (modules.py)
    refresh: recompute mu, sigma^2     merge: W <- W diag(A), b <- b + W B, and the norm is removed     (transition.py)

Attention without a softmax, which the paper uses in the high-resolution stages of vision models, is a separate module
(``LinearAttention``). In a trained decoder the norms with the least variation over tokens can be folded without any
training: ``fold``.
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
from lamella.methods.slab.recipe import GammaSchedule, counted_tokens, free_sites, without_norms
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
    norms: GammaSchedule = GammaSchedule(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train a decoder without norms: they become batch norms gradually, and are folded away.

    Args:
        stack: a pre-norm decoder; it is not changed.
        train: text to train on; the last twentieth is held out, to choose the checkpoint and the statistics.
        norms: schedule of the transition.
        config: training settings; defaults to the paper's learning rate, weight decay and clipping, and one epoch.
        work: folder from which an interrupted run resumes, with bitwise equal results.

    Returns:
        The model without norms. A norm stays if the layer after it has a tied weight, such as a head tied to the
        embedding.

    Raises:
        ArchitectureError: for a model whose wiring is not known.
        TrainingError: when training cannot start or stay finite: try a larger ``share``.
    """
    sites, tied = free_sites(stack)
    if not sites:
        raise MethodError(f"{stack.name} has no norm to fold: all layers after norms are tied")
    model_without, log, fold_norms = without_norms(stack, train, sites, norms, config, work.directory("run"))
    found = result_of(stack, model_without, sites)
    findings: dict[str, Any] = {"sites": [s.path for s in sites], "kept": [s.path for s in tied], "folding": fold_norms}
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
    """Fold the norms with the least variation over tokens into the next linear layers, without training.

    Such a norm divides by a nearly constant value; it is replaced by the mean over the calibration text without the
    first token of each row. The variation is measured over all tokens: in many models the first token is a hundred
    times as large as the others and serves as an attention sink, which a folded norm would destroy.

    Args:
        stack: a decoder with RMSNorms; it is not changed.
        calibration: text.
        count: number of norms to fold.
        by: which norms: those whose RMS varies least over tokens, the first ones by ``depth``, or ``random`` ones.
        seed: random seed.

    Returns:
        The model without these norms, and the variation of the RMS at each norm.

    Raises:
        MethodError: for norms that subtract a mean, or more norms than the model has.
    """
    sites, tied = free_sites(stack)
    centred = next((s.path for s in sites if isinstance(stack.model.get_submodule(s.path), nn.LayerNorm)), None)
    if centred is not None:
        raise MethodError(
            f"{centred} subtracts a mean, which cannot be folded: convert the model with pre-rmsnorm first"
        )
    if count > len(sites):
        raise MethodError(f"count {count}: {stack.name} has {len(sites)} norms to fold: give 1 to {len(sites)}")
    ids = calibration["input_ids"].to(stack.device)
    variation, divisors = rms_statistics(stack, sites, ids)
    chosen = order_sites(sites, variation, by, seed)[:count]
    found = result_of(stack, fold_norms(stack.model, chosen, divisors), chosen)
    rows = [{"site": s.path, "varies": variation[s.path], "folded": s in chosen} for s in sites]
    return Edit(stack=found[0], plan=found[1], findings={"norms": rows, "kept": [s.path for s in tied]})


def rms_statistics(stack: Stack, sites: list[Site], ids: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Return the variation of the RMS over tokens at each norm, and its divisor: the harmonic mean of the RMS.

    The first token of each row counts for the former only.

    Args:
        stack: a decoder stack with its norms.
        sites: the norms to measure.
        ids: token ids of the calibration text `[rows, tokens]`.
    """
    with torch.no_grad():
        rms = sizes(stack.model, sites, lambda: stack.model(input_ids=ids, use_cache=False))
    later = counted_tokens({"input_ids": ids}).flatten()
    return constancy(rms), {path: float(1 / (1 / each[later]).mean()) for path, each in rms.items()}


def fold_norms(model: nn.Module, sites: Sequence[Site], divisors: Mapping[str, float]) -> Any:
    """Return a view of a model without these norms: each is a gain over a constant, folded into the next layers.

    Args:
        model: the model.
        sites: the norms.
        divisors: divisor of each norm, by its path.
    """
    model_without = share(model)
    for site in sites:
        gain = model_without.get_submodule(site.path).weight.double()
        for path in site.readers:
            fold_before(model_without.get_submodule(path), gain / divisors[site.path], torch.zeros_like(gain))
        model_without.set_submodule(site.path, nn.Identity())
    return model_without


def order_sites(sites: list[Site], variation: dict[str, float], by: Order, seed: int) -> list[Site]:
    """Return the norms in the order in which they are folded.

    Args:
        sites: the norms, by depth.
        variation: variation of the RMS over tokens by the path of each norm; used by ``constancy``.
        by: ``constancy`` (least variation first), ``depth`` (from the first layer on) or ``random``.
        seed: random seed of ``random``.
    """
    if by == "depth":
        return sites
    if by == "random":
        return [sites[each] for each in np.random.default_rng(seed).permutation(len(sites))]
    return sorted(sites, key=lambda site: variation[site.path])


def result_of(stack: Stack, model_without: Any, sites: list[Site]) -> tuple[Stack, Plan]:
    """Return a model that has the removed norms as unused modules, and the plan that removes them.

    Args:
        stack: the original model; its norms become the unused modules.
        model_without: the same model without the removed norms.
        sites: the removed norms.
    """
    host = share(model_without)
    for site in sites:
        host.set_submodule(site.path, share(stack.model.get_submodule(site.path)))
    found = Stack(host, name=f"{stack.name}, folded", stack=stack.stack)
    gone = [site.path for site in sites]
    rewrite = RewriteReference(name=SLUG, params={"gone": gone})
    return found, Plan(model=ModelReference.of(found), rewrite=rewrite)
