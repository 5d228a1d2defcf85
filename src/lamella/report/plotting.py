"""Figures drawn with Plotly. Colours of the light and dark page themes are set in the templates' ``page.js``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from html import escape
from typing import Any

from lamella.report.figures import Axes, Bars, Gantt, Heatmap, Lines, Points, Positions, Scatter, Value, known

FAINT, NEUTRAL, STRONG = "rgba(128, 128, 128, 0.15)", "#c4c9ce", "#888888"  # on light and dark backgrounds
CATEGORIES = (NEUTRAL, "#0d9488", "#ea580c", "#6366f1", "#a16207", "#be185d", "#15803d", "#7c3aed")
DIVERGING = ((0.0, "rgb(37, 99, 235)"), (0.5, NEUTRAL), (1.0, "rgb(220, 38, 38)"))
VEIL = ((0.0, "rgba(12, 14, 20, 0.92)"), (1.0, "rgba(12, 14, 20, 0)"))  # over an image: dark for low values
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "hexagon")
MANY = 40  # points of a line above which markers are omitted
ROW, TALL, LEAST, MOST, SQUARE = 26, 110, 240, 900, 420  # pixels: a row, the margin around rows, limits of a figure
FEW = 12  # positions up to which each has a tick label
CROWDED = 8  # column names above which they are rotated
DECADES, MOST_TICKS = 3, 8  # decades of an axis from which only powers of ten have ticks, and how many of those
STANDOFF = 10  # pixels between the labels of an axis and its title
HEIGHT, UNTITLED = 500, 70  # pixels of an SVG file, and how many of Plotly's 100 above a plot are for a title
LARGEST = 34  # maximum size of a mark in pixels


def plain(text: str) -> str:
    """Return a text escaped for Plotly, which interprets some HTML; line breaks are kept."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace("\n", "<br>")


@singledispatch
def plotted(figure: Axes) -> Any:
    """Return the figure as a ``plotly.graph_objects.Figure``.

    Args:
        figure: one that is not empty.
    """
    raise TypeError(f"there is no plot of a {type(figure).__name__}")


def svg(figure: Axes) -> str:
    """Return the figure as an SVG file, for documents without scripts. This needs kaleido, and a Chromium or Chrome."""
    drawn = plotted(figure)
    for axes in (drawn.update_xaxes, drawn.update_yaxes):  # as on pages, whose scripts set it
        axes(automargin=True, title_standoff=STANDOFF)
    drawn.update_layout(margin_t=100 - UNTITLED, height=(drawn.layout.height or HEIGHT) - UNTITLED)
    content = drawn.to_image("svg").decode()
    return str(content.replace(">", f"><title>{escape(figure.label)}</title>", 1))


@plotted.register
def _lines(figure: Lines) -> Any:
    at = _at(figure.positions)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "name": plain(name),
            "x": at[: len(values)] or list(range(len(values))),
            "y": list(values),
            "mode": "lines" if len(known([values])) > MANY else "lines+markers",
        }
        for name, values in figure.series.items()
    ]
    y = _log(figure.values) if figure.is_log_y else {"rangemode": "tozero"} if min(figure.values) >= 0 else {}
    longest = max(map(len, figure.series.values()))
    return _figure(figure, traces, _ticks(figure.positions, longest), y)


@plotted.register
def _scatter(figure: Scatter) -> Any:
    largest = max((size for points in figure.points.values() for size in points.sizes), default=1.0)
    traces = [
        _trace(name, points, SYMBOLS[place % len(SYMBOLS)], largest)
        for place, (name, points) in enumerate(figure.points.items())
    ]
    every = [point for points in figure.points.values() for point in points.at]
    x, y = (_signed([point[axis] for point in every]) for axis in (0, 1))
    if figure.log_y:
        y = _log([up for _, up in every])
    elif figure.from_zero:
        y |= {"rangemode": "tozero"}
    if figure.rows:
        y |= _ticks(figure.rows, len(figure.rows)) | {"range": [len(figure.rows) - 0.4, -0.6], "showgrid": False}
    drawn = _figure(figure, traces, x | {"ticksuffix": figure.suffix}, y, len(figure.rows))
    for text, value in figure.guides.items():
        drawn.add_vline(value, line={"color": STRONG, "width": 1, "dash": "dot"}, annotation_text=plain(text),
                        annotation_position="top")  # fmt: skip
    return drawn


def _trace(name: str, points: Points, symbol: str, largest: float) -> dict[str, Any]:
    x, y = ([float(point[axis]) for point in points.at] for axis in (0, 1))
    trace: dict[str, Any] = {"type": "scatter", "name": plain(name), "x": x, "y": y}
    if points.mark == "band":
        return trace | {"mode": "lines", "line": {"width": 11, "color": FAINT}, "hoverinfo": "skip", "zorder": -1}
    trace["mode"] = "+".join(["lines"] * points.joined + ["markers"] + ["text"] * bool(points.labels))
    trace["marker"] = {"symbol": symbol, "size": 7}
    if points.joined:
        trace["line"] = {"width": 1.5, "dash": "dot" if points.dashed else "solid"}
    if points.mark == "ring":
        trace["marker"] = {"symbol": "circle-open", "size": 20, "color": STRONG, "line": {"width": 1.75}}
    if points.mark == "diamond":
        trace["marker"] = {"symbol": "diamond-open", "size": 12, "line": {"width": 2}}
    if points.sizes:
        sizes = [LARGEST * (size / largest) ** 0.5 for size in points.sizes]
        trace["marker"] |= {"symbol": "circle", "size": sizes, "opacity": 0.75}
    if points.labels:
        trace |= {"text": [plain(each) for each in points.labels], "textposition": "top center", "cliponaxis": False}
    if points.hover:
        trace |= {"hovertext": [plain(each) for each in points.hover], "hovertemplate": "%{hovertext}<extra></extra>"}
    for axis, centres, ends in (("x", x, points.x_range), ("y", y, points.y_range)):
        if ends:
            trace[f"error_{axis}"] = _error(centres, ends)
    return trace


@plotted.register
def _bars(figure: Bars) -> Any:
    along, up = ("y", "x") if figure.horizontal else ("x", "y")
    traces = []
    for name, values in figure.series.items():
        trace: dict[str, Any] = {
            "type": "bar",
            "name": plain(name),
            "orientation": "h" if figure.horizontal else "v",
            along: _at(figure.positions)[: len(values)] or list(range(len(values))),
            up: list(values),
        }
        if name in figure.labels:
            trace |= {
                "text": [plain(each) for each in figure.labels[name]],
                "textposition": "outside",
                "cliponaxis": False,
            }
        if name in figure.intervals:
            trace[f"error_{up}"] = _error(values, figure.intervals[name]) | {"color": STRONG}
        traces.append(trace)
    longest = max(map(len, figure.series.values()))
    positions = _ticks(figure.positions, longest)
    sizes: dict[str, Any] = _log(figure.values) if figure.log_y else {"rangemode": "tozero"}
    if not figure.horizontal:
        return _figure(figure, traces, positions, sizes, barmode=_mode(figure))
    turned = positions | {"autorange": "reversed", "title": {"text": plain(figure.x)}}
    sizes |= {"title": {"text": plain(figure.y)}}
    thick = 1 if figure.is_exclusive else (1 + len(traces)) // 2  # bars of a group are next to each other
    return _figure(figure, traces, sizes, turned, thick * longest, barmode=_mode(figure))


def _mode(figure: Bars) -> str:
    return "stack" if figure.is_exclusive else "group"


@plotted.register
def _heatmap(figure: Heatmap) -> Any:
    across = max(map(len, figure.values), default=0)
    columns = _at(figure.columns) or list(range(across))
    rows = _at(figure.rows) or list(range(len(figure.values)))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": columns,
        "y": rows,
        "z": [list(row) for row in figure.values],
        "colorbar": {"title": {"text": plain(figure.measure), "side": "right"}},
        "hovertemplate": f"{plain(figure.y)} %{{y}}<br>{plain(figure.x)} %{{x}}<br>%{{z:.4g}}<extra></extra>",
    } | _scale(figure)
    if figure.hover:
        hover = [[plain(each) for each in row] for row in figure.hover]
        trace |= {"hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>"}
    if figure.labels:
        trace |= {"text": [[plain(each) for each in row] for row in figure.labels], "texttemplate": "%{text}"}
    traces = [trace]
    if figure.path:
        x, y = [columns[int(column)] for column, _ in figure.path], [rows[int(row)] for _, row in figure.path]
        mode = "lines+markers" if figure.joined else "markers"
        traces.append({"type": "scatter", "x": x, "y": y, "mode": mode, "marker": {"size": 5, "color": CATEGORIES[2]},
                       "line": {"color": CATEGORIES[2], "width": 1.25}, "hoverinfo": "skip"})  # fmt: skip
    y_axis = (
        _ticks(figure.rows, len(figure.values))
        | {"showgrid": False}
        | ({} if figure.upwards else {"autorange": "reversed"})
    )
    x_axis: dict[str, Any] = _ticks(figure.columns, across) | {"showgrid": False}
    if len(x_axis.get("ticktext", ())) > CROWDED:
        x_axis |= {"tickangle": -60, "tickfont": {"size": 10}}
    if figure.square:
        x_axis |= {"constrain": "domain"}
        y_axis |= {"scaleanchor": "x", "constrain": "domain"}
    if figure.background:
        x_axis |= {"visible": False}
        y_axis |= {"visible": False}
        trace |= {"colorscale": VEIL, "showscale": False}
    if not figure.y and not figure.rows:
        y_axis |= {"showticklabels": False}
    drawn = _figure(figure, traces, x_axis, y_axis, len(figure.values), showlegend=False)
    if figure.square:
        drawn.update_layout(height=max(drawn.layout.height, SQUARE))
    if figure.background:
        drawn.add_layout_image(source=figure.background, xref="x", yref="y", x=-0.5, y=-0.5, sizex=across,
                               sizey=len(figure.values), sizing="stretch", layer="below")  # fmt: skip
    line = {"color": CATEGORIES[2], "width": 2, "dash": "dash"}
    for column in figure.vertical:
        drawn.add_vline(column, line=line)
    for row in figure.horizontal:
        drawn.add_hline(row, line=line)
    if figure.outlined is not None:
        column, row = figure.outlined
        drawn.add_shape(type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5,
                        line={"color": CATEGORIES[2], "width": 2.5})  # fmt: skip
    return drawn


def _scale(figure: Heatmap) -> dict[str, Any]:
    """Return the colour scale of a heat map, and its ends."""
    if figure.categories:
        count = len(figure.categories)
        steps = [(end / count, CATEGORIES[place]) for place in range(count) for end in (place, place + 1)]
        return {
            "zmin": -0.5,
            "zmax": count - 0.5,
            "colorscale": steps,
            "colorbar": {"tickvals": list(range(count)), "ticktext": [plain(each) for each in figure.categories]},
        }
    least, most = figure.least, figure.most
    if figure.diverging:
        most = most or max(map(abs, known(figure.values)), default=0.0) or 1.0
        least = -most
    ends = {name: value for name, value in (("zmin", least), ("zmax", most)) if value is not None}
    if len(ends) == 1:  # Plotly needs both ends or none
        values = known(figure.values) or [0.0]
        ends = {"zmin": min(values), "zmax": max(values)} | ends
    return ends | ({"colorscale": DIVERGING} if figure.diverging else {})


@plotted.register
def _gantt(figure: Gantt) -> Any:
    groups: dict[str, list[Any]] = {}
    for task in figure.tasks:
        groups.setdefault(task.group, []).append(task)
    traces = [
        {
            "type": "bar",
            "name": plain(name),
            "orientation": "h",
            "y": [task.row for task in tasks],
            "base": [task.begin for task in tasks],
            "x": [task.end - task.begin for task in tasks],
            "marker": {"opacity": [task.strength for task in tasks]},
            "hovertext": [plain(task.hover) for task in tasks],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
        for name, tasks in groups.items()
    ]
    y = _ticks(figure.rows, len(figure.rows)) | {"autorange": "reversed"}
    return _figure(figure, traces, {"rangemode": "tozero"}, y, len(figure.rows), barmode="overlay", bargap=0.25)


def _figure(
    figure: Axes,
    traces: Sequence[dict[str, Any]],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    rows: int = 0,
    **layout: Any,
) -> Any:
    """Return a figure of traces with their axes; its height depends on the number of rows."""
    from plotly import graph_objects  # imported here because it is slow and few commands need it

    titles = {"xaxis": {"title": {"text": plain(figure.x)}}, "yaxis": {"title": {"text": plain(figure.y)}}}
    axes = {"xaxis": titles["xaxis"] | dict(x), "yaxis": titles["yaxis"] | dict(y)}
    height = {"height": min(max(ROW * rows + TALL, LEAST), MOST)} if rows else {}
    legend = {"showlegend": sum("name" in trace for trace in traces) > 1}
    return graph_objects.Figure(list(traces), {"template": "none"} | axes | height | legend | layout)


def _at(positions: Positions) -> list[float]:
    """Return the positions as numbers; their indices if they have names."""
    return [float(place if isinstance(each, str) else each) for place, each in enumerate(positions)]


def _ticks(positions: Positions, count: int) -> dict[str, Any]:
    """Return the ticks of an axis: names of the positions, or the positions themselves if they are few."""
    names = [plain(each) for each in positions if isinstance(each, str)]
    if names:
        return {"tickvals": list(range(len(names))), "ticktext": names}
    return {"tickvals": _at(positions) or list(range(count))} if count <= FEW else {}


def _log(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis, with ticks at 1, 2 and 5 of each decade, or at every few decades if there are many."""
    positive = [value for value in values if value > 0]
    decades = math.log10(max(positive) / min(positive)) if positive else 0
    return {"type": "log", "dtick": "D2" if decades < DECADES else math.ceil(decades / MOST_TICKS), "tickformat": "~g"}


def _signed(values: Sequence[float]) -> dict[str, Any]:
    """Return an axis that does not cross zero if no value does."""
    if min(values) >= 0:
        return {"autorangeoptions": {"clipmin": 0}}
    return {"autorangeoptions": {"clipmax": 0}} if max(values) <= 0 else {}


def _error(centres: Sequence[Value], ends: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    """Return error bars between two ends; none where an end or the centre is unknown."""
    pairs = [
        (0.0, 0.0) if centre is None or end is None else (end[1] - centre, centre - end[0])
        for centre, end in zip(centres, ends, strict=True)
    ]
    return {"type": "data", "symmetric": False, "thickness": 1, "width": 3,
            "array": [up for up, _ in pairs], "arrayminus": [down for _, down in pairs]}  # fmt: skip
