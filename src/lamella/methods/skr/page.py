"""From evidence to figures: iterations system by system, and what they cost in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.report.numbers import duration, number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 56, 190, 16, 40
COLOURS = ("#0d9488", "#ea580c", "#6366f1", "#a16207", "#be185d", "#475569", "#15803d", "#7c3aed")
OURS = "SKR"


def figures(evidence: Mapping[str, Any]) -> str:
    """The fragments of a page, as HTML that needs no script.

    Args:
        evidence: of :class:`~lamella.methods.skr.result.Solutions`, or of a comparison, which has ``baselines`` too.
    """
    runs = {OURS: evidence, **evidence.get("baselines", {})}
    lines = {name: [each["iterations"] for each in run["solved"]] for name, run in runs.items()}
    drawn = {name: values for name, values in lines.items() if any(values)}
    notes = "".join(f"<p>{escape(finding)}</p>" for finding in evidence["findings"])
    caption = "Iterations of each system, in the order in which they were solved; each solver has its own order."
    return f"<figure>{chart(drawn)}<figcaption>{caption}</figcaption></figure>{notes}{_table(runs)}"


def _table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Means with and without the first system, which nothing could be recycled for."""
    heads = (
        "solver", "iterations", "without the first", "products with A", "time", "worst residual", "not converged",
    )  # fmt: skip
    rows = []
    for name, run in runs.items():
        mean, later = run["mean"], run["mean_without_first"]
        cells = [name, number(mean["iterations"]), number(later["iterations"]), number(mean["matvecs"])]
        cells += [duration(mean["seconds"]), f"{run['worst_residual']:.1e}", str(len(run["not_converged"]))]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def chart(lines: Mapping[str, Sequence[float]], label: str = "iterations") -> str:
    """Lines over the place in the solved sequence, as one SVG; the axis is logarithmic where they are far apart."""
    values = [max(value, 1) for line in lines.values() for value in line] or [1]
    low, high = min(values), max(values)
    logarithmic = high > 8 * low
    ticks = _decades(low, high) if logarithmic else _steps(high)
    bottom, top = (math.log(ticks[0]), math.log(ticks[-1])) if logarithmic else (ticks[0], ticks[-1])
    count = max((len(line) for line in lines.values()), default=1)

    def x(place: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place / max(count - 1, 1))

    def y(value: float) -> float:
        at = math.log(max(value, 1)) if logarithmic else value
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (at - bottom) / ((top - bottom) or 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(label)} by system</title>'
    ]
    for tick in ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#8884"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#888">{tick:g}</text>'
        )
    ends = sorted((y(line[-1]), name) for name, line in lines.items() if len(line))
    at = float(TOP)
    for place, line in enumerate(lines.values()):
        colour = COLOURS[place % len(COLOURS)]
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for end, name in ends:
        at = max(at + 15, end + 4)  # names keep apart where lines end together
        colour = COLOURS[list(lines).index(name) % len(COLOURS)]
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{at:.1f}" fill="{colour}">{escape(name)}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#888">system, in solved order</text>'
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" fill="#888" '
        f'transform="rotate(-90 14 {HEIGHT / 2})">{escape(label)}</text></svg>'
    )
    return "".join(parts)


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around the values."""
    marks = [digit * 10.0**power for power in range(math.floor(math.log10(high)) + 2) for digit in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= low)
    last = min(i for i, mark in enumerate(marks) if mark >= high)
    return marks[first : max(last, first + 1) + 1]


def _steps(high: float) -> list[float]:
    """Round steps from zero to past the values."""
    size = 10.0 ** math.floor(math.log10(high))
    step = next(size * part for part in (0.2, 0.5, 1, 2) if high / (size * part) <= 6)
    return [step * i for i in range(math.ceil(high / step) + 1)]
