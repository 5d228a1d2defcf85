"""From evidence to figures: what is lost by step and by layer, and where the image is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, percent
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figures import Figure, Heatmap, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for any command of the method."""
    if isinstance(evidence, SeriesEvidence):
        return PlanSeries.summary(evidence)
    found = evidence.findings
    first, task = next(iter(found["tasks"].items()))
    verdict = f"{found['name']}, {first}: {_told(task)}."
    columns = [
        "task",
        "rows",
        "answer, tokens",
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
    return Summary(verdict, [Table("What leaves and what comes back", columns, rows)], lines)


def _told(task: Mapping[str, Any]) -> str:
    restored = task["restoration"]
    stay = f"{percent(task['agreement'])} of the answers stay as they were"
    if restored["mean"] is None:
        return f"nothing is lost by this schedule, and {stay}"
    low, high = restored["low"], restored["high"]
    if restored["mean"] <= 0:
        grown = f"restoration {number(restored['mean'])}, interval {number(low)} to {number(high)}"
        return f"nothing of what is lost comes back ({grown}), and {stay}"
    return f"{percent(restored['mean'])} of what is lost comes back ({percent(low)} to {percent(high)}), and {stay}"


def _first(task: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
    return float(task["kl"][int(schedule["drops"][0][0] * task["steps"])])


def _advice(task: Mapping[str, Any]) -> str:
    advice = task["recommended"]
    if advice is None:
        return "answers are short: leave nothing out"
    if advice["withdrawn"] is not None:
        return f"it does not recover: let image tokens skip the layers behind {advice['withdrawn']}"
    stairs = ", ".join(f"{keep:g} from {step:g} of the steps on" for step, keep in advice["drops"])
    return f"it recovers: keep {stairs}"


def figures(evidence: Evidence) -> list[Figure]:
    """What is lost by step, and by step and layer, and where the image is looked at."""
    if isinstance(evidence, SeriesEvidence):
        return []
    found = evidence.findings["tasks"]
    kl = {name: each["kl"] for name, each in found.items()}
    caption = "What the whole model predicts, against the pruned one, on one trajectory."
    drawn: list[Figure] = [Lines("step", "KL, nats", kl, caption=caption)]
    for name, each in found.items():
        drawn += [
            _grid(
                each["keep"], "share of the image", f"{name}: the share of the image that is there, by step and layer."
            ),
            _grid(each["loss"], "loss", f"{name}: what is lost of the answers' states."),
            _grid(each["mass"], "share of attention", f"{name}: the share of attention that goes to the image."),
        ]
    return drawn


def _grid(values: Sequence[Sequence[float]], measure: str, caption: str) -> Heatmap:
    """Values by step, downwards, and layer."""
    return Heatmap("layer", "step", values, measure, least=0.0, caption=caption)
