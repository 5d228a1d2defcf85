"""Recordings of the inputs and outputs of a part of a model, to which a new part is fitted.

    x [rows, ...] --the part--> y [rows, ...]

A row is one independent input of the part. A part that processes every token independently is recorded token by token;
a part that mixes tokens has whole sequences or feature maps as rows, and is recorded by the code that knows their
shape.
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
ROWS = 1024  # number of rows that are processed together


@dataclass(frozen=True, eq=False)
class Recording(Sequence[Row]):
    """Inputs and outputs of one part.

    Attributes:
        x: inputs, float32 on the host [rows, ...].
        y: outputs, float32 on the host [rows, ...].

    Raises:
        CalibrationError: for fewer than two rows, different numbers of inputs and outputs, or values that are not
            finite.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) < 2:
            raise CalibrationError(
                f"{len(self.x)} inputs and {len(self.y)} outputs are recorded: give two or more rows"
            )
        if not (torch.isfinite(self.x).all() and torch.isfinite(self.y).all()):
            raise CalibrationError("the recorded values are not finite: check the weights of the model")

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Recording:
        """Return the recording of batches of rows: pairs of x [rows, ...] and y [rows, ...].

        Raises:
            CalibrationError: for no batches.
        """
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
        """Return the first rows, and the last ones, which are the given fraction of all; the two do not overlap.

        Args:
            share: fraction of the rows in the second part.

        Raises:
            CalibrationError: if one of the two would have fewer than two rows.
        """
        last = round(share * len(self))
        first = len(self) - last
        return Recording(self.x[:first], self.y[:first]), Recording(self.x[first:], self.y[first:])

    @property
    def variance(self) -> float:
        """The mean squared deviation of y from its mean over rows."""
        parts = self.y.split(ROWS)
        mean = torch.stack([each.double().sum(dim=0) for each in parts]).sum(dim=0) / len(self)
        return float(sum((each.double() - mean).square().sum() for each in parts)) / self.y.numel()

    @torch.no_grad()
    def explained(self, part: Callable[[Tensor], Tensor]) -> float:
        """Return R^2: the fraction of the variance of y that ``part(x)`` explains; 0 for predicting the mean.

        Args:
            part: predicts y [rows, ...] from some rows x [rows, ...], both on the host.
        """
        errors = [
            (part(x).double() - y.double()).square().sum()
            for x, y in zip(self.x.split(ROWS), self.y.split(ROWS), strict=True)
        ]
        return 1 - float(torch.stack(errors).sum()) / self.y.numel() / self.variance


@torch.no_grad()
def record(stack: Stack, tokens: Tokens, position: Position) -> Recording:
    """Record what one sublayer reads and what it adds to the residual stream, at every token that is not padding.

    Args:
        stack: the stack.
        tokens: calibration tokens [sequences, time].
        position: position of the sublayer.

    Returns:
        The residual stream before the sublayer and what the sublayer adds [tokens, hidden].
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
