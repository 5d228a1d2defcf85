"""Records: the results of a reproduction or a benchmark, on the screen and as a file, with their verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamella.files import write
from lamella.provenance import environment


@dataclass
class Record:
    """Tables and checks of one run.

    Attributes:
        slug: what was run.
        data: one line on the data.
        seed: of everything that was drawn.
    """

    slug: str
    data: str
    seed: int
    tables: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Add a table and print it."""
        self.tables.append(
            {"title": title, "columns": columns, "rows": [[_cell(cell) for cell in row] for row in rows]}
        )
        grid = Table(title=title, title_justify="left")
        for column in columns:
            grid.add_column(column)
        for row in self.tables[-1]["rows"]:
            grid.add_row(*map(str, row))
        Console().print(grid)

    def check(self, name: str, expected: str, measured: Any, passed: bool) -> None:
        """Add a claim with what was measured for it, and print the verdict."""
        self.checks.append(
            {"name": name, "expected": expected, "measured": str(_cell(measured)), "passed": bool(passed)}
        )
        verdict = "[green]holds[/green]" if passed else "[red]FAILS[/red]"
        said = escape(f"{name}: expected {expected}, measured {_cell(measured)}")
        Console().print(f"{verdict}  {said}", highlight=False)

    def finish(self, path: Path) -> int:
        """Write the record to ``path`` and return the exit code: 0 if every claim holds, else 1."""
        where = environment()
        document = {
            "slug": self.slug,
            "claim_holds": bool(self.checks) and all(check["passed"] for check in self.checks),
            "machine": f"{where['machine']}, {where['threads']} threads",
            "versions": where["versions"],
            "date": where["date"],
            "seed": self.seed,
            "data": self.data,
            "tables": self.tables,
            "checks": self.checks,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(document, indent=1) + "\n")
        Console().print(f"results: {path}")
        return 0 if document["claim_holds"] else 1


def _cell(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
