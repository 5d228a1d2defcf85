"""Schedules of image tokens: the kept fraction for every layer and denoising step, and its cost.

    keep[l, s]     fraction at the input of layer l in step s, of a model with 4 layers in 4 steps

    one_shot(layer=1, step=0.5, keep=0.25)      withdraw(layer=1)        withdraw(layer=1, step=0.5)
    s=0    1    1    1    1                     1    1    0    0         1    1    0    0
    s=1    1    1    1    1                     1    1    0    0         1    1    0    0
    s=2    1    1   .25  .25                    1    1    0    0         0    0    0    0
    s=3   .25  .25  .25  .25                    1    1    0    0         0    0    0    0

Steps are fractions of all steps, since short answers have few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lamella.errors import MethodError, listed
from lamella.stack import Stack


class Drop(NamedTuple):
    """A drop: from a step on, only a fraction of the image tokens is kept.

    Attributes:
        step: the step, as a fraction of all steps.
        keep: the kept fraction.
    """

    step: float
    keep: float


@dataclass(frozen=True)
class VisualTokenSchedule:
    """The fraction of image tokens kept, by layer and step.

    Attributes:
        drops: the drops, in order of steps and decreasing fractions.
        layer: l*; in the step of a drop, tokens are dropped between its attention and its MLP; -1: before the first
            layer.
        withdrawn: the last layer that image tokens run, in every step; None: all layers.

    Raises:
        MethodError: for drops out of order, or values out of range.
    """

    drops: tuple[Drop, ...] = ()
    layer: int = -1
    withdrawn: int | None = None

    def __post_init__(self) -> None:
        steps, keeps = [each.step for each in self.drops], [each.keep for each in self.drops]
        if not all(0 <= step < 1 for step in steps) or not all(0 <= keep <= 1 for keep in keeps):
            raise MethodError(f"drops {listed(map(tuple, self.drops))}: steps must be in [0, 1) and keeps in [0, 1]")
        if steps != sorted(set(steps)) or keeps != sorted(keeps, reverse=True):
            raise MethodError(f"drops {listed(map(tuple, self.drops))}: later drops must keep fewer tokens")
        if self.layer < -1 or (self.withdrawn is not None and self.withdrawn < 0):
            raise MethodError(f"layer {self.layer}, withdrawn {self.withdrawn}: give layer indices from 0 on")

    @classmethod
    def one_shot(cls, layer: int, step: float, keep: float) -> VisualTokenSchedule:
        """Keep all tokens before, and the fraction ``keep`` after layer ``layer`` of the step.

        Args:
            layer: l*.
            step: s*, as a fraction of all steps; 0 is early.
            keep: the kept fraction.
        """
        return cls((Drop(step, keep),), layer)

    @classmethod
    def progressive(cls, steps: Sequence[float], keeps: Sequence[float], layer: int = -1) -> VisualTokenSchedule:
        """Drop tokens progressively; each selection is a subset of the previous one.

        Args:
            steps: step of each drop, as a fraction of all steps.
            keeps: kept fraction after each drop.
            layer: l*.
        """
        return cls(tuple(map(Drop, steps, keeps)), layer)

    @classmethod
    def withdraw(cls, layer: int, step: float | None = None) -> VisualTokenSchedule:
        """Layer skipping (VTW): image tokens run only layers 0 to ``layer``, and from ``step`` on none.

        Args:
            layer: the last layer for image tokens.
            step: step from which they are dropped entirely, as a fraction of all steps; None: never.
        """
        return cls(() if step is None else (Drop(step, 0.0),), -1, layer)

    def begins(self, drop: Drop, steps: int) -> int:
        """Return the index of the step in which a drop happens.

        Args:
            drop: the drop.
            steps: number of denoising steps of the answer.
        """
        return int(drop.step * steps)

    def keep(self, layer: int, step: int, steps: int) -> float:
        """Return keep[l, s]: the fraction at the input of a layer.

        Args:
            layer: l, index of the layer.
            step: s, index of the denoising step.
            steps: number of denoising steps of the answer.
        """
        if self.withdrawn is not None and layer > self.withdrawn:
            return 0.0
        passed = [
            drop.keep
            for drop in self.drops
            if step > (begins := self.begins(drop, steps)) or (step == begins and layer > self.layer)
        ]
        return min(passed, default=1.0)

    def table(self, layers: int, steps: int) -> list[list[float]]:
        """Return keep[l, s] as one row per step.

        Args:
            layers: number of layers of the model.
            steps: number of denoising steps of the answer.
        """
        return [[self.keep(layer, step, steps) for layer in range(layers)] for step in range(steps)]

    def check_fits(self, layers: int) -> None:
        """Check that the model has the layers of the schedule.

        Raises:
            MethodError: for a layer that the model does not have.
        """
        for name, layer in (("layer", self.layer), ("withdrawn", self.withdrawn)):
            if layer is not None and layer >= layers:
                raise MethodError(f"{name} {layer}: the model has the layers 0 to {layers - 1}")


def count(n_visual: int, keep: float) -> int:
    """Return the number of tokens for a fraction: rounded down, at least one, but 0 if the fraction is 0.

    Args:
        n_visual: number of image tokens.
        keep: the kept fraction.

    >>> count(64, 0.25), count(3, 0.25), count(3, 0.0)
    (16, 1, 0)
    """
    return 0 if keep == 0 else max(1, int(n_visual * keep)) if n_visual else 0


@dataclass(frozen=True)
class RequestLengths:
    """Numbers of tokens of a request.

    Attributes:
        image: image tokens.
        prompt: other tokens of the prompt.
        answer: tokens of the answer.
    """

    image: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class LayerWidths:
    """Sizes of a layer that determine its FLOPs.

    Attributes:
        hidden: hidden size.
        queries: size of all queries.
        keys: size of all keys.
        channels: intermediate size of the gated MLP.
    """

    hidden: int
    queries: int
    keys: int
    channels: int

    @classmethod
    def of(cls, stack: Stack) -> LayerWidths:
        """Return the sizes of a stack's layers."""
        sizes = stack.architecture.sizes_of(stack.config)
        return cls(
            sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.channels
        )  # of a Llama-like architecture

    def attention(self, queries: int, keys: int) -> int:
        """Return the FLOPs of an attention: four projections, scores and weighted sums.

        Args:
            queries: number of query tokens.
            keys: number of key tokens.
        """
        return 2 * queries * self.hidden * 2 * (self.queries + self.keys) + 4 * queries * keys * self.queries

    def mlp(self, tokens: int) -> int:
        """Return the FLOPs of a gated MLP."""
        return 6 * tokens * self.hidden * self.channels


def flops(
    schedule: VisualTokenSchedule,
    widths: LayerWidths,
    layers: int,
    steps: int,
    lengths: RequestLengths,
    cached: bool = False,
) -> int:
    """Return the FLOPs of all layers in all steps; a multiply-add counts as two.

    With a prefix cache the prompt is computed once, before the first step, and each step computes only the answer;
    dropped tokens then only shorten the keys.

    Args:
        schedule: the schedule.
        widths: sizes of a layer.
        layers: number of layers.
        steps: number of steps.
        lengths: lengths of the request.
        cached: whether the prompt is cached.
    """
    return sum(of_step(schedule, widths, layers, step, steps, lengths, cached) for step in range(steps))


def of_step(
    schedule: VisualTokenSchedule,
    widths: LayerWidths,
    layers: int,
    step: int,
    steps: int,
    lengths: RequestLengths,
    cached: bool = False,
) -> int:
    """Return the FLOPs of one step; the first step with a prefix cache includes the pass that fills it.

    Args:
        schedule: the schedule.
        widths: sizes of a layer.
        layers: number of layers.
        step: index of the step.
        steps: number of steps.
        lengths: lengths of the request.
        cached: whether the prompt is cached.
    """
    total = 0
    for layer in range(layers):
        kept = count(lengths.image, schedule.keep(layer, step, steps))
        behind = count(lengths.image, _behind_attention(schedule, layer, step, steps))
        answer = lengths.answer
        if not cached:
            tokens = lengths.prompt + answer
            total += widths.attention(tokens + kept, tokens + kept) + widths.mlp(tokens + behind)
            continue
        if step == 0:
            prompt = lengths.prompt
            total += widths.attention(prompt + kept, prompt + kept) + widths.mlp(prompt + behind)
        total += widths.attention(answer, answer + lengths.prompt + kept) + widths.mlp(answer)
    return total


def running(
    schedule: VisualTokenSchedule, layers: int, steps: int, lengths: RequestLengths
) -> list[tuple[float, float]]:
    """Return the fraction of all tokens that attention and MLP of each layer run, without a cache, over all steps.

    Args:
        schedule: the schedule.
        layers: number of layers.
        steps: number of steps.
        lengths: lengths of the request.
    """
    rest = lengths.prompt + lengths.answer

    def share(kept: Iterable[float]) -> float:
        tokens = sum(rest + count(lengths.image, each) for each in kept)
        return tokens / (steps * (rest + lengths.image))

    return [
        (
            share(schedule.keep(layer, step, steps) for step in range(steps)),
            share(_behind_attention(schedule, layer, step, steps) for step in range(steps)),
        )
        for layer in range(layers)
    ]


def _behind_attention(schedule: VisualTokenSchedule, layer: int, step: int, steps: int) -> float:
    """Return the fraction at the MLP of a layer: at l* that of the next layer."""
    if layer == schedule.withdrawn:
        return 0.0
    return schedule.keep(layer + 1, step, steps) if layer == schedule.layer else schedule.keep(layer, step, steps)
