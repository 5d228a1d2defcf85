"""From evidence to figures: iterations system by system, and what they cost in all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import counted, duration, number
from lamella.report.figures import Figure, Lines
from lamella.results import Evidence, Summary, Table

OURS = "SKR"


def figures(evidence: Evidence) -> list[Figure]:
    """Iterations system by system; a direct solver has none."""
    lines = {name: [each["iterations"] for each in run["solved"]] for name, run in _runs(evidence.findings).items()}
    drawn = {name: values for name, values in lines.items() if any(values)}
    caption = "Iterations of each system, in the order in which they were solved; each solver has its own order."
    return [Lines("system, in solved order", "iterations", drawn, caption=caption)]


def summary(evidence: Evidence) -> Summary:
    """What each solver took: means with and without the first system, which nothing could be recycled for."""
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
        f"{number(ours['iterations'])} iterations and {duration(ours['seconds'])} each; the worst residual is "
        f"{number(found['worst_residual'])}."
    )
    return Summary(verdict, [Table("What a system took, on average", heads, rows)])


def _runs(found: Mapping[str, Any]) -> dict[str, Any]:
    return {OURS: found, **found.get("baselines", {})}
