"""Tables and summaries as text."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from lamella.cli.console import table
from lamella.result import Summary, Table
from lamella.results import Evidence
from lamella.results.page import markdown, render

CELLS = Table("[a title]", ["exit", 1, 2.5, None], [["[/image]", 3, 0.123456, None], [True, "x|y", math.nan, -1]])
TEXT = [["[/image]", "3", "0.1235", ""], ["True", "x|y", "–", "-1"]]  # noqa: RUF001


def test_headers_and_cells_of_any_type_become_text_in_one_place() -> None:
    assert CELLS.headers == ["exit", "1", "2.5", ""]
    assert CELLS.cells == TEXT
    assert CELLS.numeric == [False, False, True, False]


def test_a_terminal_a_card_and_a_page_show_the_same_text_and_read_none_of_it_as_markup() -> None:
    printed = io.StringIO()
    table(CELLS.title, CELLS.columns, CELLS.rows, Console(file=printed, width=200))
    provenance = {"method": "it", "version": "0", "options": {}, "inputs": {}}
    environment = {"machine": "one", "threads": 1, "versions": {}, "date": "today"}
    evidence = Evidence(kind="study", provenance=provenance, environment=environment)
    page = render(evidence, Summary("It is done.", [CELLS]))
    card = markdown(CELLS).replace("\\", "")
    for text in (CELLS.title, *CELLS.headers, *TEXT[0], *TEXT[1]):
        assert text in printed.getvalue() and text in page
        assert text in card or text == CELLS.title


@pytest.mark.parametrize("rows", [[], [[1, 2]]])
def test_a_table_without_rows_has_no_numeric_columns(rows: list[list[int]]) -> None:
    assert Table("", ["a", "b"], rows).numeric == [bool(rows)] * 2
