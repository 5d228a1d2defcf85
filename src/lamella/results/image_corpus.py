"""Conversations about images, as a result: rows with their provenance, training and test splits, and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lamella.data.images import Image
from lamella.extras import require
from lamella.results.corpus import Corpus, write_rows

IMAGES = "images"


@dataclass(kw_only=True)
class ImageCorpus(Corpus):
    """A set of conversations about images.

    ``data.jsonl`` contains every row with its provenance, including dropped ones. ``train.jsonl`` and ``test.jsonl``
    are conversations about the files in ``images``, in the format of every method that accepts images with text.

    Attributes:
        items: the rows.
        train: conversations in training order.
        test: conversations that are not trained on.
        images: functions that return each image, by its file name in the folder; one is in memory at a time.
    """

    items: list[dict[str, Any]]
    train: list[dict[str, Any]] = field(default_factory=list)
    test: list[dict[str, Any]] = field(default_factory=list)
    images: Mapping[str, Callable[[], Image]] = field(default_factory=dict)

    kind: ClassVar[str] = "image-corpus"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows."""
        yield from self.items

    def write(self, folder: Path) -> None:
        """Write the rows, the splits and the images into a folder."""
        super().write(folder)
        for name in ("train", "test"):
            write_rows(folder / f"{name}.jsonl", getattr(self, name))
        pillow = require("PIL.Image", "vision", "writing images")
        (folder / IMAGES).mkdir()
        for name, image in self.images.items():
            pillow.fromarray(image()).save(folder / name)
