"""The cache folder, and folders in it that are built once, whole or not at all."""

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
    """Where downloads are kept: ``$LAMELLA_CACHE``, else ``$XDG_CACHE_HOME/lamella``, else ``~/.cache/lamella``."""
    if own := os.environ.get("LAMELLA_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lamella"
    return Path.home() / ".cache" / "lamella"


def build_once(name: str, build: Callable[[Path], dict[str, Any]], megabytes: int) -> Path:
    """The folder ``name`` of the cache, built by ``build`` unless it is already there and complete.

    The work happens in a sibling folder that is renamed at the end, so what stands under ``name`` is always whole.
    A lock makes a second process wait for the first one's result; what a killed one left behind is swept away. Each
    build has a folder of its own, in case something that a killed one has started is still writing.

    Args:
        name: the folder's name in the cache.
        build: fills the empty folder that it is given and returns the provenance to write beside the files.
        megabytes: the room that the build needs on disk at its peak.

    Returns:
        The finished folder; its ``lamella-zoo.json`` holds the provenance and the size of every file.

    Raises:
        DownloadError: when the cache folder cannot be written or its disk has no room.
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
                if done.exists():  # damaged: `is_complete` said so
                    shutil.rmtree(done)
                partial.rename(done)
                sync_entry(done.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # a library's own error, nothing to do with the disk
            raise
        raise DownloadError(
            f"cannot write '{name}' into the cache folder {done.parent} ({error.strerror}); "
            "set LAMELLA_CACHE to a folder that can be written"
        ) from error
    return done


def is_complete(folder: Path) -> bool:
    """Whether a built folder still has every file at the size that its marker names."""
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
