"""A trained network of a method as a result: a folder that is read back without executing code from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn

from lamella.errors import CheckpointError, reason_of
from lamella.plan import fingerprint
from lamella.plan.filling import load_network
from lamella.reading import parse_json, read_text
from lamella.result import Result
from lamella.train import TrainingLog

DOCUMENT, WEIGHTS, LOG = "network.json", "model.safetensors", "log.json"


@dataclass(kw_only=True)
class TrainedNetwork(Result):
    """A trained network. Subclasses have further fields that determine the network, and name them.

    Attributes:
        model: in evaluation mode.
        log: of its training.
    """

    model: Any
    log: TrainingLog

    needs_folder: ClassVar[bool] = True
    schema: ClassVar[str]  # of its document
    shaped: ClassVar[tuple[str, ...]]  # names of the fields that determine it, such as ``shape`` and ``classes``
    made_by: ClassVar[str]  # the command that trains one
    pickled: ClassVar[bool] = False  # whether `read` also takes a pickle of its authors, and `allow_pickle`

    @classmethod
    def build(cls, **shaped: Any) -> nn.Module:
        """Return a newly initialised network, given these fields."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return its description for provenance."""
        return self._fields() | {"sha256": fingerprint.state(self.model)}

    def write(self, folder: Path) -> None:
        """Write the weights, the fields that determine the network, and the log."""
        save_file({name: each.contiguous() for name, each in self.model.state_dict().items()}, folder / WEIGHTS)
        document = json.dumps({"schema": self.schema} | self._fields(), indent=1)
        (folder / DOCUMENT).write_text(document + "\n", encoding="utf-8")
        self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the network in a folder.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        path = Path(path)
        try:
            shaped = cls._shaped(parse_json(read_text(path / DOCUMENT, f"give what `{cls.made_by}` has written")))
            model = load_network(partial(cls.build, **shaped), path / WEIGHTS)
            return cls(model=model, log=TrainingLog.read(path / LOG), **shaped)
        except Exception as error:  # each part raises its own errors for a damaged file
            reason = _first(error) if isinstance(error, ValidationError) else reason_of(error)
            raise CheckpointError(f"{path}: no {cls.kind} ({reason}): train one with `{cls.made_by}`") from None

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {name: _adapter(type(self), name).dump_python(getattr(self, name), mode="json")
                                for name in self.shaped}  # fmt: skip
        return fields

    @classmethod
    def _shaped(cls, document: Any) -> dict[str, Any]:
        """Return the fields in a document, after a strict check."""
        if not isinstance(document, dict) or document.get("schema") != cls.schema:
            raise ValueError(f"{DOCUMENT} is not a document of the schema {cls.schema}")
        if document.keys() != {"schema", *cls.shaped}:
            raise ValueError(f"{DOCUMENT} must contain exactly {', '.join(cls.shaped)}")
        found = {}
        for name in cls.shaped:
            adapter = _adapter(cls, name)
            found[name] = adapter.validate_json(json.dumps(document[name]), strict=True)
            if adapter.dump_python(found[name], mode="json") != document[name]:
                raise ValueError(f"{DOCUMENT}: {name} does not name each number once")
        return found


def _adapter(kind: type[TrainedNetwork], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(kind)[name])


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{DOCUMENT}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
