"""Report of a run: losses by task, usage of ranks, and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.report.figures import Figure, Heatmap, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained, TrainedEvidence
from lamella.results.page import curves


def summary(evidence: Evidence) -> Summary:
    """Return the summary of a training, with the tasks and the load."""
    base, found = Trained.summary(evidence), evidence.findings
    tasks = Table(
        "Loss of each task, nats per token",
        ["task", "examples", "before", "after"],
        [[name, each["examples"], each["before"], each["after"]] for name, each in found["tasks"].items()],
    )
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for name, each in found["load"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(each)
    rows = [
        [kind, sum(each["cv"] for each in load) / len(load), max(each["cv"] for each in load),
         sum(int(each["dead"]) for each in load), found["r"] * len(load)]
        for kind, load in kinds.items()
    ]  # fmt: skip
    columns = ["linear layers", "mean variation of the load", "largest", "unused ranks", "of"]
    tables = [*base.tables, tasks, *_similarity(found), Table("Load", columns, rows)]
    return Summary(base.verdict, tables, base.lines)


def _similarity(found: Mapping[str, Any]) -> list[Table]:
    names = list(found["tasks"])
    if len(names) < 2:
        return []
    rows = [[name, *values] for name, values in zip(names, found["similarity"], strict=True)]
    return [Table("Similarity of the ranks that two tasks use (cosine over all linear layers)", ["", *names], rows)]


def figures(evidence: Evidence) -> list[Figure]:
    """Plot losses, the usage of ranks by task, and the load of each linear layer."""
    found = evidence.findings
    sharpest = found["sharpest"]
    shares: Mapping[str, Sequence[float]] = sharpest["shares"]
    by_kind: dict[str, list[float]] = {}
    for name, each in found["load"].items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(each["cv"])
    usage = Heatmap(
        "rank",
        "task",
        list(shares.values()),
        "fraction of tokens",
        rows=list(shares),
        least=0.0,
        title="Usage of ranks by task",
        caption=f"Usage of the {found['r']} ranks by the tokens of each task in {sharpest['layer']}, the linear "
        "layer that separates the tasks most.",
    )
    return [curves(evidence), *_held_out(evidence), usage, Lines("layer", "variation of the load", by_kind)]


def _held_out(evidence: Evidence) -> list[Figure]:
    """Plot the held-out losses of each task, if there are several points."""
    assert isinstance(evidence, TrainedEvidence)
    points = evidence.held_out
    names = [task for task in evidence.findings["tasks"] if points and task in points[0]]
    if len(points) < 2 or not names:
        return []
    return [Lines("evaluation", "held-out loss, nats", {task: [point[task] for point in points] for task in names})]
