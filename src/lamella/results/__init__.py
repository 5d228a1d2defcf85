"""What commands return, and how it is described, drawn, written and read."""

from typing import Any, get_type_hints

from lamella.plan import PlanSeries
from lamella.result import Evidence, Result, Summary, Table
from lamella.results.adapted import Adapted
from lamella.results.card import model_card
from lamella.results.corpus import Corpus
from lamella.results.edit import Edit, EditEvidence
from lamella.results.illustrated import PICTURES, Illustrated
from lamella.results.mixed import Mixed
from lamella.results.network import TrainedNetwork
from lamella.results.record import Record
from lamella.results.series import Series, SeriesEvidence
from lamella.results.study import Study
from lamella.results.trained import Trained, TrainedEvidence
from lamella.results.tuned import Tuned
from lamella.train import Healed

__all__ = [
    "PICTURES",
    "Adapted",
    "Corpus",
    "Edit",
    "EditEvidence",
    "Evidence",
    "Illustrated",
    "Mixed",
    "Record",
    "Result",
    "Series",
    "SeriesEvidence",
    "Study",
    "Summary",
    "Table",
    "Trained",
    "TrainedEvidence",
    "TrainedNetwork",
    "Tuned",
    "as_result",
    "model_card",
    "result_kind",
]


def result_kind(kind: Any) -> type[Result]:
    """The result of the house that a command's return type becomes."""
    if kind in (PlanSeries, Healed):
        return Series if kind is PlanSeries else Trained
    if hasattr(kind, "as_result"):
        kind = get_type_hints(kind.as_result)["return"]
    return kind if isinstance(kind, type) and issubclass(kind, Result) else Result


def as_result(value: Any) -> Result | None:
    """What a command has returned as a result of the house; None for what is none."""
    if isinstance(value, PlanSeries):
        return Series(series=value)
    if isinstance(value, Healed):
        return Trained.of(value)
    result = value.as_result() if hasattr(value, "as_result") else value
    return result if isinstance(result, Result) else None
