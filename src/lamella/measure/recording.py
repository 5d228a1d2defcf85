"""What goes into a part of a model and what comes out of it, recorded: what a new part is fitted to.

    x [rows, ...] --the part--> y [rows, ...]

A row is what the part reads at once. What works on every token alone is recorded token by token; a part that mixes
tokens has whole sequences or maps as rows, and is recorded by whoever knows their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.measure.hidden_states import Tokens, sequences
from lamella.progress import track
from lamella.stack import Position, Stack, join

Row = dict[str, Tensor]  # x and y
ROWS = 1024  # that are looked at together


@dataclass(frozen=True, eq=False)
class Recording(Sequence[Row]):
    """Inputs and outputs of one part.

    Attributes:
        x, y: float32 on the host [rows, ...].

    Raises:
        CalibrationError: for fewer than two rows, another number of outputs than of inputs, or what is not finite.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) < 2:
            raise CalibrationError(
                f"{len(self.x)} inputs and {len(self.y)} outputs are recorded: give two or more rows"
            )
        if not (torch.isfinite(self.x).all() and torch.isfinite(self.y).all()):
            raise CalibrationError("what was recorded is not finite: check the weights of the model")

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Recording:
        """From batches of rows: pairs of x [rows, ...] and y [rows, ...]."""
        both = [(x.detach().float().cpu(), y.detach().float().cpu()) for x, y in pairs]
        if not both:
            raise CalibrationError("nothing is recorded: give some rows")
        return cls(torch.cat([x for x, _ in both]), torch.cat([y for _, y in both]))

    def __len__(self) -> int:
        return len(self.x)

    @overload
    def __getitem__(self, row: int) -> Row: ...

    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...

    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return {"x": self.x[row], "y": self.y[row]}

    def split(self, share: float) -> tuple[Recording, Recording]:
        """The first rows and the last ones, which are a share of all; in between none is in both.

        Raises:
            CalibrationError: where one of both would have fewer than two rows.
        """
        last = round(share * len(self))
        first = len(self) - last
        return Recording(self.x[:first], self.y[:first]), Recording(self.x[first:], self.y[first:])

    @property
    def variance(self) -> float:
        """The mean square of y around its mean over rows, which a constant leaves unexplained."""
        parts = self.y.split(ROWS)
        mean = torch.stack([each.double().sum(dim=0) for each in parts]).sum(dim=0) / len(self)
        return float(sum((each.double() - mean).square().sum() for each in parts)) / self.y.numel()

    @torch.no_grad()
    def explained(self, part: Callable[[Tensor], Tensor]) -> float:
        """R^2: the share of the variance of y that ``part(x)`` explains; 1 at best, 0 for the mean, below for worse.

        Args:
            part: from some rows x [rows, ...] to what it takes for y [rows, ...], both on the host.
        """
        errors = [
            (part(x).double() - y.double()).square().sum()
            for x, y in zip(self.x.split(ROWS), self.y.split(ROWS), strict=True)
        ]
        return 1 - float(torch.stack(errors).sum()) / self.y.numel() / self.variance


@torch.no_grad()
def record(stack: Stack, tokens: Tokens, position: Position) -> Recording:
    """What one sublayer reads and what it adds to that, at every token that is no padding.

    Args:
        tokens: calibration tokens [sequences, time].
        position: of the sublayer.

    Returns:
        The stream before it and what it adds [tokens, hidden].
    """
    return Recording.of(_added(stack, tokens, position))


def _added(stack: Stack, tokens: Tokens, position: Position) -> Iterable[tuple[Tensor, Tensor]]:
    for row in track(sequences(tokens), f"recording layers.{position.layer}.{position.sublayer}"):
        context = stack.context(row)
        before = stack.run(context.h, 0, position, context)
        after = stack.run(before, position, stack.after(position), context)
        stack.check_finite(position, after)
        x = join(before)[context.real].float()
        yield x, join(after)[context.real].float() - x
