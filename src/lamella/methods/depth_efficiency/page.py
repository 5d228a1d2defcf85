"""The page of ``lamella inspect``: the contribution of each layer, and the cost of removing it."""

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
        "change of the output ({distance}) when only this sublayer is removed",
    ),
    ("layer_removed", "Layer removed", "change of the output ({distance}) when the whole layer is removed"),
    ("sublayer_influence", "Sublayer influence", "change of the residual stream's direction (1 − cosine)"),  # noqa: RUF001
    ("block_influence", "Block influence", "change of the residual stream's direction (1 − cosine)"),  # noqa: RUF001
)
BARS = (
    ("layer_removed", "Output without the layer: {distance}", "layer", True),
    ("block_influence", "Block influence", "layer", False),
    ("residual_norm", "Norm of the residual stream before the layer", "layer (last bar: after the last layer)", True),
)
LINES = (
    (
        "ratio",
        "Norm of the contribution, relative to its input",
        (("ratio_attn", "attention"), ("ratio_mlp", "MLP"), ("ratio_layer", "layer")),
        True,
    ),
    (
        "cosine",
        "Cosine of the contribution and its input",
        (("cosine_attn", "attention"), ("cosine_mlp", "MLP"), ("cosine_layer", "layer")),
        False,
    ),
    ("lens", "Logit lens before each layer: KL to the output (nats)", (("lens_kl", "KL"),), False),
    ("top5", "Logit lens before each layer: fraction of the top 5 tokens that agree", (("lens_top5", "top 5"),), False),
)
MODALITIES = (  # one line per modality
    ("ratio_layer", "Norm of the layer's contribution, relative to its input"),
    ("cosine_layer", "Cosine of the contribution and its input"),
    ("norm_residual", "Norm of the residual stream before the layer"),
)
HEATS = (  # name, title and finding of each heat map; values above 1 have one colour, as in the paper
    ("current", "Skipped for all tokens", "skip_current"),
    ("future", "Skipped for earlier tokens, measured at later ones", "skip_future"),
)


def page(evidence: Evidence) -> str:
    """Return the HTML page, a single file that needs no network.

    Raises:
        LamellaError: if plotly or jinja2 is not installed.
    """
    record = finite(evidence.model_dump(by_alias=True))
    found, layers = record["findings"], record["model"]["layers"]
    scores = found["scores"]
    distance = _distance(record)
    shades = [
        shaded
        for name, title, description in SCORES
        for shaded in shade(name, title, description.format(distance=distance), scores[name]["values"], layers)
    ]
    bars = {
        name: Bars(axis, "", {"": scores[name]["values"]}, log_y=log, title=title.format(distance=distance))
        for name, title, axis, log in BARS
    }
    panels: dict[str, dict[str, Figure]] = {"bars": {**bars}, "lines": {}, "heats": {}, "kinds": {}}
    if study := found.get("study"):
        panels |= {"lines": _lines(study["profile"]), "heats": _heats(study)}
        title = "Effect on later tokens without the layer: distance of output probabilities"
        values = study["skip_future"]["output_mean"]["values"]
        panels["bars"]["output_mean"] = bars["output_mean"] = Bars("layer", "", {"": values}, title=title)
    if kinds := found.get("modalities"):
        panels["kinds"] = _by_modality(kinds)
    figures = {name: each for group in panels.values() for name, each in group.items()}
    if maps := found.get("maps"):
        title = f"Linear maps to {maps['target']}: relative error on held-out tokens"
        axes = f"point of {maps['target']}", "point of this model"
        figures["maps"] = Heatmap(*axes, maps["errors"]["values"], "relative error", title=title)
    title = f"the layers of {record['model']['name']}"
    figures["stack"] = StackDrawing([{"attn": "kept", "mlp": "kept"}] * layers, shades, title=title)
    figures["angles"] = _angles(scores["angular_distance"]["values"])
    table = [(each.title, next(iter(each.series.values()))) for each in bars.values()]
    template = Path(__file__).with_name("page.html")
    context = {"evidence": record, "found": found, "panels": panels, "table": table}
    return render_page(template, figures, verdict=_verdict(record), **context)


def summary(evidence: Evidence) -> Summary:
    """Summarise the scores of every layer and the study."""
    record = finite(evidence.model_dump(by_alias=True))
    found, layers = record["findings"], range(record["model"]["layers"])
    scores = {name: score["values"] for name, score in found["scores"].items()}
    alone = scores["sublayer_removed"]
    parts = [scores["block_influence"], scores["residual_norm"], alone[::2], alone[1::2], scores["layer_removed"]]
    tables = [
        Table(
            f"{record['model']['name']}: depth report (last three columns: change of the output, {_distance(record)})",
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
                "Contributions, and effect on later tokens (distance of probabilities)",
                ["layer", "contribution / input norm", "cosine", "lens KL before", "later tokens without it"],
                [[layer, *(part["values"][layer] for part in parts)] for layer in layers],
            )
        )
        turning_point = "at no layer" if study["turning_point"] is None else f"at layer {study['turning_point']}"
        lines += [
            f"nine tenths of the effects of layers on later ones: in {_first(study['effective_depth'])}",
            f"the logit lens converges from point {study['refinement']} on; layers start to amplify {turning_point}",
        ]
    if kinds := found.get("modalities"):
        tables.append(_modalities_table(kinds, layers))
    if maps := found.get("maps"):
        lines.append(
            f"linear maps to {maps['target']}: mean offset of the best relative depth {maps['offset']:.2f}, "
            f"rank correlation {maps['correlation']:.2f}"
        )
    return Summary(_verdict(record), tables, lines)


def _first(depth: int) -> str:
    """Return "the first N layers"."""
    return "the first layer" if depth == 1 else f"the first {depth} layers"


def _lines(profile: dict[str, Any]) -> dict[str, Figure]:
    return {
        name: Lines(
            "layer" if name in ("ratio", "cosine") else "number of layers run",
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
    title = "Text tokens if the tokens of one modality skip the layer: distance of output probabilities"
    return panels | {"by_missed": Lines("layer", "", missed, log_y=True, title=title)}


def _modalities_table(kinds: dict[str, Any], layers: range) -> Table:
    columns, parts = ["layer"], []
    for kind, each in kinds.items():
        columns += [f"contribution / input norm, {kind}", f"cosine, {kind}"]
        parts += [each["profile"][score]["values"] for score in ("ratio_layer", "cosine_layer")]
        if "skip" in each:
            columns.append(f"text if {kind} skips it")
            parts.append(each["skip"]["output_mean"]["values"])
    title = "Contributions for the tokens of each modality, and effect on text tokens (distance of probabilities)"
    return Table(title, columns, [[layer, *(part[layer] for part in parts)] for layer in layers])


def _heats(study: dict[str, Any]) -> dict[str, Figure]:
    heats = [(name, title, study[part]["later_max"]["values"]) for name, title, part in HEATS]
    heats.append(("direct", "Direct effect: removed from the input of one layer", study["direct"]["max"]["values"]))
    return {
        name: Heatmap("affected layer", "skipped layer", values, "change", least=0.0, most=1.0, title=title)
        for name, title, values in heats
    }


def _angles(distances: Sequence[Sequence[float | None]]) -> Heatmap:
    """Plot the angular distance of each run of layers, by its first layer and its length."""
    lengths = range(1, len(distances[0]))
    values = [[row[length] for row in distances] for length in lengths]
    closest = [
        (min((value, start) for start, value in enumerate(row) if value is not None)[1], index)
        for index, row in enumerate(values)
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


def _distance(record: dict[str, Any]) -> str:
    """Return the measure by which outputs without a part of the model are compared."""
    features = "features" in record["findings"]["scores"]["layer_removed"]["name"]
    return "1 - cosine of the features" if features else "JSD in nats"


def _verdict(record: dict[str, Any]) -> str:
    """Return the least and the most important layer."""
    name, removed = record["model"]["name"], record["findings"]["scores"]["layer_removed"]["values"]
    known = [layer for layer, value in enumerate(removed) if value is not None]
    if not known:
        return f"{name}, layer by layer."
    least, maximum = min(known, key=removed.__getitem__), max(known, key=removed.__getitem__)
    return (
        f"{name}: layer {least} matters least and layer {maximum} most: removing them changes the output by "
        f"{number(removed[least])} and {number(removed[maximum])} ({_distance(record)})."
    )
