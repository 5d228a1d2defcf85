"""Figures and summary: losses and energy of old samples on the trained directions, or turns of an augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from lamella.formatting import count, counted, percent, share
from lamella.report.figures import Excerpts, Figure, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained
from lamella.results.page import curves
from lamella.train import TrainedEvidence


def summary(evidence: Evidence) -> Summary:
    """Summarise training with the energy by kind of layer, or the kept turns of each task."""
    if not isinstance(evidence, TrainedEvidence):
        return _augmented(evidence)
    training, found = Trained.summary(evidence), evidence.findings
    kinds: dict[str, list[float]] = {}
    for name, energy in found["energy"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(energy)
    rows = [[kind, len(shares), fmean(shares), max(shares)] for kind, shares in kinds.items()]
    title = f"Energy of old samples on the {found['r']} directions, as a fraction of all"
    table = Table(title, ["linear layers", "number", "mean", "largest"], rows)
    lines = [*training.lines]
    if found["image tokens"]:
        images = percent(share(found["image tokens"], found["tokens"]), 0)
        lines.append(f"{images} of the tokens used to choose the directions are image positions")
    if found["projector"]:
        lines.append(f"{found['projector']} was trained as well, and is stored in full in the adapter")
    return Summary(training.verdict, [*training.tables, table], lines)


def _augmented(evidence: Evidence) -> Summary:
    found = evidence.findings
    turns, conversations = found["turns"], found["conversations"]
    made, kept = (sum(each[name] for each in turns.values()) for name in ("made", "kept"))
    verdict = (
        f"{counted(found['items'], 'item')} gave {counted(sum(conversations.values()), 'conversation')} about "
        f"{counted(found['images'], 'image')}, with {kept} of {counted(made, 'turn')}."
    )
    reasons = list(dict.fromkeys(why for each in turns.values() for why in each["dropped"]))
    rows = [
        [task, each["made"], each["kept"], *(each["dropped"].get(why, 0) for why in reasons)]
        for task, each in turns.items()
    ]
    tables = [
        Table("Turns", ["task", "made", "kept", *(f"dropped: {why}" for why in reasons)], rows),
        Table("Conversations", ["task", ""], [[task, number] for task, number in conversations.items()]),
    ]
    cost = found["cost"]
    lines = []
    if cost["tokens written"]:
        read, written = (count(cost[f"tokens {what}"]) for what in ("read", "written"))
        lines.append(f"tokens read by the writer: {read}; written: {written}")
    return Summary(verdict, tables, lines)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot losses and the energy by layer; or show sample turns."""
    if not isinstance(evidence, TrainedEvidence):
        return [Excerpts([_excerpt(row) for row in evidence.findings["samples"]], title="Sample turns")]
    lines: dict[str, list[float]] = {}
    for name, energy in evidence.findings["energy"].items():
        lines.setdefault(name.rpartition(".")[2], []).append(energy)
    return [curves(evidence), Lines("layer", "energy of old samples on the directions, fraction", lines)]


def _excerpt(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    status = f"dropped: {row['why']}" if row["why"] else "kept"
    return f"{row['task']}, {row['id']}: {status}", [row["question"], row["answer"]]
