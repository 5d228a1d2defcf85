"""Report of a run: its losses, and the spectrum of the updates."""

from __future__ import annotations

from lamella.report.figures import Figure, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained
from lamella.results.page import curves


def summary(evidence: Evidence) -> Summary:
    """Return the summary of a training, with the ranks of the updates."""
    base, found = Trained.summary(evidence), evidence.findings
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, update in found["updates"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(update)
    rows = [
        [kind, min(each["rank"] for each in updates), _mean(updates, "rank"), _mean(updates, "beyond")]
        for kind, updates in kinds.items()
    ]
    columns = ["linear layers", "minimum rank", "mean rank", f"fraction beyond the first {found['r']}"]
    return Summary(base.verdict, [*base.tables, Table("Updates", columns, rows)], base.lines)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot losses, and the mean spectrum of the updates."""
    spectrum = {"updates": evidence.findings["spectrum"]}
    label = "index of the singular value, from the first (0) to the last (32)"
    return [curves(evidence), Lines(label, "singular value relative to the largest", spectrum)]


def _mean(updates: list[dict[str, float]], name: str) -> float:
    return sum(each[name] for each in updates) / len(updates)
