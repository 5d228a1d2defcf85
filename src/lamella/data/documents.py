"""Documents: texts with an id each, from files of many formats.

Unreadable content does not stop the rest: a malformed line, or one without text, is reported with its file and line,
counted, and skipped.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lamella.data.context import InputContext
from lamella.data.lazy import Lazy, at
from lamella.data.rows import Rows
from lamella.data.sources import DOCUMENTED, built_in_documents, hub_rows
from lamella.data.stored import stored
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.reading import (
    DECOMPRESSORS,
    LONGEST,
    FileRefused,
    check_expansion,
    files_below,
    open_decompressed,
    open_file,
    parse_json,
    read_text,
)
from lamella.signature import Fixture

PLAIN_TEXT = (".txt", ".md")
ENDINGS = (*PLAIN_TEXT, ".jsonl", *(f".jsonl{each}" for each in DECOMPRESSORS), ".parquet")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, FileRefused)  # of compressed files
TOO_LONG = f"has more than {LONGEST:,} characters"
ROW = 64  # minimum size of a table row in memory, in bytes
NAMED = 20  # maximum number of malformed lines that are listed; all are counted


class Document(NamedTuple):
    """One text.

    Attributes:
        id: identifier, unique among all documents: the ``id`` of its row, else its file and line.
        text: the text as it was found.
    """

    id: str
    text: str


@dataclass
class Broken:
    """Rows and files that could not be read.

    Attributes:
        count: their number.
        examples: the first of them, each with its file, line and reason.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Count a skipped row or file, and remember it if it is among the first.

        Args:
            where: the file, or the file and line.
            why: the rest of the sentence that ``where`` begins, such as "is not JSON".
        """
        self.count += 1
        if len(self.examples) < NAMED:
            self.examples.append(f"{where} {why}")

    def note(self) -> list[str]:
        """Return one sentence about what was skipped; empty if nothing was."""
        if not self.count:
            return []
        more = f", and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return [f"{self.count} documents could not be read and were left out: {'; '.join(self.examples)}{more}."]


class Documents(Rows[Document]):
    """A sequence of documents.

    Attributes:
        items: the documents, in the order of their files.
        broken: the rows and files that could not be read.
    """

    metavar = "DOCUMENTS"
    source_help = (
        "a .jsonl file (.gz, .bz2, .xz or .zst too), a .parquet or a text file, a folder of such files, pydoc, stdlib "
        "or a datasets name"
    )
    example = Fixture(
        "documents.jsonl",
        '{"text": "The tide was low when the boat came in. Nobody stood at the landing, and the lamp was out."}\n'
        '{"text": "A kettle needs four minutes to boil a litre of water. With its lid off it needs five."}\n'
        '{"text": "Herons stand still for so long that fish forget them. Then they strike, and rarely miss."}\n'
        '{"text": "The library opens at nine. Books may be kept for three weeks, and renewed once by telephone."}\n'
        '{"text": "Rye bread keeps longer than wheat bread. Its crumb is dense, and it dries out slowly."}\n'
        '{"text": "The old mill has two wheels. One turns the stones, the other one lifts water to the garden."}\n',
    )

    def __init__(
        self, items: Iterable[Document], metadata: dict[str, Any] | None = None, broken: Broken | None = None
    ) -> None:
        super().__init__(items, metadata=metadata)
        self.broken = broken or Broken()

    @classmethod
    def open(
        cls, name: str | Path, context: InputContext, *, column: str = "text", limit: int | None = None
    ) -> Documents:
        """Read documents; they may be larger than the memory.

        Args:
            name: a file, a folder of files, ``pydoc``, ``stdlib`` or a ``datasets`` name. Each row of a table is a
                document, and so is each text file.
            context: the split that is read.
            column: the field of a row that holds its text; an optional field ``id`` identifies the document.
            limit: maximum number of documents; all if None.

        Raises:
            CalibrationError: if the source does not exist, holds no document, or is truncated.
        """
        broken = Broken()
        documents = _stored(islice(_found(str(name), context, column, broken), limit))
        if not documents:
            why = f": {broken.examples[0]}" if broken.examples else ""
            raise CalibrationError(f"{name} holds no documents{why}; give rows with a field '{column}', or text files")
        return cls(documents, {"data": str(name), "left out": broken.count}, broken)

    def describe(self) -> dict[str, Any]:
        """Return the description of the documents, for provenance."""
        return self.metadata | {"documents": len(self), "sha256": self.digest}

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all ids and texts."""
        found = hashlib.sha256()
        for each in self:
            found.update(json.dumps(each).encode())
        return found.hexdigest()


def hold_out(documents: Sequence[Document], share: float, seed: int) -> tuple[Lazy[Document], Lazy[Document]]:
    """Split documents into a part to train on and a part to test on, both in their order, by a hash of the ids.

    Args:
        documents: the documents.
        share: fraction of the documents to hold out: at least one and never all, unless it is 0.
        seed: random seed of the split.

    Returns:
        The documents to train on, and those that are held out.
    """
    count = min(max(1, round(share * len(documents))), len(documents) - 1) if share > 0 else 0
    ranks = np.fromiter((seed_of("held out", seed, each.id) for each in documents), np.int64, len(documents))
    chosen = np.zeros(len(documents), bool)
    chosen[np.argsort(ranks, kind="stable")[:count]] = True
    train, held_out = (at(documents, np.flatnonzero(mask).astype(np.uint32)) for mask in (~chosen, chosen))
    return train, held_out


def seed_of(*parts: Any) -> int:
    """Return a random seed that depends on the given parts only."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _found(name: str, context: InputContext, column: str, broken: Broken) -> Iterator[Document]:
    """Yield the documents of a source in their order; ids may repeat."""
    path = Path(name).expanduser()
    if name in DOCUMENTED:
        texts = built_in_documents(name, context.split)
        yield from (Document(f"{name}:{number}", text) for number, text in enumerate(texts, start=1))
    elif path.is_file():
        yield from _of_file(path, path.name, column, broken)
    elif path.is_dir():
        files = files_below(path, lambda file: file.name.endswith(ENDINGS))
        if not files:
            raise CalibrationError(f"{name} has no documents: give a folder with {', '.join(ENDINGS)} files")
        for file in files:
            yield from _of_file(file, str(file.relative_to(path)), column, broken)
    elif path.is_absolute() or name.startswith(".") or name.endswith(ENDINGS):
        raise CalibrationError(f"no documents '{name}': there is no such file or folder")
    else:
        rows = hub_rows(name, context.split, f"no documents '{name}': it is neither built in nor a file or folder")
        yield from _of_rows(enumerate(rows, start=1), name, column, broken)


def _of_file(file: Path, name: str, column: str, broken: Broken) -> Iterator[Document]:
    if file.suffix in PLAIN_TEXT:
        try:
            text = read_text(file)
        except CalibrationError:
            broken.add(str(file), "cannot be read as UTF-8 text")
            return
        if len(text) > LONGEST:
            broken.add(str(file), TOO_LONG)
        elif text.strip():
            yield Document(name, text)
        return
    if not file.name.endswith(ENDINGS):
        raise CalibrationError(f"{file}: documents are read from {', '.join(ENDINGS)} files")
    rows = _parquet(file, column) if file.suffix == ".parquet" else _lines(file, broken)
    yield from _of_rows(rows, name, column, broken, where=str(file))


def _of_rows(
    rows: Iterable[tuple[int, Any]], name: str, column: str, broken: Broken, where: str = ""
) -> Iterator[Document]:
    for number, row in rows:
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            broken.add(f"{where or name} line {number}", f"has no text in '{column}'")
            continue
        if len(text) > LONGEST:
            broken.add(f"{where or name} line {number}", TOO_LONG)
            continue
        own = row.get("id")
        yield Document(str(own) if isinstance(own, str | int) and str(own) else f"{name}:{number}", text)


def _stored(documents: Iterable[Document]) -> Lazy[Document]:
    """Store the documents; a number is appended to ids that occurred before."""
    hashes = array("q")

    def hashed() -> Iterator[Document]:
        for each in documents:
            hashes.append(hash(each.id))
            yield each

    rows = stored(hashed())
    values, counts = np.unique(np.array(hashes), return_counts=True)
    suspects = np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist()
    seen: Counter[str] = Counter()
    renamed = {}
    for number in suspects:
        name, _ = rows[number]
        seen[name] += 1
        if seen[name] > 1:
            renamed[number] = f"{name}#{seen[name]}"

    def document(number: int) -> Document:
        name, text = rows[number]
        return Document(renamed.get(number, name), text)

    return Lazy(range(len(rows)), document)


def _lines(file: Path, broken: Broken) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file of JSON lines with their line numbers; malformed lines are skipped and counted."""
    number = 0
    try:
        with open_decompressed(file) as lines:
            while line := lines.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise FileRefused(f"line {number} has more than {LONGEST:,} bytes")
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:  # or not UTF-8
                    broken.add(f"{file} line {number}", f"is not JSON ({error})")
                    continue
                yield number, row
    except DAMAGED as error:
        raise CalibrationError(
            f"{file}: cannot be read after line {number} ({' '.join(str(error).split())}): get the file again"
        ) from None


def _parquet(file: Path, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a Parquet file with their numbers; only the columns of the text and the id are decoded."""
    arrow, parquet = (require(name, "data", "a .parquet file") for name in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        with open_file(file) as opened:
            size, expanded = os.fstat(opened.fileno()).st_size, 0
            metadata = parquet.read_metadata(opened)
            names = [name for name in dict.fromkeys((column, "id")) if _has(metadata.schema, name)]
            check_expansion(size, _declared(metadata, names))
            # a text that occurs in many rows is stored once
            table = parquet.ParquetFile(opened, metadata=metadata, read_dictionary=names)
            for batch in table.iter_batches(columns=names):
                columns = {name: _cells(batch.column(name), arrow) for name in names}
                for values in zip(*columns.values(), strict=True) if columns else repeat((), len(batch)):
                    number += 1
                    expanded += ROW + sum(len(each) for each in values if isinstance(each, str))
                    check_expansion(size, expanded)
                    yield number, dict(zip(columns, values, strict=True))
    except FileRefused as error:
        raise CalibrationError(f"{file}: cannot be read after row {number} ({error})") from None
    except Exception as error:  # pyarrow raises a dozen types for damaged files
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{file}: cannot be read as Parquet ({reason}): get the file again") from None


def _has(schema: Any, name: str) -> bool:
    """Return whether a Parquet file has a column of this name, or one nested in it."""
    paths = [schema.column(number).path for number in range(len(schema))]
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def _declared(metadata: Any, names: Sequence[str]) -> int:
    """Return the uncompressed size in bytes that a Parquet file declares for some columns."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(each.total_uncompressed_size for each in chunks if each.path_in_schema.partition(".")[0] in names)


def _cells(values: Any, arrow: Any) -> Iterator[str | int | None]:
    """Yield the texts and integers of a column; None where a cell is empty, of another type, or not UTF-8."""
    if arrow.types.is_dictionary(values.type):
        known = list(_cells(values.dictionary, arrow))
        yield from (None if each is None else known[each] for each in values.indices.to_pylist())
    elif arrow.types.is_integer(values.type):
        yield from values.to_pylist()
    elif arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type):
        is_large = arrow.types.is_large_string(values.type)
        for each in values.cast(arrow.large_binary() if is_large else arrow.binary()).to_pylist():
            try:
                yield None if each is None else each.decode()
            except UnicodeDecodeError:
                yield None
    else:
        yield from [None] * len(values)
