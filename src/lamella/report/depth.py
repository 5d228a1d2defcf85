"""The page of ``lamella inspect``: what each layer does, and what removing it would cost."""

from __future__ import annotations

from typing import Any

from lamella.report.drawing import drawing, shade
from lamella.report.numbers import number
from lamella.report.page import finite, page

SCORES = (
    ("half_removed", "Half removed", "how far the output moves (JSD, nats) when this half alone is left out"),
    ("layer_removed", "Layer removed", "how far the output moves (JSD, nats) when the whole layer is left out"),
    ("half_influence", "Half influence", "how far this half turns the stream (1 − cosine)"),  # noqa: RUF001
    ("block_influence", "Block influence", "how far the whole layer turns the stream (1 − cosine)"),  # noqa: RUF001
)
BARS = (
    ("layer_removed", "Output JSD without the layer, nats", "layer", True),
    ("block_influence", "Block influence", "layer", False),
    ("stream_norm", "Stream norm before the layer", "layer, the last bar being the end", True),
)


def render_depth(report: dict[str, Any]) -> str:
    """The page ``depth.html``: one file that needs no network.

    Args:
        report: as :func:`lamella.depth.depth_report` returns it.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    report = finite(report)
    scores, layers = report["scores"], report["model"]["layers"]
    shades = [found for score in SCORES for found in shade(*score, scores[score[0]]["values"], layers)]
    stack = drawing([{"attn": "kept", "mlp": "kept"}] * layers, shades)
    bars = [
        {"name": name, "title": title, "axis": axis, "log": log, "values": scores[name]["values"]}
        for name, title, axis, log in BARS
    ]
    data = {"scores": stack["scores"], "bars": bars, "angles": scores["angular_distance"]["values"]}
    return page("depth.html", data, report=report, stack=stack, verdict=_verdict(report))


def _verdict(report: dict[str, Any]) -> str:
    """Which layer matters least and which most, to the output."""
    removed = report["scores"]["layer_removed"]["values"]
    known = [layer for layer, value in enumerate(removed) if value is not None]
    if not known:
        return f"{report['model']['name']}, layer by layer."
    least, most = min(known, key=removed.__getitem__), max(known, key=removed.__getitem__)
    return (
        f"{report['model']['name']} would miss layer {least} least and layer {most} most: leaving one out moves the "
        f"output by {number(removed[least])} and {number(removed[most])} nats."
    )
