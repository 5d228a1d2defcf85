"""What a result says in words and tables: the same for a terminal, a page and a model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lamella.report.numbers import MISSING


@dataclass(frozen=True)
class Table:
    """A table of any values, which become text here and nowhere else.

    Attributes:
        title: one line.
        columns: the header of each column.
        rows: one cell for each column.
    """

    title: str
    columns: Sequence[Any]
    rows: Sequence[Sequence[Any]]

    @property
    def headers(self) -> list[str]:
        """The headers as text."""
        return [shown(each) for each in self.columns]

    @property
    def cells(self) -> list[list[str]]:
        """The cells as text, row by row."""
        return [[shown(each) for each in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether all of its cells are numbers."""
        return [
            bool(self.rows) and all(isinstance(row[place], int | float) for row in self.rows)
            for place in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Summary:
    """The findings of a run.

    Attributes:
        verdict: one sentence.
        tables: in the order in which a reader wants them.
        lines: what else there is to say.
    """

    verdict: str
    tables: Sequence[Table] = field(default_factory=tuple)
    lines: Sequence[str] = field(default_factory=tuple)


def shown(cell: Any) -> str:
    """A value as text: numbers with four significant digits, a dash for one that is not finite, None as nothing."""
    if cell is None:
        return ""
    if isinstance(cell, float) and not math.isfinite(cell):
        return MISSING
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
