"""Untrusted inputs: damaged bytes and almost valid documents, and checks of their effects.

A document is damaged as a structure and then serialised, so that it passes the parser and reaches the code behind it.
"""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import settings
from hypothesis import strategies as st

from lamella.errors import LamellaError

EVIL = (  # strings with a special meaning for a file system, a shell, a template, a terminal or a decoder
    "",
    ".",
    "..",
    "../canary",
    "../canary.safetensors",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\0",
    "a\0b",
    "line\nline",
    "line\u2028line\x85line",
    "\x1b[2J\x1b]0;x\x07",
    "\ud800",
    "\udcff",
    "x" * 300,
    "NaN",
    "1e999",
    "layers.0",
    "layers.٣",
    "layers." + "9" * 5000,
    "__class__",
    "{0.__class__}%s%n",
    "{{ 7 * 7 }}",
    "__import__('os').system('touch canary')",
    "; touch canary",
    "~",
    "$HOME",
    "\ufeff",
    "e\u0301\u202e\U0001d4b3",
)
DEEP, DIGITS, HUGE = "@deep@", "@digits@", "@huge@"  # replaced by `dumped`, since they have no Python value
WRITTEN = {DEEP: "[" * 20_000 + "]" * 20_000, DIGITS: "9" * 5000, HUGE: "1e999"}

numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63 - 1, 2**63, 2**64, 10**12, 10**18, -(10**18), 10**40, -(2**63)]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.integers(-3, 600),
    st.integers(),
    st.floats(),
)
strings = st.one_of(
    st.sampled_from(EVIL),
    st.sampled_from(list(WRITTEN)),
    st.text(st.characters(exclude_categories=()), max_size=12),  # lone surrogates too
)
scalars = st.one_of(st.none(), st.booleans(), numbers, strings)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(strings, inner, max_size=4)),
    max_leaves=8,
)


def dumped(document: Any) -> str:
    """Return a document as JSON text, with values that Python cannot represent."""
    text = json.dumps(document)
    for name, written in WRITTEN.items():
        text = text.replace(f'"{name}": ', f'"{name} ": ').replace(f'"{name}"', written)
    return text


@st.composite
def mutated(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """Draw a document that differs from a valid one in a few entries: presence, type, number or size."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        holder, key = draw(st.sampled_from(list(_locations(document)) or [([document], 0)]))
        if holder is None:
            document = draw(values)
            continue
        old = holder[key]
        change = draw(st.sampled_from(_CHANGES))
        if change is _removed:
            del holder[key]
        else:
            holder[key] = change(draw, old, document)
        if isinstance(holder, dict) and draw(st.integers(0, 9)) == 0:
            holder[draw(strings)] = draw(values)
    return document


def _locations(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every entry of a document as its container and key; the root has no container."""
    yield None, None
    waiting = [document]
    while waiting:
        container = waiting.pop()
        pairs = (
            container.items()
            if isinstance(container, dict)
            else enumerate(container)
            if isinstance(container, list)
            else ()
        )
        for key, inner in pairs:
            yield container, key
            waiting.append(inner)


def _removed(draw: st.DrawFn, old: Any, document: Any) -> Any:
    """Remove the entry."""


def _other(draw: st.DrawFn, old: Any, document: Any) -> Any:
    return draw(values)


def _same_type(draw: st.DrawFn, old: Any, document: Any) -> Any:
    """Another value of the same type, which readers that check types alone let pass."""
    if isinstance(old, bool) or old is None:
        return draw(scalars)
    if isinstance(old, int | float):
        return draw(numbers)
    if isinstance(old, str):
        return draw(st.one_of(strings, st.text(max_size=3).map(lambda more: old + more)))
    if isinstance(old, list):
        more = draw(st.lists(st.sampled_from(old) if old else scalars, max_size=6))
        return draw(st.permutations([*old, *more][:20]))
    return {draw(st.one_of(st.just(name), strings)): inner for name, inner in old.items()}


def _from_elsewhere(draw: st.DrawFn, old: Any, document: Any) -> Any:
    holder, key = draw(st.sampled_from(list(_locations(document))))
    return copy.deepcopy(document if holder is None else holder[key])


def _wrapped(draw: st.DrawFn, old: Any, document: Any) -> Any:
    return draw(st.sampled_from([[old], {"0": old}, [old, old], str(old), [[[[old]]]]]))


def _more(draw: st.DrawFn, old: Any, document: Any) -> Any:
    """One entry more, or the same one many times."""
    if isinstance(old, list):
        return old + draw(st.sampled_from([old, old * 3, [draw(values)]]))
    if isinstance(old, dict):
        return old | {draw(strings): draw(values)}
    return old * 2 if isinstance(old, str) else old


_CHANGES = (_removed, _other, _same_type, _same_type, _from_elsewhere, _wrapped, _more)


@st.composite
def damaged(draw: st.DrawFn, data: bytes, within: int | None = None) -> bytes:
    """Draw bytes that are truncated, flipped, repeated, overwritten or removed.

    Args:
        within: the damage begins before this byte; anywhere if None.
    """
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, min(len(data), within or len(data)) - 1)))
        length = draw(st.one_of(st.integers(0, 16), st.integers(0, len(data))))
        end = min(start + length, len(data))
        kind = draw(st.sampled_from(["cut", "flip", "lose", "repeat", "overwrite", "insert", "zeros", "all"]))
        if kind == "cut":
            data = data[:start]
        elif kind == "flip" and data:
            data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
        elif kind == "lose":
            data = data[:start] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[start:]
        elif kind == "overwrite":
            other = draw(st.binary(max_size=24))
            data = data[:start] + other + data[start + len(other) :]
        elif kind == "insert":
            data = data[:start] + draw(st.binary(max_size=24)) + data[start:]
        elif kind == "zeros":
            data = data[:start] + bytes(end - start) + data[end:]
        else:
            data = draw(st.binary(max_size=64))
    return data


def safetensors_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of this header, however wrong; with a length of it that may be wrong too."""
    text = dumped(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def parts_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@st.composite
def safetensors_files(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """Files whose header or bytes are not quite those of a valid one."""
    if draw(st.booleans()):
        lengths = st.one_of(st.none(), st.sampled_from([0, 1, 7, 8, 100_000_001, 2**32, 2**63, 2**64 - 1]))
        return safetensors_file(draw(mutated(header)), data, draw(st.one_of(st.none(), lengths)))
    whole = safetensors_file(header, data)
    return draw(damaged(whole, within=draw(st.sampled_from([8, len(whole) - len(data), None]))))


@st.composite
def zip_archives(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a zip archive with members that differ slightly from those of a valid one.

    A member may be truncated, duplicated, renamed, have a wrong size in the directory, or expand a thousandfold.
    """
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    chosen = draw(st.integers(0, len(members) - 1))
    name, content = members[chosen]
    change = draw(st.sampled_from(["damaged", "name", "twice", "huge", "size", "gone"]))
    if change == "damaged":
        content = draw(st.just(content).flatmap(lambda data: damaged(data, within=draw(st.sampled_from([128, None])))))
    elif change == "name":
        name = draw(
            st.sampled_from([".npy", "../canary.npy", "/etc/passwd", "a\\b.npy", "x" * 300 + ".npy", name[:-4]])
        )
    elif change == "huge":
        content += bytes(draw(st.sampled_from([10**3, 10**6, 10**8])))
    members[chosen] = (name, content)
    members += [members[chosen]] if change == "twice" else []
    del members[chosen : chosen + (change == "gone")]
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for member, data in members:
            archive.writestr(member, data)
        if change == "size":
            archive.filelist[chosen].file_size = draw(st.sampled_from([0, 1, 2**20, 2**31, 2**40, 2**62]))
    return written.getvalue()


def parquet_file(columns: dict[str, Any], **how: Any) -> bytes:
    """A Parquet file of these columns."""
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), written, **how)
    return written.getvalue()


@st.composite
def parquet_files(draw: st.DrawFn, rows: list[dict[str, Any]]) -> bytes:
    """Parquet files with columns of types and values that nobody expects, or damaged ones."""
    table: dict[str, Any] = {name: pyarrow.array([row[name] for row in rows]) for name in rows[0]}
    whole = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**62, -(2**63), 2**63 - 1])
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*table, "other", "a.b", ""]))
        kind = draw(st.sampled_from(["binary", "i8", "i4", "list", "struct", "float", "null", "cut"]))
        values = [draw(whole) for _ in rows]
        column: Any = pyarrow.nulls(len(rows))
        if kind == "binary":
            column = pyarrow.array([draw(st.binary(max_size=12)) for _ in rows])
            column = column.view(draw(st.sampled_from([pyarrow.string(), pyarrow.binary()])))
        elif kind == "i8":
            zone = draw(st.sampled_from([None, "UTC", "Nowhere/Atlantis", "\\0", "+99:99"]))
            types = [pyarrow.int64(), pyarrow.uint64(), pyarrow.timestamp("us", zone), pyarrow.timestamp("ns", zone)]
            types += [pyarrow.duration("s"), pyarrow.duration("ns"), pyarrow.time64("us"), pyarrow.date64()]
            column = pyarrow.array(values, pyarrow.int64()).view(draw(st.sampled_from(types)))
        elif kind == "i4":
            column = pyarrow.array([each % 2**31 for each in values], pyarrow.int32())
            column = column.view(draw(st.sampled_from([pyarrow.int32(), pyarrow.date32(), pyarrow.time32("s")])))
        elif kind in ("list", "struct"):
            column = pyarrow.array([["a"] if kind == "list" else {"b": "a", "text": each} for each in values])
        elif kind == "float":
            column = pyarrow.array([float("nan")] * len(rows))
        table[name] = column
    codec = draw(st.sampled_from(["none", "snappy", "gzip", "zstd"]))
    try:
        content = parquet_file(table, compression=codec, use_dictionary=draw(st.booleans()))
    except (pyarrow.ArrowException, ValueError):  # values that the format cannot store
        content = parquet_file({"text": ["A text."]})
    end = draw(st.sampled_from([None, 16, len(content)]))  # the footer describes the contents
    return draw(st.one_of(st.just(content), st.just(content), damaged(content, within=end)))


PLY_TYPES = ["char", "uchar", "short", "int", "float", "double", "uint8", "int32", "float64", "list", "void"]
PLY_NAMES = ["x", "y", "z", "red", "green", "blue", "object", "label", "other"]


@st.composite
def point_clouds(draw: st.DrawFn) -> bytes:
    """PLY files whose header does not quite say what follows it."""
    form = draw(st.sampled_from(["ascii", "ascii", "binary_little_endian", "binary_big_endian", "binary"]))
    names = draw(st.one_of(st.just(PLY_NAMES[:7]), st.lists(st.sampled_from(PLY_NAMES), max_size=8)))
    kinds = [draw(st.sampled_from(["float", "uchar", "int", *PLY_TYPES])) for _ in names]
    points = draw(st.integers(0, 4))
    count = draw(st.sampled_from([points, points, points, points + 1, 2**31, 10**30, -1, "many"]))
    vertex = [f"element vertex {count}", *(f"property {kind} {name}" for kind, name in zip(kinds, names, strict=True))]
    faces = [f"element face {draw(st.integers(0, 2))}", "property list uchar int vertex_indices"]
    lines = draw(st.permutations([vertex, faces]) if draw(st.booleans()) else st.just([vertex]))
    header = ["ply", f"format {form} 1.0", "comment made up", *(line for part in lines for line in part), "end_header"]
    if form == "ascii":
        words = st.one_of(st.integers(-2, 300).map(str), numbers.map(str), st.sampled_from(["nan", "1e400", "0x1", ""]))
        rows = [" ".join(draw(words) for _ in names) for _ in range(points)]
        body = "\n".join([*rows, "3 0 1 2", ""]).encode("ascii", "replace")
    else:
        body = draw(st.binary(max_size=8 * len(names) * points + 8))
    content = "\n".join([*header, ""]).encode() + body
    return draw(st.one_of(st.just(content), st.just(content), damaged(content, within=200)))


def share(of: int) -> settings:
    """Settings for tests whose examples are slow: one ``of`` the profile's examples."""
    return settings(max_examples=max(5, settings().max_examples // of))


class _Timeout(BaseException):
    """Not an `Exception`, so that no code on the way handles it."""


@contextmanager
def answered(folder: Path, seconds: int = 20, gigabytes: float = 4, allowed: str = "") -> Iterator[None]:
    """Require that a block succeeds or fails with a one-line error, within limits of time, memory and folder.

    Args:
        folder: the only folder that it may write to, and the only one that it may read next to others.
        allowed: one audit event of running code that may occur.
    """
    with _time_limit(seconds), _memory_limit(gigabytes), _confined(folder, allowed):
        try:
            yield
        except LamellaError as error:
            refusal(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # for a timeout or a panic in Rust, Hypothesis would not print the example
            if isinstance(error, Exception):
                raise
            raise AssertionError(f"{type(error).__name__}: {error}") from error


def refusal(error: LamellaError) -> str:
    """Return the message of an error after a check that it is one line."""
    message = str(error)
    assert message.strip() and message.isprintable(), f"not one printable line: {message!r}"
    assert len(message) <= 2500, f"a line of {len(message)} characters"
    return message


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Timeout(f"no answer after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit(gigabytes: float) -> Iterator[None]:
    """Let allocations beyond this limit fail, instead of exhausting the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(gigabytes * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_watching: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watching:
        watch(event, arguments)


@cache
def _install_hook() -> None:
    sys.addaudithook(_hook)  # once and for good: Python has no way back


_RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
_CHANGES_FILES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@contextmanager
def _confined(folder: Path, allowed: str) -> Iterator[None]:
    """Check that nothing is written outside a folder, no neighbour of it is read, and no other code runs."""
    folder = folder.resolve()
    wrong: list[str] = []

    def outside(path: Any) -> Path | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        found = Path(os.path.realpath(os.fsdecode(path)))
        return None if found == folder or folder in found.parents else found

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS and event != allowed:
            wrong.append(f"{event}{arguments[:2]}")
        elif event == "exec":
            source = getattr(arguments[0], "co_filename", "")
            if "transformers_modules" in source or source.startswith(str(folder)):
                wrong.append(f"ran {source}")
        elif event == "open":
            path, _, flags = arguments
            found = outside(path)
            if found is None or str(found).startswith("/dev/") or "__pycache__" in found.parts:
                return
            if flags & _WRITES and not found.is_dir():  # in a folder, a temporary file without a name is opened
                wrong.append(f"wrote {found}")
            elif folder.parent in found.parents or found == Path("/etc/passwd"):
                wrong.append(f"read {found}")
        elif event in _CHANGES_FILES and (os.path.isabs(arguments[0]) or -1 in arguments):  # -1: of no open folder
            wrong.extend(f"{event} {found}" for found in map(outside, arguments[:2]) if found is not None)

    _install_hook()
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.remove(watch)
    assert not wrong, wrong[0]
