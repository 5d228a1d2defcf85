"""Rows of images and text with their answers, from files, datasets or rendered scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from lamella.data.context import InputContext
from lamella.data.images import Image, check_image, inside, read_image, to_rgb
from lamella.data.lazy import Lazy, batches
from lamella.data.processing import MARK, ImageTextRow, Message, Processing
from lamella.data.records import PROMPTS, RESPONSES
from lamella.data.rows import Rows
from lamella.data.sources import BUILT_IN, SPLITS, Split, check_text, hub_rows, split_rows
from lamella.errors import CalibrationError
from lamella.reading import RowFile, check_in_folder
from lamella.signature import Fixture
from lamella.stack import Model
from lamella.zoo.worlds import QUESTIONS, SIZE, ShapeExample, examples

SHAPES = "shapes"
FILES = (".jsonl", ".json", ".txt")
HINT = 'write {"image": "images/one.png", "prompt": "...", "answer": "..."}, or "messages" in place of the last two'
IMAGES = ("image", "images", "file_name")
CAPTIONS = ("caption", "text")
ROLES = {"human": "user", "gpt": "assistant"}  # as in LLaVA's data


class ImageText(Rows[ImageTextRow]):
    """Rows of images and text, which the model's own processor batches.

    Opening a file reads the headers of its images. Rows are read, and images decoded, on access.

    Args:
        rows: the rows.
        processing: the processor of the model.
        metadata: description of the source for provenance.
        opened: the name, context and settings that the rows were opened with, for :meth:`part`.

    Attributes:
        items: the rows in their order.
        processing: the processor of the model.
        metadata: description of the source.
    """

    metavar = "FILE"
    source_help = (
        'a .jsonl file: {"image": "images/one.png", "prompt": "...", "answer": "..."} on each line, or "messages" in '
        "place of the last two; paths are relative to the file. Or a folder with train.jsonl and test.jsonl, a "
        "datasets name, or shapes, shapes:caption, shapes:colour+count: built-in rendered images"
    )
    example = Fixture("shapes:colour", settings={"rows": 8})

    def __init__(
        self,
        rows: Iterable[ImageTextRow],
        processing: Processing,
        metadata: Mapping[str, Any] | None = None,
        opened: Any = None,
    ) -> None:
        super().__init__(rows, processing.tokenizer, metadata)
        self.processing, self._opened = processing, opened

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, rows: int = 256, pixels: int = SIZE) -> ImageText:
        """Read rows of images and text.

        Args:
            name: a file, a folder, a ``datasets`` name (``name`` or ``name:config``), or ``shapes`` with some tasks of
                :data:`lamella.zoo.worlds.TASKS` (``shapes:colour+count``).
            context: gives the processor, the split and the random seed.
            rows: maximum number of rows.
            pixels: width and height of rendered images.

        Raises:
            CalibrationError: if the source does not exist, or a row is malformed; the message names its line.
        """
        if rows < 1:
            raise CalibrationError(f"rows {rows}: give at least 1")
        found = _source(str(name), context, rows, pixels)
        digest, images = hashlib.sha256(), 0
        for each in found:
            digest.update(each.check())
            images += len(each.images)
            if each.images and not context.processing.takes_images:
                raise CalibrationError(f"{each.where} has an image, but this model takes text only: give another model")
        if not found:
            raise CalibrationError(f"{name} holds no rows for the split {context.split}: {HINT}")
        metadata = {"data": str(name), "split": context.split, "rows": len(found), "images": images}
        settings = {"rows": rows, "pixels": pixels}
        shown = Lazy(found, _Undecoded.read)
        return cls(shown, context.processing, metadata | {"sha256": digest.hexdigest()}, (name, context, settings))

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that a source exists, without reading it.

        Args:
            name: the source.

        Raises:
            CalibrationError: if something is missing; the message says what.
        """
        if str(name).partition(":")[0] == SHAPES:
            return
        if str(name) in BUILT_IN:
            raise CalibrationError(f"{name} is text without images: {HINT}")
        check_text(name)

    @classmethod
    def fits(cls, model: Model | None, given: Any) -> bool:
        """Return whether an input that may be text or images with text is opened as images with text.

        Args:
            model: the model of the command, if it has one.
            given: the value of the input: a name, rows, or None for the default.
        """
        has_images = model is not None and any(each.architecture.images for each in model.stacks.values())
        is_text = given is None or str(given) in BUILT_IN or Path(str(given)).suffix in (".txt", ".md")
        return isinstance(given, cls) or (has_images and not is_text)

    def part(self, split: Split, seed: int | None = None, rows: int | None = None) -> ImageText:
        """Read another split of the same source.

        Args:
            split: the split.
            seed: random seed of rendered images; that of these rows if None.
            rows: maximum number of rows; that of these rows if None.

        Raises:
            CalibrationError: if the rows were made in memory.
        """
        if self._opened is None:
            raise CalibrationError("these rows were made in memory and have no splits: give the test rows too")
        name, context, settings = self._opened
        seed = context.seed if seed is None else seed
        settings = settings if rows is None else settings | {"rows": rows}
        return type(self).open(name, replace(context, split=split, seed=seed), **settings)

    def batch(self, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
        """Encode rows with their answers; see :meth:`lamella.data.Processing.batch`."""
        return self.processing.batch(rows)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Iterate over all rows in batches of ``size``."""
        return iter(batches(self, size, self.batch))

    def prompts(self, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
        """See :meth:`lamella.data.Processing.prompts`."""
        return self.processing.prompts(rows)

    def kinds(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`lamella.data.Processing.places`."""
        return self.processing.kinds(batch)


@dataclass(frozen=True)
class _Undecoded:
    """A row whose images have not been decoded yet: files, or the images of a dataset."""

    images: tuple[Any, ...]
    messages: tuple[Message, ...]
    where: str
    task: str = ""

    def read(self) -> ImageTextRow:
        if any(MARK in each["content"] for each in self.messages) or not self.images:
            messages = self.messages
        else:  # without marks, images come first
            first, *others = self.messages
            messages = ({**first, "content": f"{MARK * len(self.images)}\n{first['content']}"}, *others)
        return ImageTextRow(Lazy(self.images, partial(_decoded, where=self.where)), messages, self.where, self.task)

    def check(self) -> bytes:
        """Check the text of a row, and the headers of its images.

        Returns:
            Bytes that identify the row, for hashing.
        """
        images = (
            check_image(each, self.where).digest if isinstance(each, Path) else _decoded(each, self.where).tobytes()
            for each in self.images
        )
        return b"".join([self.read().text(), *images])


def _decoded(image: Any, where: str) -> Image:
    if isinstance(image, Path):
        return read_image(image, where)
    if isinstance(image, ShapeExample):
        return image.image
    try:
        return image if hasattr(image, "ndim") else to_rgb(image)
    except Exception as error:  # a damaged image may raise anything
        reason = type(error).__name__
        raise CalibrationError(f"{where}: an image cannot be read ({reason}): leave this row out") from None


def _source(name: str, context: InputContext, rows: int, pixels: int) -> Sequence[_Undecoded]:
    """Return the first rows of a source; rows of a file are read on access."""
    kind, _, chosen = name.partition(":")
    file = Path(name).expanduser()
    if file.is_file() or file.suffix in FILES:
        return _part(_of_file(file), context.split, name)[:rows]
    if context.split not in SPLITS:
        raise CalibrationError(f"{name} has the splits {' and '.join(SPLITS)}, not '{context.split}'")
    if kind == SHAPES:
        tasks = chosen.split("+") if chosen else QUESTIONS
        made = examples(tasks, rows, context.split, context.seed, pixels)  # type: ignore[arg-type]  # no other is left
        return [
            _Undecoded((each,), _conversation(each.prompt, each.answer), f"{name} row {number}", each.task)
            for number, each in enumerate(made)
        ]
    if file.is_dir():
        parts = {"calibration": file / "train.jsonl", "test": file / "test.jsonl"}
        if not all(each.is_file() for each in parts.values()):
            raise CalibrationError(f"{name} has no train.jsonl and test.jsonl: write them, or give one .jsonl file")
        return _of_file(check_in_folder(parts[context.split]))[:rows]
    rows_of = hub_rows(name, context.split, f"no images and text '{name}': it is neither shapes nor a file")
    return [_parsed(row, f"dataset '{name}' row {n}", None) for n, row in enumerate(islice(rows_of, rows))]


def _of_file(file: Path) -> Lazy[_Undecoded]:
    rows = RowFile(file, HINT)
    return Lazy(rows.lines, partial(_of_line, rows))


def _of_line(rows: RowFile, line: tuple[int, int, int]) -> _Undecoded:
    number, row = rows.read(line)
    return _parsed(row, f"{rows.path} line {number}", rows.path.parent)


def _parsed(row: Any, where: str, folder: Path | None) -> _Undecoded:
    """Parse a row of a file, with image paths relative to its folder, or of a dataset, which contains the images."""
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where} is no JSON object: {HINT}")
    images: list[Any] = []
    for name in IMAGES:
        value = row.get(name)
        images += [] if value is None else value if isinstance(value, list) else [value]
    messages = _messages(row, where, images)
    if folder is not None:
        if not all(isinstance(each, str) for each in images):
            raise CalibrationError(f"{where}: images are paths relative to the file: {HINT}")
        images = [inside(folder, each, where) for each in images]
    return _Undecoded(tuple(images), messages, where)


def _messages(row: Mapping[str, Any], where: str, images: list[Any]) -> tuple[Message, ...]:
    """Return a row as a conversation; images that it refers to are added to those of the row."""
    messages = row.get("messages") or [
        {"role": ROLES.get(str(each.get("from")), each.get("from")), "content": each.get("value")}
        for each in row.get("conversations") or []
        if isinstance(each, Mapping)
    ]
    if isinstance(messages, list) and messages:
        try:
            return tuple({"role": str(each["role"]), "content": _joined(each["content"], images)} for each in messages)
        except (KeyError, TypeError, AttributeError):
            raise CalibrationError(f"{where} has messages without role or content: {HINT}") from None
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    answer = next((texts[name] for name in (*RESPONSES, *CAPTIONS) if name in texts), "")
    prompt = next((texts[name] for name in PROMPTS if name in texts), "")
    if not answer.strip() or not (prompt.strip() or images):
        raise CalibrationError(f"{where} has no prompt with an answer: {HINT}")
    return _conversation(prompt, answer)


def _conversation(prompt: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def _joined(content: Any, images: list[Any]) -> str:
    """Return the content of a message as one text; image parts become marks."""
    if isinstance(content, str):
        return content
    text = ""
    for part in content:
        if part["type"] == "image":
            text += MARK
            images += [part[name] for name in ("image", "path") if name in part]
        else:
            text += str(part["text"])
    return text


def _part(rows: Lazy[_Undecoded], split: Split, name: str) -> Lazy[_Undecoded]:
    """Return the first four fifths of a user's rows, or the last fifth; rows that share an image stay together."""
    groups = _together(rows)  # this checks every row, whatever the split
    if split == "whole":
        return rows
    names = list(dict.fromkeys(groups))
    if rows and len(names) < 2:
        raise CalibrationError(f"{name} has one image only, so there is none for the test split: give more")
    known = set(names[split_rows(len(names), split)])
    chosen = [each for each, group in zip(rows.entries, groups, strict=True) if group in known]
    return Lazy(chosen, rows.decode)


def _together(rows: Sequence[_Undecoded]) -> list[int]:
    """Return a group for each row; rows that share images, directly or through others, have the same group."""
    first: dict[str, int] = {}
    same = list(range(len(rows)))

    def root(index: int) -> int:
        while same[index] != index:
            index = same[index]
        return index

    for index, row in enumerate(rows):
        for image in row.images:
            other = first.setdefault(str(image.resolve()), index)
            low, high = sorted((root(other), root(index)))
            same[high] = low
    return [root(index) for index in range(len(rows))]
