"""What is drawn: the rank of each layer's attention, and which tokens ran in which layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lamella.formatting import counted, number, numbered, percent
from lamella.plan import PlanSeries
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.results import Evidence, Study, Summary, Table, Trained, TrainedEvidence
from lamella.results.page import curves

CELL, LEFT, TOP = 7, 60, 16  # of a map: a token's square, and what stands beside them
COLOURS = {"image": "#3b6fb6", "prompt": "#3f8f4f", "answer": "#b5532f"}
SHARES = "#3b6fb6"


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


def figures(evidence: Evidence) -> str:
    """The curve of ranks; of a trained model the losses, and the tokens that ran in the first sample."""
    found = evidence.findings
    parts = [curves(evidence)] if isinstance(evidence, TrainedEvidence) else []
    if "arank" in found:
        line = chart({"ARank": found["arank"]["by_layer"]}, "rank, as a share of the highest possible", "layer")
        caption = "The rank of each layer's attention: low where tokens attend to the same few places."
        parts.append(figure(line, caption))
    if "shown" in found:
        told = (
            "The first sample, one column a token: which converted layers have processed it. Blue is the image, green "
            "the prompt, red the answer."
        )
        parts.append(figure(tokens_map(found["shown"], found["layers"]), told))
        parts.append(image_map(found["shown"]))
    return "".join(parts)


def tokens_map(shown: Mapping[str, Any], layers: list[int]) -> str:
    """A row for each converted layer, a column for each token."""
    kinds, ran = shown["kinds"], shown["ran"]
    width, height = LEFT + CELL * len(kinds), TOP + 2 * CELL * len(layers)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" '
        'font-size="10"><title>which tokens ran in which layer</title>'
    ]
    for row, (layer, each) in enumerate(zip(layers, ran, strict=True)):
        y = TOP + 2 * CELL * row
        parts.append(f'<text x="0" y="{y + CELL + 3}" fill="currentColor">layer {layer}</text>')
        for column, (kind, here) in enumerate(zip(kinds, each, strict=True)):
            fill = COLOURS[kind] if here else "none"
            parts.append(f'<rect x="{LEFT + CELL * column}" y="{y}" width="{CELL - 1}" height="{2 * CELL - 2}" '
                         f'fill="{fill}" stroke="{COLOURS[kind]}" stroke-width=".4"/>')  # fmt: skip
    return "".join([*parts, "</svg>"])


def image_map(shown: Mapping[str, Any]) -> str:
    """Of a square image, how many of the converted layers have processed each of its positions."""
    places = [place for place, kind in enumerate(shown["kinds"]) if kind == "image"]
    side = math.isqrt(len(places))
    if not places or side * side != len(places):
        return ""
    shares = [sum(each[place] for each in shown["ran"]) / len(shown["ran"]) for place in places]
    size = 3 * CELL
    squares = "".join(
        f'<rect x="{size * (n % side)}" y="{size * (n // side)}" width="{size}" height="{size}" fill="{SHARES}" '
        f'fill-opacity="{share:.2f}" stroke="currentColor" stroke-width=".3"/>'
        for n, share in enumerate(shares)
    )
    drawing = (
        f'<svg viewBox="0 0 {size * side} {size * side}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'style="max-width: 20rem"><title>how many layers process each part of the image</title>{squares}</svg>'
    )
    return figure(drawing, "Its image: the darker, the more of the converted layers process what is there.")


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
