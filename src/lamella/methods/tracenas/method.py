"""TraceNAS: search for the shape whose gradients agree best with the original's, before any training.

Malettira et al., "TraceNAS: Zero-shot LLM Pruning via Gradient Trace Correlation", arXiv 2602.02891.

    shape      which layers are kept, and the number of heads and MLP channels in each of them
    g          per sublayer, the gradient of adapters that are never trained, on one fixed batch
    rho        Pearson correlation of g with and without the pruning, per sublayer
    Phi        sum over kept sublayers of (fraction kept) * rho    evolution maximises it within the budget

Phi is a sum, so it only compares shapes of similar size: nothing outside the window of parameters is ever scored. The
resulting shape is meant to be trained: :func:`recover` is the paper's continued pre-training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from lamella.data import Samples, Text
from lamella.errors import MethodError
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.measure import describe
from lamella.methods.tracenas.evolve import Breeding, Genome, ScoredShape, evolve
from lamella.methods.tracenas.space import SearchSpace
from lamella.methods.tracenas.traces import GradientTraces, Traces, cosine, pearson
from lamella.plan import ModelReference, Plan, PlanSeries, Point, materialise
from lamella.progress import tracker
from lamella.registry import command, method
from lamella.runtime import apply
from lamella.search import Memo
from lamella.stack import Stack
from lamella.train import Healed, Task, TrainConfig, fit, own, response_loss, warmup_stable_decay

Agreement = Literal["pearson", "cosine", "dot"]
AGREEMENTS: dict[str, Callable[..., float]] = {
    "pearson": pearson,
    "cosine": cosine,
    "dot": lambda a, b: float(a @ b),
}
Prior = Literal["importance", "uniform"]
TRAINING = TrainConfig(steps=400, lr=1e-4, schedule="wsd")


def phi(
    base: Traces, cut: Traces, shares: np.ndarray, agreement: Agreement = "pearson", weighted: bool = True
) -> float:
    """Return the agreement of a pruned shape's gradients with the original's; compare shapes of equal size only.

    Args:
        base: the traces of the model.
        cut: the traces of the pruned shape.
        shares: the fraction of each sublayer that is kept `[layers, 2]`.
        agreement: ``pearson`` as in the paper, or ``cosine`` or ``dot``, which are worse in its ablation.
        weighted: weight each sublayer by the fraction that is kept.
    """
    agree = AGREEMENTS[agreement]
    total = 0.0
    for position, trace in cut.sublayers.items():
        fraction = float(shares[position.layer, ("attn", "mlp").index(position.sublayer)])
        total += (fraction if weighted else 1.0) * agree(base.sublayers[position], trace)
    return total


@command("tracenas", "recover")
def recover(
    stack: Stack,
    plan: Plan,
    train: Samples,
    *,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Healed:
    """Continue pre-training of the pruned model: all parameters, the causal language modelling loss, no teacher.

    Args:
        stack: the original; it is not changed.
        plan: a plan of whole layers and widths for it.
        train: text, as blocks from :func:`lamella.train.blocks`.
        config: settings of the training; the authors' script has 5 000 steps of 1 024 sequences. Its ``wsd`` schedule
            is theirs: 5 % of the steps are warm-up, 65 % have the highest rate, 30 % decay.
        work: the directory from which an interrupted run resumes.

    Returns:
        The pruned model, which is an ordinary one, with a plan that runs all of it.
    """
    out = work.directory()
    smaller = materialise(stack, plan)
    own(smaller.model)
    config = config.with_steps(len(train))
    if config.schedule == "wsd":
        config = config.with_schedule(config.shaped(partial(warmup_stable_decay, warmup=0.05, anneal=0.7)))
    log = fit(
        smaller.model,
        train,
        Task(response_loss),
        config,
        out=out,
        trainable=lambda name: True,
        settings={"plan": plan.digest},
    )
    trained = Stack(smaller.model, name=f"{stack.name}, recovered")
    whole = Plan(model=ModelReference.of(trained), provenance=plan.provenance | {"healed": plan.digest})
    return Healed(stack=trained, plan=whole, log=log)


Share = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class Shapes:
    """The shapes to search.

    Attributes:
        params: the fraction of all parameters to keep.
        tolerance: maximum relative deviation of a shape from it.
        min_layers: minimum number of layers; 85 % if omitted, as in the paper.
        attn: minimum and maximum fraction of query heads per layer. Key-value heads that are shared by several query
            heads are kept.
        mlp: minimum and maximum fraction of channels.
        multiple: channels are multiples of this, or of an eighth of the axis if that is smaller.
    """

    params: Annotated[float, Gt(0), Lt(1)] = 0.6
    tolerance: Annotated[float, Gt(0)] = 0.03
    min_layers: Annotated[int, Ge(1)] | None = None
    attn: tuple[Share, Share] = (0.4, 1.0)
    mlp: tuple[Share, Share] = (0.4, 1.0)
    multiple: Annotated[int, Ge(1)] = 32

    def of(self, stack: Stack) -> SearchSpace:
        """Return the search space of a model."""
        sizes = {"attn": self.attn, "mlp": self.mlp, "multiple": self.multiple}
        return SearchSpace.of(stack, params=self.params, tolerance=self.tolerance, min_layers=self.min_layers, **sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ShapeSearch:
    """Settings of the evolutionary search; the defaults are the authors'.

    Attributes:
        population: individuals per generation.
        elites: individuals that are kept unchanged.
        iterations: number of generations.
        crossover: probability that a child has two parents.
        mutate_depth: probability that its layers are flipped.
        mutate_width: probability that its widths are perturbed.

    Raises:
        MethodError: for a population that is not larger than its elites.
    """

    population: Annotated[int, Ge(2)] = 30
    elites: Annotated[int, Ge(1)] = 10
    iterations: Annotated[int, Ge(1)] = 50
    crossover: Annotated[float, Ge(0), Le(1)] = 0.7
    mutate_depth: Annotated[float, Ge(0), Le(1)] = 0.2
    mutate_width: Annotated[float, Ge(0), Le(1)] = 0.2

    def __post_init__(self) -> None:
        if self.elites >= self.population:
            raise MethodError(f"tracenas: elites {self.elites} of a population of {self.population}: give fewer elites")

    @property
    def odds(self) -> tuple[float, float, float]:
        """The probabilities of crossover, depth mutation and width mutation."""
        return self.crossover, self.mutate_depth, self.mutate_width

    @property
    def scored(self) -> int:
        """The maximum number of shapes that are scored."""
        return self.population + (self.iterations - 1) * (self.population - self.elites)


@method(
    "tracenas",
    paper="2602.02891",
    purpose="prune",
    on=("llama", "mistral", "qwen2", "qwen3", "gpt2"),
    brief={"params": 0.8, "tolerance": 0.1, "population": 4, "elites": 2, "iterations": 2, "rank": 2},
    slow=True,
)
def tracenas(
    stack: Stack,
    calibration: Text,
    *,
    shapes: Shapes = Shapes(),
    evolution: ShapeSearch = ShapeSearch(),
    agreement: Agreement = "pearson",
    weighted: bool = True,
    prior: Prior = "importance",
    rank: Annotated[int, Ge(1)] = 64,
    batch: Annotated[int, Ge(1)] = 4,
    seed: int = 42,
    work: Work = Work(),
) -> PlanSeries:
    """Search layers, heads and MLP channels together for the shape whose gradients agree best with the original's.

    Args:
        stack: the opened model.
        calibration: text, or token ids `[sequences, time]`, alone or with an attention mask; the paper uses 16 x 4 096.
            The same for all shapes.
        shapes: the shapes to search.
        evolution: settings of the evolutionary search.
        agreement: measure of agreement of gradients: ``pearson``, ``cosine`` or ``dot``.
        weighted: weight each sublayer by the fraction that is kept.
        prior: initial shapes are wider where weights times inputs are large (``importance``), or ``uniform``.
        rank: rank of the adapters.
        batch: sequences per pass; gradients are means over passes.
        seed: random seed of the adapters and of the evolution.
        work: the directory from which an interrupted search resumes.

    Returns:
        The whole model and the best shape, with its Phi. The provenance contains the ten best, the widths of each layer
        of the best, and its fidelity to the original before any training, on the test split of a text.

    Raises:
        BudgetError: if no shape meets the budget; the message contains the possible range.
        MethodError: for more layers or larger fractions than there are.
    """
    space = shapes.of(stack)
    traces = GradientTraces(stack, calibration, rank=rank, batch=batch, seed=seed)
    model = ModelReference.of(stack)
    measure = {"agreement": agreement, "weighted": weighted, "rank": rank, "batch": batch, "seed": seed}
    header = {"model": model.model_dump(), "calibration": describe(calibration), **measure}
    memo = Memo(work.journal("tracenas"), header)

    def score(genome: Genome) -> float:
        cut = space.cut(genome)
        name = str([list(each) for each in cut])
        if name not in memo:
            point = space.point(cut, traces.saliency)
            plan = Plan(model=model, drop=point.drop, width=point.width)
            memo[name] = phi(traces.base, traces.of(plan), space.shares(cut), agreement, weighted)
        return memo[name]

    order = traces.saliency.sublayers if prior == "importance" else np.zeros((len(stack), 2))
    breeding = Breeding(space.low, space.high, *evolution.odds)
    evaluated: list[ScoredShape] = []
    with tracker("tracenas: scoring shapes", evolution.scored) as count:
        for scored in evolve(
            lambda rng: space.sample(rng, order),
            space.allows,
            score,
            breeding,
            key=space.cut,
            population=evolution.population,
            elites=evolution.elites,
            iterations=evolution.iterations,
            seed=seed,
        ):
            evaluated.append(scored)
            count(note=f"Phi {max(each.score for each in evaluated):.3f}")

    ranked = sorted(evaluated, key=lambda each: each.score, reverse=True)[:10]
    best_ten = [
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
            "parameters": float(space.count([space.whole] * len(stack), space.whole.hidden)),
        }
    )
    series = PlanSeries(
        model=model, points=[whole, winner], provenance={"evaluations": len(evaluated), "best": best_ten}
    )
    series.provenance["shape"] = [
        {"layer": layer, "kept": keep, "heads": heads, "channels": channels}
        for layer, (keep, heads, channels) in enumerate(zip(*best, strict=True))
    ]
    series.provenance["whole"] = {"heads": space.whole.heads, "channels": space.whole.channels}
    if isinstance(calibration, Text):
        test = FidelityTest(stack, calibration.part("test").tokens)
        series.provenance["fidelity"] = test.of(apply(stack, series[1])).as_dict()
    return series
