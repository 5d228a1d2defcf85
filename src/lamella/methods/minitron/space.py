"""The shapes that a model can be cut to, and those on the way to a budget (Minitron, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lamella.errors import BudgetError
from lamella.methods.minitron.shapes import enumerate_shapes
from lamella.plan import ModelReference
from lamella.plan.width import counter
from lamella.stack import Stack
from lamella.stack.wiring import Sizes

STEPS = 4  # points of the series from the whole model to the target


@dataclass(frozen=True)
class Shape:
    """The sizes of one smaller model."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Space:
    """The shapes that a model can be cut to.

    Attributes:
        whole: the model's own sizes, ``layers`` of them.
        hidden_step, mlp_step: sizes are multiples of these, or whole.
        plain: whether an ordinary config can say a shape.
    """

    layers: int
    whole: Sizes
    hidden_step: int
    mlp_step: int
    count: Callable[[Sequence[Sizes], int], int]
    plain: Callable[[Shape], bool]

    @classmethod
    def of(cls, stack: Stack, multiple: int) -> Space:
        """The space of a model, whose sizes are multiples of ``multiple``, or of an eighth where an axis is short."""
        whole, architecture = ModelReference.of(stack).sizes, stack.architecture
        assert whole is not None
        return cls(
            layers=len(stack),
            whole=whole,
            hidden_step=max(1, min(multiple, whole.hidden // 8)),
            mlp_step=max(1, min(multiple, whole.channels // 8)),
            count=counter(stack.model, stack.layers, architecture.wiring),
            plain=lambda shape: architecture.fits(shape.hidden, shape.heads, whole.head_dim),
        )

    @property
    def everything(self) -> Shape:
        whole = self.whole
        return Shape(self.layers, whole.hidden, whole.channels, whole.heads, whole.kv_heads)

    def shape(self, sizes: Mapping[str, int]) -> Shape:
        """The shape of these sizes; the others stay whole, and key-value heads follow where each query has its own."""
        shape = replace(self.everything, **sizes)
        if "kv_heads" not in sizes and self.whole.heads == self.whole.kv_heads:
            shape = replace(shape, kv_heads=shape.heads)
        return shape

    def parameters(self, shape: Shape) -> int:
        """The number of parameters of a shape, tied ones counted once."""
        sizes = Sizes(shape.hidden, shape.mlp, shape.heads, shape.kv_heads, self.whole.head_dim)
        return self.count([sizes] * shape.layers, shape.hidden)

    def work(self, shape: Shape) -> float:
        """What is left of the weights inside the layers, in sublayers; see :attr:`lamella.plan.Plan.work`."""
        whole = self.whole
        attn = (shape.heads + shape.kv_heads) / (whole.heads + whole.kv_heads)
        return shape.layers * shape.hidden / whole.hidden * (attn + shape.mlp / whole.channels)

    def near(self, share_of_all: float, fixed: Mapping[str, int], tolerance: float) -> list[Shape]:
        """The shapes with about that share of all parameters, the closest first (section 2.3).

        Args:
            fixed: sizes that are given; layers and key-value heads stay whole where they are not.

        Raises:
            BudgetError: when there is none; the message names the nearest ones.
        """
        whole = self.whole
        grid: dict[str, Sequence[int]] = {
            "hidden": _multiples(self.hidden_step, whole.hidden),
            "mlp": _multiples(self.mlp_step, whole.channels),
            "heads": _multiples(1 if whole.heads == whole.kv_heads else whole.kv_heads, whole.heads),
        }
        grid |= {name: [size] for name, size in fixed.items()}
        found = enumerate_shapes(
            grid,
            lambda sizes: self.parameters(self.shape(sizes)),
            share_of_all * self.parameters(self.everything),
            tolerance,
            allowed=lambda sizes: self.plain(self.shape(sizes)),
        )
        return [self.shape(candidate.shape) for candidate in found]

    def descent(self, params: float, fixed: Mapping[str, int], tolerance: float) -> tuple[list[Shape], list[Shape]]:
        """A few shapes on the way to a budget, each the one whose widths shrink most evenly, and all that meet it.

        Raises:
            BudgetError: when no shape meets the budget at the end.
        """
        candidates = self.near(params, fixed, tolerance)
        shapes = [min(candidates, key=self.unevenness)]
        for step in range(STEPS - 1, 0, -1):
            try:
                larger = min(self.near(1 - (1 - params) * step / STEPS, fixed, tolerance), key=self.unevenness)
            except BudgetError:
                continue  # the grid is coarse
            if self.work(shapes[0]) < self.work(larger) < self.work(self.everything):
                shapes.insert(0, larger)
        return shapes, candidates

    def unevenness(self, shape: Shape) -> float:
        """How differently the widths shrink: 0 when all by the same factor."""
        whole = self.whole
        shares = (shape.hidden / whole.hidden, shape.mlp / whole.channels, shape.heads / whole.heads)
        return max(shares) - min(shares)


def _multiples(step: int, most: int) -> list[int]:
    return sorted({*range(step, most + 1, step), most})
