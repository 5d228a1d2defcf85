"""The text whose distribution is to stay: the model's own, or one that is like what it was trained on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from lamella.data import InputContext, Source, load_text, own_texts, windows
from lamella.methods.irepair.recipe import OWN_TOKENS
from lamella.signature import Fixture
from lamella.stack import Stack
from lamella.train import Sample, blocks

OWN = "self"


@dataclass(frozen=True)
class Utility:
    """Where text in general comes from.

    Attributes:
        source: a text; None where the model writes it itself.
    """

    source: Source | None = None
    context: InputContext = field(default_factory=InputContext)
    said: dict[str, Any] = field(default_factory=dict)

    default = OWN
    metavar = "TEXT"
    source_help = "self: the model writes it. Or pydoc, stdlib, a file or a datasets name"
    example = Fixture(OWN)

    @classmethod
    def open(cls, name: str, context: InputContext) -> Utility:
        """``self``, or a text; see :func:`lamella.load_text`."""
        return cls(None if name == OWN else load_text(name, "calibration"), context)

    def samples(self, stack: Stack, count: int, habit: re.Pattern[str] | None, seed: int) -> list[Sample]:
        """So many texts; of its own, those that the habit is not found in."""
        length = min(OWN_TOKENS, int(getattr(stack.config, "max_position_embeddings", None) or 1024) - 1)
        if self.source is not None:
            tokens = windows(self.context.tokenizer, self.source, count, length, seed)
            self.said.update(self.source.provenance(tokens))
            return blocks(tokens, loss_on="all")
        texts = own_texts(
            stack.model,
            count,
            length,
            seed=seed,
            accept=lambda each: (
                len(each) > 1 and (habit is None or not habit.search(self.context.tokenizer.decode(each[1:])))
            ),
        )
        written = hashlib.sha256(b"".join(each.numpy().tobytes() for each in texts)).hexdigest()
        self.said.update({"data": "the model's own samples", "tokens": sum(map(len, texts)), "sha256": written})
        return [blocks(each[None], loss_on="all")[0] for each in texts]

    def describe(self) -> dict[str, Any]:
        """What provenance says of it, once it was read."""
        return self.said
