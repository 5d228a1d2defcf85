"""Figures and summaries: the rank of each layer's attention, and the tokens processed by each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lamella.formatting import counted, number, numbered, percent
from lamella.plan import PlanSeries
from lamella.report.figures import Figure, Heatmap, Lines
from lamella.results import Evidence, Study, Summary, Table, Trained, TrainedEvidence
from lamella.results.page import curves

KINDS = ("image", "prompt", "answer")  # of tokens


def summary(evidence: Evidence) -> Summary:
    """Summarise the ranks, the converted layers and the tokens they process; or a plan series."""
    found = evidence.findings
    if "kept" in found:
        record = Trained.summary(evidence)
        lines = [*record.lines, f"converted {numbered('layer', found['layers'])} of {counted(found['of'], 'layer')}"]
        return Summary(record.verdict, [*record.tables, *_ranks(found), _kept(found)], lines)
    if "arank" in found:
        verdict = f"Selected for conversion: {numbered('layer', found['layers'])}."
        return Summary(verdict, _ranks(found), [_agreement(found["arank"])])
    return PlanSeries.summary(evidence) if evidence.kind == PlanSeries.kind else Study.summary(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the ranks; for a trained model the losses, and the tokens processed in the first sample."""
    found = evidence.findings
    parts: list[Figure] = [curves(evidence)] if isinstance(evidence, TrainedEvidence) else []
    if "arank" in found:
        line = {"ARank": found["arank"]["by_layer"]}
        caption = "Rank of each layer's attention: low if tokens attend to the same few positions."
        parts.append(Lines("layer", "rank (fraction of the maximum)", line, caption=caption))
    if "shown" in found:
        parts += [tokens_map(found["shown"], found["layers"]), *image_map(found["shown"])]
    return parts


def tokens_map(first_row: Mapping[str, Any], layers: list[int]) -> Heatmap:
    """Plot which tokens (columns) each converted layer (row) processes.

    Args:
        first_row: tokens of the first sample.
        layers: the converted layers.
    """
    kinds = first_row["kinds"]
    return Heatmap(
        "token",
        "",
        [[KINDS.index(kind) + 1 if here else 0 for kind, here in zip(kinds, ran, strict=True)]
         for ran in first_row["ran"]],
        "processed",
        rows=[f"layer {layer}" for layer in layers],
        categories=("not processed", *KINDS),
        hover=[
            [f"token {index}, {kind}: {'processed' if here else 'not processed'} by layer {layer}"
             for index, (kind, here) in enumerate(zip(kinds, ran, strict=True))]
            for layer, ran in zip(layers, first_row["ran"], strict=True)
        ],
        title="Tokens processed by each converted layer",
        caption="The first sample, one column per token.",
    )  # fmt: skip


def image_map(first_row: Mapping[str, Any]) -> list[Figure]:
    """Plot, for a square image, the fraction of the converted layers that process each position."""
    positions = [index for index, kind in enumerate(first_row["kinds"]) if kind == "image"]
    side = math.isqrt(len(positions))
    if not positions or side * side != len(positions):
        return []
    shares = [sum(each[index] for each in first_row["ran"]) / len(first_row["ran"]) for index in positions]
    rows = [shares[side * row : side * (row + 1)] for row in range(side)]
    caption = "Its image: fraction of the converted layers that process each position."
    return [Heatmap("column", "row", rows, "fraction of layers", least=0.0, most=1.0, square=True, caption=caption)]


def _agreement(record: Mapping[str, Any]) -> str:
    agreement = "unknown" if record["agreement"] is None else number(record["agreement"])
    shortest, longest = record["lengths"]
    return (
        f"rank correlation of the layers between two halves of the samples: {agreement}; "
        f"{counted(len(record['by_sample']), 'sample')} of {shortest} to {longest} tokens, {record['rank']} rank, "
        f"{record['dtype']}"
    )


def _ranks(found: Mapping[str, Any]) -> list[Table]:
    if "arank" not in found:
        return []
    rows = [[layer, value, "yes" if layer in found["layers"] else ""]
            for layer, value in enumerate(found["arank"]["by_layer"])]  # fmt: skip
    return [Table("ARank (fraction of the maximum)", ["layer", "ARank", "converted"], rows)]


def _kept(found: Mapping[str, Any]) -> Table:
    kinds = list(found["kept"])
    rows = [
        [layer, *(percent(found["kept"][kind][row]) for kind in kinds)] for row, layer in enumerate(found["layers"])
    ]
    return Table("Tokens processed by each converted layer in serving", ["layer", *kinds], rows)
