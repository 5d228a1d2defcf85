"""What commands return, and how it is described, drawn, written and read."""

from typing import Any

from lamella.plan import PlanSeries
from lamella.report.summary import Summary, Table
from lamella.results.card import model_card
from lamella.results.edit import Edit, EditEvidence
from lamella.results.evidence import Evidence
from lamella.results.record import Record
from lamella.results.result import Result
from lamella.results.series import Series, SeriesEvidence
from lamella.results.study import Study

__all__ = [
    "Edit",
    "EditEvidence",
    "Evidence",
    "Record",
    "Result",
    "Series",
    "SeriesEvidence",
    "Study",
    "Summary",
    "Table",
    "as_result",
    "model_card",
]


def as_result(value: Any) -> Result | None:
    """What a command has returned as a result of the house; None for what is none."""
    if isinstance(value, PlanSeries):
        return Series(series=value)
    result = value.as_result() if hasattr(value, "as_result") else value
    return result if isinstance(result, Result) else None
