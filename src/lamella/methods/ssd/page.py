"""The report of ``lamella forget``: figures on forgotten and retained data, and the dampening by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lamella.formatting import counted, number, percent
from lamella.report.drawing import SUBLAYERS, StackDrawing, shade
from lamella.report.figures import Bars, Figure
from lamella.report.page import finite, render_page
from lamella.results import Evidence, Summary, Table

ROWS = (
    ("forget", "loss", "loss on the forget set, nats"),
    ("forget", "accuracy", "next-token accuracy, forget set"),
    ("retain", "loss", "loss on the retained data, nats"),
    ("retain", "accuracy", "next-token accuracy, retained data"),
    ("test", "loss", "loss on unseen text, nats"),
    ("test", "accuracy", "next-token accuracy, unseen text"),
    ("membership", None, "forget set classified as training data"),
    ("zrf", None, "ZRF (1: same as random weights)"),
)
SHADES = (
    ("share", "Selected", "fraction of the sublayer's weights that were dampened"),
    ("removed_share", "Removed", "removed fraction of the sublayer's mass, the sum of its magnitudes"),
)


def page(evidence: Evidence) -> str:
    """Render the report as one file that needs no network.

    Raises:
        LamellaError: if plotly or jinja2 is missing.
    """
    document = finite(evidence.model_dump(by_alias=True))
    found, layers = document["findings"], document["model"]["layers"]
    shades = [
        each
        for name, label, meaning in SHADES
        for each in shade(name, label, meaning, _by_sublayer(found["sites"], layers, name), layers)
    ]
    title = f"the layers of {document['model']['name']}"
    figures: dict[str, Figure] = {
        "stack": StackDrawing([{"attn": "kept", "mlp": "kept"}] * layers, shades, title=title)
    }
    figures |= {
        part: Bars("layer", "percent", {title: _by_layer(found, layers, part, whole)}, title=title)
        for part, whole, title in (
            ("selected", "weights", "Weights selected, %"),
            ("removed", "mass", "Mass removed, %"),
        )
    }
    columns, rows = _columns(found), _rows(found)
    variables = {"evidence": document, "found": found, "columns": columns, "rows": rows}
    template = Path(__file__).with_name("page.html")
    return render_page(template, figures, verdict=_verdict(document), **variables)


def summary(evidence: Evidence) -> Summary:
    """Tabulate the figures and the sites with the largest dampening."""
    document = finite(evidence.model_dump(by_alias=True))
    found = document["findings"]
    samples, total = found["samples"], found["total"]
    title = (
        f"{document['model']['name']}: {samples['forget']} of {counted(samples['reference'], 'sample')} forgotten, "
        f"{percent(total['share'], 2)} of the weights dampened"
    )
    rows = [[label, *values] for label, values in _rows(found)]
    most = sorted(found["sites"], key=lambda site: -site["removed"])[:5]
    where = [[site["name"], f"{site['share']:.2%}", f"{site['removed_share']:.2%}"] for site in most]
    tables = [
        Table(title, ["", *_columns(found)], rows),
        Table("Sites with the largest dampening", ["site", "selected", "mass removed"], where),
    ]
    return Summary(_verdict(document), tables)


def _columns(found: dict[str, Any]) -> list[str]:
    return [name for name in ("before", "after", "retrained") if name in found]


def _rows(found: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """Return the available figures of each version."""
    rows = [(label, [_figure(found[column], part, key) for column in _columns(found)]) for part, key, label in ROWS]
    return [(label, values) for label, values in rows if any(value is not None for value in values)]


def _figure(figures: dict[str, Any], part: str, key: str | None) -> float | None:
    value = figures[part]
    return value if key is None or value is None else value[key]


def _verdict(document: dict[str, Any]) -> str:
    found = document["findings"]
    before, after = (found[when]["forget"]["loss"] for when in ("before", "after"))
    forgotten, dampened = counted(found["samples"]["forget"], "sample"), f"{number(100 * found['total']['share'])} %"
    return (
        f"{document['model']['name']} was made to forget {forgotten}, whose loss goes from {number(before)} to "
        f"{number(after)} nats per token, with {dampened} of the weights dampened."
    )


def _sites(sites: list[dict[str, Any]]) -> list[tuple[int, tuple[int, ...], dict[str, Any]]]:
    """Return the layer and the sublayers of each site within the layers."""
    found: list[tuple[int, tuple[int, ...], dict[str, Any]]] = []
    for site in sites:
        match = re.fullmatch(r"layers\.(\d+)(?:\.(attn|mlp))?", site["name"])
        if match:
            sublayers = (0, 1) if match[2] is None else (SUBLAYERS.index(match[2]),)
            found.append((int(match[1]), sublayers, site))
    return found


def _by_sublayer(sites: list[dict[str, Any]], layers: int, key: str) -> list[float | None]:
    values: list[float | None] = [None] * (len(SUBLAYERS) * layers)
    for layer, sublayers, site in _sites(sites):
        for sublayer in sublayers:
            values[len(SUBLAYERS) * layer + sublayer] = site[key]
    return values


def _by_layer(found: dict[str, Any], layers: int, part: str, whole: str) -> list[float]:
    """Return the percentage of ``part`` in ``whole`` for each layer."""
    sums = [[0.0, 0.0] for _ in range(layers)]
    for layer, _, site in _sites(found["sites"]):
        sums[layer][0] += site[part]
        sums[layer][1] += site[whole]
    return [100 * part_ / total if total else 0.0 for part_, total in sums]
