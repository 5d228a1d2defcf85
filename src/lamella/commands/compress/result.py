"""The result of a compression: the choice, its measurements, and the exported folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lamella.commands.compress.llama_cpp import REFERENCE
from lamella.commands.compress.routes import UNQUANTISED, Quantize
from lamella.commands.quantize import Kind, write_beside
from lamella.evaluate import peak_memory
from lamella.files import new_folder
from lamella.plan import Plan
from lamella.plan.export import export
from lamella.plan.quantize import write_int8
from lamella.progress import tracker
from lamella.provenance import environment
from lamella.result import Documents, Evidence, Result
from lamella.stack import Stack
from lamella.zoo import open_config


class CompressionEvidence(Evidence):
    """Evidence of a compression.

    Attributes:
        goal: name, value and text of the goal.
        target_speedup: the target of the decode speed-up, if that is the goal.
        step_seconds: step times of the original by part.
        base: cost, timings and memory of the original.
        chosen: the same of the chosen plan, with its method, the plan, and its fidelity before healing.
        layers: states of the sublayers of each layer: ``kept``, ``cut``, ``prompt`` or ``some``.
        curves: measurements along the series of each planner.
        scores: scores for the colours of the stack drawing.
        healing: record of the training, and fidelity after it; None if the model was not healed.
        samples: answers of both models to the same prompts.
        tasks: scores of all models; empty if there were no tasks.
        routes: the routes that were measured: each model with its weights as they are and quantised.
        agreement: bounds of the top-1 agreement of the result, for whichever route was chosen; None in evidence that
            was written before they were measured.
        quantised: description of the quantised files.
        runtime: the program with which speed was measured; for llama.cpp its version, threads, and the kind of file
            that speed-ups are relative to.
    """

    goal: dict[str, Any]
    runtime: dict[str, Any] = Field(default_factory=lambda: {"name": "torch"})
    target_speedup: float | None = None
    step_seconds: dict[str, Any]
    base: dict[str, Any]
    chosen: dict[str, Any]
    layers: list[dict[str, str]]
    curves: list[dict[str, Any]]
    scores: dict[str, Any]
    healing: dict[str, Any] | None = None
    samples: list[dict[str, str]] = Field(default_factory=list)
    tasks: list[dict[str, Any]] = Field(default_factory=list)
    routes: list[dict[str, Any]] = Field(default_factory=list)
    quantised: dict[str, Any] | None = None
    agreement: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Compression(Result):
    """A compressed model, and its measurements.

    Attributes:
        stack: the original.
        changed: the model with healed weights; the original if it was not healed.
        plan: the plan, for ``changed``.
        measured: the measurements, as in evidence.
        processor: processor or tokenizer of the model.
        quantize: how to quantise the result.
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
        """The chosen plan with its measurements, as in evidence."""
        chosen: dict[str, Any] = self.measured["chosen"]
        return chosen

    def body(self) -> dict[str, Any]:
        """Return the fields that the evidence of this kind adds."""
        return self.measured

    def save(
        self, out: str | Path, documents: Documents | None = None, *, overwrite: bool = False, tokenizer: Any = None
    ) -> None:
        """Export the model, measure the memory of the export, and write the documents.

        Args:
            out: the output folder.
            documents: returns evidence, page and card; the default ones if None.
            overwrite: replace ``out``.
            tokenizer: overrides the processor that the model was opened with.
        """
        out = Path(out)
        with (
            tracker(f"exporting and measuring {out.name}"),
            new_folder(out, size=0, overwrite=overwrite, source=self.stack.path) as folder,
        ):
            path = folder / "export" / out.name
            processor = tokenizer or self.processor
            exported = export(self.changed, self.plan, path, form=self.chosen["form"], tokenizer=processor)
            if self.measured["runtime"]["name"] == "llama.cpp":
                kind: Kind = self.chosen["quantised"] or REFERENCE
                self.measured["quantised"] = write_beside(exported, kind)
            else:
                exported = self._for_torch(exported, processor)
            for name, text in (documents or self.documents)().items():
                (exported / name).write_text(text, encoding="utf-8")
            for path in exported.iterdir():
                path.rename(folder / path.name)
            shutil.rmtree(folder / "export")

    def _for_torch(self, exported: Path, processor: Any) -> Path:
        """Write an export in the forms that were chosen and requested, and measure its memory; return its folder."""
        if self.chosen["quantised"]:
            exported = self._in_int8(exported, processor)
        self.chosen["memory"] = peak_memory(exported).as_dict()
        if self.stack.path is not None:
            self.measured["base"]["memory"] = peak_memory(self.stack.path).as_dict()
        if self.quantize is not None:
            source = exported / UNQUANTISED if self.chosen["quantised"] else exported
            self.measured["quantised"] = write_beside(source, self.quantize.kind)
        return exported

    def _in_int8(self, exported: Path, processor: Any) -> Path:
        """Quantise an export, which is kept in a folder within unless it is the original."""
        quantised = exported.with_name("int8") / exported.name
        write_int8(exported, open_config(exported), processor, quantised)
        shutil.copy(exported / "plan.json", quantised)
        if self.chosen["cut"] or self.quantize is not None:
            exported.rename(quantised / UNQUANTISED)
        return quantised

    def documents(self) -> dict[str, str]:
        """Return evidence, page and card."""
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
        """Summarise the compression."""
        from lamella.commands.compress.page import summary

        return summary(evidence)
