"""Sequences of JSON values that are larger than the memory: each is compressed, in a temporary file."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from array import array
from collections.abc import Iterable
from typing import Any

from lamella.data.lazy import Lazy
from lamella.errors import ExportError

FASTEST = 1  # level of compression, which halves English text


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
            data = zlib.compress(json.dumps(value).encode(), FASTEST)
            file.write(data)
            ends.append(ends[-1] + len(data))
        file.flush()
    except OSError as error:
        folder = tempfile.gettempdir()
        raise ExportError(f"{folder}: {error.strerror}; set TMPDIR to a folder with more space") from None

    def read(number: int) -> Any:
        return json.loads(zlib.decompress(os.pread(file.fileno(), ends[number + 1] - ends[number], ends[number])))

    return Lazy(range(len(ends) - 1), read)
