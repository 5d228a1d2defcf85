"""The cache folder, and cached folders that are built once, atomically."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from lamella.errors import DownloadError
from lamella.files import sync, sync_entry

MARKER = "lamella-zoo.json"


def cache_folder() -> Path:
    """Return the download folder: ``$LAMELLA_CACHE``, else ``$XDG_CACHE_HOME/lamella``, else ``~/.cache/lamella``."""
    if own := os.environ.get("LAMELLA_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lamella"
    return Path.home() / ".cache" / "lamella"


def build_once(name: str, build: Callable[[Path], dict[str, Any]], megabytes: int) -> Path:
    """Return the folder ``name`` of the cache, built by ``build`` unless it already exists and is complete.

    The folder is built under a temporary name and renamed at the end, so ``name`` is always complete. A lock makes a
    second process wait for the first one's result; leftovers of a killed one are deleted. Each build has its own
    temporary folder, in case a child of a killed process is still writing.

    Args:
        name: the folder's name in the cache.
        build: fills the given empty folder and returns the provenance to store with the files.
        megabytes: peak disk space of the build.

    Returns:
        The finished folder; its ``lamella-zoo.json`` contains the provenance and the size of every file.

    Raises:
        DownloadError: if the cache folder cannot be written or its disk is full.
    """
    done = cache_folder() / name
    if is_complete(done):
        return done
    partial = done.with_name(f".{name}.partial-{secrets.token_hex(4)}")
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(done.with_name(f".{name}.lock")):
            if is_complete(done):  # another process finished it while this one waited
                return done
            for left in done.parent.glob(f".{name}.partial*"):
                shutil.rmtree(left, ignore_errors=True)
            _check_room(done.parent, name, megabytes)
            partial.mkdir()
            try:
                _write_marker(partial, build(partial))
                sync(partial)
                if done.exists():  # damaged, see `is_complete`
                    shutil.rmtree(done)
                partial.rename(done)
                sync_entry(done.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # an error of a library, not of the disk
            raise
        raise DownloadError(
            f"cannot write '{name}' into the cache folder {done.parent} ({error.strerror}); "
            "set LAMELLA_CACHE to a writable folder"
        ) from error
    return done


def is_complete(folder: Path) -> bool:
    """Return whether a built folder still has every file with the size that its marker records."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _write_marker(folder: Path, provenance: dict[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = json.dumps({**provenance, "files": files}, indent=2)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


def _check_room(folder: Path, name: str, megabytes: int) -> None:
    free = shutil.disk_usage(folder).free // 10**6
    if free < megabytes:
        raise DownloadError(
            f"'{name}' needs {megabytes} MB in the cache folder {folder}, which has {free} MB free; "
            "set LAMELLA_CACHE to a folder on a larger disk"
        )
