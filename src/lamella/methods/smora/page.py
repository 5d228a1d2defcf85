"""What a run says: losses by task, who runs which ranks, and how even the load is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.report.figures import Figure, Heatmap, Lines
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained, TrainedEvidence
from lamella.results.page import curves


def summary(evidence: Evidence) -> Summary:
    """The same as of any training, with the tasks and the load."""
    told, found = Trained.summary(evidence), evidence.findings
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
    columns = ["linear maps", "mean variation of a rank's load", "largest", "ranks that nobody chose", "of"]
    tables = [*told.tables, tasks, *_alike(found), Table("Load", columns, rows)]
    return Summary(told.verdict, tables, told.lines)


def _alike(found: Mapping[str, Any]) -> list[Table]:
    names = list(found["tasks"])
    if len(names) < 2:
        return []
    rows = [[name, *values] for name, values in zip(names, found["similarity"], strict=True)]
    return [Table("How alike two tasks choose their ranks, as a cosine over all maps", ["", *names], rows)]


def figures(evidence: Evidence) -> list[Figure]:
    """Losses, the usage of ranks by task, and the load of each map."""
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
        "share of the tokens",
        rows=list(shares),
        least=0.0,
        title="Usage of ranks by task",
        caption=f"Which of its {found['r']} ranks the tokens of each task choose in {sharpest['map']}, the linear "
        "layer that separates the tasks most.",
    )
    return [curves(evidence), *_held_out(evidence), usage, Lines("layer", "variation of the load", by_kind)]


def _held_out(evidence: Evidence) -> list[Figure]:
    """Held-out losses of each task, where there are several points."""
    assert isinstance(evidence, TrainedEvidence)
    points = evidence.held_out
    names = [task for task in evidence.findings["tasks"] if points and task in points[0]]
    if len(points) < 2 or not names:
        return []
    return [Lines("evaluation", "held-out loss, nats", {task: [point[task] for point in points] for task in names})]
