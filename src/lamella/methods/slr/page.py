"""The page of ``lamella restore``: every interval by diversity and validity, and what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.formatting import counted, duration, number, span
from lamella.report.figures import Figure, Heatmap, Points, Scatter
from lamella.report.page import finite, render_page
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
MEASURES = {"diversity": "Diversity D", "quality": "Validity Q"}
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
    marked = {"post": searched["post"], "all layers": whole, "chosen": searched["chosen"]}
    if "soup" in searched["soups"]:
        marked["pre"] = searched["soups"]["soup"][-1]
    figures: dict[str, Figure] = {"plane": _plane(searched, marked, floor)}
    for measure, title in MEASURES.items():
        figures[f"intervals-{measure}"] = _intervals(searched["points"], layers, found["interval"], measure, title)
    rows = [{"label": described(row), "row": row} for row in found["report"]]
    given = {"evidence": told, "found": found, "rows": rows, "verdict": _verdict(told), "floor": floor}
    return render_page(Path(__file__).with_name("page.html"), figures, **given)


def _plane(searched: dict[str, Any], marked: dict[str, dict[str, float]], floor: float) -> Scatter:
    """Diversity against validity of every interval and of the soups."""
    series = {
        name: _points([each for each in searched["points"] if each["feasible"] is feasible])
        for name, feasible in (("interval", True), ("interval below the floor", False))
    }
    for name, curve in searched["soups"].items():
        named = [f"{NAMES[name]}, {number(each['share'])} of pre" for each in curve]
        series[NAMES[name]] = _points(curve, named, joined=True)
    at = [(each["quality"], each["diversity"]) for each in marked.values()]
    series["models"] = Points(at, mark="ring", labels=list(marked))
    guides = {"floor": floor}
    return Scatter("Q, mass on valid answers", "D, diversity of valid answers", series, guides=guides)


def _points(found: list[dict[str, Any]], names: list[str] | None = None, joined: bool = False) -> Points:
    names = names or [_interval(each) for each in found]
    hover = [f"{name}\n{_both(each)}" for name, each in zip(names, found, strict=True)]
    return Points([(each["quality"], each["diversity"]) for each in found], joined=joined, hover=hover)


def _intervals(points: list[dict[str, Any]], layers: int, chosen: tuple[int, int], measure: str, title: str) -> Heatmap:
    """One measure of every interval, by its first and its last layer."""
    values: list[list[float | None]] = [[None] * layers for _ in range(layers)]
    hover = [[""] * layers for _ in range(layers)]
    for each in points:
        first, end = each["interval"]
        values[end - 1][first] = each[measure]
        below = "" if each["feasible"] else "\nbelow the floor"
        hover[end - 1][first] = f"{_interval(each)}\n{_both(each)}{below}"
    start, stop = chosen
    return Heatmap(
        "first restored layer",
        "last restored layer",
        values,
        title,
        upwards=True,
        hover=hover,
        outlined=None if start == stop else (start, stop - 1),
        title=title,
    )


def _interval(point: dict[str, Any]) -> str:
    start, stop = point["interval"]
    return "none" if start == stop else f"layers {start} to {stop - 1}"


def _both(point: dict[str, Any]) -> str:
    return f"Q {number(point['quality'])}, D {number(point['diversity'])}"


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
