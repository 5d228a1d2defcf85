"""The input of AGILE3D: scenes from .ply files, images, or synthetic rooms and collages with ground truth."""

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
from lamella.methods.agile3d.images import OBJECTS, parse_image, read_scene
from lamella.methods.agile3d.ply import parse_ply, read_ply
from lamella.methods.agile3d.rooms import rooms
from lamella.methods.agile3d.scene import ClickScene
from lamella.reading import check_in_folder
from lamella.signature import Fixture

BUILT_IN = {"rooms": rooms, "collages": collages}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
EXPECTED = f"give a .ply file or an image, a folder of them, or {' or '.join(BUILT_IN)}"


@dataclass(frozen=True)
class Scenes:
    """One or several scenes of points in space, or images.

    Attributes:
        scenes: the scenes.
        metadata: provenance.
    """

    metavar = "SCENES"
    source_help = "a .ply file or an image, a folder of them, or `rooms` or `collages` (synthetic)"
    example = Fixture("rooms", settings={"count": 2})

    scenes: tuple[ClickScene, ...]
    metadata: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 24) -> Scenes:
        """Read scenes.

        Args:
            name: a .ply file or an image, a folder of them, or ``rooms`` or ``collages``, which are synthetic with
                disjoint training and test splits. The objects of ``a.jpg`` are the grey values of ``a.objects.png``.
            context: the split and the random seed.
            count: maximum number of scenes.

        Raises:
            CalibrationError: if a file is missing, damaged, or has no points.
        """
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        found = tuple(islice(_source(Path(name), context), count))
        digest = hashlib.sha256(b"".join(scene.content() for scene in found)).hexdigest()
        split = {"split": context.split, "seed": context.seed} if str(name) in BUILT_IN else {}
        return cls(found, {"data": str(name), **split, "scenes": len(found), "sha256": digest})

    def describe(self) -> dict[str, Any]:
        """Return the provenance of these scenes."""
        return dict(self.metadata)

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[ClickScene]:
        return iter(self.scenes)


def _source(path: Path, context: InputContext) -> Iterator[ClickScene]:
    if str(path) in BUILT_IN:
        return BUILT_IN[str(path)]("test" if context.split == "test" else "train", context.seed)
    if path.is_dir():
        files = [check_in_folder(each) for each in sorted(path.iterdir()) if is_scene(each)]
        if not files:
            raise CalibrationError(f"{path} has no .ply file and no image: give another folder")
        return map(read, files)
    if not is_scene(path):
        raise CalibrationError(f"no scenes '{path}': {EXPECTED}")
    return iter([read(path)])


def is_scene(path: PurePath) -> bool:
    """Return whether a file name has the suffix of a scene."""
    return path.suffix.lower() in (".ply", *IMAGE_SUFFIXES) and not path.name.endswith(OBJECTS)


def read(path: Path) -> ClickScene:
    """Read a scene from a file."""
    return read_ply(path) if path.suffix.lower() == ".ply" else read_scene(path)


def parse(data: bytes, path: PurePath) -> ClickScene:
    """Parse a scene from the content of a file.

    Args:
        data: content of the file.
        path: its name, which decides the format.
    """
    return parse_image(data, path) if path.suffix.lower() in IMAGE_SUFFIXES else parse_ply(data, path)
