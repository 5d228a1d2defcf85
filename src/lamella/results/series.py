"""A series of plans as a result: the planners' own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from lamella.plan import PlanSeries
from lamella.report.numbers import counted
from lamella.result import Evidence, Result, Summary, Table

LOADING = """
## Using it

`series.json` goes wherever a plan does, and stands for its last one: `lamella apply FOLDER/series.json MODEL -o SMALL`,
or `lamella trace MODEL --plan FOLDER/series.json`. In Python, `PlanSeries.read("FOLDER/series.json")[n]` is plan n.
"""


class SeriesEvidence(Evidence):
    """Evidence of a search.

    Attributes:
        points: of each plan, what it leaves out (``removed`` sublayers, ``masked`` weights) and its ``scores``.
    """

    points: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(kw_only=True)
class Series(Result):
    """The plans of one search."""

    series: PlanSeries

    kind: ClassVar[str] = "series"
    evidence: ClassVar[type[Evidence]] = SeriesEvidence
    loading: ClassVar[str] = LOADING

    def __post_init__(self) -> None:
        self.provenance = self.series.provenance

    def body(self) -> dict[str, Any]:
        points = zip(self.series, self.series.points, strict=True)
        return {
            "points": [
                {"removed": plan.removed, "masked": plan.masked, "scores": point.scores} for plan, point in points
            ]
        }

    def write(self, folder: Path) -> None:
        self.series.write(folder / "series.json")

    def save(self, out: Path, documents: dict[str, str], *, overwrite: bool = False, tokenizer: Any = None) -> None:
        super().save(out, documents, overwrite=overwrite, tokenizer=tokenizer)
        self.series.settle(out)  # the folder of work, where its side files were, goes

    @classmethod
    def read(cls, path: Path) -> Self:
        """The series in a folder of results, or in its file."""
        file = path / "series.json" if path.is_dir() else path
        return cls(series=PlanSeries.read(file))

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        assert isinstance(evidence, SeriesEvidence)
        names = list(dict.fromkeys(name for point in evidence.points for name in point["scores"]))
        masks = any(point["masked"] for point in evidence.points)
        what = "weights masked" if masks else "sublayers removed"
        rows = [
            [number, point["masked" if masks else "removed"], *(point["scores"].get(name) for name in names)]
            for number, point in enumerate(evidence.points)
        ]
        return Summary(
            f"{evidence.method} has made {counted(len(rows), 'plan')}, from the whole model on.",
            [Table("The series", ["plan", what, *names], rows)],
        )
