"""A trained network of a method's own, as a result: a folder that is read back without running anything in it."""

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
    """A trained network. A kind of it has further fields that decide what the network is, and names them.

    Attributes:
        model: in evaluation mode.
        log: of its training.
    """

    model: Any
    log: TrainingLog

    needs_folder: ClassVar[bool] = True
    schema: ClassVar[str]  # of its document
    shaped: ClassVar[tuple[str, ...]]  # the fields by which it is built, such as ``shape`` and ``classes``
    made_by: ClassVar[str]  # the command that trains one

    @classmethod
    def build(cls, **shaped: Any) -> nn.Module:
        """A network with fresh weights, from these fields."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return self._said() | {"sha256": fingerprint.state(self.model)}

    def write(self, folder: Path) -> None:
        """Weights, what is needed to build what they are of, and the log."""
        save_file({name: each.contiguous() for name, each in self.model.state_dict().items()}, folder / WEIGHTS)
        document = json.dumps({"schema": self.schema} | self._said(), indent=1)
        (folder / DOCUMENT).write_text(document + "\n", encoding="utf-8")
        self.log.write(folder / LOG)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The network in a folder.

        Raises:
            CheckpointError: when there is none, or it is damaged.
        """
        path = Path(path)
        try:
            shaped = cls._shaped(parse_json(read_text(path / DOCUMENT, f"give what `{cls.made_by}` has written")))
            model = load_network(partial(cls.build, **shaped), path / WEIGHTS)
            return cls(model=model, log=TrainingLog.read(path / LOG), **shaped)
        except Exception as error:  # each part has its own for a damaged file
            reason = _first(error) if isinstance(error, ValidationError) else reason_of(error)
            raise CheckpointError(f"{path}: no {cls.kind} ({reason}): train one with `{cls.made_by}`") from None

    def _said(self) -> dict[str, Any]:
        said: dict[str, Any] = {name: _adapter(type(self), name).dump_python(getattr(self, name), mode="json")
                                for name in self.shaped}  # fmt: skip
        return said

    @classmethod
    def _shaped(cls, said: Any) -> dict[str, Any]:
        """The fields that a document names: each of its numbers once, and nothing else."""
        if not isinstance(said, dict) or said.get("schema") != cls.schema:
            raise ValueError(f"{DOCUMENT} is no document of the schema {cls.schema}")
        if said.keys() != {"schema", *cls.shaped}:
            raise ValueError(f"{DOCUMENT} does not name {', '.join(cls.shaped)}, each once")
        found = {}
        for name in cls.shaped:
            adapter = _adapter(cls, name)
            found[name] = adapter.validate_json(json.dumps(said[name]), strict=True)
            if adapter.dump_python(found[name], mode="json") != said[name]:
                raise ValueError(f"{DOCUMENT}: {name} does not name each number once")
        return found


def _adapter(kind: type[TrainedNetwork], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(kind)[name])


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{DOCUMENT}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
