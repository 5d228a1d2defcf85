"""From evidence to figures: the matrix of languages, and what was forgotten for what was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.report.numbers import number
from lamella.report.summary import Summary, Table
from lamella.results import Evidence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 60, 190, 16, 46
COLOURS = ("#475569", "#94a3b8", "#ea580c", "#a16207", "#0d9488", "#6366f1", "#be185d", "#15803d", "#7c3aed")
Points = Sequence[tuple[float, float]]


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for any command of the method."""
    found, name = evidence.findings, (evidence.model or {}).get("name", "the model")
    if "matrix" in found:
        matrix = found["matrix"]
        names = [*matrix["old"], *matrix["new"]]
        rows = [[step, *(row[each] for each in names)]
                for step, row in zip(matrix["steps"], matrix["rows"], strict=True)]  # fmt: skip
        return Summary(f"layra has added {', '.join(matrix['new'])} to {name}.",
                       [Table("Held-out bits per byte", ["after", *names], rows)], evidence.notes)  # fmt: skip
    if "courses" in found:
        rows = sorted([[arm, rise] for arm, rise in found["forgotten"].items()], key=lambda row: row[1])
        title = f"Forgotten at {found['equal_loss']:.3f} bits per byte of {found['language']}"
        return Summary(f"layra and its controls on {name}.", [Table(title, ["method", "bits per byte"], rows)],
                       evidence.notes)  # fmt: skip
    if "curves" in found:
        rows = [[curve, "none" if cut is None else f"{cut[0]} + {cut[1]}"] for curve, cut in found["cuts"].items()]
        return Summary(f"Where the stages of {name} begin and end.", [Table("Cuts", ["curve", "first + last"], rows)],
                       evidence.notes)  # fmt: skip
    return Summary(f"{name} has the language and what its sibling was taught.", [], evidence.notes)


def figures(evidence: Evidence) -> str:
    """The fragment of a page, as HTML that needs no script."""
    found = evidence.findings
    if "matrix" in found:
        return _matrix(found["matrix"])
    if "ends" in found:
        points: dict[str, list[tuple[float, float]]] = {}
        for arm, _, new, old in found["ends"]:
            points.setdefault(arm, []).append((new, old))
        return f"<figure>{tradeoff(points)}</figure>"
    curves = {name: [(layer + 1.0, value) for layer, value in enumerate(curve)]
              for name, curve in found.get("curves", {}).items()}  # fmt: skip
    return f"<figure>{plane(curves, 'layer', 'lead, accuracy, cosine or share')}</figure>" if curves else ""


def _matrix(matrix: Mapping[str, Any]) -> str:
    """Bits per byte, steps down and languages across; shaded by the change since before."""
    names = [*matrix["old"], *matrix["new"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("after", *names))
    body = ""
    for step, row in zip(matrix["steps"], matrix["rows"], strict=True):
        cells = "".join(_cell(row[name], row[name] - matrix["rows"][0][name]) for name in names)
        body += f"<tr><th>{escape(step)}</th>{cells}</tr>"
    caption = "Held-out bits per byte; red is dearer and green is cheaper than before."
    return (
        f"<figure><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


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


def plane(points: Mapping[str, Points], across: str, up: str) -> str:
    """Points by name, joined in their order from left to right, as one SVG.

    Args:
        points: (x, y) of each line.
        across, up: what x and y are.
    """
    every = [point for line in points.values() for point in line]
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
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in where]
        at = TOP + 14 + 18 * number_of
        drawn.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{at - 4}" r="4" fill="{colour}"/>')
        drawn.append(f'<text x="{WIDTH - RIGHT + 24}" y="{at}" fill="#888">{escape(name)}</text>')
    return "".join([*drawn, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _axes(spans: Sequence[tuple[float, float]], place: Any, across: str, up: str) -> list[str]:
    """Five lines for each axis, and what they measure."""
    (left, right), (low, high) = spans
    drawn = []
    for step in range(5):
        x, y = left + (right - left) * step / 4, low + (high - low) * step / 4
        (at, _), (_, level) = place((x, low)), place((left, y))
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end" fill="#888">{y:.2f}</text>')
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#888">{x:.2f}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    drawn.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#888">{escape(across)}</text>'
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" fill="#888" '
        f'transform="rotate(-90 14 {HEIGHT / 2})">{escape(up)}</text>'
    )
    return drawn
