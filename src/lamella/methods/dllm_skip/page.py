"""From evidence to figures: how alike layers are, what each of them is worth, how points and tokens hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, number, span
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figure import figure
from lamella.report.plane import plane
from lamella.result import Summary, Table
from lamella.results import Evidence

CELL = 420  # pixels of the square of points


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for any command of the method."""
    if isinstance(evidence, SeriesEvidence):
        return PlanSeries.summary(evidence)
    found = evidence.findings
    models = [found[each] for each in ("model", "compare") if each in found]
    start, end = models[0]["plateau"]
    where = f"every layer turns the stream (no cosine of input and output is above {number(found['theta'])})"
    if end > start:
        turn = "turns" if end - start == 1 else "turn"
        where = f"{span('layer', start, end)} hardly {turn} the stream (cosine above {number(found['theta'])})"
    verdict = f"{models[0]['name']} predicts {models[0]['objective']}, and {where}."
    tables = [_layers(each) for each in models]
    lines = [
        f"{each['name']}: the paper's share of that stretch is {counted(each['recommended'], 'layer')}; rank "
        f"correlation of 1 - similarity with what a layer is worth: "
        f"{'not known' if each['spearman'] is None else number(each['spearman'])}"
        for each in models
    ]
    if "apart" in found:
        lines.append(f"the two curves are {number(found['apart'])} apart on average")
    return Summary(verdict, tables, lines)


def _layers(model: Mapping[str, Any]) -> Table:
    columns = ["layer", "similarity", "at masks", "at visible tokens", "loss without it, nats per token"]
    parts = [model["by_layer"], model["masked"], model["visible"], model["rise"]]
    rows = [[layer, *values] for layer, values in enumerate(zip(*parts, strict=True))]
    return Table(f"{model['name']}: how alike its layers' inputs and outputs are", columns, rows)


def figures(evidence: Evidence) -> str:
    """The fragment of a page, as HTML that needs no script."""
    found = evidence.findings
    if "model" not in found:
        return ""
    models = [found[each] for each in ("model", "compare") if each in found]
    model = models[0]
    curves: dict[str, Sequence[float | None]] = {each["name"]: each["by_layer"] for each in models}
    if any(value is not None for value in model["masked"]):
        curves |= {"at masks": model["masked"], "at visible tokens": model["visible"]}
    drawn = [
        (lines(curves, "layer", "cosine of input and output"), "How alike a layer's input and output are."),
        (
            lines({each["name"]: each["rise"] for each in models}, "layer", "rise of the loss, nats per token"),
            "What skipping one layer alone costs, under the same noise.",
        ),
        (
            lines({each["name"]: each["recency_index"] for each in models}, "point", "recency index"),
            "How much more alike a token is to the one before it than to those far away.",
        ),
        (square(model["points"]["values"]), "How alike the stream is at any two points, from the embedding on."),
    ]
    return "".join(figure(svg, told) for svg, told in drawn)


def lines(curves: Mapping[str, Sequence[float | None]], across: str, up: str) -> str:
    """Curves over layers or points, as one SVG."""
    points = {
        name: [(float(place), value) for place, value in enumerate(curve) if value is not None]
        for name, curve in curves.items()
    }
    return plane(points, across, up)


def square(values: Sequence[Sequence[float]]) -> str:
    """A matrix of cosines as one SVG: the darker, the more alike."""
    size = CELL / len(values)
    flat = [value for row in values for value in row]
    low, high = min(flat), max(flat)
    cells = "".join(
        f'<rect x="{column * size:.1f}" y="{row * size:.1f}" width="{size:.1f}" height="{size:.1f}" '
        f'fill="#0d9488" fill-opacity="{(value - low) / ((high - low) or 1):.2f}">'
        f"<title>{row}, {column}: {number(value)}</title></rect>"
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    )
    return (
        f'<svg viewBox="0 0 {CELL} {CELL}" width="{CELL}" xmlns="http://www.w3.org/2000/svg" role="img">'
        f"<title>cosine of the stream at two points</title>{cells}</svg>"
    )
