"""The input of AGILE3D: scenes from files, folders of data sets, or synthetic rooms and collages with ground truth."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from lamella.data import InputContext, Lazy
from lamella.errors import CalibrationError
from lamella.methods.agile3d.collages import collages
from lamella.methods.agile3d.images import OBJECTS, parse_image, read_scene
from lamella.methods.agile3d.layouts import is_scan, read_scan, scans_in
from lamella.methods.agile3d.ply import NONE, parse_ply, read_ply
from lamella.methods.agile3d.rooms import Part, rooms
from lamella.methods.agile3d.scene import ClickScene
from lamella.reading import check_in_folder
from lamella.signature import Fixture

BUILT_IN = {"rooms": rooms, "collages": collages}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
EXPECTED = f"give a .ply file or an image, a folder of them or of a data set, or {' or '.join(BUILT_IN)}"


@dataclass(frozen=True)
class Scenes:
    """One or several scenes of points in space, or images.

    Attributes:
        scenes: the scenes; those of files are read on access.
        metadata: provenance.
    """

    metavar = "SCENES"
    source_help = (
        "a .ply file or an image, a folder of them, of scans of ScanNet or of rooms of S3DIS, or `rooms` or `collages` "
        "(synthetic)"
    )
    example = Fixture("rooms", settings={"count": 2})

    scenes: Sequence[ClickScene]
    metadata: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, count: int = 24, instances: str = "") -> Scenes:
        """Open scenes; each is read once, so that a damaged one is reported before anything runs.

        Args:
            name: a .ply file or an image, a folder of them, a folder of scans of ScanNet or of rooms of S3DIS, or
                ``rooms`` or ``collages``, which are synthetic with disjoint training and test splits. The objects of
                ``a.jpg`` are the grey values of ``a.objects.png``.
            context: the split and the random seed.
            count: maximum number of scenes.
            instances: the property of a .ply file that numbers objects; if empty, ``object`` or ``instance``. ``none``
                reads no objects.

        Raises:
            CalibrationError: if a file is missing, damaged, or has no points, or if it is unclear whether its labels
                are objects.
        """
        if count < 1:
            raise CalibrationError(f"count {count}: give at least 1")
        found, digest = _source(Path(name), context, count, instances), hashlib.sha256()
        for scene in found:
            digest.update(scene.content())
        split = {"split": context.split, "seed": context.seed} if str(name) in BUILT_IN else {}
        return cls(found, {"data": str(name), **split, "scenes": len(found), "sha256": digest.hexdigest()})

    def describe(self) -> dict[str, Any]:
        """Return the provenance of these scenes."""
        return dict(self.metadata)

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[ClickScene]:
        return iter(self.scenes)


def _source(path: Path, context: InputContext, count: int, instances: str) -> Sequence[ClickScene]:
    if str(path) in BUILT_IN:
        part: Part = "test" if context.split == "test" else "train"
        return tuple(islice(BUILT_IN[str(path)](part, context.seed), count))
    if not path.is_dir() and not is_scene(path):
        raise CalibrationError(f"no scenes '{path}': {EXPECTED}")
    files = _files(path) if path.is_dir() else [path]
    return Lazy(files[:count], partial(read, instances=instances))


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder, or the folders of the scans in it."""
    inside = [] if is_scan(folder) else sorted(folder.iterdir())
    files = [check_in_folder(each) for each in inside if is_scene(each) and not each.is_dir()]
    found = files or scans_in(folder)
    if not found:
        raise CalibrationError(
            f"{folder} has no .ply file, no image, and no scan of ScanNet or S3DIS: give another folder"
        )
    return found


def is_scene(path: PurePath) -> bool:
    """Return whether a file name has the suffix of a scene."""
    return path.suffix.lower() in (".ply", *IMAGE_SUFFIXES) and not path.name.endswith(OBJECTS)


def read(path: Path, instances: str = "") -> ClickScene:
    """Read a scene from a file, or from the folder of a scan.

    Args:
        path: the file or folder.
        instances: see :meth:`Scenes.open`.
    """
    if path.is_dir():
        return read_scan(path)
    return read_ply(path, instances) if path.suffix.lower() == ".ply" else read_scene(path)


def parse(data: bytes, path: PurePath) -> ClickScene:
    """Parse a scene to label, without objects, from the content of a file.

    Args:
        data: content of the file.
        path: its name, which decides the format.
    """
    return parse_image(data, path) if path.suffix.lower() in IMAGE_SUFFIXES else parse_ply(data, path, NONE)
