"""When and where image tokens are there: a share for every layer and denoising step, and what it costs.

    keep[l, s]     share at the input of layer l in step s, of a model of 4 layers in 4 steps

    one_shot(layer=1, step=0.5, keep=0.25)      withdraw(layer=1)        withdraw(layer=1, step=0.5)
    s=0    1    1    1    1                     1    1    0    0         1    1    0    0
    s=1    1    1    1    1                     1    1    0    0         1    1    0    0
    s=2    1    1   .25  .25                    1    1    0    0         0    0    0    0
    s=3   .25  .25  .25  .25                    1    1    0    0         0    0    0    0

Steps are shares of all steps, since short answers have few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lamella.errors import MethodError, listed
from lamella.stack import Stack


class Drop(NamedTuple):
    """From a step on (as a share of all steps), a share of the image tokens is there."""

    step: float
    keep: float


@dataclass(frozen=True)
class VisualTokenSchedule:
    """Which share of the image tokens is there, by layer and step.

    Attributes:
        drops: stairs, later ones lower.
        layer: l*, between whose attention and MLP tokens leave in the step of a drop; -1: before the first layer.
        withdrawn: the last layer that image tokens run at all, in every step; None: all of them.

    Raises:
        MethodError: for stairs that rise or stand still, or shares that are none.
    """

    drops: tuple[Drop, ...] = ()
    layer: int = -1
    withdrawn: int | None = None

    def __post_init__(self) -> None:
        steps, keeps = [each.step for each in self.drops], [each.keep for each in self.drops]
        if not all(0 <= step < 1 for step in steps) or not all(0 <= keep <= 1 for keep in keeps):
            raise MethodError(
                f"drops {listed(map(tuple, self.drops))}: steps are shares from 0 to below 1, keeps 0 to 1"
            )
        if steps != sorted(set(steps)) or keeps != sorted(keeps, reverse=True):
            raise MethodError(f"drops {listed(map(tuple, self.drops))}: later stairs keep fewer tokens")
        if self.layer < -1 or (self.withdrawn is not None and self.withdrawn < 0):
            raise MethodError(f"layer {self.layer}, withdrawn {self.withdrawn}: give layers by number, from 0 on")

    @classmethod
    def one_shot(cls, layer: int, step: float, keep: float) -> VisualTokenSchedule:
        """All before, the share ``keep`` after layer ``layer`` of the step; with ``step=0`` early, else late."""
        return cls((Drop(step, keep),), layer)

    @classmethod
    def progressive(cls, steps: Sequence[float], keeps: Sequence[float], layer: int = -1) -> VisualTokenSchedule:
        """A staircase over steps, each selection a part of the last."""
        return cls(tuple(map(Drop, steps, keeps)), layer)

    @classmethod
    def withdraw(cls, layer: int, step: float | None = None) -> VisualTokenSchedule:
        """Layer-skipping (VTW): image tokens run layers 0 to ``layer`` alone, and from a step on none."""
        return cls(() if step is None else (Drop(step, 0.0),), -1, layer)

    def begins(self, drop: Drop, steps: int) -> int:
        """The step in which a drop happens."""
        return int(drop.step * steps)

    def keep(self, layer: int, step: int, steps: int) -> float:
        """keep[l, s]: the share at the input of a layer."""
        if self.withdrawn is not None and layer > self.withdrawn:
            return 0.0
        passed = [
            drop.keep
            for drop in self.drops
            if step > (begins := self.begins(drop, steps)) or (step == begins and layer > self.layer)
        ]
        return min(passed, default=1.0)

    def table(self, layers: int, steps: int) -> list[list[float]]:
        """keep[l, s] as rows of steps."""
        return [[self.keep(layer, step, steps) for layer in range(layers)] for step in range(steps)]

    def check_fits(self, layers: int) -> None:
        """
        Raises:
            MethodError: for a layer that the model does not have.
        """
        for name, layer in (("layer", self.layer), ("withdrawn", self.withdrawn)):
            if layer is not None and layer >= layers:
                raise MethodError(f"{name} {layer}: the model has the layers 0 to {layers - 1}")


def count(n_visual: int, keep: float) -> int:
    """How many tokens a share is: the whole part, one at least, but none of none.

    >>> count(64, 0.25), count(3, 0.25), count(3, 0.0)
    (16, 1, 0)
    """
    return 0 if keep == 0 else max(1, int(n_visual * keep)) if n_visual else 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of a request: of the image, of the rest of the prompt, of the answer."""

    image: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Widths:
    """What a layer computes with: the stream, all queries, all keys, the channels of its gated MLP."""

    stream: int
    queries: int
    keys: int
    channels: int

    @classmethod
    def of(cls, stack: Stack) -> Widths:
        sizes = stack.architecture.sizes_of(stack.config)
        return cls(
            sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.channels
        )  # of Llama's kind

    def attention(self, queries: int, keys: int) -> int:
        """FLOPs of an attention: four projections of the queries' tokens, scores and means over all keys."""
        return 2 * queries * self.stream * 2 * (self.queries + self.keys) + 4 * queries * keys * self.queries

    def mlp(self, tokens: int) -> int:
        """FLOPs of a gated MLP."""
        return 6 * tokens * self.stream * self.channels


def flops(
    schedule: VisualTokenSchedule, widths: Widths, layers: int, steps: int, lengths: Lengths, cached: bool = False
) -> int:
    """FLOPs of all layers in all steps, two for a multiplication with its addition.

    With a prefix cache the prompt is computed once, before the first step, and of a step only the answer; what is
    dropped then shortens the keys alone.
    """
    return sum(of_step(schedule, widths, layers, step, steps, lengths, cached) for step in range(steps))


def of_step(
    schedule: VisualTokenSchedule,
    widths: Widths,
    layers: int,
    step: int,
    steps: int,
    lengths: Lengths,
    cached: bool = False,
) -> int:
    """FLOPs of one step, the first of a prefix cache with the pass that fills it."""
    total = 0
    for layer in range(layers):
        here = count(lengths.image, schedule.keep(layer, step, steps))
        behind = count(lengths.image, _behind_attention(schedule, layer, step, steps))
        answer = lengths.answer
        if not cached:
            tokens = lengths.prompt + answer
            total += widths.attention(tokens + here, tokens + here) + widths.mlp(tokens + behind)
            continue
        if step == 0:
            prompt = lengths.prompt
            total += widths.attention(prompt + here, prompt + here) + widths.mlp(prompt + behind)
        total += widths.attention(answer, answer + lengths.prompt + here) + widths.mlp(answer)
    return total


def running(schedule: VisualTokenSchedule, layers: int, steps: int, lengths: Lengths) -> list[tuple[float, float]]:
    """The share of all tokens that attention and MLP of each layer run, without a cache, over all steps."""
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
    """The share that the MLP of a layer sees: at l* that of the layers behind it."""
    if layer == schedule.withdrawn:
        return 0.0
    return schedule.keep(layer + 1, step, steps) if layer == schedule.layer else schedule.keep(layer, step, steps)
