"""The report of ``lamella restore``: all intervals by diversity and validity, and the selected one."""

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
    "early": "the first layers, same length",
    "middle": "the middle layers, same length",
    "late": "the last layers, same length",
    "random": "random layers, same length (mean of 10)",
    "all": "all layers",
    "soup": "soup",
    "blocks": "soup of the layers only",
}
MEASURES = {"diversity": "Diversity D", "quality": "Validity Q"}
WITH_INTERVAL = ("slr", "early", "middle", "late", "all")


def describe_row(row: dict[str, Any]) -> str:
    """Return the label of a row of the report."""
    name = NAMES[row["name"]]
    if "share" in row:
        return f"{name}, {row['share']:g} of pre"
    start, stop = row["interval"]
    return f"{name}, [{start}, {stop})" if row["name"] in WITH_INTERVAL else name


def page(evidence: Evidence) -> str:
    """Render the report as one file that needs no network.

    Raises:
        LamellaError: if plotly or jinja2 is missing.
    """
    document = finite(evidence.model_dump(by_alias=True))
    found, layers = document["findings"], document["model"]["layers"]
    search = found["search"]
    floor = document["provenance"]["options"]["min_quality"] * search["post"]["quality"]
    whole = next(point for point in search["points"] if point["interval"] == [0, layers])
    marked = {"post": search["post"], "all layers": whole, "chosen": search["chosen"]}
    if "soup" in search["soups"]:
        marked["pre"] = search["soups"]["soup"][-1]
    figures: dict[str, Figure] = {"plane": _plane(search, marked, floor)}
    for measure, title in MEASURES.items():
        figures[f"intervals-{measure}"] = _intervals(search["points"], layers, found["interval"], measure, title)
    rows = [{"label": describe_row(row), "row": row} for row in found["report"]]
    variables = {"evidence": document, "found": found, "rows": rows, "verdict": _verdict(document), "floor": floor}
    return render_page(Path(__file__).with_name("page.html"), figures, **variables)


def _plane(search: dict[str, Any], marked: dict[str, dict[str, float]], floor: float) -> Scatter:
    """Plot diversity against validity of all intervals and of the soups."""
    series = {
        name: _points([each for each in search["points"] if each["feasible"] is feasible])
        for name, feasible in (("interval", True), ("interval below the floor", False))
    }
    for name, curve in search["soups"].items():
        named = [f"{NAMES[name]}, {number(each['share'])} of pre" for each in curve]
        series[NAMES[name]] = _points(curve, named, joined=True)
    positions = [(each["quality"], each["diversity"]) for each in marked.values()]
    series["models"] = Points(positions, mark="ring", labels=list(marked))
    guides = {"floor": floor}
    return Scatter("Q, mass on valid answers", "D, diversity of valid answers", series, guides=guides)


def _points(found: list[dict[str, Any]], names: list[str] | None = None, joined: bool = False) -> Points:
    names = names or [_interval(each) for each in found]
    hover = [f"{name}\n{_scores(each)}" for name, each in zip(names, found, strict=True)]
    return Points([(each["quality"], each["diversity"]) for each in found], joined=joined, hover=hover)


def _intervals(points: list[dict[str, Any]], layers: int, chosen: tuple[int, int], measure: str, title: str) -> Heatmap:
    """Plot one score of every interval, by its first and its last layer."""
    values: list[list[float | None]] = [[None] * layers for _ in range(layers)]
    hover = [[""] * layers for _ in range(layers)]
    for each in points:
        first, end = each["interval"]
        values[end - 1][first] = each[measure]
        suffix = "" if each["feasible"] else "\nbelow the floor"
        hover[end - 1][first] = f"{_interval(each)}\n{_scores(each)}{suffix}"
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


def _scores(point: dict[str, Any]) -> str:
    return f"Q {number(point['quality'])}, D {number(point['diversity'])}"


def summary(evidence: Evidence) -> Summary:
    """Tabulate all models on the held-out questions."""
    document = finite(evidence.model_dump(by_alias=True))
    found = document["findings"]
    search = found["search"]
    rows = [[describe_row(row), f"{row['quality']:.3f}", f"{row['diversity']:.3f}"] for row in found["report"]]
    tables = [Table("On held-out questions", ["model", "Q (valid)", "D (diverse)"], rows)]
    if "open" in found:
        before, after = found["open"]["before"], found["open"]["after"]
        parts = [("different correct answers", "distinct", ".2f"), ("correct", "valid", ".0%")]
        rows = [[label, format(before[name], form), format(after[name], form)] for label, name, form in parts]
        tables.append(
            Table(f"Open questions, {counted(before['samples'], 'sample')} per question", ["", "before", "after"], rows)
        )
    line = (
        f"{counted(search['evaluations'], 'interval')} on {counted(search['questions'], 'question')} in "
        f"{duration(search['seconds'])}; skipped: {counted(len(search['dropped']), 'question')}"
    )
    return Summary(_verdict(document), tables, [line])


def _verdict(document: dict[str, Any]) -> str:
    """Return one sentence: which layers were restored and the effect."""
    name, found = document["model"]["name"], document["findings"]
    start, stop = found["interval"]
    if start == stop:
        return f"Nothing was restored in {name}: no range of layers is more diverse and valid enough."
    rows = {row["name"]: row for row in found["report"]}
    if not rows:
        return f"Restored in {name}: {span('layer', start, stop)}."
    before, after = rows["post"], rows["slr"]
    return (
        f"With {span('layer', start, stop)} restored, the diversity of {name} goes from "
        f"{number(before['diversity'])} to {number(after['diversity'])}, and its validity from "
        f"{number(before['quality'])} to {number(after['quality'])}."
    )
