"""The result: a network of which blocks are gone, written as a pipeline that diffusers loads."""

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
        sites: of the blocks that are gone.
        form: of what is written.
    """

    sites: list[str]
    form: Form


@dataclass(kw_only=True)
class Pruned(Result):
    """A pipeline whose network lacks blocks.

    Attributes:
        denoiser: what is left.
        plan: what is gone.
        form: in which it is written.
        log: of its training, where it was trained.
    """

    denoiser: Denoiser
    plan: Plan
    form: Form
    log: TrainingLog | None = None

    kind: ClassVar[str] = "pruned"
    evidence: ClassVar[type[Evidence]] = PrunedEvidence
    needs_folder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.provenance = self.plan.provenance  # one and the same, so that the plan says it too

    def body(self) -> dict[str, Any]:
        return {"sites": self.plan.drop, "form": self.form}

    def write(self, folder: Path) -> None:
        """The pipeline, the plan and the log of a training."""
        self.denoiser.pipeline.save_pretrained(folder)
        if self.form == "native":
            add_class(folder, self.denoiser.part, type(self.denoiser.network).__name__)
        self.plan.write(folder / PLAN)
        if self.log is not None:
            self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: str | Path) -> Pruned:
        """What a folder holds.

        Raises:
            CheckpointError, PlanError: when it is missing or damaged.
        """
        path = Path(path)
        form = PrunedEvidence.read(path).form
        log = TrainingLog.read(path / LOG) if (path / LOG).is_file() else None
        return cls(denoiser=Denoiser.open(path), plan=Plan.read(path / PLAN), form=form, log=log)
