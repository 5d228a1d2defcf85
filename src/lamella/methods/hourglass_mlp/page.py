"""Figures and summary: the frontiers of all families, and the fit of rewritten sublayers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import counted, number
from lamella.report.figures import Figure, Scatter
from lamella.result import Summary, Table
from lamella.results import Edit, Evidence
from lamella.results.page import curves
from lamella.train import Trained, TrainedEvidence


def summary(evidence: Evidence) -> Summary:
    """Summarise the result of any command of the method."""
    if isinstance(evidence, TrainedEvidence):
        return Trained.summary(evidence)
    return _searched(evidence.findings) if "points" in evidence.findings else _rewritten(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the frontiers of a search, or the losses of a training run."""
    if isinstance(evidence, TrainedEvidence):
        return [curves(evidence)]
    return [frontiers(evidence.findings)] if "points" in evidence.findings else []


def frontiers(found: Mapping[str, Any]) -> Scatter:
    """Plot the frontier of each family of a search: PSNR on test rows against parameters."""
    points, counted = found["points"], found["counted"]
    lines = {
        family: [(points[index][counted] / 1000, points[index]["test"]) for index in indices]
        for family, indices in found["fronts"].items()
    }
    caption = (
        "Every shape at its best learning rate; one line per family's frontier. Higher and further left is better."
    )
    return Scatter(f"{counted} parameters, thousands", "PSNR on test rows, dB", lines, joined=True, caption=caption)


def _searched(found: Mapping[str, Any]) -> Summary:
    points, front = found["points"], set(found["front"])
    best = max((points[index] for index in front), key=lambda one: one["held_out"])
    verdict = (
        f"On {found['task']} the best of {counted(len(points), 'shape')} is {best['family']} with "
        f"{counted(best['total'], 'parameter')}: {number(best['test'])} dB on test rows."
    )
    rows = [
        [
            one["family"],
            f"{one['d_z']} x {one['d_h']} x {one['blocks']}",
            one["total"],
            one["trainable"],
            one["lr"],
            one["held_out"],
            one["test"],
            one["spread"],
            "yes" if index in front else "",
        ]
        for index, one in enumerate(points)
    ]
    columns = ["family", "d_z x d_h x L", "parameters", "trainable", "lr", "held-out, dB", "test, dB", "sd", "frontier"]
    seeds = found["seeds"]
    return Summary(
        verdict,
        [Table(f"Shapes by {found['counted']} parameters, means over {seeds} seeds", columns, rows)],
        ["Learning rates and the frontier are selected on held-out rows. Compute follows the total parameter count."],
    )


def _rewritten(evidence: Evidence) -> Summary:
    result = Edit.summary(evidence)
    rows = [
        [
            one["site"],
            one["before"],
            one["parameters"],
            f"{len(one['inner'])} x {one['inner'][0]}",
            one["explained"]["fitted"],
            one["explained"]["held_out"],
        ]
        for one in evidence.findings["sublayers"]
    ]
    columns = ["site", "parameters before", "after", "sub-blocks", "R^2, training", "R^2, held-out"]
    return Summary(
        result.verdict,
        [Table("Replacements of the sublayers", columns, rows), *result.tables],
        ["Fitted but not healed: `lamella heal` re-trains the whole model."],
    )
