"""Series of plans, the result of every planner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError

from lamella.errors import PlanError
from lamella.formatting import counted
from lamella.plan.document import refusal
from lamella.plan.reference import ModelReference
from lamella.plan.schema import VOCAB, Plan, Point, SeriesDocument
from lamella.result import Documents, Evidence, Result, Summary, Table

FILE, PLAN = "series.json", "plan.json"
LOADING = """
## Using it

`plan.json` is the plan that meets the budget, or the last one: `lamella apply FOLDER/plan.json MODEL
-o SMALL`, or `lamella trace MODEL --plan FOLDER/plan.json`. In Python, `PlanSeries.read("FOLDER")[n]` is plan n.
"""


class SeriesEvidence(Evidence):
    """Evidence of a search.

    Attributes:
        points: for each plan, what it removes (``removed`` sublayers, ``masked`` weights) and its ``scores``.
        chosen: index of the plan that meets the budget.
    """

    chosen: int = -1

    points: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(kw_only=True)
class PlanSeries(Result):
    """An ordered series of plans from one search, from the whole model to the smallest; a budget selects one.

    Attributes:
        model: the model that the plans are for.
        points: the decision of each plan, and its measurements.
        chosen: index of the plan that meets the budget.
    """

    model: ModelReference
    points: list[Point]
    chosen: int = -1

    kind: ClassVar[str] = "series"
    evidence: ClassVar[type[Evidence]] = SeriesEvidence
    loading: ClassVar[str] = LOADING

    @property
    def document(self) -> SeriesDocument:
        """The series as a JSON document.

        Raises:
            PlanError: for points that are not valid decisions.
        """
        try:
            return SeriesDocument(model=self.model, points=self.points, provenance=self.provenance)
        except ValidationError as error:
            raise refusal(error, "series") from None

    @classmethod
    def of_document(cls, document: SeriesDocument) -> Self:
        """Return the series of a JSON document."""
        return cls(model=document.model, points=document.points, provenance=document.provenance)

    @classmethod
    def of_removals(
        cls,
        model: ModelReference,
        order: Iterable[Iterable[tuple[int, str]]],
        scores: Iterable[Mapping[str, float]],
        **provenance: Any,
    ) -> Self:
        """Return the series that removes one group of sublayers after another.

        Args:
            model: the model that the plans are for.
            order: groups of positions, in the order of removal.
            scores: measurements with nothing removed, then after each removal.
            provenance: provenance of the series.
        """
        gone: set[tuple[int, str]] = set()
        measured = iter(scores)
        points = [Point(scores=dict(next(measured)))]
        for group in order:
            gone |= set(group)
            points.append(Point(drop=model.sites({model.default: gone}), scores=dict(next(measured))))
        return cls(model=model, points=points, provenance=provenance)

    @property
    def renames_tokens(self) -> bool:
        """Whether one of its plans renames tokens; see :attr:`lamella.plan.Plan.renames_tokens`."""
        return any(site.endswith(VOCAB) for point in self.points for site in point.width)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Plan:
        return self.document.plan(index)

    def __iter__(self) -> Iterator[Plan]:
        document = self.document
        return (document.plan(index) for index in range(len(self)))

    def removing(self, sublayers: int) -> Plan:
        """Return the plan that removes the most sublayers, but at most ``sublayers`` of them.

        Raises:
            PlanError: if the plans change weights only.
        """
        if any(plan.masked for plan in self) and not any(plan.removed for plan in self):
            name = self.provenance.get("method", "this series")
            raise PlanError(
                f"{name} masks weights and removes no sublayers: choose by its own option sparsity, not ratio"
            )
        candidates = [plan for plan in self if plan.removed <= sublayers]
        return max(candidates, key=lambda plan: plan.removed)

    def at_ratio(self, ratio: float) -> Plan:
        """Return the plan that removes at most this fraction of all sublayers (FinerCut's ratio).

        Raises:
            PlanError: for a ratio out of range.
        """
        if not 0 <= ratio < 1:
            raise PlanError(
                f"ratio {ratio} is out of range: give the fraction of sublayers to remove, at least 0 and below 1"
            )
        return self.removing(int(ratio * len(self.model.positions) + 1e-9))

    # JSON document

    @classmethod
    def parse(cls, text: str, where: str = "series") -> Self:
        """Parse the JSON text of a series.

        Args:
            text: the JSON text.
            where: what to call the series in messages.

        Raises:
            PlanError: one line that names the field.
        """
        return cls.of_document(SeriesDocument.parse(text, where))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a series from its file, or from a folder of results; see :meth:`parse`."""
        path = Path(path)
        return cls.of_document(SeriesDocument.read(path / FILE if path.is_dir() else path))

    def dump(self) -> str:
        """Return the series as JSON text."""
        return self.document.dump()

    def write(self, path: str | Path) -> None:
        """Write the series to a file; or, into a folder, as ``series.json`` with the chosen plan as ``plan.json``.

        Side files are written to the same folder.

        Args:
            path: a file or an existing folder.

        Raises:
            PlanError: for a side file whose name leads to another folder.
            ExportError: if it cannot be written.
        """
        path = Path(path)
        document = self.document
        if not path.is_dir():
            document.write(path)
            return
        document.write(path / FILE)
        document.plan(self.chosen).write(path / PLAN)

    def settle(self, folder: Path) -> None:
        """Set the folder in which side files are looked up."""
        self.document.settle(folder)

    # Result

    def body(self) -> dict[str, Any]:
        """Return the fields of the evidence."""
        points = zip(self, self.points, strict=True)
        return {
            "chosen": self.chosen % len(self),
            "points": [
                {"removed": plan.removed, "masked": plan.masked, "scores": point.scores} for plan, point in points
            ],
        }

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write the series as a folder of results; see :meth:`lamella.result.Result.save`."""
        super().save(out, documents, overwrite=overwrite, tokenizer=tokenizer)
        self.settle(out)  # the working folder with its side files is deleted

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Return the headline and the table of the series."""
        assert isinstance(evidence, SeriesEvidence)
        names = list(dict.fromkeys(name for point in evidence.points for name in point["scores"]))
        masks = any(point["masked"] for point in evidence.points)
        what = "weights masked" if masks else "sublayers removed"
        rows = [
            [number, point["masked" if masks else "removed"], *(point["scores"].get(name) for name in names)]
            for number, point in enumerate(evidence.points)
        ]
        chosen = f"; plan {evidence.chosen} is chosen" if evidence.chosen >= 0 else ""
        return Summary(
            f"{evidence.method} has made {counted(len(rows), 'plan')}, starting with the whole model{chosen}.",
            [Table("The series", ["plan", what, *names], rows)],
        )
