"""Atomic writing of files and folders: at every moment, one complete version exists.

A file is written to a temporary sibling and renamed (:func:`write`, :func:`replacing`); several processes may do so at
once. Intermediate results of long work are kept as lines of a journal, the last of which a kill may cut short
(:class:`Journal`).

A folder of results is made in the same way (:func:`new_folder`): it is written as a hidden sibling,
``.OUT.partial-...``, and renamed when it is complete. An older version is exchanged atomically, so that ``OUT`` is
never missing. If the system does not support that, the older version is first moved aside, to ``.OUT.aside-...``, and
deleted last. If a process dies between the two renames, the old version is left aside; :func:`recover` restores it, and
the next export does so by itself.

Locks of the operating system, which end with their process, tell whether a sibling is still in use: the parent is
locked while names change, and a partial folder while it is written.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.errors import ExportError
from lamella.reading import read_journal

SLACK = 16 << 20  # bytes for config, tokenizer, report and the file system
HERE, EXCHANGE = -100, 2  # Linux: relative to the current folder, and exchange two names
UNFINISHED = ".*.partial-*"  # remains of files that a killed process was writing


# Files


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file, in its own hidden folder, that replaces ``path`` when the block ends without an error.

    A concurrent process that opens ``path`` finds the old file or the new one, never a part. If several processes write
    ``path`` at once, each has a folder of its own, and the last one to finish wins. Remains of a killed process are
    deleted when ``path`` is written again.

    Args:
        path: the file to write.
    """
    path = Path(path)
    for left in _siblings(path, "partial"):
        _sweep(left)
    folder, lock = _folder_in_use(path)
    partial = folder / f"{path.name}.partial"
    try:
        yield partial
        sync_entry(partial)
        partial.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _folder_in_use(path: Path) -> tuple[Path, int]:
    """Make a new sibling and lock it.

    The lock of the parent is not taken, since the caller may hold it.

    Returns:
        The folder, and the descriptor that holds its lock.
    """
    while True:
        folder = _sibling(path, "partial")
        folder.mkdir()
        with suppress(FileNotFoundError):
            lock = _lock(folder)
            if folder.exists():  # no other process has deleted it before it was locked
                return folder, lock
            os.close(lock)


def _sweep(left: Path) -> None:
    """Delete a partial sibling that no process writes any more."""
    with suppress(BlockingIOError, FileNotFoundError):
        lock = _lock(left, fcntl.LOCK_NB)
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def write(path: str | Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: the file.
        text: its content.

    Raises:
        ExportError: if it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically.

    Args:
        path: the file.
        data: its content.

    Raises:
        ExportError: if it cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from None


class Journal:
    """JSON lines from which an interrupted run resumes, after a header that identifies the run.

    Args:
        path: the file; None keeps no journal.
        is_whole: returns whether a value is a valid line of this kind of journal.
        header: the first line; a journal with another header is started again. None for a journal without a header.

    Attributes:
        found: the lines of an earlier run, up to the first that a kill cut short.
    """

    def __init__(self, path: Path | None, is_whole: Callable[[Any], bool], header: str | None = None) -> None:
        self.path = path
        self.found: list[Any] = []
        if path is None:
            return
        self.found = read_journal(path, is_whole, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [*([] if header is None else [header]), *map(json.dumps, self.found)]
        write(path, "".join(f"{line}\n" for line in lines))

    def add(self, line: Any) -> None:
        """Append a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class Finished:
    """Results of the parts of long work, by name, so that a run that was stopped does each part once.

    Args:
        path: file of the journal; None keeps no journal.
        depends: JSON values on which all results depend; results of other values are discarded.
    """

    def __init__(self, path: Path | None, depends: Any) -> None:
        self._journal = Journal(path, _is_finished, json.dumps(depends))
        self._found: dict[str, Any] = dict(self._journal.found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        return len(self._found)

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """Return the stored result of a part, or compute and store it.

        Args:
            name: name of the part.
            find: computes the result, a JSON value.
        """
        if name not in self._found:
            self._found[name] = json.loads(json.dumps(find()))
            self._journal.add([name, self._found[name]])
        return self._found[name]


def _is_finished(line: Any) -> bool:
    return isinstance(line, list) and len(line) == 2 and isinstance(line[0], str)


@dataclass(frozen=True)
class Work:
    """The folder in which long work keeps intermediate results, so that it resumes after a stop.

    Attributes:
        folder: the folder, created when something is stored. None keeps nothing after the process has ended.
    """

    folder: Path | None = None

    def journal(self, name: str) -> Path | None:
        """Return the file of a journal, for :class:`Journal`, in a folder that exists; None if nothing is kept.

        Args:
            name: name of the journal.

        Raises:
            ExportError: if the folder cannot be created.
        """
        return None if self.folder is None else self.directory() / f"{name}.jsonl"

    def within(self, name: str) -> Work:
        """Return the subfolder of one of several steps."""
        return self if self.folder is None else Work(Path(self.folder) / name)

    def directory(self, name: str = "") -> Path:
        """Return a folder for checkpoints and tensors, which exists; a temporary one if nothing is kept.

        Args:
            name: name of a subfolder.

        Raises:
            ExportError: if it cannot be created.
        """
        if self.folder is None:
            temporary = Path(tempfile.mkdtemp(prefix="lamella-"))
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            return temporary
        directory = Path(self.folder) / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                f"{directory}: cannot be written ({error.strerror or error}); choose another folder"
            ) from None
        return directory


# Folders


@contextmanager
def new_folder(out: str | Path, *, size: int, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes ``out`` when the block ends without an error.

    Args:
        out: the folder to make.
        size: number of bytes that will be written.
        overwrite: replace an earlier model in ``out``.
        source: the folder that is read meanwhile, which ``out`` must not replace.

    Raises:
        ExportError: if ``out`` exists and may not be overwritten, or does not fit on the disk.
    """
    out = Path(out).resolve()
    try:
        recover(out)
        _check_replaceable(out, overwrite, source)
        _make_parent(out)
        _check_space(out, size)
        partial = _sibling(out, "partial")
        with _locked(out.parent):
            partial.mkdir()
            lock = _lock(partial)
        try:
            yield partial
            sync(partial)
            with _locked(out.parent):
                _check_replaceable(out, overwrite, source)  # again, since another process may have created it meanwhile
                _put(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror or error}); choose another folder") from error


def recover(out: str | Path) -> None:
    """Restore the version that a killed export had moved aside, and delete partial folders.

    Args:
        out: the folder of the export.
    """
    out = Path(out).resolve()
    if not out.parent.is_dir():
        return
    with _locked(out.parent):
        for aside in _siblings(out, "aside"):
            if out.exists():
                _delete(aside, out)
            else:
                aside.rename(out)
        for folder in [path for path in _siblings(out, "partial") if not _is_locked(path)] + _siblings(out, "deleted"):
            shutil.rmtree(folder, ignore_errors=True)


def discard(work: Path, out: Path) -> None:
    """Delete the work folder of a finished run atomically, so that no later run resumes from half of it.

    Args:
        work: the work folder.
        out: the output folder.
    """
    deleted = _sibling(out, "deleted")
    try:
        work.rename(deleted)
    except OSError:  # it does not exist, or may not be deleted
        return
    shutil.rmtree(deleted, ignore_errors=True)


def _put(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an older version is kept until then, and deleted."""
    old = None
    if not out.exists():
        partial.rename(out)
    elif _exchange(partial, out):
        old = partial
    else:
        old = _sibling(out, "aside")
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
    sync_entry(out.parent)
    if old is not None:
        _delete(old, out)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step, if the system and the file system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def _delete(old: Path, out: Path) -> None:
    """Delete an old version under another name, so that a folder named ``aside`` is always complete."""
    deleted = _sibling(out, "deleted")
    old.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def _sibling(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}-{secrets.token_hex(4)}"  # process ids are reused


def _siblings(out: Path, kind: str) -> list[Path]:
    return [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.{kind}-")]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, flags: int = 0) -> int:
    """Lock a folder until the returned descriptor is closed, or its process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_locked(folder: Path) -> bool:
    try:
        os.close(_lock(folder, fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    return False


def check_free(out: Path, overwrite: bool) -> None:
    """Check, before long work, that its result may be written; :func:`new_folder` checks again when it is.

    Args:
        out: the output folder.
        overwrite: whether an existing folder may be replaced.

    Raises:
        ExportError: if ``out`` exists and must not be replaced.
    """
    try:
        recover(out)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror or error}); choose another folder") from error
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists: choose another folder, or add --overwrite to replace it")


def _check_replaceable(out: Path, overwrite: bool, source: Path | None) -> None:
    if source is not None and (out == source.resolve() or out in source.resolve().parents):
        raise ExportError(f"{out}: holds the model that is being exported; choose another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out}: is a file; give the name of a folder")
    if not overwrite:
        raise ExportError(f"{out}: exists; give another folder, or --overwrite to replace it")
    if any(out.iterdir()) and not _is_model(out):
        raise ExportError(
            f"{out}: is not a model (no config.json or plan.json of one), so it is not overwritten; delete it yourself"
        )


def _is_model(folder: Path) -> bool:
    """Return whether a folder is a checkpoint or an export; other folders may have a config.json too."""
    for name, key in (("config.json", "model_type"), ("plan.json", "schema"), ("evidence.json", "schema")):
        try:
            if key in json.loads((folder / name).read_bytes()):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return False


def _make_parent(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"{out}: its parent folder cannot be made ({error.strerror}); choose another folder"
        ) from None
    if not os.access(out.parent, os.W_OK):
        raise ExportError(f"{out}: its parent folder is not writable; choose another folder")


def _check_space(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < size + SLACK:
        raise ExportError(
            f"{out}: needs {(size + SLACK) / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder"
        )


def sync(folder: Path) -> None:
    """Flush everything in a folder to the disk, before it gets its name."""
    for path in folder.rglob("*"):
        sync_entry(path)
    sync_entry(folder)


def sync_entry(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
