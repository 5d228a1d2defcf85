"""The input: scenes from .ply files, pictures, or rooms and collages whose truth is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from lamella.data import InputContext
from lamella.errors import CalibrationError
from lamella.methods.agile3d.collages import collages
from lamella.methods.agile3d.pictures import OBJECTS, parse_picture, read_scene
from lamella.methods.agile3d.ply import parse_ply, read_ply
from lamella.methods.agile3d.rooms import rooms
from lamella.methods.agile3d.scene import Scene
from lamella.reading import check_in_folder
from lamella.signature import Fixture

BUILT_IN = {"rooms": rooms, "collages": collages}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
WANTED = f"give a .ply file or a picture, a folder of them, or {' or '.join(BUILT_IN)}"


@dataclass(frozen=True)
class Scenes:
    """Scenes of points in space, or pictures, one or many.

    Attributes:
        scenes: each with a name of its own.
        said: what provenance says of them.
    """

    metavar = "SCENES"
    source_help = "a .ply file or a picture, a folder of them, or `rooms` or `collages`, which are made by chance"
    example = Fixture("rooms", settings={"count": 2})

    scenes: tuple[Scene, ...]
    said: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 24) -> Scenes:
        """Read scenes.

        Args:
            name: a .ply file or a picture, a folder of them, or ``rooms`` or ``collages``: those for testing are never
                trained on. The objects of ``a.jpg`` are the greys of ``a.objects.png``.
            count: at most so many scenes.

        Raises:
            CalibrationError: for what is missing, damaged, or holds no points.
        """
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        found = tuple(islice(_source(Path(name), context), count))
        digest = hashlib.sha256(b"".join(scene.content() for scene in found)).hexdigest()
        split = {"split": context.split, "seed": context.seed} if str(name) in BUILT_IN else {}
        return cls(found, {"data": str(name), **split, "scenes": len(found), "sha256": digest})

    def describe(self) -> dict[str, Any]:
        """What provenance says of them."""
        return dict(self.said)

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[Scene]:
        return iter(self.scenes)


def _source(path: Path, context: InputContext) -> Iterator[Scene]:
    if str(path) in BUILT_IN:
        return BUILT_IN[str(path)]("test" if context.split == "test" else "train", context.seed)
    if path.is_dir():
        files = [check_in_folder(each) for each in sorted(path.iterdir()) if is_scene(each)]
        if not files:
            raise CalibrationError(f"{path} holds no .ply file and no picture: give another folder")
        return map(read, files)
    if not is_scene(path):
        raise CalibrationError(f"no scenes '{path}': {WANTED}")
    return iter([read(path)])


def is_scene(path: PurePath) -> bool:
    """Whether a file is one by its name."""
    return path.suffix.lower() in (".ply", *PICTURES) and not path.name.endswith(OBJECTS)


def read(path: Path) -> Scene:
    """The scene of a file."""
    return read_ply(path) if path.suffix.lower() == ".ply" else read_scene(path)


def parse(data: bytes, path: PurePath) -> Scene:
    """The scene of a file's content, by its name."""
    return parse_picture(data, path) if path.suffix.lower() in PICTURES else parse_ply(data, path)
