"""Figures and summaries of the results: the training loss, IoU against clicks, or the labelled points."""

from __future__ import annotations

from typing import Any

from lamella.formatting import counted, number, percent
from lamella.report.figures import Figure, Lines
from lamella.results import Evidence, Summary, Table

ARMS = ("agile3d", "nearest click")
TRAINED, LABELLED = "segmenter", "labelled"


def figures(evidence: Evidence) -> list[Figure]:
    """Return the figures of a page: the training loss of a segmenter, or IoU against clicks of a measurement.

    A labelled scene has no figure.

    Args:
        evidence: the evidence of the run.
    """
    found = evidence.findings
    if evidence.kind == LABELLED:
        return []
    if evidence.kind == TRAINED:
        return [Lines("logged step", "loss", {"training": found["loss"]})]
    lines = {arm: [100 * iou for iou in found[arm]["iou"].values()] for arm in ARMS}
    clicks = [int(count) for count in found[ARMS[0]]["iou"]]
    caption = "Mean IoU of the objects against the number of clicks on each of them."
    return [Lines("clicks per object", "IoU (%)", lines, positions=clicks, caption=caption)]


def summary(evidence: Evidence) -> Summary:
    """Summarise the training, the evaluation or the labels."""
    found = evidence.findings
    if evidence.kind == LABELLED:
        return labelled(found["scenes"])
    if evidence.kind == TRAINED:
        last = f"; the loss ends at {number(found['loss'][-1])}" if found["loss"] else ""
        return Summary(f"A model of {counted(found['parameters'], 'parameter')} was trained{last}.")
    ious, counts = ([found[arm][name] for arm in ARMS] for name in ("iou", "clicks"))
    first = ious[0]["1"]
    scenes = counted(found["scenes"], "scene")
    verdict = f"After one click on each object the mean IoU is {percent(first)}, over {scenes}."
    rows = [[k, *(100 * each[k] for each in ious)] for k in ious[0]]
    until = [[quality, *(each[quality] for each in counts)] for quality in counts[0]]
    return Summary(
        verdict,
        [
            Table("Mean IoU of the objects (%)", ("clicks per object", *ARMS), rows),
            Table("Clicks per object until an IoU is reached, or the budget if it never is", ("IoU", *ARMS), until),
        ],
    )


def labelled(scenes: list[dict[str, Any]]) -> Summary:
    """Summarise how many points of each scene belong to objects."""
    clicks = sum(each["clicks"] for each in scenes)
    rows = [
        [each["scene"], each["clicks"], sum(each["points"].values()), len(each["points"].keys() - {"0"}),
         sum(count for label, count in each["points"].items() if label != "0")]
        for each in scenes
    ]  # fmt: skip
    heads = ("scene", "clicks", "points", "objects", "points of objects")
    verdict = f"{counted(len(scenes), 'scene')} labelled with {counted(clicks, 'click')}."
    return Summary(verdict, [Table("Labels", heads, rows)])
