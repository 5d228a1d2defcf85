"""What is drawn: the rank of each layer's attention, and which tokens ran in which layer."""

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
    """The ranks, the layers, and what each of them keeps; of thresholds, the series."""
    found = evidence.findings
    if "kept" in found:
        told = Trained.summary(evidence)
        lines = [*told.lines, f"converted, of {counted(found['of'], 'layer')}: {numbered('layer', found['layers'])}"]
        return Summary(told.verdict, [*told.tables, *_ranks(found), _kept(found)], lines)
    if "arank" in found:
        verdict = f"To be converted: {numbered('layer', found['layers'])}."
        return Summary(verdict, _ranks(found), [_agreement(found["arank"])])
    return PlanSeries.summary(evidence) if evidence.kind == PlanSeries.kind else Study.summary(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """The curve of ranks; of a trained model the losses, and the tokens that ran in the first sample."""
    found = evidence.findings
    parts: list[Figure] = [curves(evidence)] if isinstance(evidence, TrainedEvidence) else []
    if "arank" in found:
        line = {"ARank": found["arank"]["by_layer"]}
        caption = "The rank of each layer's attention: low where tokens attend to the same few positions."
        parts.append(Lines("layer", "rank, as a share of the highest possible", line, caption=caption))
    if "shown" in found:
        parts += [tokens_map(found["shown"], found["layers"]), *image_map(found["shown"])]
    return parts


def tokens_map(shown: Mapping[str, Any], layers: list[int]) -> Heatmap:
    """A row for each converted layer, a column for each token."""
    kinds = shown["kinds"]
    return Heatmap(
        "token",
        "",
        [[KINDS.index(kind) + 1 if here else 0 for kind, here in zip(kinds, ran, strict=True)] for ran in shown["ran"]],
        "processed",
        rows=[f"layer {layer}" for layer in layers],
        categories=("not processed", *KINDS),
        hover=[
            [f"token {place}, {kind}: {'processed' if here else 'not processed'} by layer {layer}"
             for place, (kind, here) in enumerate(zip(kinds, ran, strict=True))]
            for layer, ran in zip(layers, shown["ran"], strict=True)
        ],
        title="Tokens that each converted layer has processed",
        caption="The first sample, one column for each token.",
    )  # fmt: skip


def image_map(shown: Mapping[str, Any]) -> list[Figure]:
    """Of a square image, how many of the converted layers have processed each of its positions."""
    places = [place for place, kind in enumerate(shown["kinds"]) if kind == "image"]
    side = math.isqrt(len(places))
    if not places or side * side != len(places):
        return []
    shares = [sum(each[place] for each in shown["ran"]) / len(shown["ran"]) for place in places]
    rows = [shares[side * row : side * (row + 1)] for row in range(side)]
    caption = "Its image: which share of the converted layers process each position."
    return [Heatmap("column", "row", rows, "share of the layers", least=0.0, most=1.0, square=True, caption=caption)]


def _agreement(told: Mapping[str, Any]) -> str:
    agreement = "not known" if told["agreement"] is None else number(told["agreement"])
    shortest, longest = told["lengths"]
    return (
        f"rank correlation of the layers between two halves of the samples: {agreement}; "
        f"{counted(len(told['by_sample']), 'sample')} of {shortest} to {longest} tokens, {told['rank']} rank, "
        f"{told['dtype']}"
    )


def _ranks(found: Mapping[str, Any]) -> list[Table]:
    if "arank" not in found:
        return []
    rows = [[layer, value, "yes" if layer in found["layers"] else ""]
            for layer, value in enumerate(found["arank"]["by_layer"])]  # fmt: skip
    return [Table("ARank, as a share of the highest possible", ["layer", "ARank", "converted"], rows)]


def _kept(found: Mapping[str, Any]) -> Table:
    kinds = list(found["kept"])
    rows = [
        [layer, *(percent(found["kept"][kind][row]) for kind in kinds)] for row, layer in enumerate(found["layers"])
    ]
    return Table("Tokens that a converted layer processes when it is served", ["layer", *kinds], rows)
