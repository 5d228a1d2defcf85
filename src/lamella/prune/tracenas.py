"""TraceNAS: search the shape whose gradient still points where the original's does, before any training.

Malettira et al., "TraceNAS: Zero-shot LLM Pruning via Gradient Trace Correlation", arXiv 2602.02891.

    shape      which layers stay; how many heads and MLP channels each of them keeps
    g          per half, the gradient of adapters that are never trained, on one fixed batch
    rho        Pearson correlation of g with and without the cut, per half
    Phi        sum over halves that stay of (share that is kept) * rho        evolution maximises it within the budget

Phi is a sum, so it compares shapes of about one size alone: nothing outside the window of parameters is ever scored.
What is found is made to be trained: :func:`recover` is the paper's continued pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lamella.errors import BudgetError, MethodError
from lamella.plan import HeadWidth, ModelReference, Plan, PlanSeries, Point, materialise
from lamella.plan.width import WIRINGS, Sizes, counter
from lamella.progress import tracker
from lamella.registry import method
from lamella.scoring import GradientTraces, Saliency, Tokens, Traces, cosine, describe, pearson
from lamella.search import Breeding, Genome, Memo, Scored, evolve
from lamella.stack import Stack
from lamella.train import Healed, Sample, fit, own, response_loss, warmup_stable_decay

Agreement = Literal["pearson", "cosine", "dot"]
AGREEMENTS: dict[str, Callable[..., float]] = {
    "pearson": pearson,
    "cosine": cosine,
    "dot": lambda a, b: float(a @ b),
}
Prior = Literal["importance", "uniform"]
DEPTH = 0.85  # of the layers: the least that stays; 27 of 32, 28 of 32 and 42 of 48 in the paper
LEANING = 0.5  # ours: how far widths lean to important layers at most, as a share of the mean width
TRIES = 200  # ours: for one sample within the window


class Cut(NamedTuple):
    """A shape that a model can have.

    Attributes:
        keep: whether each layer stays.
        heads, channels: what each layer keeps of its query heads and MLP channels, counted also where it goes.
    """

    keep: tuple[bool, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """The shapes of one model within a budget.

    Attributes:
        layers, whole: of the model.
        least: layers that stay at least.
        attn, mlp: the least and the largest share of heads and of channels that a layer keeps.
        multiple: what channels are rounded to.
        window: the least and the most parameters.
        count: parameters of these sizes.
    """

    layers: int
    whole: Sizes
    least: int
    attn: tuple[float, float]
    mlp: tuple[float, float]
    multiple: int
    window: tuple[float, float]
    count: Callable[[Sequence[Sizes], int], int]

    @classmethod
    def of(
        cls,
        stack: Stack,
        *,
        params: float,
        tolerance: float = 0.03,
        least: int | None = None,
        attn: tuple[float, float] = (0.4, 1.0),
        mlp: tuple[float, float] = (0.4, 1.0),
        multiple: int = 32,
    ) -> Space:
        """The space around a share of a model's parameters; channels are multiples of an eighth where that is less.

        Raises:
            BudgetError: when no shape has so many parameters; the message says how many there can be.
            MethodError: for shares out of range.
        """
        if not 0 < params < 1 or tolerance <= 0:
            raise MethodError(
                f"tracenas: params={params} is the share of parameters to keep: give more than 0, below 1"
            )
        for name, (low, high) in (("attn", attn), ("mlp", mlp)):
            if not 0 < low <= high <= 1:
                raise MethodError(f"tracenas: {name}={low},{high}: give the least and the largest share, from 0 to 1")
        whole = ModelReference.of(stack).sizes
        assert whole is not None
        layers = len(stack)
        least = round(DEPTH * layers) if least is None else least
        if not 1 <= least <= layers:
            raise MethodError(f"tracenas: min_layers={least} is out of range: give 1 to {layers}")
        count = counter(stack.model, stack.layers, WIRINGS[stack.family.name])
        every = count([whole] * layers, whole.stream)
        budget = params * every
        window = (budget * (1 - tolerance), budget * (1 + tolerance))
        multiple = max(1, min(multiple, whole.channels // 8))
        space = cls(layers, whole, least, attn, mlp, multiple, window, count)
        fewest = space.parameters(space.cut(Genome(np.arange(layers) < least, np.tile(space.low, (layers, 1)))))
        most = space.parameters(space.cut(Genome(np.ones(layers, bool), np.tile(space.high, (layers, 1)))))
        if not (fewest <= window[1] and window[0] <= most):
            raise BudgetError(
                f"tracenas: no shape has {params:g} of the parameters: from {fewest / every:.3f} to {most / every:.3f} "
                "can be had; change params, or allow fewer layers or smaller shares"
            )
        return space

    @property
    def low(self) -> np.ndarray:
        return np.array([self.attn[0], self.mlp[0]])

    @property
    def high(self) -> np.ndarray:
        return np.array([self.attn[1], self.mlp[1]])

    def cut(self, genome: Genome) -> Cut:
        """The nearest shape that the model can have: as many heads in every group, channels in multiples."""
        whole = self.whole
        step = whole.kv_heads if whole.kv_heads < whole.heads else 1
        heads = np.clip(np.rint(genome.width[:, 0] * whole.heads / step), 1, None) * step
        channels = np.clip(np.rint(genome.width[:, 1] * whole.channels / self.multiple), 1, None) * self.multiple
        return Cut(
            tuple(bool(each) for each in genome.keep),
            tuple(int(each) for each in np.minimum(heads, whole.heads)),
            tuple(int(each) for each in np.minimum(channels, whole.channels)),
        )

    def parameters(self, cut: Cut) -> int:
        """The number of parameters, tied ones counted once."""
        whole = self.whole
        sizes = [
            Sizes(
                whole.stream, channels, heads, whole.kv_heads if whole.kv_heads < whole.heads else heads, whole.head_dim
            )
            for keep, heads, channels in zip(*cut, strict=True)
            if keep
        ]
        return self.count(sizes, whole.stream)

    def allows(self, genome: Genome) -> bool:
        if int(genome.keep.sum()) < self.least:
            return False
        return self.window[0] <= self.parameters(self.cut(genome)) <= self.window[1]

    def sample(self, rng: np.random.Generator, prior: np.ndarray) -> Genome:
        """A shape within the window, wider where the prior is larger and without layers where it is small.

        Args:
            prior: importance of each half [layers, 2]; only its order counts, within attentions and within MLPs.

        Raises:
            BudgetError: when none is found.
        """
        order = prior.argsort(0).argsort(0) / max(self.layers - 1, 1)  # 0 the least important, 1 the most
        for _ in range(TRIES):
            lean = rng.random() * LEANING
            liking = 1 + lean * (2 * order - 1)
            gone = rng.choice(
                self.layers,
                size=rng.integers(0, self.layers - self.least + 1),
                replace=False,
                p=(2 - liking.mean(1)) / (2 - liking.mean(1)).sum(),
            )
            keep = ~np.isin(np.arange(self.layers), gone)
            weight = liking * rng.uniform(0.8, 1.25, liking.shape)
            wanted = rng.uniform(*self.window)
            small, large = 0.0, 2 / weight.min()
            for _ in range(30):  # parameters grow with the widths
                middle = (small + large) / 2
                genome = Genome(keep, np.clip(middle * weight, self.low, self.high))
                small, large = (middle, large) if self.parameters(self.cut(genome)) < wanted else (small, middle)
            if self.allows(genome):
                return genome
        raise BudgetError(
            f"tracenas: no shape of {self.window[0]:.0f} to {self.window[1]:.0f} parameters was found in {TRIES} "
            "tries: allow a larger tolerance"
        )

    def point(self, cut: Cut, saliency: Saliency) -> Point:
        """The plan of a shape: the most salient heads of every group, and the most salient channels."""
        whole = self.whole
        width: dict[str, Any] = {}
        for layer, (keep, heads, channels) in enumerate(zip(*cut, strict=True)):
            if keep and channels < whole.channels:
                width[f"layers.{layer}.mlp.channels"] = _best(saliency.channels[layer], channels)
            if keep and heads < whole.heads:
                shared = whole.kv_heads < whole.heads
                groups = whole.kv_heads if shared else 1
                size = whole.heads // groups
                kept = [
                    group * size + head
                    for group, each in enumerate(saliency.heads[layer].reshape(groups, size))
                    for head in _best(each, heads // groups)
                ]
                kv_of = [head // size for head in kept] if shared else kept
                width[f"layers.{layer}.attn.heads"] = HeadWidth(keep=kept, kv_of=kv_of)
        return Point(drop=[f"layers.{layer}" for layer, keep in enumerate(cut.keep) if not keep], width=width)

    def shares(self, cut: Cut) -> np.ndarray:
        """What is kept of each half, r in the paper [layers, 2]."""
        return np.array([cut.heads, cut.channels]).T / [self.whole.heads, self.whole.channels]


def _best(values: np.ndarray, count: int) -> list[int]:
    """The places of the largest values, in their own order."""
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())


def phi(
    base: Traces, cut: Traces, shares: np.ndarray, agreement: Agreement = "pearson", weighted: bool = True
) -> float:
    """How well a cut's gradients agree with the original's; larger is better, within one size.

    Args:
        base, cut: the traces of the model and of a cut of it.
        shares: what the cut keeps of each half [layers, 2].
        agreement: ``pearson`` as in the paper, or ``cosine`` or ``dot``, which its ablation finds worse.
        weighted: weigh each half by what it keeps.
    """
    agree = AGREEMENTS[agreement]
    return sum(
        (float(shares[half // 2, half % 2]) if weighted else 1.0) * agree(base.halves[half], trace)
        for half, trace in cut.halves.items()
    )


def recover(
    stack: Stack,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    out: Path,
    steps: int = 400,
    lr: float = 1e-4,
    batch: int = 4,
    seed: int = 0,
    **settings: Any,
) -> Healed:
    """Continued pre-training of the smaller model: all parameters, the loss of causal language models, no teacher.

    Args:
        stack: the original; it is not changed.
        plan: a plan of whole layers and widths for it.
        samples: text, as :func:`lamella.train.blocks` makes it.
        out: a folder for checkpoints; an interrupted run goes on from there.
        steps: of the optimizer; 5 000 of 1 024 sequences in the authors' script.
        lr: the highest rate: 5 % of the steps warm up to it, 65 % stay there, 30 % decay.
        batch, seed, settings: see :func:`lamella.train.fit`.

    Returns:
        The smaller model, which is an ordinary one, with a plan that runs all of it.
    """
    smaller = materialise(stack, plan)
    own(smaller.model)
    log = fit(
        smaller.model,
        samples,
        response_loss,
        out=out,
        steps=steps,
        schedule=warmup_stable_decay(steps, lr, warmup=0.05, anneal=0.7),
        batch=batch,
        seed=seed,
        trainable=lambda name: True,
        settings={"plan": plan.digest},
        **settings,
    )
    trained = Stack(smaller.model, name=f"{stack.name}, recovered")
    return Healed(
        trained, Plan(model=ModelReference.of(trained), provenance=plan.provenance | {"healed": plan.digest}), log
    )


@method(
    slug="tracenas",
    title="TraceNAS: Zero-shot LLM Pruning via Gradient Trace Correlation",
    arxiv="2602.02891",
    kind="plan",
    families=tuple(WIRINGS),
    needs=("calibration",),
    train=recover,
    quick=False,
)
def tracenas(
    stack: Stack,
    calibration: Tokens,
    *,
    params: float = 0.6,
    tolerance: float = 0.03,
    min_layers: int | None = None,
    attn: tuple[float, float] = (0.4, 1.0),
    mlp: tuple[float, float] = (0.4, 1.0),
    multiple: int = 32,
    population: int = 30,
    elites: int = 10,
    iterations: int = 50,
    crossover: float = 0.7,
    mutate_depth: float = 0.2,
    mutate_width: float = 0.2,
    agreement: Agreement = "pearson",
    weighted: bool = True,
    prior: Prior = "importance",
    rank: int = 64,
    batch: int = 4,
    seed: int = 42,
    journal: Path | None = None,
) -> PlanSeries:
    """Search layers, heads and MLP channels together for the shape whose gradients agree with the original's.

    Args:
        stack: the opened model.
        calibration: token ids [sequences, time], or them with an attention mask; the paper: 16 x 4 096. The same for
            all shapes.
        params, tolerance: the share of all parameters to keep, and how far from it a shape may be.
        min_layers: layers that stay at least; 85 % when left out, as in the paper.
        attn, mlp: the least and the largest share of query heads and of channels in a layer. Key-value heads stay
            where several queries share them.
        multiple: channels are multiples of this, or of an eighth of the axis where that is less.
        population, elites, iterations: individuals of a generation, how many go on unchanged, generations.
        crossover, mutate_depth, mutate_width: how likely children have two parents, flip a layer, shake their widths.
        agreement: of gradients: ``pearson``, ``cosine`` or ``dot``.
        weighted: weigh each half by what it keeps.
        prior: first shapes are wider where weights times inputs are large (``importance``), or ``uniform``.
        rank: of the adapters.
        batch: sequences in one pass; gradients are means over passes.
        seed: of the adapters and of the evolution.
        journal: a file that lets an interrupted search go on.

    Returns:
        The whole model and the best shape, with its Phi; the ten best are in the provenance.

    Raises:
        BudgetError: when no shape meets the budget; the message says what can be had.
        MethodError: for options out of range.
    """
    if agreement not in AGREEMENTS or prior not in ("importance", "uniform"):
        raise MethodError("tracenas: agreement is pearson, cosine or dot, and prior is importance or uniform")
    if not 1 <= elites < population or iterations < 1:
        raise MethodError("tracenas: give a population larger than its elites, and at least one iteration")
    space = Space.of(stack, params=params, tolerance=tolerance, least=min_layers, attn=attn, mlp=mlp, multiple=multiple)
    traces = GradientTraces(stack, calibration, rank=rank, batch=batch, seed=seed)
    model = ModelReference.of(stack)
    measure = {"agreement": agreement, "weighted": weighted, "rank": rank, "batch": batch, "seed": seed}
    shape = {"params": params, "tolerance": tolerance, "attn": list(attn), "mlp": list(mlp), "multiple": space.multiple}
    provenance: dict[str, Any] = {
        "method": "tracenas",
        "options": {**shape, "min_layers": space.least, "iterations": iterations, "population": population, **measure},
        "calibration": describe(calibration),
    }
    known = Memo(journal, {"model": model.model_dump(), "calibration": provenance["calibration"], **measure})

    def score(genome: Genome) -> float:
        cut = space.cut(genome)
        name = str([list(each) for each in cut])
        if name not in known:
            point = space.point(cut, traces.saliency)
            plan = Plan(model=model, drop=point.drop, width=point.width)
            known[name] = phi(traces.base, traces.of(plan), space.shares(cut), agreement, weighted)
        return known[name]

    halves = traces.saliency.halves if prior == "importance" else np.zeros((len(stack), 2))
    breeding = Breeding(space.low, space.high, crossover, mutate_depth, mutate_width)
    found: list[Scored] = []
    with tracker("tracenas: scoring shapes", population + (iterations - 1) * (population - elites)) as count:
        for scored in evolve(
            lambda rng: space.sample(rng, halves),
            space.allows,
            score,
            breeding,
            key=space.cut,
            population=population,
            elites=elites,
            iterations=iterations,
            seed=seed,
        ):
            found.append(scored)
            count(note=f"Phi {max(each.score for each in found):.3f}")

    ranked = sorted(found, key=lambda each: each.score, reverse=True)[:10]
    provenance["evaluations"] = len(found)
    provenance["best"] = [
        {
            "phi": each.score,
            "parameters": space.parameters(space.cut(each.genome)),
            "layers": int(each.genome.keep.sum()),
        }
        for each in ranked
    ]
    best = space.cut(ranked[0].genome)
    scores = {"phi": ranked[0].score, "parameters": float(space.parameters(best))}
    winner = space.point(best, traces.saliency).model_copy(update={"scores": scores})
    whole = Point(
        scores={
            "phi": 2.0 * len(stack),
            "parameters": float(space.count([space.whole] * len(stack), space.whole.stream)),
        }
    )
    return PlanSeries(model=model, points=[whole, winner], provenance=provenance)
