"""Evidence: the measured record that goes with every artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lamella.errors import LamellaError
from lamella.reading import in_utf_8, parse_json, read_text


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
