"""The page of ``lamella forget``: what is forgotten, what is kept, and where weights were dampened."""

from __future__ import annotations

import re
from typing import Any

from lamella.report.drawing import SUBLAYERS, drawing, shade
from lamella.report.numbers import number
from lamella.report.page import finite, page

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


def render_forgetting(evidence: dict[str, Any]) -> str:
    """The page ``forget.html``: one file that needs no network.

    Args:
        evidence: as :func:`lamella.methods.ssd.job.forget` returns it.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    evidence = finite(evidence)
    layers = evidence["model"]["layers"]
    shades = [
        each
        for name, label, meaning in SHADES
        for each in shade(name, label, meaning, _by_sublayer(evidence["sites"], layers, name), layers)
    ]
    stack = drawing([{"attn": "kept", "mlp": "kept"}] * layers, shades)
    bars = [
        {"name": part, "title": title, "axis": "layer", "log": False, "values": _by_layer(evidence, part, whole)}
        for part, whole, title in (
            ("selected", "weights", "Weights selected, %"),
            ("removed", "mass", "Mass removed, %"),
        )
    ]
    columns = [name for name in ("before", "after", "retrained") if name in evidence]
    rows = [(label, [_figure(evidence[column], part, key) for column in columns]) for part, key, label in ROWS]
    data = {"scores": stack["scores"], "bars": bars}
    shown = [(label, values) for label, values in rows if any(value is not None for value in values)]
    verdict = _verdict(evidence)
    return page("forget.html", data, evidence=evidence, stack=stack, columns=columns, rows=shown, verdict=verdict)


def _figure(figures: dict[str, Any], part: str, key: str | None) -> float | None:
    value = figures[part]
    return value if key is None or value is None else value[key]


def _verdict(evidence: dict[str, Any]) -> str:
    before, after = (evidence[when]["forget"]["loss"] for when in ("before", "after"))
    share = 100 * evidence["total"]["share"]
    return (
        f"{evidence['model']['name']} was made to forget {evidence['samples']['forget']} samples: their loss goes from "
        f"{number(before)} to {number(after)} nats per token, with {number(share)} % of the weights dampened."
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


def _by_layer(evidence: dict[str, Any], part: str, whole: str) -> list[float]:
    """Of each layer, how many percent of ``whole`` is ``part``."""
    sums = [[0.0, 0.0] for _ in range(evidence["model"]["layers"])]
    for layer, _, site in _sites(evidence["sites"]):
        sums[layer][0] += site[part]
        sums[layer][1] += site[whole]
    return [100 * some / all_ if all_ else 0.0 for some, all_ in sums]
