"""Figures as data: their content, their Plotly form, and which pages need Plotly."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lamella.report.drawing import Shade, StackDrawing
from lamella.report.figures import (
    Axes,
    Bars,
    Excerpts,
    Figure,
    Gantt,
    GanttTask,
    Heatmap,
    Images,
    Lines,
    Points,
    Scatter,
    named,
)
from lamella.report.plotting import plotted, svg
from lamella.results import Evidence, Summary, Table
from lamella.results.page import render

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%{x}"
EMPTY = [
    Lines("point", "loss", {"training": []}),
    Lines("point", "loss", {}),
    Lines("point", "loss", {"training": [None, float("nan")]}),
    Scatter("step", "loss", {}),
    Scatter("step", "loss", {"training": [], "held out": [(0.0, float("nan"))]}),
    Bars("layer", "share", {"all": [None]}),
    Heatmap("layer", "step", [], "share"),
    Heatmap("layer", "step", [[None, None]], "share"),
    Gantt("seconds", "node", ["one"], []),
    StackDrawing([]),
    Images([]),
    Excerpts([]),
]
FULL = [
    Lines("step", "loss, nats", {"training": [3.0, 2.0]}),
    Scatter("parameters", "loss, nats", {"ours": [(1.0, 2.0)]}),
    Bars("layer", "share", {"all": [0.5, 0.25]}),
    Heatmap("layer", "step", [[0.0, 1.0]], "share"),
    Gantt("seconds", "node", ["one"], [GanttTask(0, 0.0, 1.5, "a")]),
    StackDrawing([{"attn": "kept", "mlp": "cut"}], [Shade("worth", "Worth", "how much it is worth", [0.5, 0.25])]),
    Images(["aGVsbG8="], [["a caption"]], ["text"], alt="a photograph"),
    Excerpts([("a title", ["a text"])]),
]


def page(*figures: Figure, verdict: str = "It is done.") -> str:
    provenance = {"method": "it", "version": "0", "options": {}, "inputs": {}}
    environment = {"machine": "one", "threads": 1, "versions": {}, "date": "today"}
    evidence = Evidence(kind="study", provenance=provenance, environment=environment)
    return render(evidence, Summary(verdict, [Table("A table", ["a"], [[1]])]), figures)


def plots(document: str) -> dict[str, Any]:
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.DOTALL)
    assert data is not None
    found: dict[str, Any] = json.loads(data[1])["plots"]
    return found


def axis(figure: Axes, name: str) -> dict[str, Any]:
    found: dict[str, Any] = plotted(figure).to_plotly_json()["layout"][f"{name}axis"]
    return found


# Which pages need what


@pytest.mark.parametrize("figures", [[], EMPTY])
def test_a_page_without_figures_is_small_and_has_no_plotly(figures: list[Figure]) -> None:
    document = page(*figures)
    assert len(document.encode()) < 200_000
    assert "plotly" not in document.lower() and "<figure" not in document


@pytest.mark.parametrize("figures", [FULL[:1], FULL])
def test_a_page_with_plots_has_plotly_once(figures: list[Figure]) -> None:
    document = page(*figures)
    assert document.count("plotly.js v") == 1
    assert document.count("<figure") == len(figures)
    assert document.count('class="plot ') == len(plots(document)) == sum(isinstance(each, Axes) for each in figures)


def test_a_stack_images_and_texts_need_no_plotly() -> None:
    document = page(*FULL[-3:])
    assert "plotly" not in document.lower() and document.count("<figure") == 3
    assert document.count('data-site="layers.0.') == 2 and "how much it is worth" in document
    assert '<img class="pixels" alt="a photograph" src="data:image/png;base64,aGVsbG8=">' in document
    assert '<th scope="col">text</th>' in document and "<td>a caption</td>" in document
    assert "<summary>a title</summary><blockquote>a text</blockquote>" in document


@pytest.mark.parametrize("figure", EMPTY)
def test_a_figure_without_data_is_omitted(figure: Figure) -> None:
    assert figure.is_empty and named([figure]) == {}


@pytest.mark.parametrize("figure", FULL)
def test_a_figure_with_data_is_shown(figure: Figure) -> None:
    assert not figure.is_empty and list(named([*EMPTY, figure])) == ["figure-0"]


# Names are text, whoever has chosen them


@pytest.mark.parametrize(
    "figure",
    [
        Lines(ATTACK, ATTACK, {ATTACK: [1.0, 2.0]}, positions=[ATTACK, ATTACK], title=ATTACK, caption=ATTACK),
        Scatter(
            ATTACK,
            ATTACK,
            {ATTACK: Points([(1.0, 2.0)], labels=[ATTACK], hover=[ATTACK])},
            guides={ATTACK: 1.0},
            rows=[ATTACK],
        ),
        Bars(ATTACK, ATTACK, {ATTACK: [1.0]}, positions=[ATTACK], labels={ATTACK: [ATTACK]}),
        Heatmap(ATTACK, ATTACK, [[1.0]], ATTACK, columns=[ATTACK], rows=[ATTACK], labels=[[ATTACK]], hover=[[ATTACK]]),
        Heatmap(ATTACK, ATTACK, [[1.0]], ATTACK, categories=["no", ATTACK]),
        Gantt(ATTACK, ATTACK, [ATTACK], [GanttTask(0, 0.0, 1.0, ATTACK, hover=ATTACK)], title=ATTACK),
        StackDrawing([{"attn": "kept", "mlp": "cut"}], [Shade(ATTACK, ATTACK, ATTACK, [0.5, 0.2])], title=ATTACK),
        Images(["aGVsbG8="], [[ATTACK]], [ATTACK], alt=ATTACK, title=ATTACK, caption=ATTACK),
        Excerpts([(ATTACK, [ATTACK])], caption=ATTACK),
    ],
)
def test_a_hostile_name_stays_text(figure: Figure) -> None:
    document, plain = page(figure), page(figure_like(figure))
    for tag in ("<script", "</script", "<img"):
        assert document.count(tag) == plain.count(tag)
    texts = re.findall(r'"[^"]*alert[^"]*"', json.dumps(plots(document)))
    assert texts or not isinstance(figure, Axes)
    assert not any("<script" in text or "<img" in text for text in texts)  # Plotly reads a little HTML


def figure_like(figure: Figure) -> Figure:
    """A harmless figure of the same kind, with as many scripts and images."""
    return next(each for each in FULL if type(each) is type(figure))


def test_a_new_line_in_a_text_under_the_pointer_stays_one() -> None:
    found = plotted(Scatter("x", "y", {"a": Points([(1.0, 1.0)], hover=["a < b\nc & d"])}))
    assert found.data[0].hovertext == ("a &lt; b<br>c &amp; d",)


# What Plotly is given


def test_lines_have_their_names_values_and_axes() -> None:
    found = plotted(Lines("step", "loss, nats", {"training": [3.0, None, 2.0], "held out": [2.5]}, positions=[1, 5, 9]))
    assert [(each.name, each.x, each.y) for each in found.data] == [
        ("training", (1, 5, 9), (3.0, None, 2.0)),
        ("held out", (1,), (2.5,)),
    ]
    assert (found.layout.xaxis.title.text, found.layout.yaxis.title.text) == ("step", "loss, nats")
    assert found.layout.showlegend


@pytest.mark.parametrize("lines", [{"a": [1]}, {"a": [0, 0]}, {"a": [3, 900], "b": [5, 5, 5]}, {"<&>": [10, 12]}])
def test_lines_can_be_drawn_of_anything(lines: dict[str, list[float]]) -> None:
    assert len(plotted(Lines("system", "iterations", lines)).data) == len(lines)


def test_names_of_positions_stand_at_the_axis() -> None:
    found = axis(Lines("cut", "percent", {"reader": [1.0, 2.0]}, positions=["first", "last"]), "x")
    assert list(found["ticktext"]) == ["first", "last"] and list(found["tickvals"]) == [0, 1]


@pytest.mark.parametrize(("positions", "ticks"), [([1, 3, 9], [1, 3, 9]), ([], [0, 1, 2])])
def test_few_positions_are_labelled_at_the_axis(positions: list[float], ticks: list[float]) -> None:
    assert list(axis(Lines("clicks", "IoU", {"a": [1.0, 2.0, 3.0]}, positions=positions), "x")["tickvals"]) == ticks


def test_a_training_with_one_point_in_its_log_has_a_dot() -> None:
    (training, held_out) = plotted(Lines("point", "loss", {"training": [2.5], "held out": [2.0, 1.5]})).data
    assert "markers" in training.mode and "lines" in held_out.mode


@pytest.mark.parametrize(
    ("values", "given", "log"),
    [
        ([1, 9], None, True),
        ([1, 8], None, False),
        ([0, 900], None, False),
        ([0.1, 0.2], True, True),
        ([1, 9], False, False),
    ],
)
def test_an_axis_is_logarithmic_where_values_are_far_apart(values: list[float], given: bool | None, log: bool) -> None:
    assert (axis(Lines("layer", "tokens", {"a": values}, log_y=given), "y").get("type") == "log") == log


@pytest.mark.parametrize(("least", "tick"), [(0.1, "D2"), (1e-3, 1), (1e-14, 2), (1e-29, 4)])
def test_a_logarithmic_axis_of_many_decades_has_few_ticks(least: float, tick: str | int) -> None:
    values = [least, 2.0, 0.0]
    points = [(float(place), value) for place, value in enumerate(values)]
    assert axis(Bars("layer", "error", {"a": values}, horizontal=True, log_y=True), "x")["dtick"] == tick
    assert axis(Scatter("layer", "error", {"a": points}, log_y=True), "y")["dtick"] == tick


@pytest.mark.parametrize("values", [[0.08], [0.08, 0.08], [0.0, 3.0], [0.01, 9.0], [0.0]])
def test_an_axis_of_quantities_that_are_not_negative_has_no_negative_tick(values: list[float]) -> None:
    points = Scatter("layer", "loss", {"loss": [(float(i), value) for i, value in enumerate(values)]})
    assert axis(points, "x")["autorangeoptions"] == axis(points, "y")["autorangeoptions"] == {"clipmin": 0}
    assert axis(Lines("layer", "loss", {"loss": values}, log_y=False), "y")["rangemode"] == "tozero"
    assert axis(Bars("layer", "loss", {"loss": values}), "y")["rangemode"] == "tozero"


@pytest.mark.parametrize("values", [[-0.08], [-3.0, -1.0]])
def test_an_axis_of_negative_quantities_has_no_positive_tick(values: list[float]) -> None:
    points = Scatter("gain", "gain", {"gain": [(each, each) for each in values]})
    assert axis(points, "x")["autorangeoptions"] == axis(points, "y")["autorangeoptions"] == {"clipmax": 0}


def test_an_axis_of_both_signs_extends_to_both_sides() -> None:
    points = Scatter("gain", "gain", {"gain": [(-1.0, -1.0), (1.0, 1.0)]})
    assert "autorangeoptions" not in axis(points, "x") and "autorangeoptions" not in axis(points, "y")


def test_joined_points_run_from_left_to_right() -> None:
    (line,) = plotted(Scatter("x", "y", {"a": [(2.0, 0.0), (1.0, 1.0)]}, joined=True)).data
    assert (line.x, line.y, line.mode) == ((1.0, 2.0), (1.0, 0.0), "lines+markers")
    (cloud,) = plotted(Scatter("x", "y", {"a": [(2.0, 0.0), (1.0, 1.0)]})).data
    assert (cloud.x, cloud.mode) == ((2.0, 1.0), "markers")


def test_points_have_error_bars_sizes_and_guides() -> None:
    small = Points([(1.0, 2.0)], x_range=[(0.5, 2.0)], sizes=[1.0])
    found = plotted(
        Scatter("x", "y", {"small": small, "large": Points([(1.5, 1.0)], sizes=[4.0])}, guides={"target": 1.3})
    )
    assert (found.data[0].error_x.array, found.data[0].error_x.arrayminus) == ((1.0,), (0.5,))
    assert found.data[1].marker.size[0] == pytest.approx(2 * found.data[0].marker.size[0])  # areas
    assert (found.layout.shapes[0].x0, found.layout.annotations[0].text) == (1.3, "target")


def test_bars_that_exclude_each_other_share_the_space_of_one() -> None:
    chosen = Bars("layer", "change", {"chosen": [None, 2.0], "others": [1.0, None]})
    assert plotted(chosen).layout.barmode == "stack"
    assert plotted(Bars("layer", "norm", {"bad": [1.0, 2.0], "good": [1.0]})).layout.barmode == "group"


def test_bars_that_run_to_the_right_have_names_intervals_and_labels() -> None:
    figure = Bars("arm", "share", {"a": [0.5, None]}, positions=["ours", "theirs"], horizontal=True,
                  intervals={"a": [(0.4, 0.7), None]}, labels={"a": ["0.50", ""]})  # fmt: skip
    (bar,) = plotted(figure).data
    assert (bar.orientation, bar.x, bar.y, bar.text) == ("h", (0.5, None), (0, 1), ("0.50", ""))
    assert bar.error_x.array == pytest.approx((0.2, 0.0)) and bar.error_x.arrayminus == pytest.approx((0.1, 0.0))
    assert (axis(figure, "x")["title"]["text"], axis(figure, "y")["title"]["text"]) == ("share", "arm")
    assert list(axis(figure, "y")["ticktext"]) == ["ours", "theirs"]
    assert axis(figure, "y")["autorange"] == "reversed"


def test_a_heat_map_begins_on_top_by_default() -> None:
    cells = [[0.0, 1.0], [2.0, None]]
    figure = Heatmap("layer", "step", cells, "share", rows=["a", "b"], path=[(1, 0)], outlined=(0, 1))
    found = plotted(figure)
    assert [list(row) for row in found.data[0].z] == cells
    assert found.data[0].colorbar.title.text == "share" and found.layout.yaxis.autorange == "reversed"
    assert (found.data[1].x, found.data[1].y) == ((1,), (0,))
    assert (found.layout.shapes[0].x0, found.layout.shapes[0].y1) == (-0.5, 1.5)
    assert plotted(Heatmap("layer", "step", cells, "share", upwards=True)).layout.yaxis.autorange is None


def test_the_colours_of_a_heat_map_end_where_they_should() -> None:
    def ends(**given: Any) -> tuple[float | None, float | None]:
        (cells,) = plotted(Heatmap("x", "y", [[-1.0, 3.0]], "z", **given)).data
        return cells.zmin, cells.zmax

    assert ends() == (None, None)  # those of the values
    assert ends(least=0.0) == (0.0, 3.0) and ends(least=0.0, most=1.0) == (0.0, 1.0)
    assert ends(diverging=True) == (-3.0, 3.0) and ends(diverging=True, most=1.0) == (-1.0, 1.0)


def test_categories_have_one_colour_each() -> None:
    (cells,) = plotted(Heatmap("x", "y", [[0.0, 2.0]], "z", categories=["none", "some", "all"])).data
    assert (cells.zmin, cells.zmax, cells.colorbar.ticktext) == (-0.5, 2.5, ("none", "some", "all"))
    assert [share for share, _ in cells.colorscale] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert len({colour for _, colour in cells.colorscale}) == 3


def test_a_gantt_chart_has_a_bar_for_each_task_in_its_row() -> None:
    tasks = [GanttTask(1, 0.5, 2.0, "a", 0.5), GanttTask(0, 0.0, 1.0, "b")]
    first, second = plotted(Gantt("seconds", "node", ["one", "two"], tasks)).data
    assert (first.name, first.base, first.x, first.y, first.marker.opacity) == ("a", (0.5,), (1.5,), (1,), (0.5,))
    assert (second.name, second.base, second.x, second.y) == ("b", (0.0,), (1.0,), (0,))


@pytest.mark.parametrize("figure", FULL[:5])
def test_a_plot_says_what_it_is_to_those_who_do_not_see_it(figure: Axes) -> None:
    (name,) = plots(page(figure))
    assert f'id="plot-{name}" role="img" aria-label="{figure.label}"' in page(figure)
    assert figure.y in figure.label and figure.x in figure.label


def test_a_document_without_scripts_shows_a_figure_as_an_image() -> None:
    pytest.importorskip("kaleido")
    drawn = svg(Lines("step", "loss", {"training": [3.0, 2.0]}, title="a < b"))
    assert drawn.startswith("<svg") and "<title>a &lt; b</title>" in drawn and ">loss<" in drawn


def test_an_image_has_room_for_long_names_of_an_axis() -> None:
    pytest.importorskip("kaleido")
    name = "a layer with quite a long name"
    drawn = svg(Bars("layer", "share", {"all": [0.1]}, positions=(name,), horizontal=True))
    end = re.search(r'class="ytick"><text[^>]* x="([0-9.]+)"', drawn)  # names end at the axis
    assert end and float(end[1]) > 5 * len(name)


def test_an_image_leaves_no_room_for_a_title_above_the_plot() -> None:
    pytest.importorskip("kaleido")
    drawn = svg(Lines("step", "loss", {"training": [3.0, 2.0]}))
    top = re.search(r'<rect x="[0-9.]+" y="([0-9.]+)" width="540" height="320"/>', drawn)
    assert 'viewBox="0 0 700 430"' in drawn and top and float(top[1]) == 30
