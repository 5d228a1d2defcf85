"""Report of a search: the widths of each layer of the best shape, and its fidelity to the original."""

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
    """Return the shape and its fidelity; for the recovery, the summary of a training."""
    if not isinstance(evidence, SeriesEvidence):
        return Trained.summary(evidence)
    found = evidence.provenance
    shape, kept = found["shape"], sum(each["kept"] for each in found["shape"])
    parameters = [
        point["scores"]["parameters"] for point in evidence.points
    ]  # of the whole model and of the best shape
    remaining = f" and {percent(share(parameters[1], parameters[0]))} of the parameters" if len(parameters) == 2 else ""
    verdict = f"The best shape keeps {kept} of {counted(len(shape), 'layer')}{remaining}."
    fidelity = [fidelity_table(found["fidelity"])] if "fidelity" in found else []
    return Summary(verdict, [_shape(shape, found["whole"]), *fidelity, *PlanSeries.summary(evidence).tables])


def _shape(shape: list[dict[str, Any]], whole: dict[str, int]) -> Table:
    rows = [
        [each["layer"], each["heads"], each["channels"]] if each["kept"] else [each["layer"], "", "dropped"]
        for each in shape
    ]
    title = "Layers and widths of the best shape"
    return Table(title, ["layer", f"heads, of {whole['heads']}", f"MLP channels, of {whole['channels']}"], rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the widths by layer; for the recovery, the losses."""
    if not isinstance(evidence, SeriesEvidence):
        return [curves(evidence)]
    found = evidence.provenance
    lines = {
        name: [100 * each[name] / found["whole"][name] if each["kept"] else 0.0 for each in found["shape"]]
        for name in ("heads", "channels")
    }
    caption = "Kept fraction of heads and channels in each layer of the best shape; 0 for dropped layers."
    return [Lines("layer", "kept, percent", lines, caption=caption)]
