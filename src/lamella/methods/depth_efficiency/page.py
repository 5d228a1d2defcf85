"""The page of ``lamella inspect``: what each layer does, and what removing it would cost."""

from __future__ import annotations

from typing import Any

from lamella.report.drawing import drawing, shade
from lamella.report.numbers import number
from lamella.report.page import finite, page

SCORES = (
    (
        "sublayer_removed",
        "Sublayer removed",
        "how far the output moves (JSD, nats) when this sublayer alone is left out",
    ),
    ("layer_removed", "Layer removed", "how far the output moves (JSD, nats) when the whole layer is left out"),
    ("sublayer_influence", "Sublayer influence", "how far this sublayer turns the stream (1 − cosine)"),  # noqa: RUF001
    ("block_influence", "Block influence", "how far the whole layer turns the stream (1 − cosine)"),  # noqa: RUF001
)
BARS = (
    ("layer_removed", "Output JSD without the layer, nats", "layer", True),
    ("block_influence", "Block influence", "layer", False),
    ("stream_norm", "Stream norm before the layer", "layer, the last bar being the end", True),
)
LINES = (
    (
        "ratio",
        "Size of what is added, relative to the stream it is made from",
        (("ratio_attn", "attention"), ("ratio_mlp", "MLP"), ("ratio_layer", "layer")),
        True,
    ),
    (
        "cosine",
        "Its direction: cosine with the stream it is made from",
        (("cosine_attn", "attention"), ("cosine_mlp", "MLP"), ("cosine_layer", "layer")),
        False,
    ),
    ("lens", "What the head would say before each layer: KL to the output, nats", (("lens_kl", "KL"),), False),
    ("top5", "and the share of its five likeliest tokens that agree", (("lens_top5", "top 5"),), False),
)
HEATS = (  # what each heat map shows, and its greatest value: changes beyond 1 are one colour, as in the paper
    ("current", "Left out for all tokens", "skip_current"),
    ("future", "Left out for earlier tokens, measured at later ones", "skip_future"),
)


def render_depth(report: dict[str, Any]) -> str:
    """The page ``depth.html``: one file that needs no network.

    Args:
        report: as :func:`lamella.methods.depth_efficiency.job.depth_report` returns it.

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
    data |= {"lines": [], "heats": []}
    if study := report.get("study"):
        data |= {"lines": _lines(study["profile"]), "heats": _heats(study)}
        bars.append(
            {
                "name": "output_mean",
                "title": "Later tokens without the layer: distance of output probabilities",
                "axis": "layer",
                "log": False,
                "values": study["skip_future"]["output_mean"]["values"],
            }
        )
    if maps := report.get("maps"):
        title = f"Linear maps to {maps['target']}: relative error on held-out tokens"
        data["maps"] = {"name": "maps", "title": title, "x": f"point of {maps['target']}", "y": "point of this model"}
        data["maps"]["values"] = maps["errors"]["values"]
    return page("depth.html", data, report=report, stack=stack, verdict=_verdict(report))


def _lines(profile: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "title": title,
            "axis": "layer" if name in ("ratio", "cosine") else "layers that have run",
            "log": log,
            "series": [{"name": label, "values": profile[score]["values"]} for score, label in series],
        }
        for name, title, series, log in LINES
    ]


def _heats(study: dict[str, Any]) -> list[dict[str, Any]]:
    heats = [(name, title, study[part]["later_max"]["values"]) for name, title, part in HEATS]
    heats.append(("direct", "Taken from what one layer reads, nothing propagates", study["direct"]["max"]["values"]))
    return [
        {"name": name, "title": title, "x": "layer that changes", "y": "layer left out", "values": values, "most": 1}
        for name, title, values in heats
    ]


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
