"""Figures as data: a method describes the content, and :mod:`lamella.report.plotting` draws it.

All texts are plain text, which is escaped when drawn. A figure without data is omitted from the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

Value = float | None  # None if not measured
Point = tuple[float, float]
Interval = tuple[float, float]
Positions = Sequence[float | str]  # numbers, or names of equally spaced positions


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a page.

    Attributes:
        title: one line above it.
        caption: an explanation below it.
    """

    title: str = ""
    caption: str = ""

    kind: ClassVar[str] = "plot"  # the macro of ``parts.html`` that shows it

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Its description for screen readers."""
        return self.title or self.caption


@dataclass(frozen=True)
class Axes(Figure):
    """A figure with two axes.

    Attributes:
        x, y: axis labels, with units.
    """

    x: str
    y: str

    @property
    def label(self) -> str:
        """Its title, caption or axis labels."""
        return self.title or self.caption or f"{self.y} against {self.x}"


@dataclass(frozen=True)
class Lines(Axes):
    """Values over shared positions: a line for each series, or a dot for a series of one value.

    Attributes:
        series: the values of each line, by its name.
        positions: x positions of the values; 0, 1, 2, ... by default.
        log_y: whether the y axis is logarithmic; by default if all values are at least 1 and the largest is more than 8
            times the smallest.
    """

    series: Mapping[str, Sequence[Value]]
    positions: Positions = ()
    log_y: bool | None = None

    @property
    def values(self) -> list[float]:
        """All measured values."""
        return known(self.series.values())

    @property
    def is_empty(self) -> bool:
        """Whether no value was measured."""
        return not self.values

    @property
    def is_log_y(self) -> bool:
        """Whether the y axis is logarithmic."""
        if self.log_y is not None:
            return self.log_y
        return min(self.values) >= 1 and max(self.values) > 8 * min(self.values)


@dataclass(frozen=True)
class Points:
    """A series of points with further attributes. Non-empty sequences have one entry for each point.

    Attributes:
        at: the positions (x, y).
        joined: whether a line connects them in order.
        mark: the shape of the points; ``band`` is a broad line in the background.
        x_range, y_range: the ends of error bars.
        sizes: areas of the marks, on any scale.
        labels: text next to the points.
        hover: tooltip texts; the coordinates by default.
        dashed: whether the connecting line is dashed.
    """

    at: Sequence[Point]
    joined: bool = False
    mark: Literal["dot", "ring", "diamond", "band"] = "dot"
    x_range: Sequence[Interval] = ()
    y_range: Sequence[Interval] = ()
    sizes: Sequence[float] = ()
    labels: Sequence[str] = ()
    hover: Sequence[str] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Scatter(Axes):
    """Points in a plane.

    Attributes:
        series: the points of each group, by its name.
        joined: whether a line connects the points of each group given as a plain sequence, from left to right.
        guides: vertical lines by their labels.
        rows: names of y = 0, 1, 2, ..., if y is categorical.
        suffix: suffix of the numbers of the x axis, such as a times sign.
        log_y: whether the y axis is logarithmic.
        from_zero: whether the y axis starts at zero.
    """

    series: Mapping[str, Points | Sequence[Point]]
    joined: bool = False
    guides: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[str] = ()
    suffix: str = ""
    log_y: bool = False
    from_zero: bool = False

    @property
    def points(self) -> dict[str, Points]:
        """The groups that have points."""
        groups = {name: self._points(each) for name, each in self.series.items()}
        return {name: each for name, each in groups.items() if each.at}

    def _points(self, given: Points | Sequence[Point]) -> Points:
        if isinstance(given, Points):
            return given
        at = [point for point in given if len(known([point])) == 2]
        return Points(sorted(at) if self.joined else at, self.joined)

    @property
    def is_empty(self) -> bool:
        """Whether there are no points."""
        return not self.points


@dataclass(frozen=True)
class Bars(Axes):
    """A bar for each position and series.

    Attributes:
        x: label of the positions.
        y: label of the values, with the unit.
        series: the values of each series, by its name. Series that never have a value at the same position, such as
            selected and other items, share the space of one.
        positions: numbers or names; 0, 1, 2, ... by default.
        intervals: the ends of error bars, by series; None for a bar without.
        labels: text at each bar, by series.
        horizontal: whether bars are horizontal, the first on top.
        log_y: whether the axis of the values is logarithmic.
    """

    series: Mapping[str, Sequence[Value]]
    positions: Positions = ()
    intervals: Mapping[str, Sequence[Interval | None]] = field(default_factory=dict)
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    horizontal: bool = False
    log_y: bool = False

    @property
    def values(self) -> list[float]:
        """All measured values."""
        return known(self.series.values())

    @property
    def is_empty(self) -> bool:
        """Whether no value was measured."""
        return not self.values

    @property
    def is_exclusive(self) -> bool:
        """Whether no two series have a value at the same position."""
        longest = max(map(len, self.series.values()), default=0)
        padded = [[*values, *[None] * (longest - len(values))] for values in self.series.values()]
        return all(sum(value is not None for value in column) <= 1 for column in zip(*padded, strict=True))


@dataclass(frozen=True)
class Heatmap(Axes):
    """A matrix in colours. Nested sequences have the shape of ``values``.

    Attributes:
        x, y: labels of columns and rows.
        values: row by row.
        measure: label of the colours, with the unit.
        columns, rows: positions of the columns and rows; 0, 1, 2, ... by default.
        upwards: whether the first row is at the bottom instead of on top.
        categories: names of the values 0, 1, 2, ..., if they are categorical; the first is drawn in a light colour.
        diverging: whether a diverging colour scale, symmetric around 0, is used.
        least, most: the ends of the colour scale; those of the values by default.
        labels: text in the cells.
        hover: tooltip texts; position and value by default.
        path: points (column, row) to draw on top, as indices.
        joined: whether a line connects them.
        outlined: a cell (column, row) with a frame, as indices.
        vertical, horizontal: lines across the matrix, as indices of columns and rows.
        square: whether cells are squares.
        background: an image behind the matrix, as a data URI; low values darken it.
    """

    values: Sequence[Sequence[Value]]
    measure: str
    columns: Positions = ()
    rows: Positions = ()
    upwards: bool = False
    categories: Sequence[str] = ()
    diverging: bool = False
    least: float | None = None
    most: float | None = None
    labels: Sequence[Sequence[str]] = ()
    hover: Sequence[Sequence[str]] = ()
    path: Sequence[Point] = ()
    joined: bool = False
    outlined: tuple[int, int] | None = None
    vertical: Sequence[float] = ()
    horizontal: Sequence[float] = ()
    square: bool = False
    background: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there are neither values nor a path."""
        return not known(self.values) and not self.path

    @property
    def label(self) -> str:
        """Its title, caption or axis labels."""
        return self.title or self.caption or f"{self.measure} by {self.y} and {self.x}"


@dataclass(frozen=True)
class GanttTask:
    """A task in a row of a Gantt chart.

    Attributes:
        row: the index of the row.
        begin, end: in the unit of the time axis.
        group: its group, which determines the colour.
        strength: opacity, from 0 to 1.
        hover: tooltip text.
    """

    row: int
    begin: float
    end: float
    group: str
    strength: float = 1.0
    hover: str = ""


@dataclass(frozen=True)
class Gantt(Axes):
    """A Gantt chart: tasks in rows over time.

    Attributes:
        x: the time, with its unit.
        y: label of the rows.
        rows: their names, the first on top.
        tasks: in any order.
    """

    rows: Sequence[str]
    tasks: Sequence[GanttTask]

    @property
    def is_empty(self) -> bool:
        """Whether there are no tasks."""
        return not self.tasks


@dataclass(frozen=True)
class Images(Figure):
    """A table of images, each with text.

    Attributes:
        images: PNG files, as Base64.
        texts: one row of cells for each image.
        headers: headers of the text columns, if needed.
        alt: alternative text of the images.
    """

    images: Sequence[str]
    texts: Sequence[Sequence[str]] = ()
    headers: Sequence[str] = ()
    alt: str = "image"

    kind: ClassVar[str] = "images"

    @property
    def rows(self) -> list[tuple[str, Sequence[str]]]:
        """Each image with its cells."""
        return list(zip(self.images, self.texts or [()] * len(self.images), strict=True))

    @property
    def is_empty(self) -> bool:
        """Whether there are no images."""
        return not self.images


@dataclass(frozen=True)
class Excerpts(Figure):
    """Collapsible texts.

    Attributes:
        excerpts: for each, a summary line and its texts.
    """

    excerpts: Sequence[tuple[str, Sequence[str]]]

    kind: ClassVar[str] = "excerpts"

    @property
    def is_empty(self) -> bool:
        """Whether there are no excerpts."""
        return not self.excerpts


def known(series: Iterable[Sequence[Value]]) -> list[float]:
    """Return the measured values of all series."""
    return [value for values in series for value in values if value is not None and math.isfinite(value)]


def named(figures: Iterable[Figure]) -> dict[str, Figure]:
    """Return the figures of a page that have data, by their identifiers in the page."""
    return {f"figure-{number}": each for number, each in enumerate(each for each in figures if not each.is_empty)}
