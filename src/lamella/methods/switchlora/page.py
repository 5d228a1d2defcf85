"""What a run says: its losses, and over how many directions the updates are spread."""

from __future__ import annotations

from lamella.report.figures import Figure, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained
from lamella.results.page import curves


def summary(evidence: Evidence) -> Summary:
    """The same as of any training, with the ranks of the updates."""
    told, found = Trained.summary(evidence), evidence.findings
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, update in found["updates"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(update)
    rows = [
        [kind, min(each["rank"] for each in updates), _mean(updates, "rank"), _mean(updates, "beyond")]
        for kind, updates in kinds.items()
    ]
    columns = ["linear maps", "least rank", "mean rank", f"share beyond the first {found['r']}"]
    return Summary(told.verdict, [*told.tables, Table("Updates", columns, rows)], told.lines)


def figures(evidence: Evidence) -> list[Figure]:
    """Losses, and the mean spectrum of the updates."""
    spectrum = {"updates": evidence.findings["spectrum"]}
    place = "singular values from the first to the last, in 32nds"
    return [curves(evidence), Lines(place, "singular value over the largest", spectrum)]


def _mean(updates: list[dict[str, float]], name: str) -> float:
    return sum(each[name] for each in updates) / len(updates)
