"""From evidence to its figures: where slices drift apart, and what is answered at the nine places of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, numbered, percent, points
from lamella.report.figures import Figure, Heatmap, Images, Lines
from lamella.results import Evidence, Summary, Table

CUTS = ("inside", "one seam", "two seams")


def figures(evidence: Evidence) -> list[Figure]:
    """Where slices drift apart, or what is answered at the nine positions of an image."""
    found = evidence.findings
    if "places" in found:
        return _answers(found)
    drawn = _distances(found if "across" in found else found.get("seams"))
    if "probe" in found:
        probes = {cut: [100 * (each or 0) for each in found["probe"][cut]] for cut in CUTS}
        caption = "What a linear probe reads of an object from its own patches."
        drawn.append(Lines("layer", "percent", probes, caption=caption))
    return drawn


def _distances(seams: Mapping[str, Any] | None) -> list[Figure]:
    if seams is None:
        return []
    lines = {"across a seam": seams["across"], "inside a slice": seams["inside"]}
    caption = "How far neighbouring patches are apart, before and behind layers."
    return [Lines("layer", "1 - cos", lines, caption=caption)]


def _answers(found: Mapping[str, Any]) -> list[Figure]:
    """The shares of right answers at the nine positions, with the seams over them; and samples."""
    samples = found["samples"]
    shares = Heatmap(
        "column",
        "row",
        found["places"],
        "share of right answers",
        least=0.0,
        most=1.0,
        labels=[[percent(share) for share in row] for row in found["places"]],
        vertical=[1.0],
        horizontal=[1.0],
        square=True,
        caption="Right answers by the position of the object; dashed: the seams.",
    )
    questions = Images(
        [each["picture"] for each in samples],
        [[each["prompt"], each["answer"], each["cut"], "right" if each["right"] else "wrong"] for each in samples],
        ["question", "answer", "cut", ""],
        alt="an image that was asked about",
    )
    return [shares, questions]


def summary(evidence: Evidence) -> Summary:
    """What was measured or trained, in words and tables."""
    found = evidence.findings
    if "places" in found:
        return _judged(found)
    if "across" in found:
        return _measured(found)
    if "adapters" not in found:
        rows = [[part, *(counts.get(cut, 0) for cut in CUTS)] for part, counts in found["rows"].items()]
        return Summary("Questions about things that seams cut are written.", [Table("Rows", ["", *CUTS], rows)])
    new, every = found["parameters"]["new"], found["parameters"]["all"]
    tokens = [[grid, count] for grid, count in found["tokens"].items()]
    return Summary(
        f"The model reads images in slices; adapters stand in {numbered('layer', found['adapters'])} of its encoder. "
        f"New, or trained beside them: {new:,} of {counted(every, 'parameter')}.",
        [Table("Positions that an image takes", ["slices", "tokens"], tokens)],
    )


def _judged(found: Mapping[str, Any]) -> Summary:
    rows = [
        [task, *(percent(line[cut]) for cut in CUTS), _points(found["gaps"][task])]
        for task, line in found["tasks"].items()
    ]
    rows.append(["all", *(percent(found["cuts"][cut]) for cut in CUTS), _points(found["gap"])])
    gap = "" if found["gap"] is None else f" What a seam cuts costs {points(found['gap'])}, over tasks."
    if found["gap"] is not None and found["gap"] <= 0:
        gap = f" What a seam cuts costs nothing: such answers differ by {points(-found['gap'])}, over tasks."
    verdict = f"Right answers: {percent(found['accuracy'])} of {counted(found['questions'], 'question')}.{gap}"
    return Summary(verdict, [Table("Right answers", ["task", *CUTS, "gap, points"], rows)])


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _measured(found: Mapping[str, Any]) -> Summary:
    rows = [
        [layer, across, inside, score]
        for layer, across, inside, score in zip(
            ["before", *found["layers"]], found["across"], found["inside"], found["scores"], strict=True
        )
    ]
    where: Sequence[int] = found["placed"]
    verdict = f"Slices drift apart most in {numbered('layer', where)}: that is where adapters belong."
    columns = ["layer", "across a seam", "inside a slice", "difference"]
    return Summary(verdict, [Table("Distance of neighbours, 1 - cos", columns, rows)])
