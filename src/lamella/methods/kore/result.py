"""What augmentation makes: turns with their provenance, conversations to train and to test on, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lamella.data.pictures import Picture
from lamella.extras import require
from lamella.results import Corpus
from lamella.results.corpus import write_rows

PICTURES = "pictures"


@dataclass(kw_only=True)
class Augmented(Corpus):
    """A set of conversations about pictures.

    ``data.jsonl`` holds every turn, those that were dropped too, with its provenance. ``train.jsonl`` and
    ``test.jsonl`` are conversations about what lies in ``pictures``, as ``lamella run kore --samples FOLDER`` reads
    them.

    Attributes:
        items: the turns.
        train: conversations in the order in which they are seen.
        test: one of each item, asked in words and about a picture that nothing is trained on.
        pictures: what gives each picture, by its file in the folder; one is held at a time.
    """

    items: list[dict[str, Any]]
    train: list[dict[str, Any]] = field(default_factory=list)
    test: list[dict[str, Any]] = field(default_factory=list)
    pictures: Mapping[str, Callable[[], Picture]] = field(default_factory=dict)

    kind: ClassVar[str] = "augmented"

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from self.items

    def write(self, folder: Path) -> None:
        super().write(folder)
        for name in ("train", "test"):
            write_rows(folder / f"{name}.jsonl", getattr(self, name))
        pillow = require("PIL.Image", "vision", "writing pictures")
        (folder / PICTURES).mkdir()
        for name, picture in self.pictures.items():
            pillow.fromarray(picture()).save(folder / name)
