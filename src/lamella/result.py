"""What every command returns: a result, the evidence that goes with it, and what to say of it.

It lies beside the registry and needs no torch, so that plans and trained models, which are results themselves, are
built on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lamella.errors import LamellaError
from lamella.files import new_folder
from lamella.formatting import MISSING
from lamella.reading import in_utf_8, parse_json, read_text


@dataclass(frozen=True)
class Table:
    """A table of any values, which become text here and nowhere else.

    Attributes:
        title: one line.
        columns: the header of each column.
        rows: one cell for each column.
    """

    title: str
    columns: Sequence[Any]
    rows: Sequence[Sequence[Any]]

    @property
    def headers(self) -> list[str]:
        """The headers as text."""
        return [shown(each) for each in self.columns]

    @property
    def cells(self) -> list[list[str]]:
        """The cells as text, row by row."""
        return [[shown(each) for each in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether all of its cells are numbers."""
        return [
            bool(self.rows) and all(isinstance(row[place], int | float) for row in self.rows)
            for place in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Summary:
    """The findings of a run.

    Attributes:
        verdict: one sentence.
        tables: in the order in which a reader wants them.
        lines: what else there is to say.
    """

    verdict: str
    tables: Sequence[Table] = field(default_factory=tuple)
    lines: Sequence[str] = field(default_factory=tuple)


def shown(cell: Any) -> str:
    """A value as text: numbers with four significant digits, a dash for one that is not finite, None as nothing."""
    if cell is None:
        return ""
    if isinstance(cell, float) and not math.isfinite(cell):
        return MISSING
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


class Evidence(BaseModel):
    """What all evidence says; a kind of result adds its own fields, a method its ``findings``.

    Attributes:
        kind: of the result.
        provenance: the method, its version, options, inputs and seed, and the machine.
        environment: threads, versions and date.
        model: what was opened, where a model was.
        data: what the model was tested on, by role.
        findings: the method's own measurements; JSON values.
        notes: what a reader must know, one sentence each.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["lamella.evidence/2"] = Field("lamella.evidence/2", alias="schema")
    kind: str
    provenance: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any] | None = None
    data: dict[str, Any] = {}
    findings: dict[str, Any] = {}
    notes: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _in_utf_8(cls, said: Any) -> Any:
        """Inputs are named by their paths, which may be no UTF-8."""
        return in_utf_8(said)

    @property
    def method(self) -> str:
        return str(self.provenance["method"])

    def update(self, result: Result) -> None:
        """Take over what a result has learnt since, such as by being written."""
        for name, value in {"findings": result.findings, **result.body()}.items():
            setattr(self, name, value)

    def dump(self) -> str:
        """As JSON, in which a number that JSON cannot say is null."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Evidence from its file, or from the folder that has it.

        Raises:
            LamellaError: one line, for a file that is no such evidence.
        """
        file = Path(path) / "evidence.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate(parse_json(read_text(file)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "document"
            raise LamellaError(f"{file}: no evidence of this kind: {place}: {first['msg']}") from None
        except ValueError as error:
            raise LamellaError(f"{file}: no evidence ({error}); give a folder that Lamella has written") from None


Documents = Callable[[], dict[str, str]]


@dataclass(kw_only=True)
class Result:
    """What a command returns. A kind of result says what its evidence adds, and which files it has.

    Attributes:
        findings: the method's own measurements; JSON values.
        notes: what a reader must know, one sentence each.
        data: what it was made on, by role.
        files: further documents of the method, by name.
        provenance: stamped by the registry.
    """

    findings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "result"
    evidence: ClassVar[type[Evidence]] = Evidence
    needs_folder: ClassVar[bool] = False  # whether a run that writes nothing would be in vain
    writes: ClassVar[bool] = True  # whether there is anything to write
    loading: ClassVar[str] = ""  # what the card says of how to use what is written, a section of its own

    @property
    def code(self) -> int:
        """The exit code of a command line that ends with it."""
        return 0

    def body(self) -> dict[str, Any]:
        """What the evidence of this kind says beyond what all evidence says."""
        return {}

    def write(self, folder: Path) -> None:
        """Write what evidence does not hold."""

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Make a folder of results, all at once.

        Args:
            documents: gives what else goes into it, by name: evidence, page and card. It is called when the rest is
                written.
            tokenizer: of the model, for a checkpoint.

        Raises:
            ExportError: when it exists, or cannot be written.
        """
        with new_folder(out, size=0, overwrite=overwrite) as folder:
            self.write(folder)
            for name, text in documents().items():
                (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """What to say of it, where the method has nothing better: findings that are single numbers."""
        plain = [[name, value] for name, value in evidence.findings.items() if isinstance(value, int | float | str)]
        return Summary(f"{evidence.method} is done.", [Table("Findings", ["", ""], plain)] if plain else [])
