"""Models that a command opens itself by name: checkpoints as files, and models to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lamella.errors import CheckpointError, LamellaError
from lamella.plan import Plan
from lamella.stack import Model
from lamella.zoo.checks import check_model
from lamella.zoo.opening import names_plan, open_model, open_processor
from lamella.zoo.pull import resolve


@dataclass(frozen=True)
class LazyCheckpoint:
    """A checkpoint that is not opened yet: some commands read only its files.

    Attributes:
        name: what :func:`open_model` takes.
        options: how to open it.
    """

    name: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: Any, **options: Any) -> LazyCheckpoint:
        """Return the checkpoint of that name; options are those of :func:`open_model`."""
        return cls(name, {each: value for each, value in options.items() if value is not None})

    @property
    def folder(self) -> Path:
        """The folder of its files.

        Raises:
            CheckpointError: for a model in memory, or one on the hub.
        """
        place = resolve(self.name) if isinstance(self.name, str | Path) else None
        if not isinstance(place, Path):
            raise CheckpointError(f"{self.name} is not a local folder: give a local checkpoint, or a zoo name")
        return place

    def opened(self) -> Model:
        """Return the opened model."""
        return open_model(self.name, **self.options)

    def processor(self) -> Any:
        """Return its processor or tokenizer; None if it has none."""
        if not isinstance(self.name, str | Path):
            return None
        try:
            return open_processor(self.name)
        except LamellaError:
            return None

    def describe(self) -> str:
        """Return its name, for provenance."""
        return str(getattr(self.name, "name", self.name))


@dataclass(frozen=True)
class ComparedModel:
    """A model to compare with another one: a plan for it, an exported folder, or any other model.

    Attributes:
        name: of the file or of the model.
    """

    name: str

    metavar: ClassVar[str] = "CHANGED"
    source_help: ClassVar[str] = "a plan or its folder, an exported folder or another model"

    @classmethod
    def open(cls, name: str | Path) -> ComparedModel:
        """Return the reference to that name; :meth:`SavedModel.view` opens it together with the other model."""
        return cls(str(name))

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check that the plan, or the model, exists."""
        if names_plan(name):
            Plan.read(name)
        else:
            check_model(name)

    def describe(self) -> str:
        """Return its name, for provenance."""
        return self.name
