"""PLY files of points, read and written with plyfile: a position, a colour and an object for every point.

Points are the element ``vertex``; the elements after it, such as faces, are not read.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.files import write_bytes
from lamella.methods.agile3d.scene import UNLABELLED, Scene
from lamella.reading import FileRefused, open_file

PLACE, COLOUR = ("x", "y", "z"), ("red", "green", "blue")
OBJECT = ("object", "label", "instance")  # the properties that may hold it; the first one found is read
LONGEST = 1 << 16  # bytes of a header
END = re.compile(rb"^end_header\r?\n", re.MULTILINE)


def read_ply(path: Path) -> Scene:
    """The points of a file, with colours (else zeros) and objects where it has them.

    Colours are integers, whose type's largest value becomes 1, or floats from 0 to 1. Objects are the property
    ``object``, ``label`` or ``instance``; negative values are unlabelled.

    Raises:
        CalibrationError: if the file is missing, truncated or not PLY, or if its points cannot be used.
        LamellaError: if plyfile is not installed.
    """
    try:
        with open_file(path) as file:
            data = file.read()
    except (OSError, FileRefused) as error:
        reason = getattr(error, "strerror", error)
        raise CalibrationError(f"{path}: cannot be read ({reason}): give a .ply file") from None
    return parse_ply(data, path)


def parse_ply(data: bytes, path: PurePath) -> Scene:
    """The points in the content of such a file, see :func:`read_ply`; the path is used in messages only."""
    plyfile = require("plyfile", "click", "a .ply file")
    try:
        with _mappable() as file, np.errstate(over="ignore"):  # what becomes infinite is refused with its point
            file.write(_up_to_vertices(data))
            file.seek(0)
            elements = plyfile.PlyData.read(file)
        if "vertex" not in elements:
            raise ValueError("no element 'vertex'")
        return _scene(elements["vertex"].data, path.name)
    except (OSError, ValueError, OverflowError, plyfile.PlyParseError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(f"{path}: no PLY of points ({reason}): export it anew") from None


def _mappable() -> BinaryIO:
    """A file in memory, where there are such: plyfile maps files, and reads other streams one value at a time."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("ply"), "w+b")
    return tempfile.TemporaryFile()


def _up_to_vertices(data: bytes) -> bytes:
    """The same file without the elements after its vertices.

    plyfile allocates what a header declares and reads lists one value at a time, so both are checked here.

    Raises:
        ValueError: if the header is missing, has lists, or declares more values than there are bytes.
    """
    end = END.search(data, 0, LONGEST)
    if not data.startswith(b"ply") or end is None:
        raise ValueError("it has no header")
    kept, name, rows, values = list[bytes](), b"", [0], 0
    for line in data[: end.start()].splitlines():
        match line.split():
            case [b"element", *_] if name == b"vertex":
                break
            case [b"element", name, count] if count.isdigit():
                rows.append(int(count))
            case [b"element", *_]:
                raise ValueError(f"its header has the line '{line[:60].decode('ascii')}'")
            case [b"property", b"list", *_]:
                raise ValueError("lists stand before the end of its vertices")
            case [b"property", *_]:
                values += rows[-1]
        kept.append(line)
    if max(values, *rows) > len(data):
        raise ValueError(f"it is cut short: {max(rows)} rows do not fit into {len(data)} bytes")
    return b"\n".join([*kept, b"end_header\n"]) + data[end.end() :]


def _scene(vertices: NDArray[np.void], name: str) -> Scene:
    names = vertices.dtype.names or ()
    if missing := [each for each in PLACE if each not in names]:
        raise ValueError(f"its vertices have no '{missing[0]}'")
    with np.errstate(over="ignore"):  # a coordinate that becomes infinite is refused with its point
        coords = np.stack([vertices[each] for each in PLACE], axis=1).astype(np.float32)
    colours = np.zeros_like(coords)
    if all(each in names for each in COLOUR):
        colours = np.stack([_shade(vertices[each]) for each in COLOUR], axis=1)
    held = next((each for each in OBJECT if each in names), None)
    return Scene(coords, colours, None if held is None else _integers(vertices[held], held), name)


def _shade(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.kind != "f":
        return (values / np.iinfo(values.dtype).max).astype(np.float32)
    if len(values) and (values.min() < 0 or values.max() > 1):
        raise ValueError("its colours are fractions beyond 0 to 1")
    return values.astype(np.float32)


def _integers(values: NDArray[Any], name: str) -> NDArray[np.int64]:
    values = values.astype(np.float64)
    if not (np.isfinite(values) & (values == np.round(values)) & (abs(values) < 2**31)).all():
        raise ValueError(f"its property '{name}' holds what is no whole number")
    return np.maximum(values.astype(np.int64), UNLABELLED)


def dump_ply(scene: Scene, labels: NDArray[np.int64]) -> bytes:
    """The content of a file of points with their colours, and a label for each [P] as the property ``object``.

    Raises:
        LamellaError: if plyfile is not installed.
    """
    plyfile = require("plyfile", "click", "a .ply file")
    columns = [(name, "<f4") for name in PLACE] + [(name, "u1") for name in COLOUR] + [(OBJECT[0], "<i4")]
    values = np.empty(len(scene), np.dtype(columns))
    for axis, name in enumerate(PLACE):
        values[name] = scene.coords[:, axis]
    for axis, name in enumerate(COLOUR):
        values[name] = np.round(255 * scene.colours[:, axis].clip(0, 1))
    values[OBJECT[0]] = labels
    content = io.BytesIO()
    plyfile.PlyData([plyfile.PlyElement.describe(values, "vertex")], byte_order="<").write(content)
    return content.getvalue()


def write_ply(path: Path, scene: Scene, labels: NDArray[np.int64]) -> None:
    """Write such a file.

    Raises:
        ExportError: when it cannot be written.
    """
    write_bytes(path, dump_ply(scene, labels))
