"""What is drawn: how alike streams are from layer to layer, and behind which layers samples exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, percent
from lamella.plan import PlanSeries
from lamella.report.figures import Bars, Figure, Lines
from lamella.results import Evidence, Study, Summary, Table, Trained, TrainedEvidence
from lamella.results.page import curves

NAMES = {"image": "image", "text": "text", "decoder": "written words"}


def summary(evidence: Evidence) -> Summary:
    """Exits and what they save; of a study the thresholds that quantiles make; of a search the series."""
    found = evidence.findings
    if "exits" in found:
        told = Trained.summary(evidence)
        saved = found["reduction"]
        verdict = (
            f"{told.verdict} Its exits leave out {percent(saved['by layers'])} of the layers, which are "
            f"{percent(saved['by FLOPs'])} of the multiplications."
        )
        right = (
            f"answered word for word: {percent(found['right'])}, without exits {percent(found['right without exits'])}"
        )
        return Summary(verdict, [*told.tables, _exits(found)], [*told.lines, right])
    if "by quantile" in found:
        names = list(found["saturation"])
        rows = [[q, *(each.get(name) for name in names)] for q, each in found["by quantile"].items()]
        table = Table("Thresholds by quantile", ["quantile of S", *(NAMES[name] for name in names)], rows)
        return Summary("How much alike streams are before and after each layer.", [table])
    return PlanSeries.summary(evidence) if evidence.kind == PlanSeries.kind else Study.summary(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """The curves of S, and the histograms of exits; of a trained model its losses."""
    found = evidence.findings
    parts: list[Figure] = [curves(evidence)] if isinstance(evidence, TrainedEvidence) else []
    if "saturation" in found:
        lines = {NAMES[name]: values for name, values in found["saturation"].items()}
        caption = "The mean of S: where it stays high, layers change little."
        parts.append(Lines("layer", "cosine of the residual stream before and after", lines, caption=caption))
    if "exits" in found:
        parts.append(exits(found["exits"]))
    return parts


def exits(shares: Mapping[str, Sequence[float]]) -> Bars:
    """A bar for each layer and exit.

    Args:
        shares: by exit: of each layer, the share of samples or words that leave behind it.
    """
    return Bars(
        "layer",
        "samples or words, percent",
        {NAMES[name]: [100 * share for share in each] for name, each in shares.items()},
        positions=[str(layer + 1) for layer in range(max(map(len, shares.values())))],
        labels={NAMES[name]: [f"{100 * share:.0f}" if share >= 0.005 else "" for share in each]
                for name, each in shares.items()},
        title="Layers behind which samples exit",
        caption="Behind which layer samples leave the encoder, by modality, and written words the decoder; the last "
        "layer is no exit.",
    )  # fmt: skip


def _exits(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, shares in found["exits"].items():
        mean = sum(layer * share for layer, share in enumerate(shares, 1))
        rows.append([NAMES[name], found["thresholds"][name], number(mean), *(percent(share) for share in shares)])
    layers = max(len(shares) for shares in found["exits"].values())
    rows = [[*row, *[""] * (layers + 3 - len(row))] for row in rows]
    return Table("Exits, in % of samples or words", ["exit", "threshold", "mean layer", *range(1, layers + 1)], rows)
