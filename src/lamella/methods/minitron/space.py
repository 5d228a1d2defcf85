"""The shapes that a model can be pruned to, and intermediate shapes for a budget (Minitron, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import zip_longest

from lamella.errors import BudgetError
from lamella.methods.minitron.shapes import enumerate_shapes
from lamella.plan import ModelReference
from lamella.plan.width import counter
from lamella.stack import Stack
from lamella.stack.wiring import Sizes

STEPS = 4  # points of the series from the whole model to the target


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one smaller model.

    Attributes:
        layers: number of layers.
        hidden: hidden size.
        mlp: MLP intermediate size.
        heads: number of query heads per layer.
        kv_heads: number of key-value heads per layer.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class ShapeSpace:
    """The shapes that a model can be pruned to.

    Attributes:
        layers: number of layers of the model.
        whole: the model's own sizes.
        hidden_step: hidden sizes are multiples of this, or the full size.
        mlp_step: MLP sizes are multiples of this, or the full size.
        count: number of parameters, given the sizes of every layer and the hidden size.
        plain: whether a standard config can express a shape.
    """

    layers: int
    whole: Sizes
    hidden_step: int
    mlp_step: int
    count: Callable[[Sequence[Sizes], int], int]
    plain: Callable[[ModelShape], bool]

    @classmethod
    def of(cls, stack: Stack, multiple: int) -> ShapeSpace:
        """Return the space of a model with sizes in multiples of ``multiple``, or of an eighth of a short axis.

        Args:
            stack: the original model.
            multiple: step of the hidden size and of the MLP intermediate size.
        """
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
    def everything(self) -> ModelShape:
        """The shape of the whole model."""
        whole = self.whole
        return ModelShape(self.layers, whole.hidden, whole.channels, whole.heads, whole.kv_heads)

    def shape(self, sizes: Mapping[str, int]) -> ModelShape:
        """Return the shape of these sizes; other axes stay whole.

        Key-value heads follow the query heads if each query head has its own.
        """
        shape = replace(self.everything, **sizes)
        if "kv_heads" not in sizes and self.whole.heads == self.whole.kv_heads:
            shape = replace(shape, kv_heads=shape.heads)
        return shape

    def parameters(self, shape: ModelShape) -> int:
        """Return the number of parameters of a shape; tied parameters count once."""
        sizes = Sizes(shape.hidden, shape.mlp, shape.heads, shape.kv_heads, self.whole.head_dim)
        return self.count([sizes] * shape.layers, shape.hidden)

    def near(self, fraction: float, fixed: Mapping[str, int], tolerance: float) -> list[ModelShape]:
        """Return the shapes with about that fraction of all parameters, the closest first (section 2.3).

        Args:
            fraction: the fraction of the model's parameters.
            fixed: sizes that are given; layers and key-value heads stay whole unless given.
            tolerance: allowed difference from the budget as a fraction of it.

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
            fraction * self.parameters(self.everything),
            tolerance,
            allowed=lambda sizes: self.plain(self.shape(sizes)),
        )
        return [self.shape(candidate.shape) for candidate in found]

    def shortlist(self, shapes: Sequence[ModelShape], count: int) -> list[ModelShape]:
        """Return the most even shape for each number of heads, the next most even for each, and so on.

        Heads are the coarse axis: between shapes of equal size, their number changes the result most.

        Args:
            shapes: shapes of about the same size.
            count: maximum number of shapes to return.
        """
        by_heads: dict[int, list[ModelShape]] = {}
        for shape in sorted(shapes, key=self.unevenness):
            by_heads.setdefault(shape.heads, []).append(shape)
        rounds = zip_longest(*by_heads.values())
        return [shape for each in rounds for shape in each if shape is not None][:count]

    def descent(
        self, target: ModelShape, params: float, fixed: Mapping[str, int], tolerance: float
    ) -> list[ModelShape]:
        """Return a few shapes on the way to a target, of which each contains the next; the target is the last.

        Args:
            target: the shape at the end.
            params: its approximate fraction of the parameters.
            fixed: sizes that are given.
            tolerance: allowed difference from the budget of each shape, as a fraction of it.
        """
        shapes = [target]
        for step in range(STEPS - 1, 0, -1):
            try:
                near = self.near(1 - (1 - params) * step / STEPS, fixed, tolerance)
            except BudgetError:
                continue  # the grid is coarse
            larger = [each for each in near if _contains(each, shapes[0]) and each not in (shapes[0], self.everything)]
            shapes[:0] = [min(larger, key=self.unevenness)] if larger else []
        return shapes

    def unevenness(self, shape: ModelShape) -> float:
        """Return the difference between the largest and the smallest remaining fraction of a width."""
        whole = self.whole
        ratios = (shape.hidden / whole.hidden, shape.mlp / whole.channels, shape.heads / whole.heads)
        return max(ratios) - min(ratios)


def _multiples(step: int, most: int) -> list[int]:
    return sorted({*range(step, most + 1, step), most})


def _contains(larger: ModelShape, smaller: ModelShape) -> bool:
    return all(size >= least for size, least in zip(astuple(larger), astuple(smaller), strict=True))
