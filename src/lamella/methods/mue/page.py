"""What is drawn: how alike streams are from layer to layer, and behind which layers samples exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, percent
from lamella.plan import PlanSeries
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.results import Evidence, Study, Summary, Table, Trained, TrainedEvidence
from lamella.results.page import curves

NAMES = {"image": "image", "text": "text", "decoder": "written words"}
COLOURS = {"image": "#3b6fb6", "text": "#3f8f4f", "decoder": "#b5532f"}
BAR, LEFT, HIGH, LOW = 22, 110, 60, 18  # of a histogram: a bar, its name, its height, the numbers below


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


def figures(evidence: Evidence) -> str:
    """The curves of S, and the histograms of exits; of a trained model its losses."""
    found = evidence.findings
    parts = [curves(evidence)] if isinstance(evidence, TrainedEvidence) else []
    if "saturation" in found:
        lines = {NAMES[name]: values for name, values in found["saturation"].items()}
        drawn = chart(lines, "cosine of the stream before and after", "layer")
        parts.append(figure(drawn, "The mean of S: where it stays high, layers change little."))
    if "exits" in found:
        told = (
            "Behind which layer samples leave the encoder, by modality, and written words the decoder; the last layer "
            "is no exit."
        )
        parts.append(figure(exits_map(found["exits"]), told))
    return "".join(parts)


def exits_map(exits: Mapping[str, Sequence[float]]) -> str:
    """A row of bars for each exit, one for each layer."""
    layers = max(map(len, exits.values()))
    width, height = LEFT + BAR * layers, (HIGH + LOW) * len(exits)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" '
        'font-size="10" style="max-width: 32rem"><title>behind which layers samples exit</title>'
    ]
    for row, (name, shares) in enumerate(exits.items()):
        foot = (HIGH + LOW) * row + HIGH
        parts.append(f'<text x="0" y="{foot}" fill="currentColor">{NAMES[name]}</text>')
        for layer, share in enumerate(shares):
            x, tall = LEFT + BAR * layer, (HIGH - 12) * share
            middle = f'x="{x + BAR / 2 - 2}" text-anchor="middle" fill="currentColor"'
            parts.append(
                f'<rect x="{x}" y="{foot - tall:.1f}" width="{BAR - 4}" height="{tall:.1f}" fill="{COLOURS[name]}"/>'
                f'<text {middle} y="{foot + 11}">{layer + 1}</text>'
            )
            if share >= 0.005:
                parts.append(f'<text {middle} y="{foot - tall - 2:.1f}">{100 * share:.0f}</text>')
    return "".join([*parts, "</svg>"])


def _exits(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, shares in found["exits"].items():
        mean = sum(layer * share for layer, share in enumerate(shares, 1))
        rows.append([NAMES[name], found["thresholds"][name], number(mean), *(percent(share) for share in shares)])
    layers = max(len(shares) for shares in found["exits"].values())
    rows = [[*row, *[""] * (layers + 3 - len(row))] for row in rows]
    return Table("Exits, in % of samples or words", ["exit", "threshold", "mean layer", *range(1, layers + 1)], rows)
