"""From evidence to figures: the matrix of languages, and what was forgotten for what was learnt."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lamella.formatting import number
from lamella.report.figure import figure
from lamella.report.plane import Points, plane
from lamella.result import Summary, Table
from lamella.results import Evidence


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for any command of the method."""
    found, name = evidence.findings, (evidence.model or {}).get("name", "the model")
    if "matrix" in found:
        matrix = found["matrix"]
        names = [*matrix["old"], *matrix["new"]]
        rows = [[step, *(row[each] for each in names)]
                for step, row in zip(matrix["steps"], matrix["rows"], strict=True)]  # fmt: skip
        return Summary(f"layra has added {', '.join(matrix['new'])} to {name}.",
                       [Table("Held-out bits per byte", ["after", *names], rows)])  # fmt: skip
    if "courses" in found:
        rows = sorted([[arm, rise] for arm, rise in found["forgotten"].items()], key=lambda row: row[1])
        title = f"Forgotten at {found['equal_loss']:.3f} bits per byte of {found['language']}"
        return Summary(f"layra and its controls on {name}.", [Table(title, ["method", "bits per byte"], rows)])
    if "curves" in found:
        rows = [[curve, "none" if cut is None else f"{cut[0]} + {cut[1]}"] for curve, cut in found["cuts"].items()]
        return Summary(f"Where the stages of {name} begin and end.", [Table("Cuts", ["curve", "first + last"], rows)])
    return Summary(f"{name} has the language and what its sibling was taught.")


def figures(evidence: Evidence) -> str:
    """The fragment of a page, as HTML that needs no script."""
    found = evidence.findings
    if "matrix" in found:
        return _matrix(found["matrix"])
    if "ends" in found:
        points: dict[str, list[tuple[float, float]]] = {}
        for arm, _, new, old in found["ends"]:
            points.setdefault(arm, []).append((new, old))
        return figure(tradeoff(points))
    curves = {name: [(layer + 1.0, value) for layer, value in enumerate(curve)]
              for name, curve in found.get("curves", {}).items()}  # fmt: skip
    return figure(plane(curves, "layer", "lead, accuracy, cosine or share"))


def _matrix(matrix: Mapping[str, Any]) -> str:
    """Bits per byte, steps down and languages across; shaded by the change since before."""
    names = [*matrix["old"], *matrix["new"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("after", *names))
    body = ""
    for step, row in zip(matrix["steps"], matrix["rows"], strict=True):
        cells = "".join(_cell(row[name], row[name] - matrix["rows"][0][name]) for name in names)
        body += f"<tr><th>{escape(step)}</th>{cells}</tr>"
    caption = "Held-out bits per byte; red is dearer and green is cheaper than before."
    return figure(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", caption)


def _cell(value: float, change: float) -> str:
    strength = min(abs(change), 1.0) * 0.6
    colour = "220, 38, 38" if change > 0 else "22, 163, 74"
    sign = "+" if change > 0 else ""
    shown = f" <small>{sign}{number(change)}</small>" if change else ""
    return f'<td style="background: rgba({colour}, {strength:.2f})">{number(value)}{shown}</td>'


def tradeoff(points: Mapping[str, Points]) -> str:
    """Where each method ends with each of its rates, as one SVG: to the left has learnt more, below has forgotten less.

    Args:
        points: by method: bits per byte of the new language, and by how many the old ones rose.
    """
    return plane(points, "new language, bits per byte", "forgotten, bits per byte")
