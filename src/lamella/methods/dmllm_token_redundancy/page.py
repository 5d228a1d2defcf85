"""Figures and summaries: information loss by step and layer, and attention on the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, percent
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figures import Figure, Heatmap, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence


def summary(evidence: Evidence) -> Summary:
    """Return the verdict and tables of any command of the method."""
    if isinstance(evidence, SeriesEvidence):
        return PlanSeries.summary(evidence)
    found = evidence.findings
    first, task = next(iter(found["tasks"].items()))
    verdict = f"{found['name']}, {first}: {_recovery(task)}."
    columns = [
        "task",
        "rows",
        "answer tokens",
        "KL at s*",
        "KL at the end",
        "restored",
        "agreement",
        "FLOPs",
        "cached",
    ]
    rows = [
        [
            name,
            each["rows"],
            each["lengths"]["answer"],
            _first(each, found["schedule"]),
            each["kl"][-1],
            each["restoration"]["mean"],
            each["agreement"],
            *(cost[0] / cost[1] for cost in each["flops"].values()),
        ]
        for name, each in found["tasks"].items()
    ]
    lines = [f"{name}: {_advice(each)}" for name, each in found["tasks"].items()]
    return Summary(verdict, [Table("Information loss and recovery", columns, rows)], lines)


def _recovery(task: Mapping[str, Any]) -> str:
    restored = task["restoration"]
    stay = f"{percent(task['agreement'])} of the answers are unchanged"
    if restored["mean"] is None:
        return f"no information is lost with this schedule, and {stay}"
    low, high = restored["low"], restored["high"]
    if restored["mean"] <= 0:
        grown = f"restoration {number(restored['mean'])}, interval {number(low)} to {number(high)}"
        return f"no lost information is recovered ({grown}), and {stay}"
    low, high = percent(low), percent(high)
    return f"{percent(restored['mean'])} of the lost information is recovered ({low} to {high}), and {stay}"


def _first(task: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
    return float(task["kl"][int(schedule["drops"][0][0] * task["steps"])])


def _advice(task: Mapping[str, Any]) -> str:
    advice = task["recommended"]
    if advice is None:
        return "answers are short: drop no tokens"
    if advice["withdrawn"] is not None:
        return f"it does not recover: let image tokens skip the layers after {advice['withdrawn']}"
    stairs = ", ".join(f"{keep:g} from {step:g} of the steps on" for step, keep in advice["drops"])
    return f"it recovers: keep a fraction of {stairs}"


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the KL by step, and information loss and attention by step and layer."""
    if isinstance(evidence, SeriesEvidence):
        return []
    found = evidence.findings["tasks"]
    kl = {name: each["kl"] for name, each in found.items()}
    caption = "KL divergence of the pruned model's predictions from the whole model's, on the same trajectory."
    panels: list[Figure] = [Lines("step", "KL (nats)", kl, caption=caption)]
    for name, each in found.items():
        panels += [
            _grid(
                each["keep"], "fraction of image tokens", f"{name}: fraction of image tokens kept, by step and layer."
            ),
            _grid(each["loss"], "loss", f"{name}: information loss of the answer's hidden states."),
            _grid(each["mass"], "fraction of attention", f"{name}: fraction of the answer's attention on the image."),
        ]
    return panels


def _grid(values: Sequence[Sequence[float]], measure: str, caption: str) -> Heatmap:
    """Plot values by step (downwards) and layer."""
    return Heatmap("layer", "step", values, measure, least=0.0, caption=caption)
