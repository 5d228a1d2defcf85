"""Figures and summary: distances across seams by layer, and accuracy at the nine positions of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, numbered, percent, points
from lamella.report.figures import Figure, Heatmap, Images, Lines
from lamella.results import Evidence, Summary, Table

CUTS = ("inside", "one seam", "two seams")


def figures(evidence: Evidence) -> list[Figure]:
    """Plot distances across seams, or accuracy at the nine positions of an image."""
    found = evidence.findings
    if "positions" in found:
        return _answers(found)
    drawn = _distances(found if "across" in found else found.get("seams"))
    if "probe" in found:
        probes = {cut: [100 * (each or 0) for each in found["probe"][cut]] for cut in CUTS}
        caption = "Accuracy of a linear probe that classifies an object from its own patches."
        drawn.append(Lines("layer", "percent", probes, caption=caption))
    return drawn


def _distances(seams: Mapping[str, Any] | None) -> list[Figure]:
    if seams is None:
        return []
    lines = {"across a seam": seams["across"], "inside a slice": seams["inside"]}
    caption = "Distance of neighbouring patches, before the first layer and after each layer."
    return [Lines("layer", "1 - cos", lines, caption=caption)]


def _answers(found: Mapping[str, Any]) -> list[Figure]:
    """Accuracy at the nine positions with the seams, and sample questions."""
    samples = found["samples"]
    shares = Heatmap(
        "column",
        "row",
        found["positions"],
        "accuracy",
        least=0.0,
        most=1.0,
        labels=[[percent(share) for share in row] for row in found["positions"]],
        vertical=[1.0],
        horizontal=[1.0],
        square=True,
        caption="Accuracy by the position of the object; dashed lines: seams.",
    )
    questions = Images(
        [each["image"] for each in samples],
        [[each["prompt"], each["answer"], each["cut"], "right" if each["right"] else "wrong"] for each in samples],
        ["question", "answer", "cut", ""],
        alt="the image of a question",
    )
    return [shares, questions]


def summary(evidence: Evidence) -> Summary:
    """Summarise the measurement or the training in text and tables."""
    found = evidence.findings
    if "positions" in found:
        return _judged(found)
    if "across" in found:
        return _measured(found)
    if "adapters" not in found:
        rows = [[part, *(counts.get(cut, 0) for cut in CUTS)] for part, counts in found["rows"].items()]
        return Summary("Wrote questions about objects that are cut by seams.", [Table("Rows", ["", *CUTS], rows)])
    new, every = found["parameters"]["new"], found["parameters"]["all"]
    tokens = [[grid, count] for grid, count in found["tokens"].items()]
    return Summary(
        f"The model processes images in slices, with adapters in {numbered('layer', found['adapters'])} of its image "
        f"encoder. New or trained: {new:,} of {counted(every, 'parameter')}.",
        [Table("Tokens per image", ["slices", "tokens"], tokens)],
    )


def _judged(found: Mapping[str, Any]) -> Summary:
    rows = [
        [task, *(percent(line[cut]) for cut in CUTS), _points(found["gaps"][task])]
        for task, line in found["tasks"].items()
    ]
    rows.append(["all", *(percent(found["cuts"][cut]) for cut in CUTS), _points(found["gap"])])
    gap = "" if found["gap"] is None else f" A seam costs {points(found['gap'])}, averaged over tasks."
    if found["gap"] is not None and found["gap"] <= 0:
        gap = f" A seam costs nothing: accuracy differs by {points(-found['gap'])}, averaged over tasks."
    verdict = f"Accuracy: {percent(found['accuracy'])} on {counted(found['questions'], 'question')}.{gap}"
    return Summary(verdict, [Table("Accuracy", ["task", *CUTS, "gap, points"], rows)])


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _measured(found: Mapping[str, Any]) -> Summary:
    rows = [
        [layer, across, inside, score]
        for layer, across, inside, score in zip(
            ["before", *found["layers"]], found["across"], found["inside"], found["scores"], strict=True
        )
    ]
    where: Sequence[int] = found["recommended"]
    verdict = f"Slices diverge most in {numbered('layer', where)}: place the adapters there."
    columns = ["layer", "across a seam", "inside a slice", "difference"]
    return Summary(verdict, [Table("Distance of neighbouring patches, 1 - cos", columns, rows)])
