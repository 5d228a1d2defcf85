"""From evidence to its figures: the network as a U with what is gone, scores by time, and what is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.formatting import counted, number, percent, share
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.report.pictures import shown
from lamella.report.plane import plane
from lamella.results import Evidence, Summary, Table

WIDE, HIGH, GAP = 104, 18, 3  # of a block in the drawing
COLUMNS = {"down": 0, "mid": 1, "up": 2}
KEPT, GONE = "#0d9488", "#ea580c"
SITE = re.compile(r"unet\.(down|mid|up)\.(?:(\d+)\.)?(.+)")


def figures(evidence: Evidence) -> str:
    """The drawings as HTML that needs no script."""
    found = evidence.findings
    parts = []
    parts.append(figure(drawing(found["blocks"]), "The blocks: what is left, and what is gone (striped)."))
    if "drawn" in found:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{shown(picture, f'drawn by the {escape(name)} network')}</td></tr>"
            for name, picture in found["drawn"].items()
        )
        parts.append(figure(f"<table>{rows}</table>", "Drawn from the same noise."))
    if "additivity" in found:
        points = {"random sets": [tuple(each) for each in found["additivity"]["points"]]}
        picture = plane(points, "sum of the scores", "measured", joined=False)
        parts.append(figure(picture, "What dropping sets of blocks changes, beside the sum of their scores."))
    if found.get("loss"):
        parts.append(figure(chart({"training": found["loss"]}, "loss", "point of the log"), "The loss of the healing."))
    return "".join(parts)


def drawing(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The network as a U: down on the left, the middle below, up on the right; each block in its place.

    Args:
        blocks: with site, parameters, score and whether it is gone, in any order.
    """
    columns: dict[int, list[list[Mapping[str, Any]]]] = {0: [], 1: [], 2: []}
    stages: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for block in blocks:
        said = SITE.fullmatch(block["site"])
        side, place = (said[1], int(said[2] or 0)) if said else ("down", 0)
        stages.setdefault((COLUMNS[side], place), []).append(block)
    for (column, _), each in sorted(stages.items()):
        columns[column].append(sorted(each, key=lambda block: _order(block["site"])))
    heights = {column: sum(len(stage) * (HIGH + GAP) + 10 for stage in found) for column, found in columns.items()}
    sides = max(heights[0], heights[2])
    high = sides + heights[1] + 24
    drawn = [
        f'<svg viewBox="0 0 {3 * (WIDE + 40)} {high}" xmlns="http://www.w3.org/2000/svg" role="img" font-size="10" '
        'font-family="sans-serif"><title>The blocks of the network</title><defs><pattern id="gone" width="6" '
        'height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="3" height="6" '
        f'fill="{GONE}"/></pattern></defs>'
    ]
    tops = {0: 10, 1: sides + 10, 2: sides - heights[2] + 10}
    for column, found in columns.items():
        x, y = 20 + column * (WIDE + 40), tops[column]
        turn = -1 if column == 2 else 1  # on the way up, the first stage is the deepest
        for stage in found[::turn]:
            for block in stage[::turn]:
                drawn.append(_block(block, x, y))
                y += HIGH + GAP
            y += 10
    return "".join([*drawn, "</svg>"])


def _order(site: str) -> list[tuple[int, str]]:
    """Residual blocks beside their attention: in the order in which they run."""
    numbers = re.findall(r"\d+", site.split(".", 2)[-1])
    return [(int(each), "") for each in numbers] + [(0, "a" if "resnets" in site else "b")]


def _block(block: Mapping[str, Any], x: float, y: float) -> str:
    said = SITE.fullmatch(block["site"])
    name = (said[3] if said else block["site"].removeprefix("dit.")).replace("resnets", "resnet")
    name = name.replace("attentions", "attention").replace(".", " ")
    score = f", score {number(block['score'])}" if "score" in block else ""
    fact = f"{block['site']}: {number(block['parameters'])} parameters{score}"
    fill = 'fill="url(#gone)"' if block["gone"] else f'fill="{KEPT}" fill-opacity="0.35"'
    edge = GONE if block["gone"] else KEPT
    return (
        f'<g><title>{escape(fact)}{", gone" if block["gone"] else ""}</title><rect x="{x}" y="{y}" width="{WIDE}" '
        f'height="{HIGH}" rx="3" stroke="{edge}" {fill}/><text x="{x + WIDE / 2}" y="{y + HIGH - 5}" '
        f'text-anchor="middle" fill="currentColor">{escape(name)}</text></g>'
    )


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
