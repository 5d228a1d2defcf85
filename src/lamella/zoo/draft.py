"""Drafts by name: what proposes the tokens that a model verifies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.errors import MethodError
from lamella.runtime import Draft
from lamella.zoo.checks import check_model
from lamella.zoo.opening import load, open_tokenizer

LOOKUP, OFF = "lookup", "off"


@dataclass(frozen=True)
class NamedDraft:
    """What proposes tokens, by name: the text itself, or a smaller model with the same tokenizer.

    Attributes:
        name: ``lookup``, ``off``, or the name of a model.
    """

    name: str

    metavar: ClassVar[str] = "DRAFT"
    default: ClassVar[str] = OFF
    source_help: ClassVar[str] = "lookup, off, or a smaller model with the same tokenizer"

    @classmethod
    def open(cls, name: str | Path) -> NamedDraft:
        """Return the reference to that name; :meth:`draft_of` opens it together with the model that verifies."""
        return cls(str(name))

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check that the model exists."""
        if name not in (LOOKUP, OFF):
            check_model(name)

    def draft_of(self, model: Any, tokenizer: Any) -> Draft | None:
        """Open the draft of a model.

        Args:
            model: the model that verifies.
            tokenizer: its tokenizer.

        Returns:
            The draft; None if it is off.

        Raises:
            MethodError: for a model with other tokens.
        """
        if self.name == OFF:
            return None
        if self.name == LOOKUP:
            return Draft()
        if open_tokenizer(self.name).get_vocab() != tokenizer.get_vocab():
            raise MethodError(f"draft: {self.name} has other tokens than the model: give one with the same tokenizer")
        return Draft(self.name, load(self.name).model)

    def describe(self) -> str:
        """Return its name, for provenance."""
        return self.name
