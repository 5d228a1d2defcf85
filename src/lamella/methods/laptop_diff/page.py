"""From evidence to its figures: the network as a U with what is gone, scores by time, and what is drawn."""

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
    """The blocks with those that are gone, what is drawn, whether scores add up, and the loss of the healing."""
    found = evidence.findings
    drawn: list[Figure] = [blocks(found["blocks"])]
    if "drawn" in found:
        images = found["drawn"]
        texts = [[name] for name in images]
        drawn.append(Images(list(images.values()), texts, alt="generated images", caption="Drawn from the same noise."))
    if "additivity" in found:
        points = {"random sets": found["additivity"]["points"]}
        caption = "What dropping sets of blocks changes, beside the sum of their scores."
        drawn.append(Scatter("sum of the scores", "measured", points, caption=caption))
    losses = {"training": found.get("loss") or []}
    return [*drawn, Lines("point of the log", "loss", losses, caption="The loss of the healing.")]


def blocks(found: Sequence[Mapping[str, Any]]) -> Heatmap:
    """The network as a U: down on the left, the middle below, up on the right, with a gap between stages.

    Args:
        found: the blocks with site, parameters, score and whether they are gone, in any order.
    """
    stages: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for block in found:
        match = SITE.fullmatch(block["site"])
        side, place = (match[1], int(match[2] or 0)) if match else ("down", 0)
        stages.setdefault((COLUMNS[side], place), []).append(block)
    columns: list[list[Mapping[str, Any] | None]] = [[], [], []]
    for (column, _), stage in sorted(stages.items(), key=lambda item: item[0]):
        columns[column] += [*sorted(stage, key=lambda block: _order(block["site"])), None]
    down, middle, up = columns
    sides = max(len(down), len(up))
    cells = [
        [*down, *[None] * (sides + len(middle) - len(down))],
        [*[None] * sides, *middle],
        [*[None] * (sides - len(up)), *up[::-1], *[None] * len(middle)],  # the first stage upwards is the deepest
    ]
    rows = [list(row) for row in zip(*cells, strict=True)]
    return Heatmap(
        "",
        "",
        [[None if block is None else int(block["gone"]) for block in row] for row in rows],
        "blocks",
        columns=("down", "middle", "up"),
        categories=("kept", "gone"),
        labels=[["" if block is None else _name(block["site"]) for block in row] for row in rows],
        hover=[["" if block is None else _fact(block) for block in row] for row in rows],
        title="The blocks of the network",
        caption="The blocks: which are kept, and which are gone.",
    )


def _order(site: str) -> list[tuple[int, str]]:
    """Residual blocks beside their attention: in the order in which they run."""
    numbers = re.findall(r"\d+", site.split(".", 2)[-1])
    return [(int(each), "") for each in numbers] + [(0, "a" if "resnets" in site else "b")]


def _name(site: str) -> str:
    match = SITE.fullmatch(site)
    name = (match[3] if match else site.removeprefix("dit.")).replace("resnets", "resnet")
    return name.replace("attentions", "attention").replace(".", " ")


def _fact(block: Mapping[str, Any]) -> str:
    score = f", score {number(block['score'])}" if "score" in block else ""
    gone = ", gone" if block["gone"] else ""
    return f"{block['site']}: {number(block['parameters'])} parameters{score}{gone}"


def summary(evidence: Evidence) -> Summary:
    """What is gone, and what that costs."""
    found = evidence.findings
    before, after = found["parameters"]["before"], found["parameters"]["after"]
    gone = sum(each["gone"] for each in found["blocks"])
    healed = "healed" in found["test"]
    verdict = (
        f"Without {counted(gone, 'block')} the network has {after:,} of {counted(before, 'parameter')} left "
        f"({percent(share(after, before), 0)}){', and they were healed' if healed else ''}."
    )
    rows = [[name, each["task"], each.get("output", 0.0)] for name, each in found["test"].items()]
    tables = [Table("On pictures that nothing was chosen on", ("", "denoising loss", "change of the output"), rows)]
    if "additivity" in found:
        said = found["additivity"]
        worst = " and ".join(said["worst"]["sites"])
        tables.append(
            Table(
                "Whether scores add up",
                ("", ""),
                [
                    ["predicted for what is gone", found["predicted"]],
                    ["measured for what is gone", found["measured"]],
                    ["rank correlation over random sets", said["spearman"]],
                    ["measured over predicted, median", said["ratio"]],
                    ["furthest from their sum", worst],
                    ["cost of the best set", found["cost"]["exact"]],
                    ["cost of the greedy one", found["cost"]["greedy"]],
                ],
            )
        )
    if not healed:
        ordered = sorted(found["blocks"], key=lambda each: each["score"] / max(each["parameters"], 1))
        rows = [[e["site"], e["parameters"], e["score"], *e["by_time"], "gone" if e["gone"] else ""] for e in ordered]
        times = [f"time {n + 1} of {len(ordered[0]['by_time'])}" for n in range(len(ordered[0]["by_time"]))]
        tables.append(Table("The blocks, cheapest first", ("block", "parameters", "score", *times, ""), rows))
    return Summary(verdict, tables)
