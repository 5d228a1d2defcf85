"""Figures and tables from evidence: iterations per system, and the total cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import counted, duration, number
from lamella.report.figures import Figure, Lines
from lamella.results import Evidence, Summary, Table

OURS = "SKR"


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the iterations of each system; direct solvers have none."""
    lines = {name: [each["iterations"] for each in run["solved"]] for name, run in _runs(evidence.findings).items()}
    shown = {name: values for name, values in lines.items() if any(values)}
    caption = "Iterations of each system, in the order in which they were solved; each solver has its own order."
    return [Lines("system, in solved order", "iterations", shown, caption=caption)]


def summary(evidence: Evidence) -> Summary:
    """Tabulate the cost of each solver: means with and without the first system, which has nothing to recycle."""
    found = evidence.findings
    ours = found["mean"]
    rows = []
    for name, run in _runs(found).items():
        mean, later = run["mean"], run["mean_without_first"]
        cells = [name, number(mean["iterations"]), number(later["iterations"]), number(mean["matvecs"])]
        rows.append([*cells, duration(mean["seconds"]), number(run["worst_residual"]), len(run["not_converged"])])
    heads = ("solver", "iterations", "without the first", "products with A", "time", "worst residual", "not converged")
    verdict = (
        f"{counted(found['systems'], 'system')} of {counted(found['unknowns'], 'unknown')}: "
        f"{number(ours['iterations'])} iterations and {duration(ours['seconds'])} on average; the worst residual is "
        f"{number(found['worst_residual'])}."
    )
    return Summary(verdict, [Table("Average cost per system", heads, rows)])


def _runs(found: Mapping[str, Any]) -> dict[str, Any]:
    return {OURS: found, **found.get("baselines", {})}
