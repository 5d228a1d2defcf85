"""Pages as a browser shows them: every plot is drawn, and nothing fails on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamella.commands.compress.report import render
from lamella.report.figures import Bars, Figure, Gantt, GanttTask, Heatmap, Lines, Points, Scatter
from lamella.results import Evidence, Summary
from lamella.results import page as results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome"),
]
ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Opens a page in a browser; what fails in it fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    errors: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))

        def open_page(document: str) -> Any:
            (tmp_path / "page.html").write_text(document, encoding="utf-8")
            tab.goto((tmp_path / "page.html").as_uri())
            return tab

        yield open_page
        browser.close()
    assert errors == []


def page(figures: list[Figure]) -> str:
    provenance = {"method": "it", "version": "0", "options": {}, "inputs": {}}
    environment = {"machine": "one", "threads": 1, "versions": {}, "date": "today"}
    evidence = Evidence(kind="study", provenance=provenance, environment=environment)
    return results.render(evidence, Summary("It is done."), figures)


def texts(tab: Any, plot: str) -> list[str]:
    """The texts of a plot, as they are read."""
    return [each.text_content() for each in tab.query_selector_all(f"#{plot} svg text")]


def test_every_kind_of_plot_is_drawn_and_runs_nothing_of_its_names(opened: Callable[[str], Any]) -> None:
    figures: list[Figure] = [
        Lines("step", "loss, nats", {"training": [3.0, 2.0], ATTACK: [2.5]}),
        Scatter("x", "y", {ATTACK: Points([(1.0, 2.0)], labels=[ATTACK]), "b": [(1.0, 1.0)]}, guides={ATTACK: 1.0}),
        Bars("arm", "share", {ATTACK: [0.5]}, positions=[ATTACK], horizontal=True),
        Heatmap(ATTACK, "step", [[0.0, 1.0]], ATTACK, columns=[ATTACK, "b"], labels=[[ATTACK, "1"]]),
        Gantt("seconds", "node", [ATTACK], [GanttTask(0, 0.0, 1.5, ATTACK), GanttTask(0, 1.5, 2.0, "b")]),
    ]
    tab = opened(page(figures))
    for place in range(len(figures)):
        assert ATTACK in texts(tab, f"plot-figure-{place}")
    assert {"step", "loss, nats", "training"} <= set(texts(tab, "plot-figure-0"))
    assert tab.title() != "attacked"


@pytest.mark.parametrize("values", [[0.08], [0.0, 3.0], [0.01, 9.0]])
def test_no_tick_of_what_is_not_negative_is_negative(opened: Callable[[str], Any], values: list[float]) -> None:
    points = {"loss": [(float(place), value) for place, value in enumerate(values)]}
    figures: list[Figure] = [Scatter("layer", "loss", points), Lines("layer", "loss", {"loss": values}, log_y=False)]
    tab = opened(page(figures))
    for plot in ("plot-figure-0", "plot-figure-1"):
        ticks = [each.text_content() for each in tab.query_selector_all(f"#{plot} .xtick text, #{plot} .ytick text")]
        assert len(ticks) > 3 and all(float(each.replace("\u2212", "-")) >= 0 for each in ticks)


def test_curves_of_a_compression_follow_the_axis_that_is_chosen(
    opened: Callable[[str], Any], all_methods: dict[str, Any]
) -> None:
    tab = opened(render(all_methods))
    assert "measured decode speed-up" in texts(tab, "plot-kl-measured") and not texts(tab, "plot-kl-sublayers")
    tab.check('input[name="axis"][value="sublayers"]', force=True)
    assert "sublayers removed" in texts(tab, "plot-kl-sublayers")
    assert tab.is_visible("#plot-kl-sublayers") and not tab.is_visible("#plot-kl-measured")
    assert {"decode, batch 1", "measured", "cost model"} <= set(texts(tab, "plot-speed"))
