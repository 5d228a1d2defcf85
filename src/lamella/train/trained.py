"""A trained model as a result: its checkpoint, its plan and its training log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lamella.formatting import counted, number
from lamella.result import Documents, Evidence, Summary
from lamella.runtime.edit import Edit, EditEvidence, fidelity_table
from lamella.train.log import TrainingLog


class TrainedEvidence(EditEvidence):
    """Evidence of training.

    Attributes:
        before: fidelity of the plan before healing.
        settings: all settings that determine the training.
        curve, held_out: losses by step, with their parts.
    """

    before: dict[str, Any] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    curve: list[dict[str, float]] = Field(default_factory=list)
    held_out: list[dict[str, float]] = Field(default_factory=list)


@dataclass(kw_only=True)
class Trained(Edit):
    """A model with trained weights, and its plan."""

    log: TrainingLog

    kind: ClassVar[str] = "trained"
    evidence: ClassVar[type[Evidence]] = TrainedEvidence

    def __post_init__(self) -> None:
        """Keep its own provenance: the plan has that of the method that made it."""

    def body(self) -> dict[str, Any]:
        """Return the evidence, with the settings and curves of training."""
        return super().body() | {
            "settings": dict(self.log.settings),
            "curve": [{"step": point.step, "loss": point.loss, **point.parts} for point in self.log.train],
            "held_out": [{"step": point.step, "loss": point.loss, **point.parts} for point in self.log.held_out],
        }

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write the result with its training log.

        Args:
            out: the folder.
            documents: returns further documents by name: evidence, page and card.
            overwrite: replace an existing folder.
            tokenizer: tokenizer of the model, for a checkpoint.
        """
        log = {"log.json": self.log.dump()}
        super().save(out, lambda: documents() | log, overwrite=overwrite, tokenizer=tokenizer)

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Return the summary with the fidelity and the final loss."""
        assert isinstance(evidence, TrainedEvidence)
        name = (evidence.model or {}).get("name", "the model")
        tables = [fidelity_table(evidence.fidelity, evidence.before)] if evidence.fidelity else []
        last = evidence.curve[-1]["loss"] if evidence.curve else None
        lines = []
        if last is not None:
            steps = counted(round(evidence.curve[-1]["step"]), "step")
            lines.append(f"the loss ends at {number(last)} nats, after {steps}")
        return Summary(f"{evidence.method} has trained {name}.", tables, lines)


@dataclass(kw_only=True)
class Healed(Trained):
    """A model that was healed by training under a plan.

    ``stack`` is the original's own if no weights were trained, for example only a policy. The plan is that of the
    trained weights.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan.model.weights is not None and self.stack.path is None:  # its weights are only in memory
            model = self.plan.model.model_copy(update={"weights": None})
            self.plan = self.plan.model_copy(update={"model": model})
