"""Encodings of a data set: computed once, in batches, and read from memory-mapped files of a work folder.

Each file has the rows of one batch in the format of safetensors. It is written all at once, so a run that was stopped
computes the missing files only. A file is mapped while a row of it is read: pages of earlier rows need no memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamella.data.lazy import Lazy, batches
from lamella.errors import ExportError
from lamella.files import Work, replacing
from lamella.progress import track

BATCH = 64
OF = "of"  # the key in a file's metadata that says what its rows depend on
Row = dict[str, Tensor]


class Encoded(Sequence[Row]):
    """Named tensors of each item of a data set, in files.

    Args:
        folder: the folder of the files.
        length: the number of rows.
        size: rows in each file but the last.
    """

    def __init__(self, folder: Path, length: int, size: int = BATCH) -> None:
        self.folder, self.length, self.size = folder, length, size

    @classmethod
    def of(
        cls,
        items: Sequence[Any],
        encode: Callable[[list[Any]], Mapping[str, Tensor]],
        work: Work,
        name: str,
        depends: Any,
        size: int = BATCH,
    ) -> Encoded:
        """Encode all items that an earlier run with the same ``depends`` has not encoded.

        Args:
            items: what is encoded; it is read in batches and in order.
            encode: from a batch of items to named tensors, each with one row per item.
            work: where the files are kept.
            name: of the folder of the files in ``work``.
            depends: JSON values on which the encodings depend, such as digests of the data and of the model.
            size: items in a batch.

        Raises:
            ExportError: if a file cannot be written.
        """
        found = cls(work.directory(name), len(items), size)
        digest = hashlib.sha256(json.dumps([depends, len(items), size]).encode()).hexdigest()
        files = [found.file(number) for number in range(-(-len(items) // size))]
        done = next((number for number, file in enumerate(files) if not _is_of(file, digest)), len(files))
        rest = files[done:]
        if rest:
            encodings = batches(items[done * size :], size, encode)
            for file, rows in zip(rest, track(encodings, f"encoding {name}", len(rest)), strict=True):
                _write(file, rows, digest)
        return found

    def file(self, number: int) -> Path:
        """The file of a batch, by the number of the batch."""
        return self.folder / f"{number:06d}.safetensors"

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        rows = range(self.length)[row]
        if isinstance(rows, range):
            return [self[each] for each in rows]
        number, place = divmod(rows, self.size)
        with safe_open(self.file(number), "pt") as file:
            return {name: _row(file, name, place) for name in file.keys()}  # noqa: SIM118, it is no mapping

    def column(self, name: str) -> Lazy[Tensor]:
        """One of the named tensors of all rows."""
        return Lazy(range(self.length), partial(self._tensor, name))

    def _tensor(self, name: str, row: int) -> Tensor:
        number, place = divmod(row, self.size)
        with safe_open(self.file(number), "pt") as file:
            return _row(file, name, place)


def _row(file: Any, name: str, place: int) -> Tensor:
    tensor: Tensor = file.get_slice(name)[place : place + 1][0]
    return tensor


def _is_of(file: Path, digest: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get(OF) == digest
    except (OSError, SafetensorError):  # it is missing, or it is no such file
        return False


def _write(file: Path, rows: Mapping[str, Tensor], digest: str) -> None:
    try:
        with replacing(file) as out:
            save_file(
                {name: each.detach().cpu().clone().contiguous() for name, each in rows.items()}, out, {OF: digest}
            )
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{file}: cannot be written ({reason}); make room, or choose another folder") from None
