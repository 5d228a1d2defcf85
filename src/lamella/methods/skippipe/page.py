"""Figures and tables from evidence: the timeline of an iteration, and the loss without stages."""

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

CELLS = 60  # characters of a line
MARKS = {"forward": ">", "loss": "*", "backward": "<"}
SOLID = {"forward": 0.55, "loss": 1.0, "backward": 0.95}  # opacity of the colours
Interval = Sequence[Any]  # node, microbatch, phase, begin, end


def summary(evidence: Evidence) -> Summary:
    """Return the summary and tables for any command of the method."""
    if isinstance(evidence, SeriesEvidence):
        return PlanSeries.summary(evidence)
    if isinstance(evidence, TrainedEvidence):
        return _training(evidence)
    if "links" in evidence.findings:
        return _profile(evidence.findings)
    return _schedule(evidence.findings) if "gantt" in evidence.findings else _omission(evidence)


def figures(evidence: Evidence) -> list[Figure]:
    """Return the timeline of an iteration, the losses without stages, or the training curve."""
    found = evidence.findings
    if isinstance(evidence, TrainedEvidence):
        return [curves(evidence)]
    if "gantt" in found:
        return [gantt(found["gantt"], found["nodes"])]
    if "omitted" not in found:
        return []
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, trained in (("all subsets", None), ("skipped in training", True), ("never skipped in training", False)):
        points = [(float(each["omitted"]), each["mean"]) for each in found["means"] if each.get("trained") is trained]
        if points:
            lines[name] = [(0.0, found["full"]), *points]
    caption = "The mean loss by number of removed stages."
    return [Scatter("stages removed", "nats per token", lines, joined=True, caption=caption)]


# A network


def _profile(found: Mapping[str, Any]) -> Summary:
    load, nodes = found["load"], found["nodes"]
    slowest = max(each["seconds"] for each in nodes)
    verdict = (
        f"{counted(len(nodes), 'node')} and {counted(len(found['links']), 'link')} were measured: a layer takes at "
        f"most {number(slowest)} s per sample of {counted(load['tokens'], 'token')}."
    )
    names = ("node", "region", "seconds", "fastest seconds", "slowest seconds", "backward over forward seconds")
    speeds = [[each[name] for name in names] for each in nodes]
    columns = ("node", "region", "s per layer and sample", "fastest s", "slowest s of a stage", "backward / forward")
    tables = [Table(f"Forward pass of a stage of {counted(load['layers'], 'layer')}", columns, speeds)]
    if found["links"]:
        links = [
            [" - ".join(each["between"]), each["milliseconds"], each["gigabytes"], each["lowest"], each["highest"],
             each["pairs"]] for each in found["links"]
        ]  # fmt: skip
        columns = ("between", "ms one way", "GB/s", "lowest", "highest", "pairs of nodes")
        tables.append(Table("Links", columns, links))
    return Summary(verdict, tables, ["the planner takes a backward pass as 1.5 forward passes"])


# A schedule


def _schedule(found: Mapping[str, Any]) -> Summary:
    predicted = found["predicted"]
    verdict = (
        f"An iteration of {_microbatches(found)} takes {number(predicted['planned'])} s as planned, and "
        f"{number(predicted['full'])} s in the full pipeline."
    )
    last = max((each[4] for each in found["gantt"]), default=0.0)
    times = [
        ["full pipeline, all stages", predicted["full"]],
        ["random paths", predicted["random"]],
        ["paths that balance the load", predicted["load alone"]],
        ["paths that also avoid collisions", predicted["planned"]],
        ["lower bound for these stages", found["bound"]],
    ]
    paths = [
        [index, " ".join(map(str, each["nodes"])), " ".join(map(str, each["stages"]))]
        for index, each in enumerate(found["paths"])
    ]
    rows = [
        [each["stage"], each["node"], each["region"], timeline_text(found["gantt"], each["node"], last)]
        for each in found["nodes"]
    ]
    return Summary(
        verdict,
        [
            Table("Simulated seconds per iteration", ["", "seconds"], times),
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


def timeline_text(timeline: Sequence[Interval], node: int, last: float) -> str:
    """Return the activity of a node over time as one line of text.

    Args:
        timeline: the intervals of all nodes.
        node: the node.
        last: the seconds that the whole line spans.
    """
    marks = ["."] * CELLS
    for here, _, phase, begin, end in timeline:
        if here == node:
            for cell in range(int(begin / last * CELLS), min(CELLS, max(1, round(end / last * CELLS)))):
                marks[cell] = MARKS[phase]
    return "".join(marks)


def gantt(timeline: Sequence[Interval], nodes: Sequence[Mapping[str, Any]]) -> Gantt:
    """Return the activity of all nodes over time, one row per node by stage, coloured by the origin of the microbatch.

    Args:
        timeline: the intervals of all nodes.
        nodes: the nodes with stage and region, in the order of the rows.
    """
    row = {each["node"]: index for index, each in enumerate(nodes)}
    origins = {microbatch: node for node, microbatch, phase, *_ in timeline if phase == "loss"}
    return Gantt(
        "seconds",
        "stage: node, region",
        [f"{each['stage']}: {each['node']} {each['region']}" for each in nodes],
        [
            GanttTask(
                row[node],
                begin,
                end,
                f"from node {origins[microbatch]}",
                SOLID[phase],
                f"microbatch {microbatch}, {phase}, {begin:.2f} to {end:.2f} s",
            )
            for node, microbatch, phase, begin, end in sorted(timeline, key=lambda each: origins[each[1]])
        ],
        title="An iteration, node by node",
        caption="One iteration: forward passes are light and backward passes dark, with a colour for each origin.",
    )


# A model


def _training(evidence: TrainedEvidence) -> Summary:
    base, found = Trained.summary(evidence), evidence.findings
    sets = found["omitted in training"]
    lines = [
        *base.lines,
        f"{counted(len(found['stages']), 'stage')}, {_microbatches(found)} per step; skipped: "
        f"{counted(len(sets), 'subset')} of stages",
    ]
    if "predicted seconds" in found:
        lines.append(
            f"an iteration over {counted(found['nodes'], 'node')} is predicted to take "
            f"{number(found['predicted seconds'])} s"
        )
    return Summary(base.verdict, base.tables, lines)


def _omission(evidence: Evidence) -> Summary:
    found = evidence.findings
    name = (evidence.model or {}).get("name", "the model")
    half = [each for each in found["means"] if "trained" not in each][-1]
    verdict = (
        f"Without {half['omitted']} of its {counted(len(found['stages']), 'stage')}, {name} has a loss of "
        f"{number(half['mean'])} nats per token on average, and {number(found['full'])} with all."
    )
    kinds = {None: "all", True: "skipped in training", False: "others"}
    rows = [
        [each["omitted"], kinds[each.get("trained")], each["mean"], each["best"], each["worst"]]
        for each in found["means"]
    ]
    swaps = [[" ".join(map(str, each["stages"])), each["loss"]] for each in found["swapped"]]
    return Summary(
        verdict,
        [
            Table("Nats per token without stages", ["stages removed", "subsets", "mean", "best", "worst"], rows),
            Table("Nats per token with neighbours swapped", ["stages", "loss"], swaps),
        ],
        [f"without the first stage: {number(found['without the first'])} nats per token"],
    )
