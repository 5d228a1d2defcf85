"""A study: measurements and findings, and nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from lamella.result import Evidence, Result


class Study(Result):
    """What was measured; all of it is in the findings."""

    kind: ClassVar[str] = "study"

    @classmethod
    def read(cls, path: Path) -> Self:
        """The study in a folder of results."""
        evidence = Evidence.read(path)
        return cls(findings=evidence.findings, notes=evidence.notes, provenance=evidence.provenance)

    def __getitem__(self, name: str) -> Any:
        return self.findings[name]
