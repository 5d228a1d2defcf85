"""Figures and summary of MuE: saturation by layer, and the layers after which samples exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, percent
from lamella.plan import PlanSeries
from lamella.report.figures import Bars, Figure, Lines
from lamella.results import Evidence, Study, Summary, Table, Trained, TrainedEvidence
from lamella.results.page import curves

NAMES = {"image": "image", "text": "text", "decoder": "generated tokens"}


def summary(evidence: Evidence) -> Summary:
    """Summarise exits and their savings; for `mue saturation` the thresholds by quantile; for a search the series."""
    found = evidence.findings
    if "exits" in found:
        trained = Trained.summary(evidence)
        saved = found["reduction"]
        verdict = (
            f"{trained.verdict} Its exits skip {percent(saved['by layers'])} of the layers, or "
            f"{percent(saved['by FLOPs'])} of the multiplications."
        )
        right = (
            f"exact match: {percent(found['exact match'])}, without exits {percent(found['exact match without exits'])}"
        )
        return Summary(verdict, [*trained.tables, _exits(found)], [*trained.lines, right])
    if "by quantile" in found:
        names = list(found["saturation"])
        rows = [[q, *(each.get(name) for name in names)] for q, each in found["by quantile"].items()]
        table = Table("Thresholds by quantile", ["quantile of S", *(NAMES[name] for name in names)], rows)
        return Summary("The cosine between the hidden states before and after each layer.", [table])
    return PlanSeries.summary(evidence) if evidence.kind == PlanSeries.kind else Study.summary(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """Draw the saturation by layer and the histograms of exits; for a trained model also its losses."""
    found = evidence.findings
    parts: list[Figure] = [curves(evidence)] if isinstance(evidence, TrainedEvidence) else []
    if "saturation" in found:
        lines = {NAMES[name]: values for name, values in found["saturation"].items()}
        caption = "Mean saturation S: layers with a high S change the hidden states little."
        parts.append(Lines("layer", "cosine of the residual stream before and after", lines, caption=caption))
    if "exits" in found:
        parts.append(exits(found["exits"]))
    return parts


def exits(shares: Mapping[str, Sequence[float]]) -> Bars:
    """Draw a bar for each layer and exit.

    Args:
        shares: by exit, the fraction of samples or tokens that exit after each layer.
    """
    return Bars(
        "layer",
        "samples or tokens, percent",
        {NAMES[name]: [100 * share for share in each] for name, each in shares.items()},
        positions=[str(layer + 1) for layer in range(max(map(len, shares.values())))],
        labels={NAMES[name]: [f"{100 * share:.0f}" if share >= 0.005 else "" for share in each]
                for name, each in shares.items()},
        title="Exits by layer",
        caption="Layers after which samples exit the encoder, by modality, and generated tokens the decoder; the last "
        "layer is no exit.",
    )  # fmt: skip


def _exits(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, shares in found["exits"].items():
        mean = sum(layer * share for layer, share in enumerate(shares, 1))
        rows.append([NAMES[name], found["thresholds"][name], number(mean), *(percent(share) for share in shares)])
    layers = max(len(shares) for shares in found["exits"].values())
    rows = [[*row, *[""] * (layers + 3 - len(row))] for row in rows]
    return Table("Exits, in % of samples or tokens", ["exit", "threshold", "mean layer", *range(1, layers + 1)], rows)
