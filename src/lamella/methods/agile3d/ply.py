"""Reading PLY point files from any source, and writing them with a label for every point.

A text header lists the elements of a file and the properties of each; the values follow as text or binary. Points are
the element ``vertex``; other elements, such as faces, are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from lamella.errors import CalibrationError
from lamella.files import write_bytes
from lamella.methods.agile3d.scene import UNLABELLED, ClickScene
from lamella.reading import FileRefused, open_file

TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
ORDERS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
POSITION, COLOUR = ("x", "y", "z"), ("red", "green", "blue")
OBJECT = ("object", "instance")  # properties that number objects; the first that exists is used
CLASS = "label"  # a property that numbers objects in some files, and classes in others
NONE = "none"  # in place of a property: read no objects
MAX_HEADER = 1 << 16  # maximum length of a header in bytes
Columns = dict[str, NDArray[np.float64]]


@dataclass
class Element:
    """One element type of a file.

    Attributes:
        name: its name, such as ``vertex``.
        count: number of such elements.
        types: type of each property, by name.
        lists: whether any property is a list, whose length is only known from the values.
    """

    name: str
    count: int
    types: dict[str, str] = field(default_factory=dict)
    lists: bool = False


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        form: ``ascii``, ``binary_little_endian`` or ``binary_big_endian``.
        elements: element types, in the order of their values.
        size: length of the header in bytes.
    """

    form: str
    elements: list[Element]
    size: int

    def dtype(self, element: Element) -> np.dtype[np.void]:
        """Return the NumPy dtype of one element in a binary file."""
        return np.dtype([(name, ORDERS[self.form] + kind) for name, kind in element.types.items()])


def read_ply(path: Path, instances: str = "") -> ClickScene:
    """Read the points of a file, with colours (zeros if absent) and objects if present.

    Integer colours are divided by the maximum of their type; floating-point colours must lie in 0..1. Values of objects
    below 0 mean unlabelled.

    Args:
        path: the .ply file.
        instances: the property that numbers objects; if empty, ``object`` or ``instance``. ``none`` reads no objects.

    Raises:
        CalibrationError: for a file that is missing, truncated or not PLY, for points that cannot be used, and for a
            file with only a property ``label``, which may number classes, unless ``instances`` is given.
    """
    try:
        with open_file(path) as file:
            data = file.read()
    except (OSError, FileRefused) as error:
        reason = getattr(error, "strerror", error)
        raise CalibrationError(f"{path}: cannot be read ({reason}): give a .ply file") from None
    return parse_ply(data, path, instances)


def parse_ply(data: bytes, path: PurePath, instances: str = "") -> ClickScene:
    """Parse the content of a PLY file, as :func:`read_ply` does.

    Args:
        data: content of the file.
        path: its name, for messages.
        instances: see :func:`read_ply`.
    """
    try:
        header = read_header(data)
        vertex = next((each for each in header.elements if each.name == "vertex"), None)
        if vertex is None:
            raise ValueError("no element 'vertex'")
        if missing := [name for name in POSITION if name not in vertex.types]:
            raise ValueError(f"its vertices have no '{missing[0]}'")
        numbered = _object_property(vertex, path, instances)
        columns = (_from_text if header.form == "ascii" else _from_binary)(data, header, vertex)
        return _scene(columns, vertex, path.name, numbered)
    except (ValueError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(f"{path}: not a valid PLY file of points ({reason}): export it again") from None


def _object_property(vertex: Element, path: PurePath, instances: str) -> str | None:
    """Return the property that numbers objects; None if there is none.

    Raises:
        CalibrationError: for a property that does not exist, or that may number classes.
    """
    if instances == NONE:
        return None
    if instances and instances not in vertex.types:
        raise CalibrationError(
            f"{path}: its vertices have no '{instances}': give instances {NONE}, or one of {', '.join(vertex.types)}"
        )
    found = instances or next((each for each in OBJECT if each in vertex.types), None)
    if found is None and CLASS in vertex.types:
        raise CalibrationError(
            f"{path}: its '{CLASS}' may number classes, not objects: give instances {CLASS} if it numbers objects, "
            f"else instances {NONE}, which reads no objects"
        )
    return found


def read_header(data: bytes) -> Header:
    """Parse the header at the beginning of a file.

    Args:
        data: content of the file.

    Raises:
        ValueError: if there is no valid header.
    """
    end = data.find(b"end_header", 0, MAX_HEADER)
    size = data.find(b"\n", max(end, 0), MAX_HEADER) + 1
    if not data.startswith(b"ply") or end < 0 or size == 0:
        raise ValueError("it has no header")
    form, elements = "", list[Element]()
    for line in data[:end].decode("ascii").splitlines()[1:]:
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                continue
            case ["format", str(form), "1.0"] if form in ORDERS:
                continue
            case ["element", name, count] if count.isdecimal():
                elements.append(Element(name, int(count)))
            case ["property", "list", *_] if elements:
                elements[-1].lists = True
            case ["property", kind, name] if elements and kind in TYPES and name not in elements[-1].types:
                elements[-1].types[name] = TYPES[kind]
            case _:
                raise ValueError(f"its header has the line '{line.strip()[:60]}'")
    if not form:
        raise ValueError("its header names no format")
    return Header(form, elements, size)


def _from_binary(data: bytes, header: Header, vertex: Element) -> Columns:
    """Read the vertex properties of a binary file."""
    before = header.elements[: header.elements.index(vertex)]
    if any(each.lists for each in [*before, vertex]):
        raise ValueError("lists stand before the end of its vertices")
    start = header.size + sum(each.count * header.dtype(each).itemsize for each in before)
    dtype = header.dtype(vertex)
    if len(data) < start + vertex.count * dtype.itemsize:
        raise ValueError(f"it is truncated: {vertex.count} vertices do not fit into {len(data)} bytes")
    values = np.frombuffer(data, dtype, vertex.count, start)
    return {name: values[name].astype(np.float64) for name in vertex.types}


def _from_text(data: bytes, header: Header, vertex: Element) -> Columns:
    """Read the vertex properties of a text file."""
    if vertex.lists:
        raise ValueError("its vertices have lists")
    start = sum(each.count for each in header.elements[: header.elements.index(vertex)])
    lines = data[header.size :].decode("ascii").splitlines()[start : start + vertex.count]
    if len(lines) < vertex.count:
        raise ValueError(f"it is truncated: {len(lines)} of {vertex.count} vertices")
    if not lines:
        return {name: np.empty(0) for name in vertex.types}
    values = np.loadtxt(lines, np.float64, comments=None, ndmin=2)
    if values.shape != (vertex.count, len(vertex.types)):
        raise ValueError(f"its vertices do not have {len(vertex.types)} values each")
    return dict(zip(vertex.types, values.T, strict=True))


def _scene(columns: Columns, vertex: Element, name: str, numbered: str | None) -> ClickScene:
    with np.errstate(over="ignore"):  # values that overflow to infinity are rejected by the scene, with their point
        coords = np.stack([columns[each] for each in POSITION], axis=1).astype(np.float32)
    colours = np.zeros_like(coords)
    if all(each in columns for each in COLOUR):
        colours = np.stack([_shade(columns[each], vertex.types[each]) for each in COLOUR], axis=1)
    return ClickScene(coords, colours, None if numbered is None else _object_ids(columns[numbered], numbered), name)


def _shade(values: NDArray[np.float64], kind: str) -> NDArray[np.float32]:
    if kind[0] == "f":
        if len(values) and (values.min() < 0 or values.max() > 1):
            raise ValueError("its floating-point colours are outside 0 to 1")
        return values.astype(np.float32)
    return (values / np.iinfo(kind).max).astype(np.float32)


def _object_ids(values: NDArray[np.float64], numbered: str) -> NDArray[np.int64]:
    if not (np.isfinite(values) & (values == np.round(values)) & (abs(values) < 2**31)).all():
        raise ValueError(f"its property '{numbered}' has a value that is not an integer")
    return np.maximum(values.astype(np.int64), UNLABELLED)


def dump_ply(scene: ClickScene, labels: NDArray[np.int64]) -> bytes:
    """Return the content of a PLY file with coloured points and the labels as property ``object``.

    Args:
        scene: the points.
        labels: label of each point [P].
    """
    kinds = [("f4", name) for name in POSITION] + [("u1", name) for name in COLOUR] + [("i4", OBJECT[0])]
    types = {"f4": "float", "u1": "uchar", "i4": "int"}
    values = np.empty(len(scene), np.dtype([(name, f"<{kind}") for kind, name in kinds]))
    for axis, name in enumerate(POSITION):
        values[name] = scene.coords[:, axis]
    for axis, name in enumerate(COLOUR):
        values[name] = np.round(255 * scene.colours[:, axis].clip(0, 1))
    values[OBJECT[0]] = labels
    properties = "".join(f"property {types[kind]} {name}\n" for kind, name in kinds)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(scene)}\n{properties}end_header\n"
    return header.encode() + values.tobytes()


def write_ply(path: Path, scene: ClickScene, labels: NDArray[np.int64]) -> None:
    """Write a PLY file with coloured points and their labels.

    Args:
        path: the file to write.
        scene: the points.
        labels: label of each point [P].

    Raises:
        ExportError: if it cannot be written.
    """
    write_bytes(path, dump_ply(scene, labels))
