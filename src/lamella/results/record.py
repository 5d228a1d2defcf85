"""Records of a reproduction or a benchmark: tables and checks, printed and written to a file, with a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamella.files import write
from lamella.provenance import environment

Kind = Literal["exactness", "premise", "main", "further"]
Verdict = Literal["holds", "does not hold", "undecided", "premise not met"]
HOLDS, FAILS, UNDECIDED, PREMISE = get_args(Verdict)
VERDICTS: dict[bool | None, Verdict] = {True: HOLDS, False: FAILS, None: UNDECIDED}  # of a check
COLOURS = {HOLDS: "green", FAILS: "red", UNDECIDED: "yellow", PREMISE: "yellow"}


class PremiseNotMet(Exception):
    """Model and data do not show the effect that a claim presupposes."""


@dataclass
class Record:
    """Tables and checks of one run.

    A check holds, does not hold, or is undecided (None) if it is within the measurement noise. The checks of a
    reproduction have four kinds: exactness (identities), premise (the effect that a claim presupposes is there), the
    paper's main claim, and further claims. Those of a benchmark have a single kind.

    Attributes:
        slug: name of the run.
        data: one line on the data.
        seed: of all random draws.
    """

    slug: str
    data: str
    seed: int
    tables: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Add a table and print it.

        Args:
            title: title of the table.
            columns: headings of the columns.
            rows: values of each row, one per column.
        """
        self.tables.append(
            {"title": title, "columns": columns, "rows": [[_cell(cell) for cell in row] for row in rows]}
        )
        grid = Table(title=title, title_justify="left")
        for column in columns:
            grid.add_column(column)
        for row in self.tables[-1]["rows"]:
            grid.add_row(*map(str, row))
        Console().print(grid)

    def exact(self, name: str, expected: str, measured: Any, passed: bool) -> None:
        """Add a check that must hold for the rest to be meaningful.

        Args:
            name: what is checked.
            expected: the expected value or relation, as text.
            measured: the measured value.
            passed: whether the check holds.
        """
        self.check(name, expected, measured, passed, "exactness")

    def premise(self, name: str, expected: str, measured: Any, passed: bool | None) -> None:
        """Add a check of what the main claim presupposes of model and data, before any arm of the experiment runs.

        Args:
            name: what is checked.
            expected: the expected value or relation, as text.
            measured: the measured value.
            passed: whether the check holds; None if it is within the measurement noise.

        Raises:
            PremiseNotMet: if it does not hold, so that the claim cannot be tested on this model and data, or is
                undecided.
        """
        self.check(name, expected, measured, passed, "premise")
        if not passed:
            raise PremiseNotMet(f"{name}: expected {expected}, measured {_cell(measured)}")

    def main(self, name: str, expected: str, measured: Any, passed: bool | None) -> None:
        """Add a check of the paper's main claim, or a part of it.

        Args:
            name: what is checked.
            expected: the expected value or relation, as text.
            measured: the measured value.
            passed: whether the check holds; None if it is within the measurement noise.
        """
        self.check(name, expected, measured, passed, "main")

    def further(self, name: str, expected: str, measured: Any, passed: bool | None) -> None:
        """Add a check of a further claim of the paper.

        Args:
            name: what is checked.
            expected: the expected value or relation, as text.
            measured: the measured value.
            passed: whether the check holds; None if it is within the measurement noise.
        """
        self.check(name, expected, measured, passed, "further")

    def check(self, name: str, expected: str, measured: Any, passed: bool | None, kind: Kind | None = None) -> None:
        """Add a check with its measured value, and print the verdict.

        Args:
            name: what is checked.
            expected: the expected value or relation, as text.
            measured: the measured value.
            passed: whether the check holds; None if it is within the measurement noise.
            kind: kind of the check in a reproduction; None in a benchmark.
        """
        passed = None if passed is None else bool(passed)
        found = {"name": name, "expected": expected, "measured": str(_cell(measured)), "passed": passed}
        self.checks.append(({} if kind is None else {"kind": kind}) | found)
        text, verdict = escape(f"{name}: expected {expected}, measured {_cell(measured)}"), VERDICTS[passed]
        Console().print(f"[{COLOURS[verdict]}]{verdict}[/]  {text}", highlight=False)

    @property
    def verdict(self) -> Verdict:
        """The verdict on all parts of the main claim after its premises; on all checks if none is of that kind."""
        premises = [check["passed"] for check in self.checks if check.get("kind") == "premise"]
        if False in premises:
            return PREMISE
        if None in premises:
            return UNDECIDED
        return VERDICTS[together([c["passed"] for c in self.checks if c.get("kind") == "main"] or self.passed)]

    @property
    def passed(self) -> list[bool | None]:
        """The verdicts of all checks."""
        return [check["passed"] for check in self.checks]

    def finish(self, path: Path) -> int:
        """Write the record to ``path`` and return the exit code: 0 if all required checks hold.

        Required are the main claim, its premises, all exactness checks, and that nothing fails. An undecided further
        claim is not a failure; an undecided main claim is.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(self.document(), indent=1) + "\n")
        counts = [f"{self.passed.count(each)} {verdict}" for each, verdict in VERDICTS.items() if each in self.passed]
        text = f"[{COLOURS[self.verdict]}]the claim: {self.verdict}[/] ({', '.join(counts)})"
        Console().print(text, highlight=False)
        Console().print(f"results: {path}")
        return 0 if self.verdict == HOLDS and False not in self.passed else 1

    def document(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        run_environment = environment()
        return {
            "slug": self.slug,
            "verdict": self.verdict,
            "machine": f"{run_environment['machine']}, {run_environment['threads']} threads",
            "versions": run_environment["versions"],
            "date": run_environment["date"],
            "seed": self.seed,
            "data": self.data,
            "tables": self.tables,
            "checks": self.checks,
        }


def together(verdicts: Sequence[bool | None]) -> bool | None:
    """Return the joint verdict: False if one fails, else undecided if one is; without checks it does not hold."""
    return None if None in verdicts and False not in verdicts else bool(verdicts) and all(verdicts)


def _cell(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
