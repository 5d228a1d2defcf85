"""Sequences of JSON values that are larger than the memory: their lines are in a temporary file."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from lamella.data.lazy import Lazy
from lamella.errors import ExportError

Item = TypeVar("Item")


def stored(values: Iterable[Any]) -> Lazy[Any]:
    """Write JSON values to a temporary file, and return them as a sequence of which memory holds eight bytes per value.

    The file is in the folder of temporary files, which the environment variable TMPDIR selects, and is removed with the
    sequence.

    Args:
        values: the values.

    Raises:
        ExportError: if the file cannot be written.
    """
    ends = array("Q", [0])
    file = tempfile.TemporaryFile()  # noqa: SIM115, closed with the sequence
    try:
        for value in values:
            line = json.dumps(value).encode() + b"\n"
            file.write(line)
            ends.append(ends[-1] + len(line))
        file.flush()
    except OSError as error:
        folder = tempfile.gettempdir()
        raise ExportError(f"{folder}: {error.strerror}; set TMPDIR to a folder with more space") from None

    def read(number: int) -> Any:
        return json.loads(os.pread(file.fileno(), ends[number + 1] - ends[number], ends[number]))

    return Lazy(range(len(ends) - 1), read)


def where(items: Sequence[Item], holds: Callable[[Item], bool]) -> Lazy[Item]:
    """Return the items for which a condition holds, in their order, as a sequence that reads them again on access.

    Args:
        items: the items.
        holds: the condition.
    """
    return at(items, array("Q", (number for number, each in enumerate(items) if holds(each))))


def at(items: Sequence[Item], numbers: Sequence[int]) -> Lazy[Item]:
    """Return the items with some indices, as a sequence that reads them on access.

    Args:
        items: the items.
        numbers: the indices.
    """
    return Lazy(numbers, lambda number: items[number])


def column(rows: Sequence[Any], name: str) -> Lazy[Any]:
    """Return one value of each row, as a sequence that reads the rows on access.

    Args:
        rows: mappings.
        name: the key of the value.
    """
    return Lazy(range(len(rows)), lambda number: rows[number][name])


def first_of_each(
    items: Iterable[Item], key: Callable[[Item], int], group: Callable[[Item], Any], most: Callable[[Any], int]
) -> dict[Any, list[Item]]:
    """Return the items with the smallest keys in each group, smallest first; only these are in memory.

    Args:
        items: the items.
        key: returns the key of an item.
        group: returns the group of an item.
        most: returns the maximum number of items of a group.
    """
    found: dict[Any, list[tuple[int, int, Item]]] = {}
    for number, each in enumerate(items):
        of_group = found.setdefault(name := group(each), [])
        insort(of_group, (key(each), number, each))
        del of_group[most(name) :]
    return {name: [each for _, _, each in of_group] for name, of_group in found.items()}
