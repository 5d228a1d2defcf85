"""The page of ``lamella restore``: every interval by diversity and validity, and what was chosen."""

from __future__ import annotations

from typing import Any

from lamella.report.numbers import number
from lamella.report.page import finite, page

NAMES = {
    "post": "post-trained model",
    "pre": "pre-trained model",
    "slr": "SLR",
    "early": "as many layers, the first",
    "middle": "as many layers, in the middle",
    "late": "as many layers, the last",
    "random": "as many layers, at random (mean of 10)",
    "all": "all layers",
    "soup": "soup",
    "blocks": "soup of the layers alone",
}
PLACED = ("slr", "early", "middle", "late", "all")


def described(row: dict[str, Any]) -> str:
    """What a row of the report is."""
    name = NAMES[row["name"]]
    if "share" in row:
        return f"{name}, {row['share']:g} of pre"
    start, stop = row["interval"]
    return f"{name}, [{start}, {stop})" if row["name"] in PLACED else name


def verdict(evidence: dict[str, Any]) -> str:
    """One sentence: what was restored and what that brought."""
    name, (start, stop) = evidence["model"]["name"], evidence["interval"]
    if start == stop:
        return f"Nothing was restored in {name}: no range of layers is more diverse and valid enough."
    rows = {row["name"]: row for row in evidence["report"]}
    if not rows:
        return f"Layers {start} to {stop - 1} of {name} are pre-trained again."
    before, after = rows["post"], rows["slr"]
    return (
        f"With layers {start} to {stop - 1} pre-trained again, {name} goes from a diversity of "
        f"{number(before['diversity'])} to {number(after['diversity'])}, at a validity of {number(after['quality'])} "
        f"after {number(before['quality'])}."
    )


def render_restoration(evidence: dict[str, Any]) -> str:
    """The page ``restore.html``: one file that needs no network.

    Args:
        evidence: as :func:`lamella.methods.slr.job.restore` returns it.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    evidence = finite(evidence)
    told, layers = evidence["search"], evidence["model"]["layers"]
    floor = evidence["options"]["min_quality"] * told["post"]["quality"]
    whole = next(point for point in told["points"] if point["interval"] == [0, layers])
    data = {
        "intervals": {"points": told["points"], "layers": layers, "chosen": evidence["interval"]},
        "plane": {
            "points": told["points"],
            "soups": {NAMES[name]: points for name, points in told["soups"].items()},
            "marked": {"post": told["post"], "all layers": whole, "chosen": told["chosen"]}
            | ({"pre": told["soups"]["soup"][-1]} if "soup" in told["soups"] else {}),
            "floor": floor,
        },
    }
    rows = [{"label": described(row), "row": row} for row in evidence["report"]]
    return page("restore.html", data, evidence=evidence, rows=rows, verdict=verdict(evidence), floor=floor)
