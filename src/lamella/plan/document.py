"""Versioned JSON documents whose errors are one line, and the side files that lie beside them."""

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
    """The first of some errors as one line that names the field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    return PlanError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}")


def text_of(path: str | Path) -> str:
    """What is in the file of a document.

    Raises:
        PlanError: when it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read ({error.__class__.__name__}): give the path of a JSON plan") from None


def schema_of(text: str) -> str:
    """The schema that a text says it has; nothing where it says none."""
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
        """Read the JSON text of a document.

        Raises:
            PlanError: one line that names the field and the mend.
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
        """The document that a file says, whose text is known; its side files lie beside that file."""
        document = cls.parse(text, where=str(path))
        document.settle(Path(path).parent)
        return document

    def settle(self, folder: Path) -> None:
        """Find side files in this folder from now on."""
        for part in self._parts():
            part._folder = folder

    def _parts(self) -> Sequence[SidefileDocument]:
        """The parts of the document whose side files lie beside it."""
        return []

    def dump(self) -> str:
        text = self.model_dump_json(indent=2, by_alias=True, exclude_defaults=False)
        return _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"  # a list on one line

    def write(self, path: str | Path) -> None:
        """Write the document to a file, and its side files beside it.

        Raises:
            PlanError: for a side file whose name would lead elsewhere.
            ExportError: when it cannot be written.
        """
        folder = Path(path).parent
        for part in self._parts():
            try:
                _ = part.is_folder or plain_name(part.file)
            except ValueError as error:
                raise PlanError(f"{path}: {error}") from None
        try:
            for part in self._parts():
                if part.file is None or part.is_folder:  # another checkpoint is named, not copied
                    continue
                if part.located.resolve() != (folder / part.file).resolve():
                    with replacing(folder / part.file) as partial:
                        shutil.copyfile(part.located, partial)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
        write(path, self.dump())


def plain_name(name: str | None) -> str | None:
    """A side file lies beside its plan, so its name leads nowhere else."""
    if name is not None and (not name.strip(".") or set(name) & set("/\\:\0")):
        raise ValueError(f"'{name}' is no plain name: a side file lies beside its plan")
    return name


class SidefileDocument(JsonDocument):
    """A part of a document that has a side file beside it, under a plain name."""

    file: Annotated[str | None, AfterValidator(plain_name)] = None
    sha256: str | None = None

    _folder: Path = PrivateAttr(default=Path("."))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.model_dump() == other.model_dump()  # wherever they lie

    @property
    def is_folder(self) -> bool:
        """Whether it names another checkpoint, and no side file."""
        return False

    @property
    def located(self) -> Path:
        """The side file, beside the plan that names it."""
        return self._folder / (self.file or "")
