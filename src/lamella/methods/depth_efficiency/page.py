"""The page of ``lamella inspect``: what each layer does, and what removing it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.formatting import number
from lamella.report.drawing import StackDrawing, shade
from lamella.report.figures import Bars, Figure, Heatmap, Lines, known
from lamella.report.page import finite, render_page
from lamella.results import Evidence, Summary, Table

SCORES = (
    (
        "sublayer_removed",
        "Sublayer removed",
        "how far the output moves ({distance}) when this sublayer alone is left out",
    ),
    ("layer_removed", "Layer removed", "how far the output moves ({distance}) when the whole layer is left out"),
    ("sublayer_influence", "Sublayer influence", "how far this sublayer turns the stream (1 − cosine)"),  # noqa: RUF001
    ("block_influence", "Block influence", "how far the whole layer turns the stream (1 − cosine)"),  # noqa: RUF001
)
BARS = (
    ("layer_removed", "Output without the layer: {distance}", "layer", True),
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
MODALITIES = (  # lines, one for each modality
    ("ratio_layer", "Size of what a layer adds, relative to the stream"),
    ("cosine_layer", "Its direction: cosine with the stream"),
    ("norm_stream", "Norm of the stream before the layer"),
)
HEATS = (  # what each heat map shows, and its greatest value: changes beyond 1 are one colour, as in the paper
    ("current", "Left out for all tokens", "skip_current"),
    ("future", "Left out for earlier tokens, measured at later ones", "skip_future"),
)


def page(evidence: Evidence) -> str:
    """The page: one file that needs no network.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    told = finite(evidence.model_dump(by_alias=True))
    found, layers = told["findings"], told["model"]["layers"]
    scores = found["scores"]
    distance = _distance(told)
    shades = [
        shaded
        for name, title, said in SCORES
        for shaded in shade(name, title, said.format(distance=distance), scores[name]["values"], layers)
    ]
    bars = {
        name: Bars(axis, "", {"": scores[name]["values"]}, log_y=log, title=title.format(distance=distance))
        for name, title, axis, log in BARS
    }
    panels: dict[str, dict[str, Figure]] = {"bars": {**bars}, "lines": {}, "heats": {}, "kinds": {}}
    if study := found.get("study"):
        panels |= {"lines": _lines(study["profile"]), "heats": _heats(study)}
        title = "Later tokens without the layer: distance of output probabilities"
        values = study["skip_future"]["output_mean"]["values"]
        panels["bars"]["output_mean"] = bars["output_mean"] = Bars("layer", "", {"": values}, title=title)
    if kinds := found.get("modalities"):
        panels["kinds"] = _by_modality(kinds)
    figures = {name: each for group in panels.values() for name, each in group.items()}
    if maps := found.get("maps"):
        title = f"Linear maps to {maps['target']}: relative error on held-out tokens"
        axes = f"point of {maps['target']}", "point of this model"
        figures["maps"] = Heatmap(*axes, maps["errors"]["values"], "relative error", title=title)
    title = f"the layers of {told['model']['name']}"
    figures["stack"] = StackDrawing([{"attn": "kept", "mlp": "kept"}] * layers, shades, title=title)
    figures["angles"] = _angles(scores["angular_distance"]["values"])
    table = [(each.title, next(iter(each.series.values()))) for each in bars.values()]
    template = Path(__file__).with_name("page.html")
    context = {"evidence": told, "found": found, "panels": panels, "table": table}
    return render_page(template, figures, verdict=_verdict(told), **context)


def summary(evidence: Evidence) -> Summary:
    """The scores of every layer, and what the study says."""
    told = finite(evidence.model_dump(by_alias=True))
    found, layers = told["findings"], range(told["model"]["layers"])
    scores = {name: score["values"] for name, score in found["scores"].items()}
    alone = scores["sublayer_removed"]
    parts = [scores["block_influence"], scores["stream_norm"], alone[::2], alone[1::2], scores["layer_removed"]]
    tables = [
        Table(
            f"{told['model']['name']}: depth report (last three: output, {_distance(told)})",
            ["layer", "block influence", "norm before", "without attn", "without mlp", "without layer"],
            [[layer, *(part[layer] for part in parts)] for layer in layers],
        )
    ]
    lines = []
    if study := found.get("study"):
        profile, future = study["profile"], study["skip_future"]
        parts = [profile["ratio_layer"], profile["cosine_layer"], profile["lens_kl"], future["output_mean"]]
        tables.append(
            Table(
                "What layers add, and what later tokens lose (distance of probabilities)",
                ["layer", "adds / stream", "cosine", "lens KL before", "later tokens without it"],
                [[layer, *(part["values"][layer] for part in parts)] for layer in layers],
            )
        )
        turning = "at no layer" if study["turning"] is None else f"at layer {study['turning']}"
        lines += [
            f"nine tenths of what layers do for later ones: in {_first(study['effective_depth'])}",
            f"the logit lens closes in from point {study['refinement']} on; layers turn to amplifying {turning}",
        ]
    if kinds := found.get("modalities"):
        tables.append(_modalities_table(kinds, layers))
    if maps := found.get("maps"):
        lines.append(
            f"linear maps to {maps['target']}: best at a relative depth {maps['offset']:.2f} away, "
            f"rank correlation {maps['correlation']:.2f}"
        )
    return Summary(_verdict(told), tables, lines)


def _first(depth: int) -> str:
    """So many layers from the first on."""
    return "the first layer" if depth == 1 else f"the first {depth} layers"


def _lines(profile: dict[str, Any]) -> dict[str, Figure]:
    return {
        name: Lines(
            "layer" if name in ("ratio", "cosine") else "layers that have run",
            "",
            {label: profile[score]["values"] for score, label in series},
            log_y=log,
            title=title,
        )
        for name, title, series, log in LINES
    }


def _by_modality(kinds: dict[str, Any]) -> dict[str, Figure]:
    panels: dict[str, Figure] = {
        f"by_{score}": Lines(
            "layer",
            "",
            {kind: each["profile"][score]["values"] for kind, each in kinds.items()},
            log_y=score != "cosine_layer",
            title=title,
        )
        for score, title in MODALITIES
    }
    missed = {kind: each["skip"]["output_mean"]["values"] for kind, each in kinds.items() if "skip" in each}
    title = "Text tokens where those of one kind skip the layer: distance of output probabilities"
    return panels | {"by_missed": Lines("layer", "", missed, log_y=True, title=title)}


def _modalities_table(kinds: dict[str, Any], layers: range) -> Table:
    columns, parts = ["layer"], []
    for kind, each in kinds.items():
        columns += [f"adds / stream, {kind}", f"cosine, {kind}"]
        parts += [each["profile"][score]["values"] for score in ("ratio_layer", "cosine_layer")]
        if "skip" in each:
            columns.append(f"text without it for {kind}")
            parts.append(each["skip"]["output_mean"]["values"])
    title = "What layers do for the tokens of each kind, and what text tokens lose (distance of probabilities)"
    return Table(title, columns, [[layer, *(part[layer] for part in parts)] for layer in layers])


def _heats(study: dict[str, Any]) -> dict[str, Figure]:
    heats = [(name, title, study[part]["later_max"]["values"]) for name, title, part in HEATS]
    heats.append(("direct", "Taken from what one layer reads, nothing propagates", study["direct"]["max"]["values"]))
    return {
        name: Heatmap("layer that changes", "layer left out", values, "change", least=0.0, most=1.0, title=title)
        for name, title, values in heats
    }


def _angles(distances: Sequence[Sequence[float | None]]) -> Heatmap:
    """The angular distance of each run of layers, by its first layer and its length; a line joins the closest."""
    lengths = range(1, len(distances[0]))
    values = [[row[length] for row in distances] for length in lengths]
    closest = [
        (min((value, start) for start, value in enumerate(row) if value is not None)[1], place)
        for place, row in enumerate(values)
        if known([row])
    ]
    return Heatmap(
        "first layer of the run",
        "layers in the run",
        values,
        "angular distance",
        rows=list(lengths),
        upwards=True,
        path=closest,
        joined=True,
    )


def _distance(told: dict[str, Any]) -> str:
    """How the output without a part of the model was compared."""
    features = "features" in told["findings"]["scores"]["layer_removed"]["name"]
    return "1 - cosine of the features" if features else "JSD, nats"


def _verdict(told: dict[str, Any]) -> str:
    """Which layer matters least and which most, to the output."""
    name, removed = told["model"]["name"], told["findings"]["scores"]["layer_removed"]["values"]
    known = [layer for layer, value in enumerate(removed) if value is not None]
    if not known:
        return f"{name}, layer by layer."
    least, most = min(known, key=removed.__getitem__), max(known, key=removed.__getitem__)
    return (
        f"{name} would miss layer {least} least and layer {most} most: leaving one out moves the "
        f"output by {number(removed[least])} and {number(removed[most])} ({_distance(told)})."
    )
