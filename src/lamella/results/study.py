"""A study: measurements and findings, without changes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lamella.result import Evidence, Result


class Study(Result):
    """A result that consists of measurements only, all of them in its findings."""

    kind: ClassVar[str] = "study"

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study from a folder of results; any kind of result can be read as a study.

        Args:
            path: folder of the results.
        """
        evidence = Evidence.read(path)
        return Study(findings=evidence.findings, notes=evidence.notes, provenance=evidence.provenance)

    def __getitem__(self, name: str) -> Any:
        return self.findings[name]
