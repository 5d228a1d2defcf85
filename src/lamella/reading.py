"""Reading of untrusted files: any defect of a file becomes one error that names it.

Python's JSON parser also raises errors that callers do not expect (``RecursionError`` for deep nesting), and accepts
values that fail much later: an unpaired surrogate can neither be written nor tokenized.

Files are opened here, too. A file from elsewhere may be a pipe that never ends, a link to a file that its author must
not see, or an archive of a few kilobytes that decompresses to all of the memory. So only regular files are opened,
folders are listed without following links, and lines, files and decompressed data have a maximum size.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lamella.errors import CalibrationError, LamellaError
from lamella.extras import require

DEEPEST = 100  # maximum levels of nesting, far below the recursion limit
LONGEST = 2**25  # maximum characters or bytes of a line and of a document: more than any book has
LARGEST_TEXT = 2**30  # maximum bytes of a text that is read into memory
ALWAYS_ALLOWED = 2**26  # bytes that any archive may expand to
LARGEST_RATIO = 200  # maximum compression ratio of a larger archive; text reaches about 20

DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: require("pyarrow", "data", "a .zst file").CompressedInputStream(file, "zstd"),
}


class FileRefused(ValueError):
    """A file that is not read because of its type or its size."""


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading; a pipe is refused instead of being waited for.

    Args:
        path: the file.

    Raises:
        OSError: if the file cannot be opened.
        FileRefused: if it is a pipe, a socket or a device.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileRefused("it is not a regular file")
    return file


def open_decompressed(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, decompressed if its suffix is one of :data:`DECOMPRESSORS`.

    Args:
        path: the file.

    Raises:
        OSError: if the file cannot be opened.
        FileRefused: if it is not a regular file. Reading raises it when the file expands to more than the maximum size.
    """
    file, decompress = open_file(path), DECOMPRESSORS.get(Path(path).suffix)
    return file if decompress is None else io.BufferedReader(_Expanding(file, decompress(file)))


def may_expand_to(size: int) -> int:
    """Return the maximum number of bytes that an archive of ``size`` bytes may expand to."""
    return max(ALWAYS_ALLOWED, LARGEST_RATIO * size)


def check_expansion(size: int, expanded: int) -> None:
    """Check how much larger the content of an archive is than the archive.

    Args:
        size: size of the archive in bytes.
        expanded: size of its content in bytes.

    Raises:
        FileRefused: if it expands to more than :func:`may_expand_to`.
    """
    if expanded > may_expand_to(size):
        raise FileRefused(
            f"its {size:,} bytes expand to {expanded:,} or more, above {may_expand_to(size):,}: decompress it first"
        )


class _Expanding(io.RawIOBase):
    """The decompressed bytes of a file, counted while they are read."""

    def __init__(self, file: BinaryIO, decompressed: Any) -> None:
        self._file, self._decompressed = file, decompressed
        self._size, self._expanded = os.fstat(file.fileno()).st_size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and return the number of bytes."""
        data = self._decompressed.read(len(buffer))
        self._expanded += len(data)
        check_expansion(self._size, self._expanded)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._decompressed.close()
        self._file.close()
        super().close()


def files_below(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Return the regular files in a folder and its subfolders, sorted.

    Args:
        folder: the folder.
        wanted: returns whether a path is listed.

    Raises:
        CalibrationError: if there is a symbolic link, which may lead anywhere, or a pipe, a socket or a device among
            the listed paths; or if a subfolder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise CalibrationError(f"{error.filename}: cannot be listed ({error.strerror}): change its permissions")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        linked = [path for name in folders if (path := Path(parent, name)).is_symlink()]
        files = [path for name in names if wanted(path := Path(parent, name))]
        for path in (*linked, *files):
            check_in_folder(path)
        found += files
    return sorted(found)


def check_in_folder(path: Path) -> Path:
    """Check that a path in a folder is not a link, and return it; a missing file is left to the caller.

    Args:
        path: the path.

    Raises:
        CalibrationError: if it is a link, or exists and is not a regular file.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return path
    if stat.S_ISLNK(mode):
        raise CalibrationError(
            f"{path}: links in a folder are not followed: replace the link by the file, or remove it"
        )
    if not stat.S_ISREG(mode):
        raise CalibrationError(f"{path}: is not a regular file: remove it from the folder")
    return path


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Args:
        text: the text.

    Raises:
        ValueError: if it is not valid, with the reason in one line.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST or "\\ud" in text or "\\uD" in text:
        _check(value)
    return value


def _check(value: Any) -> None:
    """Check level by level, without recursion, that a value is not nested too deeply and its strings can be encoded."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str):
                each.encode()
            elif isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
        if not inner:
            return
        level = inner
    raise ValueError("nested too deeply")


def in_utf_8(value: Any) -> Any:
    """Replace characters in the strings of a JSON value that UTF-8 cannot encode by question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {in_utf_8(name): in_utf_8(each) for name, each in value.items()}
    return [in_utf_8(each) for each in value] if isinstance(value, list) else value


def read_text(path: str | Path, hint: str = "give a text file") -> str:
    """Read a text file.

    Args:
        path: the file.
        hint: which file to give, for the message.

    Raises:
        CalibrationError: if it is missing, too large or not UTF-8.
    """
    try:
        with open_file(Path(path).expanduser()) as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST_TEXT:
                raise FileRefused(f"it has {size:,} bytes, above {LARGEST_TEXT:,}")
            with io.TextIOWrapper(file, encoding="utf-8") as text:
                return text.read()
    except (OSError, UnicodeDecodeError, FileRefused) as error:
        raise _unreadable(path, error, hint) from None


def _unreadable(path: str | Path, error: Exception, hint: str) -> CalibrationError:
    reason = str(error) if isinstance(error, FileRefused) else type(error).__name__
    return CalibrationError(f"{path}: cannot be read as UTF-8 text ({reason}): {hint}")


class Line(NamedTuple):
    """A line of a text file.

    Attributes:
        number: line number, from 1.
        text: the line without its ending.
        offset: offset of the line in the file, in bytes.
        size: size of the line with its ending, in bytes.
    """

    number: int
    text: str
    offset: int
    size: int


def _lines(path: str | Path, hint: str) -> Iterator[Line]:
    """Yield the lines of a text file that are not blank; see :func:`read_lines`."""
    try:
        with open_file(Path(path).expanduser()) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            number = offset = 0
            while line := text.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise FileRefused(f"line {number} has more than {LONGEST:,} characters")
                size = len(line.encode())
                if line.strip():
                    yield Line(number, line.rstrip("\r\n"), offset, size)
                offset += size
    except (OSError, UnicodeDecodeError, FileRefused) as error:
        raise _unreadable(path, error, hint) from None


def read_lines(path: str | Path, hint: str = "give a text file") -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their line numbers.

    Only line feeds and carriage returns end a line: JSON strings may contain other characters that end lines elsewhere.

    Args:
        path: the file.
        hint: which file to give, for the message.

    Raises:
        CalibrationError: if the file is missing or not UTF-8, or a line is too long.
    """
    return [(line.number, line.text) for line in _lines(path, hint)]


def read_rows(
    path: str | Path, hint: str = "give one object a line", instead: str = "give a .jsonl file"
) -> Iterator[tuple[int, Any]]:
    """Yield the values of a file of JSON lines with their line numbers.

    Args:
        path: the file.
        hint: the expected form of a line, for the message.
        instead: which file to give, for the message.

    Raises:
        CalibrationError: if the file cannot be read, or a line is not JSON.
    """
    for line in _lines(path, instead):
        yield line.number, _row(path, line.number, line.text, hint)


class RowFile:
    """A file of JSON lines, of which only the offsets of the lines are in memory.

    Args:
        path: the file.
        hint: the expected form of a line, for messages.

    Raises:
        CalibrationError: if the file cannot be read.
    """

    def __init__(self, path: Path, hint: str) -> None:
        self.path, self.hint = path, hint
        self.lines = [(line.number, line.offset, line.size) for line in _lines(path, "give a .jsonl file")]

    def read(self, entry: tuple[int, int, int]) -> tuple[int, Any]:
        """Return the value of an entry of ``lines``, with its line number.

        Args:
            entry: line number, offset and size.

        Raises:
            CalibrationError: if the line is not JSON, or the file can no longer be read.
        """
        number, offset, size = entry
        try:
            with open_file(self.path) as file:
                file.seek(offset)
                text = file.read(size).decode()
        except (OSError, UnicodeDecodeError, FileRefused) as error:
            raise _unreadable(self.path, error, "give a .jsonl file") from None
        return number, _row(self.path, number, text, self.hint)


def _row(path: str | Path, number: int, text: str, hint: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise CalibrationError(f"{path} line {number} is not JSON ({error}); {hint}") from None


def read_journal(path: Path, is_whole: Callable[[Any], bool], header: str | None = None) -> list[Any]:
    """Return the JSON lines of a journal, up to the first that a kill cut short or that does not belong to it.

    Args:
        path: the journal.
        is_whole: returns whether a value is a line of this journal.
        header: the expected first line; nothing is returned under another one.

    Raises:
        LamellaError: if the file exists and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise LamellaError(f"{path}: the journal cannot be read ({error.strerror}): remove it") from None
    if header is not None:
        lines = lines[1:] if lines[:1] == [header.encode()] else []
    found = []
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            break
        if not is_whole(value):
            break
        found.append(value)
    return found
