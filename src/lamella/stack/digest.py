"""The digest of a checkpoint: of its tensors, however they are divided among files and whatever lies beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

BUFFER = 8 << 20  # bytes


def digest_of_files(folder: Path) -> str | None:
    """The SHA-256 over names, dtypes, shapes and bytes of the tensors of a safetensors checkpoint, by name.

    It does not depend on their order, on shards, or on other safetensors files in the folder, such as those of a plan.
    Since checkpoints are large, it is remembered for as long as the files stay as they are.

    Args:
        folder: of a checkpoint that was opened; its files have been checked.

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
    """The digest of the tensors of files, each with the size and the time by which a change is noticed."""
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
    """The tensors of a file: name, dtype and shape, and the first and last byte."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, said in header.items():
        if name != "__metadata__":
            start, end = said["data_offsets"]
            yield name, f"{said['dtype']} {said['shape']}", file, 8 + length + start, 8 + length + end
