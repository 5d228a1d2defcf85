"""From evidence to figures: how alike layers are, what each of them is worth, how points and tokens hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, number, span
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figures import Figure, Heatmap, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence


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


def figures(evidence: Evidence) -> list[Figure]:
    """How alike layers and positions are, and what each layer is worth."""
    found = evidence.findings
    if "model" not in found:
        return []
    models = [found[each] for each in ("model", "compare") if each in found]
    model = models[0]
    curves: dict[str, Sequence[float | None]] = {each["name"]: each["by_layer"] for each in models}
    if any(value is not None for value in model["masked"]):
        curves |= {"at masks": model["masked"], "at visible tokens": model["visible"]}
    rises = {each["name"]: each["rise"] for each in models}
    recency = {each["name"]: each["recency_index"] for each in models}
    return [
        Lines("layer", "cosine of input and output", curves, caption="How alike a layer's input and output are."),
        Lines(
            "layer",
            "rise of the loss, nats per token",
            rises,
            caption="What skipping one layer alone costs, under the same noise.",
        ),
        Lines(
            "point",
            "recency index",
            recency,
            caption="How much more alike a token is to the one before it than to those far away.",
        ),
        Heatmap(
            "point",
            "point",
            model["points"]["values"],
            "cosine",
            square=True,
            caption="How alike the residual stream is at any two points, from the embedding on.",
        ),
    ]
