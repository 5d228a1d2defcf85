"""From evidence to its figures: where slices drift apart, and what is answered at the nine places of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.formatting import counted, numbered, percent, points
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.report.pictures import shown
from lamella.results import Evidence, Summary, Table

CUTS = ("inside", "one seam", "two seams")
CELL = 72  # pixels of a place in the map of answers


def figures(evidence: Evidence) -> str:
    """Curves and maps as HTML that needs no script."""
    found = evidence.findings
    if "places" in found:
        return _answers(found)
    lines = _distances(found if "across" in found else found.get("seams"))
    if "probe" in found:
        probes = {cut: [100 * (each or 0) for each in found["probe"][cut]] for cut in CUTS}
        lines += figure(chart(probes, "percent", "layer"), "What a linear probe reads of a thing from its own patches.")
    return lines


def _distances(seams: Mapping[str, Any] | None) -> str:
    if seams is None:
        return ""
    lines = {"across a seam": seams["across"], "inside a slice": seams["inside"]}
    return figure(chart(lines, "1 - cos", "layer"), "How far neighbouring patches are apart, before and behind layers.")


def _answers(found: Mapping[str, Any]) -> str:
    """The nine places, each as dark as its answers are wrong, with the seams over them; and samples."""
    side = 3 * CELL
    cells = []
    for row, line in enumerate(found["places"]):
        for column, share in enumerate(line):
            x, y = column * CELL, row * CELL
            shade = 0 if share is None else share
            cells.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#2a7f62" fill-opacity="{shade:.3f}"/>'
                f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 5}" text-anchor="middle" fill="currentColor">'
                f"{percent(share)}</text>"
            )
    seam = 'stroke="currentColor" stroke-dasharray="5 4"'
    cells.append(f'<path d="M{side / 2} 0V{side}M0 {side / 2}H{side}" {seam}/>')
    drawing = f'<svg viewBox="0 0 {side} {side}" width="{side}" role="img" aria-label="right answers by place">'
    grid = figure(f"{drawing}{''.join(cells)}</svg>", "Right answers by the place of the thing; dashed: the seams.")
    rows = "".join(
        f"<tr><td>{shown(each['picture'], 'a picture that was asked about')}</td><td>{escape(each['prompt'])}</td>"
        f"<td>{escape(each['answer'])}</td><td>{each['cut']}</td><td>{'right' if each['right'] else 'wrong'}</td></tr>"
        for each in found["samples"]
    )
    return f"{grid}<table><tr><th></th><th>question</th><th>answer</th><th>cut</th><th></th></tr>{rows}</table>"


def summary(evidence: Evidence) -> Summary:
    """What was measured or trained, in words and tables."""
    found = evidence.findings
    if "places" in found:
        return _judged(found)
    if "across" in found:
        return _measured(found)
    if "adapters" not in found:
        rows = [[part, *(counts.get(cut, 0) for cut in CUTS)] for part, counts in found["rows"].items()]
        return Summary("Questions about things that seams cut are written.", [Table("Rows", ["", *CUTS], rows)])
    new, every = found["parameters"]["new"], found["parameters"]["all"]
    tokens = [[grid, count] for grid, count in found["tokens"].items()]
    return Summary(
        f"The model reads images in slices; adapters stand in {numbered('layer', found['adapters'])} of its encoder. "
        f"New, or trained beside them: {new:,} of {counted(every, 'parameter')}.",
        [Table("Positions that an image takes", ["slices", "tokens"], tokens)],
    )


def _judged(found: Mapping[str, Any]) -> Summary:
    rows = [
        [task, *(percent(line[cut]) for cut in CUTS), _points(found["gaps"][task])]
        for task, line in found["tasks"].items()
    ]
    rows.append(["all", *(percent(found["cuts"][cut]) for cut in CUTS), _points(found["gap"])])
    gap = "" if found["gap"] is None else f" What a seam cuts costs {points(found['gap'])}, over tasks."
    if found["gap"] is not None and found["gap"] <= 0:
        gap = f" What a seam cuts costs nothing: such answers differ by {points(-found['gap'])}, over tasks."
    verdict = f"Right answers: {percent(found['accuracy'])} of {counted(found['questions'], 'question')}.{gap}"
    return Summary(verdict, [Table("Right answers", ["task", *CUTS, "gap, points"], rows)])


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _measured(found: Mapping[str, Any]) -> Summary:
    rows = [
        [layer, across, inside, score]
        for layer, across, inside, score in zip(
            ["before", *found["layers"]], found["across"], found["inside"], found["scores"], strict=True
        )
    ]
    where: Sequence[int] = found["placed"]
    verdict = f"Slices drift apart most in {numbered('layer', where)}: that is where adapters belong."
    columns = ["layer", "across a seam", "inside a slice", "difference"]
    return Summary(verdict, [Table("Distance of neighbours, 1 - cos", columns, rows)])
