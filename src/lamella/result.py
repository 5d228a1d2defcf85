"""Results of commands, the evidence that goes with them, and their summary.

This module lies beside the registry and does not import torch, so that plans and trained models, which are results
themselves, can be built on it.
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
    """A table of arbitrary values, which are formatted as text here and nowhere else.

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
        """For each column, whether all of its cells are numbers."""
        return [
            bool(self.rows) and all(isinstance(row[column], int | float) for row in self.rows)
            for column in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Summary:
    """The findings of a run.

    Attributes:
        verdict: one sentence.
        tables: in order of importance.
        lines: further remarks.
    """

    verdict: str
    tables: Sequence[Table] = field(default_factory=tuple)
    lines: Sequence[str] = field(default_factory=tuple)


def shown(cell: Any) -> str:
    """Format a value: numbers with four significant digits, a dash if not finite, an empty string for None."""
    if cell is None:
        return ""
    if isinstance(cell, float) and not math.isfinite(cell):
        return MISSING
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


class Evidence(BaseModel):
    """The record of a run; a kind of result adds its own fields, a method its ``findings``.

    Attributes:
        kind: kind of the result.
        provenance: the method, its version, options, inputs and seed, and the machine.
        environment: threads, versions and date.
        model: description of the model, if there is one.
        data: the data of the evaluation, by role.
        findings: the method's own measurements; JSON values.
        notes: what users must know, one sentence each.
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
    def _in_utf_8(cls, values: Any) -> Any:
        """Replace characters that UTF-8 cannot encode, since paths of inputs may contain them."""
        return in_utf_8(values)

    @property
    def method(self) -> str:
        """The slug of the method."""
        return str(self.provenance["method"])

    def update(self, result: Result) -> None:
        """Take over changes of a result, such as those from being written.

        Args:
            result: the result.
        """
        for name, value in {"findings": result.findings, **result.body()}.items():
            setattr(self, name, value)

    def dump(self) -> str:
        """Return the JSON text, in which numbers that are not finite are null."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read evidence from its file, or from its folder.

        Args:
            path: the file or the folder.

        Raises:
            LamellaError: one line, if the file is no such evidence.
        """
        file = Path(path) / "evidence.json" if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate(parse_json(read_text(file)))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "document"
            raise LamellaError(f"{file}: no evidence of this kind: {field}: {first['msg']}") from None
        except ValueError as error:
            raise LamellaError(f"{file}: no evidence ({error}); give a folder that Lamella has written") from None


Documents = Callable[[], dict[str, str]]


@dataclass(kw_only=True)
class Result:
    """What a command returns. A kind of result defines what its evidence adds, and which files it has.

    Attributes:
        findings: the method's own measurements; JSON values.
        notes: what users must know, one sentence each.
        data: the data that it was made from, by role.
        files: further documents of the method, by name.
        provenance: written by the registry.
    """

    findings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "result"
    evidence: ClassVar[type[Evidence]] = Evidence
    needs_folder: ClassVar[bool] = False  # whether a run without an output folder would be useless
    writes: ClassVar[bool] = True  # whether there is anything to write
    loading: ClassVar[str] = ""  # section of the card on how to use the files

    @property
    def code(self) -> int:
        """The exit code of the command line."""
        return 0

    def body(self) -> dict[str, Any]:
        """Return the fields that the evidence of this kind adds."""
        return {}

    def write(self, folder: Path) -> None:
        """Write the files of the result that are not evidence.

        Args:
            folder: the folder.
        """

    def save(self, out: Path, documents: Documents, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write a folder of results atomically.

        Args:
            out: the folder.
            documents: returns further documents by name: evidence, page and card. It is called when the rest is
                written.
            overwrite: replace an existing folder.
            tokenizer: tokenizer of the model, for a checkpoint.

        Raises:
            ExportError: if the folder exists, or cannot be written.
        """
        with new_folder(out, size=0, overwrite=overwrite) as folder:
            self.write(folder)
            for name, text in documents().items():
                (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Return the default summary, for methods without their own: findings that are single values.

        Args:
            evidence: the evidence.
        """
        plain = [[name, value] for name, value in evidence.findings.items() if isinstance(value, int | float | str)]
        return Summary(f"{evidence.method} is done.", [Table("Findings", ["", ""], plain)] if plain else [])
