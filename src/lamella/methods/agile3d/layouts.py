"""Folders of public data sets: scans of ScanNet and rooms of S3DIS, each with the objects that are annotated in it.

    scene0000_00/  scene0000_00_vh_clean_2.ply                      the points
                   scene0000_00_vh_clean_2.0.010000.segs.json       the segment of each point
                   scene0000_00.aggregation.json                    the segments of each object; missing in test scans

    office_1/      Annotations/chair_1.txt, ...                     lines of x y z red green blue, one file per object

Walls, floors and ceilings are background; points of ScanNet without an annotation are unlabelled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamella.errors import CalibrationError
from lamella.methods.agile3d.clicks import BACKGROUND
from lamella.methods.agile3d.ply import NONE, read_ply
from lamella.methods.agile3d.scene import UNLABELLED, ClickScene
from lamella.reading import check_in_folder, parse_json, read_text

MESH, SEGMENTS, OBJECTS = "_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json"
ANNOTATIONS = "Annotations"
STRUCTURE = ("wall", "floor", "ceiling")  # classes that are background
MOST_SEGMENTS = 1 << 24  # an upper bound of their numbers


def is_scan(folder: Path) -> bool:
    """Return whether a folder is a scan of ScanNet or a room of S3DIS."""
    return _is_scannet(folder) or (folder / ANNOTATIONS).is_dir()


def _is_scannet(folder: Path) -> bool:
    return (folder / f"{folder.name}{MESH}").is_file()


def scans_in(folder: Path) -> list[Path]:
    """Return the scans of a folder, such as ``scans`` of ScanNet, or an area of S3DIS or all of its areas.

    Raises:
        CalibrationError: for a link, which may lead anywhere.
    """
    if is_scan(folder):
        return [folder]
    found = [each for pattern in ("*", "*/*") for each in sorted(folder.glob(pattern)) if is_scan(each)]
    for each in found:
        if each.is_symlink():
            check_in_folder(each)
    return found


def read_scan(folder: Path) -> ClickScene:
    """Read a scan of ScanNet or a room of S3DIS.

    Args:
        folder: the folder of the scan.

    Raises:
        CalibrationError: for files that are damaged or do not fit each other.
    """
    return _read_scannet(folder) if _is_scannet(folder) else _read_s3dis(folder)


def _read_scannet(folder: Path) -> ClickScene:
    name = folder.name
    scene = replace(read_ply(check_in_folder(folder / f"{name}{MESH}"), NONE), name=name)
    if not (folder / f"{name}{OBJECTS}").is_file():
        return scene
    segments, groups = (_parsed(folder / f"{name}{suffix}") for suffix in (SEGMENTS, OBJECTS))
    try:
        of_point = np.array(segments["segIndices"], np.int64)
        if of_point.shape != (len(scene),) or of_point.min() < 0 or of_point.max() >= MOST_SEGMENTS:
            raise ValueError(f"{len(of_point)} segments for {len(scene)} points")
        objects = np.full(int(of_point.max()) + 1, UNLABELLED, np.int64)
        for group in groups["segGroups"]:
            label = BACKGROUND if str(group["label"]).lower() in STRUCTURE else int(group["objectId"]) + 1
            inside = np.array(group["segments"], np.int64)
            objects[inside[(inside >= 0) & (inside < len(objects))]] = label
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CalibrationError(
            f"{folder}: its segments and objects do not fit its points ({reason}): download the scan again"
        ) from None
    return replace(scene, objects=objects[of_point])


def _parsed(file: Path) -> Any:
    try:
        return parse_json(read_text(check_in_folder(file), "download the scan again"))
    except ValueError as error:
        raise CalibrationError(f"{file}: not valid JSON ({error}): download the scan again") from None


def _read_s3dis(folder: Path) -> ClickScene:
    files = [check_in_folder(file) for file in sorted((folder / ANNOTATIONS).glob("*.txt"))]
    if not files:
        raise CalibrationError(f"{folder / ANNOTATIONS} holds no .txt file: download the room again")
    points, objects = [], []
    for number, file in enumerate(files, start=1):
        points.append(_points(file))
        is_structure = file.stem.rpartition("_")[0] in STRUCTURE
        objects.append(np.full(len(points[-1]), BACKGROUND if is_structure else number))
    rows = np.concatenate(points)
    if not ((rows[:, 3:] >= 0) & (rows[:, 3:] <= 255)).all():
        raise CalibrationError(f"{folder}: its colours are outside 0 to 255: download the room again")
    coords, colours = rows[:, :3].astype(np.float32), (rows[:, 3:] / 255).astype(np.float32)
    return ClickScene(coords, colours, np.concatenate(objects), f"{folder.parent.name}/{folder.name}")


def _points(file: Path) -> NDArray[np.float64]:
    """Read x, y, z, red, green and blue of each point [points, 6]."""
    lines = read_text(file, "download the room again").splitlines()
    try:
        if not lines:
            raise ValueError("it has no points")
        found = np.loadtxt(lines, np.float64, comments=None, ndmin=2)
        if found.shape[1] != 6:
            raise ValueError(f"{found.shape[1]} values per line")
    except (ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(
            f"{file}: not lines of x y z red green blue ({reason}): correct the line, or download the room again"
        ) from None
    return found
