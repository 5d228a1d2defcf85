"""A study: measurements and findings, and nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lamella.result import Evidence, Result


class Study(Result):
    """What was measured; all of it is in the findings."""

    kind: ClassVar[str] = "study"

    @classmethod
    def read(cls, path: Path) -> Study:
        """The study in a folder of results: its findings, whatever made them."""
        evidence = Evidence.read(path)
        return Study(findings=evidence.findings, notes=evidence.notes, provenance=evidence.provenance)

    def __getitem__(self, name: str) -> Any:
        return self.findings[name]
