"""The shapes that a model can be pruned to, and intermediate shapes for a budget (Minitron, section 2.3)."""

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

    def work(self, shape: ModelShape) -> float:
        """Return the remaining weights of the layers in units of sublayers; see :attr:`lamella.plan.Plan.work`."""
        whole = self.whole
        attn = (shape.heads + shape.kv_heads) / (whole.heads + whole.kv_heads)
        return shape.layers * shape.hidden / whole.hidden * (attn + shape.mlp / whole.channels)

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

    def descent(
        self, params: float, fixed: Mapping[str, int], tolerance: float
    ) -> tuple[list[ModelShape], list[ModelShape]]:
        """Return a few shapes on the way to a budget, each with the most even widths, and all shapes that meet it.

        Args:
            params: fraction of the parameters to keep at the end.
            fixed: sizes that are given.
            tolerance: allowed difference from each budget as a fraction of it.

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

    def unevenness(self, shape: ModelShape) -> float:
        """Return the difference between the largest and the smallest remaining fraction of a width."""
        whole = self.whole
        ratios = (shape.hidden / whole.hidden, shape.mlp / whole.channels, shape.heads / whole.heads)
        return max(ratios) - min(ratios)


def _multiples(step: int, most: int) -> list[int]:
    return sorted({*range(step, most + 1, step), most})
