"""The page of ``lamella restore``: every interval by diversity and validity, and what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.formatting import counted, duration, number, span
from lamella.report.page import filled, finite
from lamella.results import Evidence, Summary, Table

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


def page(evidence: Evidence) -> str:
    """The page: one file that needs no network.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    told = finite(evidence.model_dump(by_alias=True))
    found, layers = told["findings"], told["model"]["layers"]
    searched = found["search"]
    floor = told["provenance"]["options"]["min_quality"] * searched["post"]["quality"]
    whole = next(point for point in searched["points"] if point["interval"] == [0, layers])
    data = {
        "intervals": {"points": searched["points"], "layers": layers, "chosen": found["interval"]},
        "plane": {
            "points": searched["points"],
            "soups": {NAMES[name]: points for name, points in searched["soups"].items()},
            "marked": {"post": searched["post"], "all layers": whole, "chosen": searched["chosen"]}
            | ({"pre": searched["soups"]["soup"][-1]} if "soup" in searched["soups"] else {}),
            "floor": floor,
        },
    }
    rows = [{"label": described(row), "row": row} for row in found["report"]]
    given = {"evidence": told, "found": found, "rows": rows, "verdict": _verdict(told), "floor": floor}
    return filled(Path(__file__).with_name("page.html"), data, **given)


def summary(evidence: Evidence) -> Summary:
    """Every model on the questions that nothing was chosen on."""
    told = finite(evidence.model_dump(by_alias=True))
    found = told["findings"]
    searched = found["search"]
    rows = [[described(row), f"{row['quality']:.3f}", f"{row['diversity']:.3f}"] for row in found["report"]]
    tables = [Table("On questions that nothing was chosen on", ["model", "Q (valid)", "D (diverse)"], rows)]
    if "open" in found:
        before, after = found["open"]["before"], found["open"]["after"]
        parts = [("different right answers", "distinct", ".2f"), ("right", "valid", ".0%")]
        rows = [[label, format(before[name], form), format(after[name], form)] for label, name, form in parts]
        tables.append(
            Table(f"Open questions, {counted(before['samples'], 'answer')} to each", ["", "before", "after"], rows)
        )
    line = (
        f"{counted(searched['evaluations'], 'interval')} on {counted(searched['questions'], 'question')} in "
        f"{duration(searched['seconds'])}; left out: {counted(len(searched['dropped']), 'question')}"
    )
    return Summary(_verdict(told), tables, [line])


def _verdict(told: dict[str, Any]) -> str:
    """One sentence: what was restored and what that brought."""
    name, found = told["model"]["name"], told["findings"]
    start, stop = found["interval"]
    if start == stop:
        return f"Nothing was restored in {name}: no range of layers is more diverse and valid enough."
    rows = {row["name"]: row for row in found["report"]}
    if not rows:
        return f"Pre-trained again in {name}: {span('layer', start, stop)}."
    before, after = rows["post"], rows["slr"]
    return (
        f"With {span('layer', start, stop)} pre-trained again, {name} goes from a diversity of "
        f"{number(before['diversity'])} to {number(after['diversity'])}, at a validity of {number(after['quality'])} "
        f"after {number(before['quality'])}."
    )
