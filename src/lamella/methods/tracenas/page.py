"""From evidence to what the best shape keeps of each layer, and how far it is from the original."""

from __future__ import annotations

from typing import Any

from lamella.formatting import counted, percent, share
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figures import Figure, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained
from lamella.results.page import curves
from lamella.runtime import fidelity_table


def summary(evidence: Evidence) -> Summary:
    """The shape and its fidelity; of the recovery, that of any training."""
    if not isinstance(evidence, SeriesEvidence):
        return Trained.summary(evidence)
    found = evidence.provenance
    shape, kept = found["shape"], sum(each["kept"] for each in found["shape"])
    parameters = [point["scores"]["parameters"] for point in evidence.points]  # of the whole model and of the shape
    left = f" and {percent(share(parameters[1], parameters[0]))} of the parameters" if len(parameters) == 2 else ""
    verdict = f"The best shape keeps {kept} of {counted(len(shape), 'layer')}{left}."
    fidelity = [fidelity_table(found["fidelity"])] if "fidelity" in found else []
    return Summary(verdict, [_shape(shape, found["whole"]), *fidelity, *PlanSeries.summary(evidence).tables])


def _shape(shape: list[dict[str, Any]], whole: dict[str, int]) -> Table:
    rows = [
        [each["layer"], each["heads"], each["channels"]] if each["kept"] else [each["layer"], "", "left out"]
        for each in shape
    ]
    title = "What the best shape keeps of each layer"
    return Table(title, ["layer", f"heads, of {whole['heads']}", f"MLP channels, of {whole['channels']}"], rows)


def figures(evidence: Evidence) -> list[Figure]:
    """The widths by layer; of the recovery, its losses."""
    if not isinstance(evidence, SeriesEvidence):
        return [curves(evidence)]
    found = evidence.provenance
    lines = {
        name: [100 * each[name] / found["whole"][name] if each["kept"] else 0.0 for each in found["shape"]]
        for name in ("heads", "channels")
    }
    caption = "What the best shape keeps of each layer; 0 is left out."
    return [Lines("layer", "kept, percent", lines, caption=caption)]
