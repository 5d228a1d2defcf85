"""Versioned JSON documents with one-line validation errors, and the side files in the same folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PrivateAttr, ValidationError

from lamella.errors import ExportError, PlanError
from lamella.files import replacing, write
from lamella.reading import parse_json

Read = TypeVar("Read", bound="JsonDocument")
_NUMBERS = re.compile(r"\[\n\s*(\d+(?:,\n\s*\d+)*)\n\s*\]")


def refusal(error: ValidationError, where: str) -> PlanError:
    """Return the first of some validation errors as one line that names the field.

    Args:
        error: the validation error.
        where: what to call the document in the message.
    """
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    return PlanError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}")


def text_of(path: str | Path) -> str:
    """Return the text of a document's file.

    Args:
        path: the file.

    Raises:
        PlanError: if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read ({error.__class__.__name__}): give the path of a JSON plan") from None


def schema_of(text: str) -> str:
    """Return the schema that a JSON text declares; an empty string if it declares none."""
    try:
        document = parse_json(text)
    except ValueError:
        return ""
    schema = document.get("schema") if isinstance(document, dict) else None
    return schema if isinstance(schema, str) else ""


class JsonDocument(BaseModel):
    """A versioned JSON document, or a part of one."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    @classmethod
    def parse(cls: type[Read], text: str, where: str = "plan") -> Read:
        """Parse the JSON text of a document.

        Args:
            text: the JSON text.
            where: what to call the document in messages.

        Raises:
            PlanError: one line that names the field and the fix.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise refusal(error, where) from None

    @classmethod
    def read(cls: type[Read], path: str | Path) -> Read:
        """Read a document from a file; see :meth:`parse`."""
        return cls.of_file(text_of(path), path)

    @classmethod
    def of_file(cls: type[Read], text: str, path: str | Path) -> Read:
        """Return the document of a file whose text is already known; its side files are in the folder of that file.

        Args:
            text: the JSON text.
            path: the file.
        """
        document = cls.parse(text, where=str(path))
        document.settle(Path(path).parent)
        return document

    def settle(self, folder: Path) -> None:
        """Set the folder in which side files are looked up."""
        for part in self._parts():
            part._folder = folder

    def _parts(self) -> Sequence[SidefileDocument]:
        """Return the parts of the document that may have side files."""
        return []

    def dump(self) -> str:
        """Return the document as JSON text."""
        text = self.model_dump_json(indent=2, by_alias=True, exclude_defaults=False)
        return (
            _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"
        )  # each list of integers on one line

    def write(self, path: str | Path) -> None:
        """Write the document to a file, and its side files into the same folder.

        Args:
            path: the file.

        Raises:
            PlanError: for a side file whose name leads to another folder.
            ExportError: if it cannot be written.
        """
        folder = Path(path).parent
        for part in self._parts():
            try:
                _ = part.is_folder or plain_name(part.file)
            except ValueError as error:
                raise PlanError(f"{path}: {error}") from None
        try:
            for part in self._parts():
                if part.file is None or part.is_folder:  # another checkpoint is referenced, not copied
                    continue
                if part.located.resolve() != (folder / part.file).resolve():
                    with replacing(folder / part.file) as partial:
                        shutil.copyfile(part.located, partial)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
        write(path, self.dump())


def plain_name(name: str | None) -> str | None:
    """Return the name of a side file if it stays in the folder of its plan.

    Raises:
        ValueError: for a name that leads to another folder.
    """
    if name is not None and (not name.strip(".") or set(name) & set("/\\:\0")):
        raise ValueError(f"'{name}' is not a plain file name: a side file is in the folder of its plan")
    return name


class SidefileDocument(JsonDocument):
    """A part of a document that may have a side file.

    Attributes:
        file: name of the side file, in the folder of the plan; None if there is none.
        sha256: SHA-256 of the side file.
    """

    file: Annotated[str | None, AfterValidator(plain_name)] = None
    sha256: str | None = None

    _folder: Path = PrivateAttr(default=Path("."))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.model_dump() == other.model_dump()  # the folder does not matter

    @property
    def is_folder(self) -> bool:
        """Whether it names another checkpoint instead of a side file."""
        return False

    @property
    def located(self) -> Path:
        """The path of the side file, in the folder of the plan that names it."""
        return self._folder / (self.file or "")
