"""From evidence to figures: an iteration in time, node by node, and what stages are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, number
from lamella.plan import PlanSeries, SeriesEvidence
from lamella.report.figures import Figure, Gantt, GanttTask, Scatter
from lamella.result import Summary, Table
from lamella.results import Evidence
from lamella.results.page import curves
from lamella.train import Trained, TrainedEvidence

CELLS = 60  # of a line of text
MARKS = {"forward": ">", "loss": "*", "backward": "<"}
SOLID = {"forward": 0.55, "loss": 1.0, "backward": 0.95}  # how dense a colour is
Served = Sequence[Any]  # node, microbatch, phase, begin, end


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for any command of the method."""
    if isinstance(evidence, SeriesEvidence):
        return PlanSeries.summary(evidence)
    if isinstance(evidence, TrainedEvidence):
        return _trained(evidence)
    return _planned(evidence.findings) if "gantt" in evidence.findings else _omitted(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """An iteration in time, what stages are worth, or the losses of a training."""
    found = evidence.findings
    if isinstance(evidence, TrainedEvidence):
        return [curves(evidence)]
    if "gantt" in found:
        return [gantt(found["gantt"], found["nodes"])]
    if "omitted" not in found:
        return []
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, wanted in (("all sets", None), ("left out in training", True), ("never left out in training", False)):
        points = [(float(each["omitted"]), each["mean"]) for each in found["means"] if each.get("trained") is wanted]
        if points:
            lines[name] = [(0.0, found["full"]), *points]
    caption = "The mean loss without so many stages."
    return [Scatter("stages left out", "nats per token", lines, joined=True, caption=caption)]


# A schedule


def _planned(found: Mapping[str, Any]) -> Summary:
    predicted = found["predicted"]
    verdict = (
        f"An iteration of {_microbatches(found)} takes {number(predicted['planned'])} s as planned, and "
        f"{number(predicted['full'])} s in the full pipeline."
    )
    last = max((each[4] for each in found["gantt"]), default=0.0)
    times = [
        ["full pipeline, all stages", predicted["full"]],
        ["paths by chance", predicted["by chance"]],
        ["paths that share the load", predicted["load alone"]],
        ["paths that avoid each other, too", predicted["planned"]],
        ["no plan of these stages takes less than", found["bound"]],
    ]
    paths = [
        [place, " ".join(map(str, each["nodes"])), " ".join(map(str, each["stages"]))]
        for place, each in enumerate(found["paths"])
    ]
    rows = [
        [each["stage"], each["node"], each["region"], line(found["gantt"], each["node"], last)]
        for each in found["nodes"]
    ]
    return Summary(
        verdict,
        [
            Table("Seconds of an iteration, as the simulator says", ["", "seconds"], times),
            Table("Paths of a wave", ["path", "nodes", "stages"], paths),
            Table(
                f"An iteration of {number(last)} s: > forward, * loss, < backward",
                ["stage", "node", "region", ""],
                rows,
            ),
        ],
        [
            f"visits of the stages: {' '.join(map(str, found['visits']))}; "
            f"{counted(found['collisions'], 'overlap')} in the plan"
        ],
    )


def _microbatches(found: Mapping[str, Any]) -> str:
    return counted(found["microbatches"], "microbatch", "microbatches")


def line(served: Sequence[Served], node: int, last: float) -> str:
    """What a node does over time, as one line of text."""
    marks = ["."] * CELLS
    for at, _, phase, begin, end in served:
        if at == node:
            for cell in range(int(begin / last * CELLS), min(CELLS, max(1, round(end / last * CELLS)))):
                marks[cell] = MARKS[phase]
    return "".join(marks)


def gantt(served: Sequence[Served], nodes: Sequence[Mapping[str, Any]]) -> Gantt:
    """What all nodes do over time: a row for each, by stage, and a colour for the node where a microbatch began."""
    row = {each["node"]: place for place, each in enumerate(nodes)}
    homes = {microbatch: node for node, microbatch, phase, *_ in served if phase == "loss"}
    return Gantt(
        "seconds",
        "stage: node, region",
        [f"{each['stage']}: {each['node']} {each['region']}" for each in nodes],
        [
            GanttTask(
                row[node],
                begin,
                end,
                f"from node {homes[microbatch]}",
                SOLID[phase],
                f"microbatch {microbatch}, {phase}, {begin:.2f} to {end:.2f} s",
            )
            for node, microbatch, phase, begin, end in sorted(served, key=lambda each: homes[each[1]])
        ],
        title="An iteration, node by node",
        caption="One iteration: forward passes are light and backward passes dark, with a colour for each origin.",
    )


# A model


def _trained(evidence: TrainedEvidence) -> Summary:
    told, found = Trained.summary(evidence), evidence.findings
    sets = found["omitted in training"]
    lines = [
        *told.lines,
        f"{counted(len(found['stages']), 'stage')}, {_microbatches(found)} in a step; left out: "
        f"{counted(len(sets), 'set')} of stages",
    ]
    if "predicted seconds" in found:
        lines.append(
            f"an iteration over {counted(found['nodes'], 'node')} takes {number(found['predicted seconds'])} s, as "
            "predicted"
        )
    return Summary(told.verdict, told.tables, lines)


def _omitted(evidence: Evidence) -> Summary:
    found = evidence.findings
    name = (evidence.model or {}).get("name", "the model")
    half = [each for each in found["means"] if "trained" not in each][-1]
    verdict = (
        f"Without {half['omitted']} of its {counted(len(found['stages']), 'stage')} {name} costs "
        f"{number(half['mean'])} nats per token on average, and {number(found['full'])} with all."
    )
    kinds = {None: "all", True: "left out in training", False: "others"}
    rows = [
        [each["omitted"], kinds[each.get("trained")], each["mean"], each["best"], each["worst"]]
        for each in found["means"]
    ]
    swaps = [[" ".join(map(str, each["stages"])), each["loss"]] for each in found["swapped"]]
    return Summary(
        verdict,
        [
            Table("Nats per token without stages", ["stages left out", "sets", "mean", "best", "worst"], rows),
            Table("Nats per token with neighbours swapped", ["stages", "loss"], swaps),
        ],
        [f"without the first stage: {number(found['without the first'])} nats per token"],
    )
