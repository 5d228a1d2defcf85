"""Figures and summaries: similarity of layers, loss without each layer, and similarity of points and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, number, span
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figures import Figure, Heatmap, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence


def summary(evidence: Evidence) -> Summary:
    """Return the verdict and tables of any command of the method."""
    if isinstance(evidence, SeriesEvidence):
        return PlanSeries.summary(evidence)
    found = evidence.findings
    models = [found[each] for each in ("model", "compare") if each in found]
    start, end = models[0]["plateau"]
    where = f"every layer changes the residual stream (no cosine of input and output is above {number(found['theta'])})"
    if end > start:
        verb = "changes" if end - start == 1 else "change"
        where = f"{span('layer', start, end)} hardly {verb} the residual stream (cosine above {number(found['theta'])})"
    verdict = f"{models[0]['name']} predicts {models[0]['objective']}, and {where}."
    tables = [_layers(each) for each in models]
    lines = [
        f"{each['name']}: the paper's proportion of this plateau is {counted(each['recommended'], 'layer')}; rank "
        f"correlation of 1 - similarity with the loss without the layer: "
        f"{'unknown' if each['spearman'] is None else number(each['spearman'])}"
        for each in models
    ]
    if "curve_distance" in found:
        lines.append(f"mean distance of the two curves: {number(found['curve_distance'])}")
    return Summary(verdict, tables, lines)


def _layers(model: Mapping[str, Any]) -> Table:
    columns = ["layer", "similarity", "at masked tokens", "at visible tokens", "loss increase without it (nats/token)"]
    parts = [model["by_layer"], model["masked"], model["visible"], model["rise"]]
    rows = [[layer, *values] for layer, values in enumerate(zip(*parts, strict=True))]
    return Table(f"{model['name']}: similarity of each layer's input and output", columns, rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the similarity of layers and tokens, and the loss without each layer."""
    found = evidence.findings
    if "model" not in found:
        return []
    models = [found[each] for each in ("model", "compare") if each in found]
    model = models[0]
    curves: dict[str, Sequence[float | None]] = {each["name"]: each["by_layer"] for each in models}
    if any(number is not None for number in model["masked"]):
        curves |= {"at masked tokens": model["masked"], "at visible tokens": model["visible"]}
    rises = {each["name"]: each["rise"] for each in models}
    recency = {each["name"]: each["recency_index"] for each in models}
    return [
        Lines("layer", "cosine of input and output", curves, caption="Similarity of each layer's input and output."),
        Lines(
            "layer",
            "increase of the loss (nats per token)",
            rises,
            caption="Cost of skipping a single layer, under the same noise.",
        ),
        Lines(
            "point",
            "recency index",
            recency,
            caption="Similarity of a token to the previous one minus that to distant ones.",
        ),
        Heatmap(
            "point",
            "point",
            model["points"]["values"],
            "cosine",
            square=True,
            caption="Cosine of the residual stream at any two points, from the embedding on.",
        ),
    ]
