"""The digest of a checkpoint's tensors, which does not depend on how they are divided among files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

BUFFER = 8 << 20  # bytes


def digest_of_files(folder: Path) -> str | None:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the tensors of a safetensors checkpoint, by name.

    It does not depend on the order of tensors, on shards, or on other safetensors files in the folder, such as those of
    a plan. Since checkpoints are large, it is cached as long as the files do not change.

    Args:
        folder: folder of a checkpoint that was opened; its files have been checked.

    Returns:
        The digest, or None for a folder without safetensors.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    if not all(file.is_file() for file in files):
        return None
    stats = [file.stat() for file in files]
    return _digest(tuple((file, each.st_size, each.st_mtime_ns) for file, each in zip(files, stats, strict=True)))


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return the digest of the tensors of files, given with the size and modification time that detect a change."""
    found = sorted(tensor for file, _, _ in files for tensor in _tensors(file))
    digest = hashlib.sha256()
    for name, described, file, start, end in found:
        digest.update(f"{name} {described};".encode())
        with file.open("rb") as opened:
            opened.seek(start)
            for position in range(start, end, BUFFER):
                digest.update(opened.read(min(BUFFER, end - position)))
    return digest.hexdigest()


def _tensors(file: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """Yield the tensors of a file: name, dtype and shape, file, and the first and last byte."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, f"{entry['dtype']} {entry['shape']}", file, 8 + length + start, 8 + length + end
