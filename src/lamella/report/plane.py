"""Points in a plane as a picture that needs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 740, 340, 60, 210, 16, 46
COLOURS = ("#475569", "#94a3b8", "#ea580c", "#a16207", "#0d9488", "#6366f1", "#be185d", "#15803d", "#7c3aed")
Points = Sequence[tuple[float, float]]


def plane(points: Mapping[str, Points], across: str, up: str, *, joined: bool = True) -> str:
    """Points by name, as one SVG; nothing where there are none.

    Args:
        points: (x, y) of each group.
        across, up: what x and y are.
        joined: by a line in each group, from left to right.
    """
    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    spans = [_span([point[axis] for point in every]) for axis in (0, 1)]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        parts = [(value - low) / (high - low) for value, (low, high) in zip(point, spans, strict=True)]
        return LEFT + parts[0] * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - parts[1] * (HEIGHT - TOP - BOTTOM)

    drawn = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" role="img" '
        'font-family="sans-serif" font-size="12"><title>'
        f"{escape(up)} against {escape(across)}</title>"
    ]
    drawn += _axes(spans, place, across, up)
    for number_of, (name, line) in enumerate(points.items()):
        colour = COLOURS[number_of % len(COLOURS)]
        where = [place(point) for point in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        if joined:
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in where]
        at = TOP + 14 + 18 * number_of
        drawn.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{at - 4}" r="4" fill="{colour}"/>')
        drawn.append(f'<text x="{WIDTH - RIGHT + 24}" y="{at}" fill="#888">{escape(name)}</text>')
    return "".join([*drawn, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """An axis with some room beside the values, which does not cross zero where no value does."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return max(low - room, 0.0) if low >= 0 else low - room, min(high + room, 0.0) if high < 0 else high + room


def _axes(spans: Sequence[tuple[float, float]], place: Any, across: str, up: str) -> list[str]:
    """Five lines for each axis, and what they measure."""
    (left, right), (low, high) = spans
    drawn = []
    for step in range(5):
        x, y = left + (right - left) * step / 4, low + (high - low) * step / 4
        (at, _), (_, level) = place((x, low)), place((left, y))
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end" fill="#888">{y:.3g}</text>')
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#888">{x:.3g}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    drawn.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#888">{escape(across)}</text>'
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" fill="#888" '
        f'transform="rotate(-90 14 {HEIGHT / 2})">{escape(up)}</text>'
    )
    return drawn
