"""Figures and summary: the dropped blocks of the network, scores by timestep, and generated images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, number, percent, share
from lamella.report.figures import Figure, Heatmap, Images, Lines, Scatter
from lamella.results import Evidence, Summary, Table

COLUMNS = {"down": 0, "mid": 1, "up": 2}
SITE = re.compile(r"unet\.(down|mid|up)\.(?:(\d+)\.)?(.+)")


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the kept and dropped blocks, generated images, the additivity of scores, and the loss of healing."""
    found = evidence.findings
    drawn: list[Figure] = [blocks(found["blocks"])]
    if "generated" in found:
        images = found["generated"]
        texts = [[name] for name in images]
        drawn.append(Images(list(images.values()), texts, alt="generated images", caption="From the same noise."))
    if "additivity" in found:
        points = {"random sets": found["additivity"]["points"]}
        caption = "Output change of dropping sets of blocks, against the sum of their scores."
        drawn.append(Scatter("sum of the scores", "measured", points, caption=caption))
    losses = {"training": found.get("loss") or []}
    return [*drawn, Lines("log entry", "loss", losses, caption="Training loss of healing.")]


def blocks(found: Sequence[Mapping[str, Any]]) -> Heatmap:
    """Plot the network as a U: down on the left, the middle at the bottom, up on the right, with a gap between stages.

    Args:
        found: the blocks with site, parameters, score and whether they are dropped, in any order.
    """
    stages: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for block in found:
        match = SITE.fullmatch(block["site"])
        side, index = (match[1], int(match[2] or 0)) if match else ("down", 0)
        stages.setdefault((COLUMNS[side], index), []).append(block)
    columns: list[list[Mapping[str, Any] | None]] = [[], [], []]
    for (column, _), stage in sorted(stages.items(), key=lambda item: item[0]):
        columns[column] += [*sorted(stage, key=lambda block: _order(block["site"])), None]
    down, middle, up = columns
    sides = max(len(down), len(up))
    cells = [
        [*down, *[None] * (sides + len(middle) - len(down))],
        [*[None] * sides, *middle],
        [*[None] * (sides - len(up)), *up[::-1], *[None] * len(middle)],  # the first up stage is the deepest
    ]
    rows = [list(row) for row in zip(*cells, strict=True)]
    return Heatmap(
        "",
        "",
        [[None if block is None else int(block["dropped"]) for block in row] for row in rows],
        "blocks",
        columns=("down", "middle", "up"),
        categories=("kept", "dropped"),
        labels=[["" if block is None else _name(block["site"]) for block in row] for row in rows],
        hover=[["" if block is None else _fact(block) for block in row] for row in rows],
        title="The blocks of the network",
        caption="Kept and dropped blocks.",
    )


def _order(site: str) -> list[tuple[int, str]]:
    """Sort key: residual blocks before their attention, in execution order."""
    numbers = re.findall(r"\d+", site.split(".", 2)[-1])
    return [(int(each), "") for each in numbers] + [(0, "a" if "resnets" in site else "b")]


def _name(site: str) -> str:
    match = SITE.fullmatch(site)
    name = (match[3] if match else site.removeprefix("dit.")).replace("resnets", "resnet")
    return name.replace("attentions", "attention").replace(".", " ")


def _fact(block: Mapping[str, Any]) -> str:
    score = f", score {number(block['score'])}" if "score" in block else ""
    gone = ", dropped" if block["dropped"] else ""
    return f"{block['site']}: {number(block['parameters'])} parameters{score}{gone}"


def summary(evidence: Evidence) -> Summary:
    """Summarise the dropped blocks and their effect."""
    found = evidence.findings
    before, after = found["parameters"]["before"], found["parameters"]["after"]
    gone = sum(each["dropped"] for each in found["blocks"])
    healed = "healed" in found["test"]
    verdict = (
        f"Without {counted(gone, 'block')} the network has {after:,} of {counted(before, 'parameter')} left "
        f"({percent(share(after, before), 0)}){', after healing' if healed else ''}."
    )
    rows = [[name, each["task"], each.get("output", 0.0)] for name, each in found["test"].items()]
    tables = [Table("On test images", ("", "denoising loss", "change of the output"), rows)]
    if "additivity" in found:
        additivity = found["additivity"]
        worst = " and ".join(additivity["worst"]["sites"])
        tables.append(
            Table(
                "Additivity of scores",
                ("", ""),
                [
                    ["dropped blocks, predicted", found["predicted"]],
                    ["dropped blocks, measured", found["measured"]],
                    ["rank correlation over random sets", additivity["spearman"]],
                    ["measured / predicted, median", additivity["ratio"]],
                    ["largest deviation from the sum", worst],
                    ["cost of the optimal set", found["cost"]["exact"]],
                    ["cost of the greedy set", found["cost"]["greedy"]],
                ],
            )
        )
    if not healed:
        ordered = sorted(found["blocks"], key=lambda each: each["score"] / max(each["parameters"], 1))
        rows = [
            [e["site"], e["parameters"], e["score"], *e["by_time"], "dropped" if e["dropped"] else ""] for e in ordered
        ]
        times = [f"time {n + 1} of {len(ordered[0]['by_time'])}" for n in range(len(ordered[0]["by_time"]))]
        tables.append(Table("Blocks, cheapest first", ("block", "parameters", "score", *times, ""), rows))
    return Summary(verdict, tables)
