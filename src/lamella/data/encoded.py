"""Encodings of a dataset, computed once in batches and read from memory-mapped files of a work folder.

Each file has the rows of one batch in the safetensors format. It is written atomically, so a run that was stopped
computes only the missing files. A file is mapped while a row of it is read: pages of earlier rows need no memory.
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
OF = "of"  # the metadata key with the digest of what the rows depend on
Row = dict[str, Tensor]


class Encoded(Sequence[Row]):
    """Named tensors for each item of a dataset, stored in files.

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
        """Encode the items, except those that an earlier run with the same ``depends`` has encoded.

        Args:
            items: the items; they are read in batches and in order.
            encode: encodes a batch of items as named tensors, each with one row per item.
            work: where the files are kept.
            name: name of the folder of the files in ``work``.
            depends: JSON values on which the encodings depend, such as digests of the data and of the model.
            size: items in a batch.

        Returns:
            The encodings of all items.

        Raises:
            ExportError: if a file cannot be written.
        """

        def write(some: list[Any], keep: Callable[[str, Mapping[str, Tensor]], None]) -> None:
            keep("", encode(some))

        return _encode(cls, items, write, [""], work, name, depends, size)[""]

    @classmethod
    def columns(
        cls,
        items: Sequence[Any],
        encode: Callable[[list[Any], Callable[[str, Tensor], None]], None],
        names: Sequence[str],
        work: Work,
        name: str,
        depends: Any,
        size: int = BATCH,
    ) -> dict[str, Lazy[Tensor]]:
        """Encode the items as several tensors, each of which is written as soon as it is computed; see :meth:`of`.

        Args:
            items: the items; they are read in batches and in order.
            encode: passes each named tensor of a batch, with one row per item, to a function that writes it.
            names: names of the tensors.
            work: where the files are kept.
            name: name of the folder of the files in ``work``.
            depends: JSON values on which the encodings depend.
            size: items in a batch.

        Returns:
            Each tensor's rows for all items, by name.

        Raises:
            ExportError: if a file cannot be written.
        """

        def write(some: list[Any], keep: Callable[[str, Mapping[str, Tensor]], None]) -> None:
            encode(some, lambda column, rows: keep(column, {column: rows}))

        found = _encode(cls, items, write, names, work, name, depends, size)
        return {column: each.column(column) for column, each in found.items()}

    def file(self, number: int) -> Path:
        """Return the file of a batch.

        Args:
            number: index of the batch.
        """
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
        number, row = divmod(rows, self.size)
        with safe_open(self.file(number), "pt") as file:
            return {name: _row(file, name, row) for name in file.keys()}  # noqa: SIM118, it is no mapping

    def column(self, name: str) -> Lazy[Tensor]:
        """Return one of the named tensors for all rows, as a lazy sequence."""
        return Lazy(range(self.length), partial(self._tensor, name))

    def _tensor(self, name: str, row: int) -> Tensor:
        number, row = divmod(row, self.size)
        with safe_open(self.file(number), "pt") as file:
            return _row(file, name, row)


def _encode(
    kind: type[Encoded],
    items: Sequence[Any],
    write: Callable[[list[Any], Callable[[str, Mapping[str, Tensor]], None]], None],
    folders: Sequence[str],
    work: Work,
    name: str,
    depends: Any,
    size: int,
) -> dict[str, Encoded]:
    """Write the files of each batch that are not there yet, into one or several folders."""
    found = {folder: kind(work.directory(f"{name}/{folder}"), len(items), size) for folder in folders}
    digest = hashlib.sha256(json.dumps([depends, len(items), size]).encode()).hexdigest()
    count = -(-len(items) // size)

    def keep(number: int, folder: str, rows: Mapping[str, Tensor]) -> None:
        _write(found[folder].file(number), rows, digest)

    def is_done(number: int) -> bool:
        return all(_is_of(each.file(number), digest) for each in found.values())

    done = next((number for number in range(count) if not is_done(number)), count)
    if done < count:
        parts = track(batches(items[done * size :], size), f"encoding {name}", count - done)
        for number, part in enumerate(parts, done):
            write(part, partial(keep, number))
    return found


def _row(file: Any, name: str, row: int) -> Tensor:
    tensor: Tensor = file.get_slice(name)[row : row + 1][0]
    return tensor


def _is_of(file: Path, digest: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get(OF) == digest
    except (OSError, SafetensorError):  # the file is missing or damaged
        return False


def _write(file: Path, rows: Mapping[str, Tensor], digest: str) -> None:
    try:
        with replacing(file) as out:
            save_file(
                {name: each.detach().cpu().clone().contiguous() for name, each in rows.items()}, out, {OF: digest}
            )
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{file}: cannot be written ({reason}); free some space, or choose another folder") from None
