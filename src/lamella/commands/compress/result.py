"""A compressed model as a result: what was chosen and measured, and the folder that it is exported to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lamella.commands.compress.variants import Quantize
from lamella.commands.quantize import write_beside
from lamella.evaluate import peak_memory
from lamella.files import new_folder
from lamella.plan import Plan
from lamella.plan.export import export
from lamella.progress import tracker
from lamella.provenance import environment
from lamella.result import Documents, Evidence, Result
from lamella.stack import Stack


class CompressionEvidence(Evidence):
    """Evidence of a compression.

    Attributes:
        target_speedup: the decode speed-up that was asked for.
        step_seconds: where the time of one decoding step of the original goes.
        base, chosen: the original and what was chosen, with cost, timings and memory; ``chosen`` also has its method,
            its plan and its fidelity before healing.
        layers: of each layer, what its sublayers do: ``kept``, ``cut``, ``prompt`` or ``some``.
        curves: of each planner, what was measured along its series.
        scores: what the drawing of the stack is coloured by.
        healing: the training, and fidelity after it; None where nothing was healed.
        samples: answers of both models to the same prompts.
        tasks: scores of all models; empty where none were asked for.
        variants: the models whole and in 8 bits.
        quantised: what was written in 8 bits.
    """

    target_speedup: float
    step_seconds: dict[str, Any]
    base: dict[str, Any]
    chosen: dict[str, Any]
    layers: list[dict[str, str]]
    curves: list[dict[str, Any]]
    scores: dict[str, Any]
    healing: dict[str, Any] | None = None
    samples: list[dict[str, str]] = Field(default_factory=list)
    tasks: list[dict[str, Any]] = Field(default_factory=list)
    variants: list[dict[str, Any]] = Field(default_factory=list)
    quantised: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Compression(Result):
    """A compressed model, and what was measured of it.

    Attributes:
        stack: the original.
        changed: the model with healed weights; the original where nothing was healed.
        plan: what is left out, for ``changed``.
        measured: what evidence says of it.
        processor: what the model reads with.
        quantize: what to write in 8 bits, too.
    """

    stack: Stack
    changed: Stack
    plan: Plan
    measured: dict[str, Any] = field(default_factory=dict)
    processor: Any = None
    quantize: Quantize | None = None

    kind: ClassVar[str] = "compression"
    evidence: ClassVar[type[Evidence]] = CompressionEvidence
    needs_folder: ClassVar[bool] = True

    @property
    def chosen(self) -> dict[str, Any]:
        """What was chosen, as evidence has it."""
        chosen: dict[str, Any] = self.measured["chosen"]
        return chosen

    def body(self) -> dict[str, Any]:
        return self.measured

    def save(
        self, out: str | Path, documents: Documents | None = None, *, overwrite: bool = False, tokenizer: Any = None
    ) -> None:
        """Export, measure the memory of what was exported, which the documents say, and write them.

        Args:
            out: the folder to write.
            documents: gives evidence, page and card; its own when left out.
            overwrite: replace ``out``.
            tokenizer: in place of what the model was opened with.
        """
        out = Path(out)
        with (
            tracker(f"exporting and measuring {out.name}"),
            new_folder(out, size=0, overwrite=overwrite, source=self.stack.path) as folder,
        ):
            place = folder / "export" / out.name
            processor = tokenizer or self.processor
            exported = export(self.changed, self.plan, place, form=self.chosen["form"], tokenizer=processor)
            self.chosen["memory"] = peak_memory(exported).as_dict()
            if self.stack.path is not None:
                self.measured["base"]["memory"] = peak_memory(self.stack.path).as_dict()
            if self.quantize is not None:
                self.measured["quantised"] = write_beside(exported, self.quantize.kind)
            for name, text in (documents or self.documents)().items():
                (exported / name).write_text(text, encoding="utf-8")
            for path in exported.iterdir():
                path.rename(folder / path.name)
            shutil.rmtree(folder / "export")

    def documents(self) -> dict[str, str]:
        """Evidence, page and card."""
        from lamella.commands.compress.page import card, page

        evidence = CompressionEvidence(
            kind=self.kind,
            provenance=self.provenance,
            environment=environment(),
            model=self.stack.describe(),
            data=self.data,
            notes=self.notes,
            **self.body(),
        )
        return {"evidence.json": evidence.dump(), "report.html": page(evidence), "README.md": card(evidence)}

    @classmethod
    def summary(cls, evidence: Evidence) -> Any:
        from lamella.commands.compress.page import summary

        return summary(evidence)
