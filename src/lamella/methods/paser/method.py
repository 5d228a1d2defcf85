"""PASER: choose the samples to heal a pruned model with, by the skills that pruning has damaged.

He et al., "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery", arXiv 2502.12594.

    pool --embed--> diffusion + non-negative factors --> clusters, one for each capability
    both models process every response: J = mean JSD over its tokens;  CDS_k = mean J of cluster k
    budget n_k ~ CDS_k;  within a cluster the samples with the largest J / log cost come first,
    and a sample that combines concepts which accepted samples have only separately is refused

The authors' published code scores prompts and sums over their tokens; the paper's form, the mean over response tokens,
is the default here. Rounding budgets by largest remainder and capping them by cluster sizes is Lamella's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from lamella.errors import CalibrationError, MethodError
from lamella.measure import DISTANCES, Embed, Embedder, embed
from lamella.methods.paser.concepts import ConceptGraph, concepts
from lamella.methods.paser.pool import InstructionPool, Selection
from lamella.methods.paser.spectral import Graph, check_scikit_learn, spectral_clusters
from lamella.plan import Plan
from lamella.progress import track
from lamella.registry import method
from lamella.runtime import apply
from lamella.signature import Named
from lamella.stack import Stack
from lamella.train import Sample, collate, pairs, scored_states

Tokens = Literal["response", "prompt"]
CHUNK = 64  # positions whose logits are computed at once, for both models


@torch.no_grad()
def degradation(
    original: Any, changed: Any, samples: Sequence[Sample], *, tokens: Tokens = "response", batch: int = 8
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure J of each sample: the divergence of the changed model's predictions from the original's.

    Args:
        original: the original model.
        changed: the pruned model or view, with the same vocabulary.
        samples: prompts with their responses.
        tokens: the mean over ``response`` tokens, as in the paper, or the sum over ``prompt`` tokens, as in its code.
        batch: samples in one forward pass.

    Returns:
        J [n] in nats, in [0, ln 2] for means; and the mean entropy of the original's predictions [n] there, in nats.
    """
    heads = [Stack(model).logits for model in (original, changed)]
    device = next(original.parameters()).device
    scores = np.zeros((2, len(samples)))
    for start in track(range(0, len(samples), batch), "degradation"):
        inputs = collate([_scoring(sample, tokens) for sample in samples[start : start + batch]])
        inputs = {name: each.to(device) for name, each in inputs.items()}
        counts = (inputs["labels"][:, 1:] != -100).sum(dim=1)
        states = [scored_states(model, inputs)[0] for model in (original, changed)]
        sums = []
        for ours, theirs in zip(*(each.split(CHUNK) for each in states), strict=True):
            base = torch.log_softmax(heads[0](ours).float(), dim=-1)
            jsd = DISTANCES["jsd"].at_positions(heads[1](theirs).float(), base, counts)
            sums.append(torch.stack([jsd, -(base.exp() * base).sum(-1)]).double().cpu())
        rows = torch.cat(sums, dim=1).split(counts.tolist(), dim=1)
        for index, row in enumerate(rows, start):
            scores[:, index] = (row.sum(1) if tokens == "prompt" else row.mean(1)).numpy()
    return scores[0], scores[1]


def _scoring(sample: Sample, tokens: Tokens) -> Sample:
    if tokens == "response":
        return sample
    prompt, labels = int(sample["prompt_lengths"]), sample["input_ids"].clone()
    labels[0] = -100
    labels[max(prompt, 2) :] = -100
    return {**sample, "labels": labels}


def budgets(scores: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Divide ``total`` in proportion to scores: by largest remainders, none above its size, nothing left over.

    The excess of a full cluster goes to the others in the same proportion. Without any damage, sizes decide.

    Args:
        scores: CDS of each cluster.
        sizes: number of samples of each cluster.
        total: B, the number of samples to choose.
    """
    allotted = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        open_clusters = [k for k, size in enumerate(sizes) if allotted[k] < size]
        weights = {k: scores[k] for k in open_clusters}
        if sum(weights.values()) <= 0:
            weights = {k: float(sizes[k] - allotted[k]) for k in open_clusters}
        exact = {k: left * weight / sum(weights.values()) for k, weight in weights.items()}
        shares = {k: math.floor(each) for k, each in exact.items()}
        by_remainder = sorted(open_clusters, key=lambda k: (shares[k] - exact[k], k))
        for k in by_remainder[: left - sum(shares.values())]:
            shares[k] += 1
        for k, share in shares.items():
            allotted[k] = min(allotted[k] + share, sizes[k])
        left = min(total, sum(sizes)) - sum(allotted)
    return allotted


@dataclass
class _Cluster:
    """The state of a cluster during selection.

    Attributes:
        label: index of the cluster.
        members: its samples in decreasing efficiency.
        degraded: its CDS.
        budget: number of samples to take.
        taken: number of samples taken so far.
        visited: number of samples considered so far.
    """

    label: int
    members: list[int]
    degraded: float
    budget: int
    taken: int = 0
    visited: int = 0


def take(
    clusters: Sequence[_Cluster], known: Sequence[tuple[str, ...]], consistent: bool
) -> tuple[list[int], dict[int, list[tuple[str, str]]], set[int]]:
    """Select samples (stage 3): visit clusters by decreasing damage, and samples by decreasing efficiency.

    A cluster that cannot fill its budget takes samples with a single conflict too; any remaining budget goes to the
    clusters after it.

    Args:
        clusters: the clusters.
        known: concepts of each sample.
        consistent: whether samples with conflicting concepts are refused.

    Returns:
        The samples taken, in order; the conflicts of those that were refused; those that were taken with a conflict.
    """
    graph, chosen = ConceptGraph(), []
    refused: dict[int, list[tuple[str, str]]] = {}
    relaxed: set[int] = set()
    order = sorted(clusters, key=lambda each: (-each.degraded, each.label))
    for index, cluster in enumerate(order):
        for tolerated in (0, 1):
            for sample in cluster.members if tolerated == 0 else [each for each in cluster.members if each in refused]:
                if cluster.taken == cluster.budget:
                    break
                cluster.visited += tolerated == 0
                conflicts = graph.conflicts(known[sample]) if consistent else []
                if len(conflicts) > tolerated:
                    refused[sample] = conflicts
                    continue
                refused.pop(sample, None)
                relaxed |= {sample} if conflicts else set()
                graph.add(known[sample])
                chosen.append(sample)
                cluster.taken += 1
        later = order[index + 1 :]
        capacity = [len(each.members) - each.budget for each in later]
        for each, more in zip(
            later, budgets([each.degraded for each in later], capacity, cluster.budget - cluster.taken), strict=True
        ):
            each.budget += more
    return chosen, refused, relaxed


@dataclass(frozen=True)
class Clustering:
    """How the instructions are clustered, one cluster for each capability.

    Attributes:
        embedder: embedding of instructions: minilm, the paper's sentence embedder, hidden-mean, tfidf or words.
        clusters: K; if None, where the gap between eigenvalues is largest, up to 10.
        graph: affinities between all pairs (dense, the paper's kernel), or between nearest neighbours (knn).
    """

    embedder: Embedder | Embed = "minilm"
    clusters: Annotated[int, Ge(1)] | None = None
    graph: Graph = "dense"

    @property
    def name(self) -> str:
        """The name of the embedder."""
        return self.embedder if isinstance(self.embedder, str) else self.embedder.__qualname__


SPECTRAL = Clustering()


@method("paser", paper="2502.12594", purpose="heal", brief={"embedder": "words"})
def paser(
    stack: Stack,
    pool: InstructionPool,
    plan: Plan,
    *,
    tokenizer: Any = None,
    budget: Annotated[float, Named("keep"), Gt(0), Le(1)] = 0.2,
    clustering: Clustering = SPECTRAL,
    tokens: Tokens = "response",
    ntem: bool = True,
    max_length: Annotated[int, Ge(1)] = 256,
    batch: Annotated[int, Ge(1)] = 8,
    seed: int = 0,
) -> Selection:
    """Choose, within a budget, the instruction samples that best heal the damage of a plan.

    Args:
        stack: the original model; it is not changed.
        pool: the instructions with responses.
        plan: the plan of the damaged model.
        tokenizer: tokenizer of the model; defaults to that of the pool.
        budget: fraction of the pool to choose; the paper takes 20 % of Alpaca and 4 % of LaMini.
        clustering: how the instructions are clustered.
        tokens: tokens of J: ``response`` (mean, as in the paper) or ``prompt`` (sum, as in its code).
        ntem: refuse samples with conflicting concepts.
        max_length: number of tokens of a sample that are used.
        batch: samples in one forward pass.
        seed: random seed of the choice of landmarks, for pools of more than 2000 samples.

    Returns:
        The chosen samples in order, with a report on clusters, scores and refusals.

    Raises:
        MethodError: without a plan or a tokenizer.
        CalibrationError: for a pool or a budget that leaves nothing to choose.
    """
    tokenizer = tokenizer or getattr(pool, "tokenizer", None)
    if plan is None or tokenizer is None:
        raise MethodError("paser compares the model with the same model under a plan, on text: give plan and tokenizer")
    check_scikit_learn()
    everyone = sorted(pool, key=lambda each: each.id)  # so that the order of the pool does not matter
    fitting = [each for each in everyone if len(tokenizer(each.prompt)["input_ids"]) < max_length]
    total = round(budget * len(fitting))
    if len({each.id for each in fitting}) < len(fitting) or not 0 < total <= len(fitting) or len(fitting) < 3:
        raise CalibrationError(
            f"a pool of {len(fitting)} samples (prompts below {max_length} tokens) with a budget of {budget:g} of it: "
            "give at least 3 samples with unique ids, and a fraction that selects some of them"
        )
    # Stage 1: cluster the instructions
    points = embed(clustering.embedder, stack, tokenizer, [each.instruction for each in fitting])
    grouped = spectral_clusters(points, clustering.clusters, graph=clustering.graph, seed=seed)
    # Stage 2: measure the damage
    rows = pairs([(each.prompt, each.response) for each in fitting], tokenizer, max_length=max_length)
    damage, entropy = degradation(stack.model, apply(stack, plan), rows, tokens=tokens, batch=batch)
    cost = np.array([len(row["input_ids"]) for row in rows], dtype=np.float64) ** 2
    efficiency = damage / np.log(np.maximum(cost, math.e))
    members = [np.flatnonzero(grouped.labels == k) for k in range(grouped.labels.max() + 1)]
    degraded = [float(damage[each].mean()) for each in members]
    shares = budgets(degraded, [len(each) for each in members], total)
    # Stage 3: take the most damaged samples for their cost, without contradictions
    known = concepts([f"{each.instruction}\n{each.context}\n{each.response}" for each in fitting])
    ordered = [sorted(each.tolist(), key=lambda sample: (-efficiency[sample], sample)) for each in members]
    groups = [_Cluster(k, ordered[k], degraded[k], shares[k]) for k in range(len(members))]
    chosen, refused, relaxed = take(groups, known, ntem)
    report = {
        "schema": "lamella.selection/1",
        "method": "paser",
        "pool": len(fitting),
        "budget": total,
        "selected": [fitting[sample].id for sample in chosen],
        "settings": {
            "plan": plan.digest, "embedder": clustering.name, "graph": clustering.graph,
            "tokens": tokens, "ntem": ntem, "max_length": max_length, "seed": seed,
        },
        "approximate": grouped.landmarks < len(fitting),
        "eigenvalues": grouped.eigenvalues.tolist(),
        "clusters": [
            {
                "cluster": each.label, "size": len(each.members), "cds": each.degraded,
                "entropy": float(entropy[members[each.label]].mean()), "share": shares[each.label],
                "budget": each.budget, "selected": each.taken,
                "acceptance": each.taken / each.visited if each.visited else None,
            }
            for each in groups
        ],
        "samples": [
            {"id": one.id, "cluster": int(label), "j": float(j), "ies": float(ies)}
            for one, label, j, ies in zip(fitting, grouped.labels, damage, efficiency, strict=True)
        ],
        "refused": [{"id": fitting[sample].id, "conflicts": pairs_} for sample, pairs_ in refused.items()],
        "too_long": sorted({each.id for each in everyone} - {each.id for each in fitting}),
        "relaxed": sorted(fitting[sample].id for sample in relaxed),
    }  # fmt: skip
    return Selection(examples=[fitting[sample] for sample in chosen], findings=report)
