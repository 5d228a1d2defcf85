"""What every result of a command has: evidence, a summary, and a way to be written and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lamella.files import new_folder
from lamella.report.summary import Summary, Table
from lamella.results.evidence import Evidence


@dataclass(kw_only=True)
class Result:
    """What a command returns. A kind of result says what its evidence adds, and which files it has.

    Attributes:
        findings: the method's own measurements; JSON values.
        notes: what a reader must know, one sentence each.
        files: further documents of the method, by name.
        provenance: stamped by the house.
    """

    findings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "result"
    evidence: ClassVar[type[Evidence]] = Evidence
    needs_folder: ClassVar[bool] = False  # whether a run that writes nothing would be in vain
    loading: ClassVar[str] = ""  # what the card says of how to use what is written, a section of its own

    def body(self) -> dict[str, Any]:
        """What the evidence of this kind says beyond what all evidence says."""
        return {}

    def write(self, folder: Path) -> None:
        """Write what evidence does not hold."""

    def save(self, out: Path, documents: dict[str, str], *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Make a folder of results, all at once.

        Args:
            documents: what else goes into it, by name: evidence, page and card.
            tokenizer: of the model, for a checkpoint.

        Raises:
            ExportError: when it exists, or cannot be written.
        """
        with new_folder(out, size=0, overwrite=overwrite) as folder:
            self.write(folder)
            for name, text in documents.items():
                (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """What to say of it, where the method has nothing better: findings that are single numbers."""
        plain = [[name, value] for name, value in evidence.findings.items() if isinstance(value, int | float | str)]
        return Summary(f"{evidence.method} is done.", [Table("Findings", ["", ""], plain)] if plain else [])
