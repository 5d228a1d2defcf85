"""What a result says in words and tables: the same for a terminal, a page and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table; numbers are rounded where they are shown.

    Attributes:
        title: one line.
        columns: their heads.
        rows: one cell for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


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
    """A cell as text: four significant digits."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
