"""The input: scenes from .ply files, or rooms whose truth is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lamella.data import Reader
from lamella.errors import CalibrationError
from lamella.methods.agile3d.ply import read_ply
from lamella.methods.agile3d.rooms import rooms
from lamella.methods.agile3d.scene import Scene
from lamella.signature import Fixture

ROOMS = "rooms"


@dataclass(frozen=True)
class Scenes:
    """Scenes of points, one or many.

    Attributes:
        scenes: each with a name of its own.
        said: what provenance says of them.
    """

    metavar = "SCENES"
    told = "a .ply file, a folder of them, or `rooms`, which are furnished by chance"
    example = Fixture(ROOMS, settings={"count": 2})

    scenes: tuple[Scene, ...]
    said: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | Path, reader: Reader, *, count: int = 24) -> Scenes:
        """Read scenes.

        Args:
            name: a .ply file, a folder of them, or ``rooms``: those for testing are never trained on.
            count: at most so many scenes.

        Raises:
            CalibrationError: for what is missing, damaged, or holds no points.
        """
        if count < 1:
            raise CalibrationError(f"count={count}: give at least 1")
        found = tuple(islice(_source(Path(name), reader), count))
        digest = hashlib.sha256(b"".join(scene.content() for scene in found)).hexdigest()
        split = {"split": reader.split, "seed": reader.seed} if str(name) == ROOMS else {}
        return cls(found, {"data": str(name), **split, "scenes": len(found), "sha256": digest})

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[Scene]:
        return iter(self.scenes)


def _source(path: Path, reader: Reader) -> Iterator[Scene]:
    if str(path) == ROOMS:
        return rooms("test" if reader.split == "test" else "train", reader.seed)
    if path.is_dir():
        files = sorted(path.glob("*.ply"))
        if not files:
            raise CalibrationError(f"{path} holds no .ply file: give another folder, or `{ROOMS}`")
        return map(read_ply, files)
    if path.suffix.lower() != ".ply":
        raise CalibrationError(f"no scenes '{path}': give a .ply file, a folder of them, or `{ROOMS}`")
    return iter([read_ply(path)])
