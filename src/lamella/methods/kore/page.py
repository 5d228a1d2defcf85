"""What a run says: its losses, and how much of what old samples excite lies on the directions that were trained."""

from __future__ import annotations

from statistics import fmean

from lamella.report.plane import plane
from lamella.report.summary import Summary, Table
from lamella.results import Evidence, Trained
from lamella.results.trained import curves


def summary(evidence: Evidence) -> Summary:
    """The same as of any training, with the energy by kind of map."""
    told, found = Trained.summary(evidence), evidence.findings
    kinds: dict[str, list[float]] = {}
    for name, share in found["energy"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(share)
    rows = [[kind, len(shares), fmean(shares), max(shares)] for kind, shares in kinds.items()]
    title = f"Energy of old samples on the {found['r']} directions, as a share of all"
    table = Table(title, ["linear maps", "number", "mean", "largest"], rows)
    return Summary(told.verdict, [*told.tables, table], [*told.lines, *evidence.notes])


def figures(evidence: Evidence) -> str:
    """Losses, and the energy by layer."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, share in evidence.findings["energy"].items():
        line = lines.setdefault(name.rpartition(".")[2], [])
        line.append((float(len(line)), share))
    return curves(evidence) + f"<figure>{plane(lines, 'layer', 'energy of old samples on the directions')}</figure>"
