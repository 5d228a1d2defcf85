"""A study: measurements and findings, without changes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lamella.result import Evidence, Result


class Study(Result):
    """Measurements; all of them are in the findings."""

    kind: ClassVar[str] = "study"

    @classmethod
    def read(cls, path: Path) -> Study:
        """Return the study in a folder of results: its findings, whatever made them."""
        evidence = Evidence.read(path)
        return Study(findings=evidence.findings, notes=evidence.notes, provenance=evidence.provenance)

    def __getitem__(self, name: str) -> Any:
        return self.findings[name]
