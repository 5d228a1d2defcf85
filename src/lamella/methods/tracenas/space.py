"""The search space of TraceNAS: layers, heads and MLP channels of one model, within a budget of parameters."""

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

DEPTH = 0.85  # minimum fraction of layers; 27 of 32, 28 of 32 and 42 of 48 in the paper
MAX_TILT = 0.5  # ours: maximum preference of widths for important layers, relative to the mean width
TRIES = 200  # ours: attempts per sample within the window


class PrunedShape(NamedTuple):
    """A shape that a model can have.

    Attributes:
        keep: whether each layer is kept.
        heads: the number of query heads of each layer, also of dropped ones.
        channels: the number of MLP channels of each layer, also of dropped ones.
    """

    keep: tuple[bool, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The shapes of one model within a budget.

    Attributes:
        layers: the number of layers of the model.
        whole: the sizes of the model.
        min_layers: minimum number of layers.
        attn: minimum and maximum fraction of heads per layer.
        mlp: minimum and maximum fraction of channels per layer.
        multiple: channels are multiples of this.
        window: the minimum and maximum number of parameters.
        count: returns the number of parameters of given sizes.
    """

    layers: int
    whole: Sizes
    min_layers: int
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
        min_layers: int | None = None,
        attn: tuple[float, float] = (0.4, 1.0),
        mlp: tuple[float, float] = (0.4, 1.0),
        multiple: int = 32,
    ) -> SearchSpace:
        """Create the space around a fraction of a model's parameters.

        Args:
            stack: the model.
            params: the fraction of parameters to keep.
            tolerance: maximum relative deviation from it.
            min_layers: minimum number of layers; 85 % if None.
            attn: minimum and maximum fraction of heads per layer.
            mlp: minimum and maximum fraction of channels per layer.
            multiple: channels are multiples of this, or of an eighth of the axis if that is smaller.

        Raises:
            BudgetError: if no shape has that number of parameters; the message contains the possible range.
            MethodError: for a minimum above the maximum, or more layers than there are.
        """
        for name, (low, high) in (("attn", attn), ("mlp", mlp)):
            if low > high:
                raise MethodError(f"tracenas: {name} {low},{high}: give the minimum fraction first, then the maximum")
        whole = ModelReference.of(stack).sizes
        if whole is None:
            raise MethodError(f"tracenas: the widths of {stack.name} cannot be pruned")
        layers = len(stack)
        min_layers = round(DEPTH * layers) if min_layers is None else min_layers
        if min_layers > layers:
            raise MethodError(f"tracenas: min_layers {min_layers} is out of range: give 1 to {layers}")
        count = counter(stack.model, stack.layers, stack.architecture.wiring)
        total = count([whole] * layers, whole.hidden)
        budget = params * total
        window = (budget * (1 - tolerance), budget * (1 + tolerance))
        multiple = max(1, min(multiple, whole.channels // 8))
        space = cls(layers, whole, min_layers, attn, mlp, multiple, window, count)
        fewest = space.parameters(space.cut(Genome(np.arange(layers) < min_layers, np.tile(space.low, (layers, 1)))))
        most = space.parameters(space.cut(Genome(np.ones(layers, bool), np.tile(space.high, (layers, 1)))))
        if not (fewest <= window[1] and window[0] <= most):
            raise BudgetError(
                f"tracenas: no shape has {params:g} of the parameters: {fewest / total:.3f} to {most / total:.3f} are "
                "possible; change params, or allow fewer layers or smaller fractions"
            )
        return space

    @property
    def low(self) -> np.ndarray:
        """The minimum fractions of heads and channels."""
        return np.array([self.attn[0], self.mlp[0]])

    @property
    def high(self) -> np.ndarray:
        """The maximum fractions of heads and channels."""
        return np.array([self.attn[1], self.mlp[1]])

    def cut(self, genome: Genome) -> PrunedShape:
        """Round a genome to the nearest possible shape: equally many heads per group, and channels in multiples."""
        whole = self.whole
        step = whole.kv_heads if whole.kv_heads < whole.heads else 1
        heads = np.clip(np.rint(genome.width[:, 0] * whole.heads / step), 1, None) * step
        channels = np.clip(np.rint(genome.width[:, 1] * whole.channels / self.multiple), 1, None) * self.multiple
        return PrunedShape(
            tuple(bool(each) for each in genome.keep),
            tuple(int(each) for each in np.minimum(heads, whole.heads)),
            tuple(int(each) for each in np.minimum(channels, whole.channels)),
        )

    def parameters(self, cut: PrunedShape) -> int:
        """Return the number of parameters, with tied ones counted once."""
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
        """Return whether a genome has enough layers and is within the budget."""
        if int(genome.keep.sum()) < self.min_layers:
            return False
        return self.window[0] <= self.parameters(self.cut(genome)) <= self.window[1]

    def sample(self, rng: np.random.Generator, prior: np.ndarray) -> Genome:
        """Draw a shape within the window, wider where the prior is larger, and dropping layers where it is small.

        Args:
            rng: the random number generator.
            prior: importance of each sublayer `[layers, 2]`; only its order matters, among attentions and among MLPs.

        Raises:
            BudgetError: if none is found.
        """
        order = prior.argsort(0).argsort(0) / max(self.layers - 1, 1)  # 0 for the least important, 1 for the most
        for _ in range(TRIES):
            tilt = rng.random() * MAX_TILT
            preference = 1 + tilt * (2 * order - 1)
            dropped = rng.choice(
                self.layers,
                size=rng.integers(0, self.layers - self.min_layers + 1),
                replace=False,
                p=(2 - preference.mean(1)) / (2 - preference.mean(1)).sum(),
            )
            keep = ~np.isin(np.arange(self.layers), dropped)
            weight = preference * rng.uniform(0.8, 1.25, preference.shape)
            target = rng.uniform(*self.window)
            small, large = 0.0, 2 / weight.min()
            for _ in range(30):  # bisection: the number of parameters grows with the widths
                middle = (small + large) / 2
                genome = Genome(keep, np.clip(middle * weight, self.low, self.high))
                small, large = (middle, large) if self.parameters(self.cut(genome)) < target else (small, middle)
            if self.allows(genome):
                return genome
        raise BudgetError(
            f"tracenas: no shape of {self.window[0]:.0f} to {self.window[1]:.0f} parameters was found in {TRIES} "
            "attempts: allow a larger tolerance"
        )

    def point(self, cut: PrunedShape, saliency: Saliency) -> Point:
        """Return the plan of a shape: the most salient heads of every group, and the most salient channels.

        Args:
            cut: the shape.
            saliency: the saliency of heads and channels.
        """
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

    def shares(self, cut: PrunedShape) -> np.ndarray:
        """Return the fraction of each sublayer that is kept, r in the paper `[layers, 2]`."""
        return np.array([cut.heads, cut.channels]).T / [self.whole.heads, self.whole.channels]


def _best(values: np.ndarray, count: int) -> list[int]:
    """Return the indices of the largest values, in ascending order."""
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())
