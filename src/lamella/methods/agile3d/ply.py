"""PLY files of points: read whatever anyone may have made, written with a label for every point.

A header in words says which elements a file has, and which properties each of them; then follow the values, in words or
in bytes. Points are the element ``vertex``; what else there is, such as faces, is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from lamella.errors import CalibrationError
from lamella.files import write_bytes
from lamella.methods.agile3d.scene import UNLABELLED, Scene
from lamella.reading import FileRefused, open_file

TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
ORDERS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
PLACE, COLOUR = ("x", "y", "z"), ("red", "green", "blue")
OBJECT = ("object", "label", "instance")  # the properties that may say it, the first that is there
LONGEST = 1 << 16  # bytes of a header
Columns = dict[str, NDArray[np.float64]]


@dataclass
class Element:
    """One kind of thing in a file.

    Attributes:
        name, count: what and how many.
        types: of its properties, by name.
        lists: whether one of them is a list, whose length only the values say.
    """

    name: str
    count: int
    types: dict[str, str] = field(default_factory=dict)
    lists: bool = False


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        form: ``ascii`` or one of the binary ones.
        elements: in the order of their values.
        size: bytes, after which values begin.
    """

    form: str
    elements: list[Element]
    size: int

    def dtype(self, element: Element) -> np.dtype[np.void]:
        """One such element in bytes."""
        return np.dtype([(name, ORDERS[self.form] + kind) for name, kind in element.types.items()])


def read_ply(path: Path) -> Scene:
    """The points of a file, with colours (else zeros) and objects where it has them.

    Colours are whole numbers, of which the largest of their type is 1, or fractions. Objects are the property
    ``object``, ``label`` or ``instance``; what is below 0 is unlabelled.

    Raises:
        CalibrationError: for a file that is missing, cut short or no PLY, and for points that cannot be used.
    """
    try:
        with open_file(path) as file:
            data = file.read()
    except (OSError, FileRefused) as error:
        reason = getattr(error, "strerror", error)
        raise CalibrationError(f"{path}: cannot be read ({reason}): give a .ply file") from None
    return parse_ply(data, path)


def parse_ply(data: bytes, path: PurePath) -> Scene:
    """The points in the content of such a file, see :func:`read_ply`; what it is called is for messages."""
    try:
        header = read_header(data)
        vertex = next((each for each in header.elements if each.name == "vertex"), None)
        if vertex is None:
            raise ValueError("no element 'vertex'")
        if missing := [name for name in PLACE if name not in vertex.types]:
            raise ValueError(f"its vertices have no '{missing[0]}'")
        columns = (_from_words if header.form == "ascii" else _from_bytes)(data, header, vertex)
        return _scene(columns, vertex, path.name)
    except (ValueError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CalibrationError(f"{path}: no PLY of points ({reason}): export it anew") from None


def read_header(data: bytes) -> Header:
    """What the first lines of a file say.

    Raises:
        ValueError: when they are no header.
    """
    end = data.find(b"end_header", 0, LONGEST)
    size = data.find(b"\n", max(end, 0), LONGEST) + 1
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


def _from_bytes(data: bytes, header: Header, vertex: Element) -> Columns:
    before = header.elements[: header.elements.index(vertex)]
    if any(each.lists for each in [*before, vertex]):
        raise ValueError("lists stand before the end of its vertices")
    start = header.size + sum(each.count * header.dtype(each).itemsize for each in before)
    dtype = header.dtype(vertex)
    if len(data) < start + vertex.count * dtype.itemsize:
        raise ValueError(f"it is cut short: {vertex.count} vertices do not fit into {len(data)} bytes")
    values = np.frombuffer(data, dtype, vertex.count, start)
    return {name: values[name].astype(np.float64) for name in vertex.types}


def _from_words(data: bytes, header: Header, vertex: Element) -> Columns:
    if vertex.lists:
        raise ValueError("its vertices have lists")
    start = sum(each.count for each in header.elements[: header.elements.index(vertex)])
    lines = data[header.size :].decode("ascii").splitlines()[start : start + vertex.count]
    if len(lines) < vertex.count:
        raise ValueError(f"it is cut short: {len(lines)} of {vertex.count} vertices")
    if not lines:
        return {name: np.empty(0) for name in vertex.types}
    values = np.loadtxt(lines, np.float64, comments=None, ndmin=2)
    if values.shape != (vertex.count, len(vertex.types)):
        raise ValueError(f"its vertices do not have {len(vertex.types)} values each")
    return dict(zip(vertex.types, values.T, strict=True))


def _scene(columns: Columns, vertex: Element, name: str) -> Scene:
    with np.errstate(over="ignore"):  # what becomes infinite is refused with its point
        coords = np.stack([columns[each] for each in PLACE], axis=1).astype(np.float32)
    colours = np.zeros_like(coords)
    if all(each in columns for each in COLOUR):
        colours = np.stack([_shade(columns[each], vertex.types[each]) for each in COLOUR], axis=1)
    said = next((each for each in OBJECT if each in columns), None)
    return Scene(coords, colours, None if said is None else _numbers(columns[said], said), name)


def _shade(values: NDArray[np.float64], kind: str) -> NDArray[np.float32]:
    if kind[0] == "f":
        if len(values) and (values.min() < 0 or values.max() > 1):
            raise ValueError("its colours are fractions beyond 0 to 1")
        return values.astype(np.float32)
    return (values / np.iinfo(kind).max).astype(np.float32)


def _numbers(values: NDArray[np.float64], said: str) -> NDArray[np.int64]:
    if not (np.isfinite(values) & (values == np.round(values)) & (abs(values) < 2**31)).all():
        raise ValueError(f"its property '{said}' holds what is no whole number")
    return np.maximum(values.astype(np.int64), UNLABELLED)


def dump_ply(scene: Scene, labels: NDArray[np.int64]) -> bytes:
    """The content of a file of points with their colours, and a label for each [P] as the property ``object``."""
    kinds = [("f4", name) for name in PLACE] + [("u1", name) for name in COLOUR] + [("i4", OBJECT[0])]
    words = {"f4": "float", "u1": "uchar", "i4": "int"}
    values = np.empty(len(scene), np.dtype([(name, f"<{kind}") for kind, name in kinds]))
    for axis, name in enumerate(PLACE):
        values[name] = scene.coords[:, axis]
    for axis, name in enumerate(COLOUR):
        values[name] = np.round(255 * scene.colours[:, axis].clip(0, 1))
    values[OBJECT[0]] = labels
    properties = "".join(f"property {words[kind]} {name}\n" for kind, name in kinds)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(scene)}\n{properties}end_header\n"
    return header.encode() + values.tobytes()


def write_ply(path: Path, scene: Scene, labels: NDArray[np.int64]) -> None:
    """Write such a file.

    Raises:
        ExportError: when it cannot be written.
    """
    write_bytes(path, dump_ply(scene, labels))
