"""Reading what anyone may have written: whatever is wrong with a file becomes one error that names it.

Python's own reader of JSON also raises what no caller expects (``RecursionError`` for deep nesting), and lets pass what
fails much later: half of a surrogate pair can be neither written down nor tokenized.

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

DEEPEST = 100  # levels of nesting: far above any document, far below what ends the interpreter
LONGEST = 2**25  # characters or bytes of one line, and of one document: more than any book has
LARGEST_TEXT = 2**30  # bytes of a text that is read whole
ALWAYS_ALLOWED = 2**26  # bytes that every archive may expand to
LARGEST_RATIO = 200  # bytes that one byte of a larger archive may expand to; text reaches about 20

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
    """Open a regular file for reading, decompressed where its suffix is one of :data:`DECOMPRESSORS`.

    Raises:
        OSError: if the file cannot be opened.
        FileRefused: if it is not a regular file. Reading raises it when the file expands to more than it may.
    """
    file, decompress = open_file(path), DECOMPRESSORS.get(Path(path).suffix)
    return file if decompress is None else io.BufferedReader(_Expanding(file, decompress(file)))


def may_expand_to(size: int) -> int:
    """The largest number of bytes that an archive of ``size`` bytes may expand to."""
    return max(ALWAYS_ALLOWED, LARGEST_RATIO * size)


def check_expansion(size: int, expanded: int) -> None:
    """Check how much larger the content of an archive is than the archive.

    Raises:
        FileRefused: if it expands to more than :func:`may_expand_to`.
    """
    if expanded > may_expand_to(size):
        raise FileRefused(
            f"its {size:,} bytes expand to {expanded:,} or more, above {may_expand_to(size):,}: decompress it first"
        )


class _Expanding(io.RawIOBase):
    """The decompressed bytes of a file, which are counted while they are read."""

    def __init__(self, file: BinaryIO, decompressed: Any) -> None:
        self._file, self._decompressed = file, decompressed
        self._size, self._expanded = os.fstat(file.fileno()).st_size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._decompressed.read(len(buffer))
        self._expanded += len(data)
        check_expansion(self._size, self._expanded)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._decompressed.close()
        self._file.close()
        super().close()


def files_below(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """The regular files in a folder and its subfolders, sorted.

    Args:
        folder: where to look.
        wanted: which files are listed, by their path.

    Raises:
        CalibrationError: if there is a symbolic link, which may lead anywhere, or a pipe, a socket or a device among
            what is wanted; or if a subfolder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise CalibrationError(f"{error.filename}: cannot be listed ({error.strerror}): change its permissions")

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        linked = [path for name in folders if (path := Path(place, name)).is_symlink()]
        files = [path for name in names if wanted(path := Path(place, name))]
        for path in (*linked, *files):
            check_in_folder(path)
        found += files
    return sorted(found)


def check_in_folder(path: Path) -> Path:
    """A file of a folder, which is checked not to be a link; one that is missing is for its reader to refuse.

    Raises:
        CalibrationError: if it is a link, or there and no regular file.
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
    """The value of a JSON text.

    Raises:
        ValueError: for anything else, with one line that says why.
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
    """Check level by level, without recursion, that a value is not nested too deeply and its strings are whole."""
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
    """A JSON value whose strings UTF-8 can hold: of file names, what it cannot hold becomes question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {in_utf_8(name): in_utf_8(each) for name, each in value.items()}
    return [in_utf_8(each) for each in value] if isinstance(value, list) else value


def read_text(path: str | Path, hint: str = "give a text file") -> str:
    """The content of a file of data.

    Raises:
        CalibrationError: when it is missing, too large or no UTF-8 text.
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
        number: of the line, from 1.
        text: without what ends the line.
        offset, size: the bytes of the line in the file, with what ends it.
    """

    number: int
    text: str
    offset: int
    size: int


def _lines(path: str | Path, hint: str) -> Iterator[Line]:
    """The lines of a text file that are not blank; see :func:`read_lines`."""
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
    """The lines of a file of data that are not blank, with their numbers.

    Only line feeds and carriage returns end a line: JSON strings may hold all other characters that end one elsewhere.

    Raises:
        CalibrationError: when the file is missing or no UTF-8 text, or a line is too long.
    """
    return [(line.number, line.text) for line in _lines(path, hint)]


def read_rows(
    path: str | Path, hint: str = "give one object a line", instead: str = "give a .jsonl file"
) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines, each with the number of its line.

    Args:
        mend: what a line should be, for the message.
        instead: which file to give where there is none.

    Raises:
        CalibrationError: for a file that cannot be read, or a line that is not JSON.
    """
    for line in _lines(path, instead):
        yield line.number, _row(path, line.number, line.text, hint)


class RowFile:
    """A file of JSON lines of which only the offsets of the lines are in memory.

    Args:
        path: the file.
        mend: what a line should be, for the message.

    Raises:
        CalibrationError: if the file cannot be read.
    """

    def __init__(self, path: Path, hint: str) -> None:
        self.path, self.hint = path, hint
        self.lines = [(line.number, line.offset, line.size) for line in _lines(path, "give a .jsonl file")]

    def read(self, entry: tuple[int, int, int]) -> tuple[int, Any]:
        """The value of a line of ``lines``, with the number of the line.

        Raises:
            CalibrationError: if the line is not JSON, or the file cannot be read any more.
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
    """The JSON lines of a journal, up to the first that a kill cut short or that is none of its own.

    Args:
        is_whole: whether a value is a line of this journal.
        header: the line that must come first; nothing is found under another one.

    Raises:
        LamellaError: when the file is there and cannot be read.
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
