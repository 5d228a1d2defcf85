"""The page of ``lamella forget``: what is forgotten, what is kept, and where weights were dampened."""

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
    ("forget", "accuracy", "next tokens right, forget set"),
    ("retain", "loss", "loss on the retained data, nats"),
    ("retain", "accuracy", "next tokens right, retained data"),
    ("test", "loss", "loss on text never seen, nats"),
    ("test", "accuracy", "next tokens right, text never seen"),
    ("membership", None, "forget set taken for training data"),
    ("zrf", None, "ZRF (1: no more than random weights know)"),
)
SHADES = (
    ("share", "Selected", "share of the sublayer's weights that were dampened"),
    ("removed_share", "Removed", "share of the sublayer's mass, the sum of its magnitudes, that is gone"),
)


def page(evidence: Evidence) -> str:
    """The page: one file that needs no network.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    told = finite(evidence.model_dump(by_alias=True))
    found, layers = told["findings"], told["model"]["layers"]
    shades = [
        each
        for name, label, meaning in SHADES
        for each in shade(name, label, meaning, _by_sublayer(found["sites"], layers, name), layers)
    ]
    title = f"the layers of {told['model']['name']}"
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
    given = {"evidence": told, "found": found, "columns": columns, "rows": rows}
    template = Path(__file__).with_name("page.html")
    return render_page(template, figures, verdict=_verdict(told), **given)


def summary(evidence: Evidence) -> Summary:
    """What is forgotten and kept, and where most was removed."""
    told = finite(evidence.model_dump(by_alias=True))
    found = told["findings"]
    samples, total = found["samples"], found["total"]
    title = (
        f"{told['model']['name']}: {samples['forget']} of {counted(samples['reference'], 'sample')} forgotten, "
        f"{percent(total['share'], 2)} of the weights dampened"
    )
    rows = [[label, *values] for label, values in _rows(found)]
    most = sorted(found["sites"], key=lambda site: -site["removed"])[:5]
    where = [[site["name"], f"{site['share']:.2%}", f"{site['removed_share']:.2%}"] for site in most]
    tables = [
        Table(title, ["", *_columns(found)], rows),
        Table("Where most was removed", ["site", "selected", "mass removed"], where),
    ]
    return Summary(_verdict(told), tables)


def _columns(found: dict[str, Any]) -> list[str]:
    return [name for name in ("before", "after", "retrained") if name in found]


def _rows(found: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """The figures of each version, as far as there are any."""
    rows = [(label, [_figure(found[column], part, key) for column in _columns(found)]) for part, key, label in ROWS]
    return [(label, values) for label, values in rows if any(value is not None for value in values)]


def _figure(figures: dict[str, Any], part: str, key: str | None) -> float | None:
    value = figures[part]
    return value if key is None or value is None else value[key]


def _verdict(told: dict[str, Any]) -> str:
    found = told["findings"]
    before, after = (found[when]["forget"]["loss"] for when in ("before", "after"))
    gone, dampened = counted(found["samples"]["forget"], "sample"), f"{number(100 * found['total']['share'])} %"
    return (
        f"{told['model']['name']} was made to forget {gone}, whose loss goes from {number(before)} to {number(after)} "
        f"nats per token, with {dampened} of the weights dampened."
    )


def _sites(sites: list[dict[str, Any]]) -> list[tuple[int, tuple[int, ...], dict[str, Any]]]:
    """The layer and the sublayers of each site within the layers."""
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
    """Of each layer, how many percent of ``whole`` is ``part``."""
    sums = [[0.0, 0.0] for _ in range(layers)]
    for layer, _, site in _sites(found["sites"]):
        sums[layer][0] += site[part]
        sums[layer][1] += site[whole]
    return [100 * some / all_ if all_ else 0.0 for some, all_ in sums]
