"""What a run says: losses by task, who runs which ranks, and how even the load is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.formatting import number
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.result import Summary, Table
from lamella.results import Evidence, Trained, TrainedEvidence
from lamella.results.page import curves

LEFT, CELL, HIGH, WIDTH = 150, 9, 18, 720


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


def figures(evidence: Evidence) -> str:
    """Losses, the usage of ranks by task, and the load of each map."""
    found = evidence.findings
    shares: Mapping[str, Sequence[float]] = found["sharpest"]["shares"]
    parts = [
        curves(evidence),
        _held_out(evidence),
        figure(
            usage(shares),
            f"Which of its {found['r']} ranks the tokens of each task choose in {found['sharpest']['map']}, the linear "
            "layer that separates the tasks most; the darker, the more often.",
        ),
    ]
    by_kind: dict[str, list[float]] = {}
    for name, each in found["load"].items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(each["cv"])
    parts.append(figure(chart(by_kind, "variation of the load", "layer")))
    return "".join(parts)


def _held_out(evidence: Evidence) -> str:
    """Held-out losses of each task, where there are several points."""
    assert isinstance(evidence, TrainedEvidence)
    points = evidence.held_out
    names = [task for task in evidence.findings["tasks"] if points and task in points[0]]
    if len(points) < 2 or not names:
        return ""
    lines = {task: [point[task] for point in points] for task in names}
    return figure(chart(lines, "held-out loss, nats", "evaluation"))


def usage(shares: Mapping[str, Sequence[float]]) -> str:
    """The task-by-rank matrix as coloured cells, as one SVG."""
    most = max((each for row in shares.values() for each in row), default=0.0) or 1.0
    columns = max(map(len, shares.values()), default=1)
    width, height = LEFT + CELL * columns, HIGH * len(shares)
    drawn = [f'<svg viewBox="0 0 {width} {height}" width="{min(WIDTH, 2 * width)}" xmlns="http://www.w3.org/2000/svg" '
             'role="img" font-family="sans-serif" font-size="11"><title>Usage of ranks by task</title>']  # fmt: skip
    for place, (task, row) in enumerate(shares.items()):
        y = HIGH * place
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end" fill="#888">{escape(task[:24])}</text>')
        for rank, share in enumerate(row):
            drawn.append(
                f'<rect x="{LEFT + CELL * rank}" y="{y}" width="{CELL}" height="{HIGH}" '
                f'fill="rgba(13, 148, 136, {share / most:.2f})"><title>{escape(task)}, rank {rank}: {number(share)}'
                "</title></rect>"
            )
    return "".join([*drawn, "</svg>"])
