"""The result: a network without some blocks, saved as a pipeline that diffusers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.methods.laptop_diff.cut import Form, add_class
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.plan import Plan
from lamella.results import Evidence, Result
from lamella.train import TrainingLog

PLAN, LOG = "plan.json", "log.json"


class PrunedEvidence(Evidence):
    """Evidence of a pruned denoiser.

    Attributes:
        sites: sites of the dropped blocks.
        form: form of the saved pipeline.
    """

    sites: list[str]
    form: Form


@dataclass(kw_only=True)
class PrunedDenoiser(Result):
    """A pipeline whose network lacks some blocks.

    Attributes:
        denoiser: the pruned denoiser.
        plan: plan with the dropped blocks.
        form: form of the saved pipeline.
        log: training log, if it was healed.
    """

    denoiser: Denoiser
    plan: Plan
    form: Form
    log: TrainingLog | None = None

    kind: ClassVar[str] = "pruned"
    evidence: ClassVar[type[Evidence]] = PrunedEvidence
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.provenance = self.plan.provenance  # the same object, so that the plan contains it too

    def body(self) -> dict[str, Any]:
        """Fields of the evidence."""
        return {"sites": self.plan.drop, "form": self.form}

    def write(self, folder: Path) -> None:
        """Write the pipeline, the plan and the training log."""
        self.denoiser.pipeline.save_pretrained(folder)
        if self.form == "native":
            add_class(folder, self.denoiser.part, type(self.denoiser.network).__name__)
        self.plan.write(folder / PLAN)
        if self.log is not None:
            self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: str | Path) -> PrunedDenoiser:
        """Read a result from a folder.

        Raises:
            CheckpointError, PlanError: for a missing or damaged folder.
        """
        path = Path(path)
        form = PrunedEvidence.read(path).form
        log = TrainingLog.read(path / LOG) if (path / LOG).is_file() else None
        return cls(denoiser=Denoiser.open(path), plan=Plan.read(path / PLAN), form=form, log=log)
