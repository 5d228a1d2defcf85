"""Lines as a picture that needs no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 56, 190, 16, 40
COLOURS = ("#0d9488", "#ea580c", "#6366f1", "#a16207", "#be185d", "#475569", "#15803d", "#7c3aed")


def chart(lines: Mapping[str, Sequence[float]], label: str, across: str) -> str:
    """Lines over their places, as one SVG; the axis is logarithmic where they are far apart.

    A line of a single value is a dot. Where no line has a value there is no drawing, and without lines only the axes.

    Args:
        lines: by name, values from 0 on.
        label: what the values are.
        across: what the places are.
    """
    values = [max(value, 1) for line in lines.values() for value in line]
    if lines and not values:
        return ""
    values = values or [1]
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
        f'font-family="sans-serif" font-size="12"><title>{escape(label)}</title>'
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
        where = [(x(i), y(value)) for i, value in enumerate(line)]
        if len(where) == 1:
            parts.append(f'<circle cx="{where[0][0]:.1f}" cy="{where[0][1]:.1f}" r="4" fill="{colour}"/>')
        points = " ".join(f"{left:.1f},{top:.1f}" for left, top in where)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for end, name in ends:
        at = max(at + 15, end + 4)  # names keep apart where lines end together
        colour = COLOURS[list(lines).index(name) % len(COLOURS)]
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{at:.1f}" fill="{colour}">{escape(name)}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#888">{escape(across)}</text>'
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
