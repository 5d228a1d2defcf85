"""Figures and summary: the matrix of languages, and forgetting against learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, signed
from lamella.report.figures import Figure, Heatmap, Point, Scatter
from lamella.result import Summary, Table
from lamella.results import Evidence


def summary(evidence: Evidence) -> Summary:
    """Summarise the result of any command of the method."""
    found, name = evidence.findings, (evidence.model or {}).get("name", "the model")
    if "matrix" in found:
        matrix = found["matrix"]
        names = [*matrix["old"], *matrix["new"]]
        rows = [[step, *(row[each] for each in names)]
                for step, row in zip(matrix["steps"], matrix["rows"], strict=True)]  # fmt: skip
        return Summary(f"LayRA added {', '.join(matrix['new'])} to {name}.",
                       [Table("Held-out bits per byte", ["after", *names], rows)])  # fmt: skip
    if "courses" in found:
        rows = sorted([[arm, rise] for arm, rise in found["forgotten"].items()], key=lambda row: row[1])
        title = f"Forgotten at {found['equal_loss']:.3f} bits per byte of {found['language']}"
        return Summary(f"LayRA and its baselines on {name}.", [Table(title, ["method", "bits per byte"], rows)])
    if "curves" in found:
        rows = [[curve, "none" if cut is None else f"{cut[0]} + {cut[1]}"] for curve, cut in found["cuts"].items()]
        return Summary(f"Language stages of {name}.", [Table("Cuts", ["curve", "first + last"], rows)])
    return Summary(f"{name} now has the language and the abilities of its instruct sibling.")


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the matrix of languages, forgetting against learning, or curves by layer."""
    found = evidence.findings
    if "matrix" in found:
        return [_matrix(found["matrix"])]
    if "ends" in found:
        points: dict[str, list[tuple[float, float]]] = {}
        for arm, _, new, old in found["ends"]:
            points.setdefault(arm, []).append((new, old))
        return [tradeoff(points)]
    curves = {name: list(enumerate(curve, 1)) for name, curve in found.get("curves", {}).items()}
    return [Scatter("layer", "lead, accuracy, cosine or fraction", curves, joined=True)]


def _matrix(matrix: Mapping[str, Any]) -> Heatmap:
    """Plot bits per byte, one row per step and one column per language, coloured by the change."""
    names = [*matrix["old"], *matrix["new"]]
    values = [[row[name] for name in names] for row in matrix["rows"]]
    changes = [[value - first for value, first in zip(row, values[0], strict=True)] for row in values]
    return Heatmap(
        "language",
        "after",
        changes,
        "change, bits per byte",
        columns=names,
        rows=matrix["steps"],
        diverging=True,
        most=1.0,
        labels=[
            [f"{number(value)} ({signed(change, 3)})" if change else number(value)
             for value, change in zip(row, moved, strict=True)]
            for row, moved in zip(values, changes, strict=True)
        ],
        title="Held-out bits per byte",
        caption="Red: higher loss than before, blue: lower; the change in parentheses, up to 1 bit per byte.",
    )  # fmt: skip


def tradeoff(points: Mapping[str, Sequence[Point]]) -> Scatter:
    """Plot the end points of all methods: further left has learned more, lower has forgotten less.

    Args:
        points: by method: bits per byte of the new language, and rise of the loss on the old ones.
    """
    return Scatter("new language, bits per byte", "forgotten, bits per byte", points, joined=True)
