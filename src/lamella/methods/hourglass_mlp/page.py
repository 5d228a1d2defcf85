"""From evidence to figures: the frontiers of all families, and what became of rewritten sublayers."""

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
    """The verdict in words and tables, for any command of the method."""
    if isinstance(evidence, TrainedEvidence):
        return Trained.summary(evidence)
    return _searched(evidence.findings) if "points" in evidence.findings else _rewritten(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """The frontiers of a search; of a training its losses."""
    if isinstance(evidence, TrainedEvidence):
        return [curves(evidence)]
    return [frontiers(evidence.findings)] if "points" in evidence.findings else []


def frontiers(found: Mapping[str, Any]) -> Scatter:
    """The frontier of each family of a search: PSNR on test rows against parameters."""
    points, counted = found["points"], found["counted"]
    lines = {
        family: [(points[place][counted] / 1000, points[place]["test"]) for place in places]
        for family, places in found["fronts"].items()
    }
    caption = "Every shape at its best rate, a line for each family's frontier. Further up and to the left is better."
    return Scatter(f"{counted} parameters, thousands", "PSNR on test rows, dB", lines, joined=True, caption=caption)


def _searched(found: Mapping[str, Any]) -> Summary:
    points, front = found["points"], set(found["front"])
    best = max((points[place] for place in front), key=lambda one: one["held out"])
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
            one["held out"],
            one["test"],
            one["spread"],
            "yes" if place in front else "",
        ]
        for place, one in enumerate(points)
    ]
    columns = ["family", "d_z x d_h x L", "parameters", "trainable", "lr", "held out, dB", "test, dB", "sd", "frontier"]
    seeds = found["seeds"]
    return Summary(
        verdict,
        [Table(f"Shapes by {found['counted']} parameters, means over {seeds} seeds", columns, rows)],
        ["Rates and the frontier are chosen on held-out rows. Compute follows all parameters, frozen ones too."],
    )


def _rewritten(evidence: Evidence) -> Summary:
    told = Edit.summary(evidence)
    rows = [
        [
            one["site"],
            one["before"],
            one["parameters"],
            f"{len(one['inner'])} x {one['inner'][0]}",
            one["explained"]["fitted"],
            one["explained"]["held out"],
        ]
        for one in evidence.findings["sublayers"]
    ]
    columns = ["site", "parameters before", "after", "sub-blocks", "R^2 fitted", "R^2 held out"]
    return Summary(
        told.verdict,
        [Table("What stands in place of the sublayers", columns, rows), *told.tables],
        ["Fitted and not healed: `lamella heal` trains the whole model back."],
    )
