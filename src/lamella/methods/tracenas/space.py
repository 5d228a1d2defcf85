"""The shapes that TraceNAS searches: layers, heads and MLP channels of one model, within a budget of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lamella.errors import BudgetError, MethodError
from lamella.methods.tracenas.evolve import Genome
from lamella.methods.tracenas.traces import Saliency
from lamella.plan import HeadWidth, ModelReference, Point
from lamella.plan.width import counter
from lamella.stack import Stack
from lamella.stack.wiring import Sizes

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
            MethodError: for a least share above the largest, or more layers than there are.
        """
        for name, (low, high) in (("attn", attn), ("mlp", mlp)):
            if low > high:
                raise MethodError(f"tracenas: {name} {low},{high}: give the least share first, then the largest")
        whole = ModelReference.of(stack).sizes
        if whole is None:
            raise MethodError(f"tracenas: the widths of {stack.name} cannot be cut")
        layers = len(stack)
        least = round(DEPTH * layers) if least is None else least
        if least > layers:
            raise MethodError(f"tracenas: min_layers {least} is out of range: give 1 to {layers}")
        count = counter(stack.model, stack.layers, stack.architecture.wiring)
        every = count([whole] * layers, whole.hidden)
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
                whole.hidden, channels, heads, whole.kv_heads if whole.kv_heads < whole.heads else heads, whole.head_dim
            )
            for keep, heads, channels in zip(*cut, strict=True)
            if keep
        ]
        return self.count(sizes, whole.hidden)

    def allows(self, genome: Genome) -> bool:
        if int(genome.keep.sum()) < self.least:
            return False
        return self.window[0] <= self.parameters(self.cut(genome)) <= self.window[1]

    def sample(self, rng: np.random.Generator, prior: np.ndarray) -> Genome:
        """A shape within the window, wider where the prior is larger and without layers where it is small.

        Args:
            prior: importance of each sublayer [layers, 2]; only its order counts, within attentions and within MLPs.

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
        """What is kept of each sublayer, r in the paper [layers, 2]."""
        return np.array([cut.heads, cut.channels]).T / [self.whole.heads, self.whole.channels]


def _best(values: np.ndarray, count: int) -> list[int]:
    """The places of the largest values, in their own order."""
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())
