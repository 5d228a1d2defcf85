"""Images with text: prompts about images with the answers that are wanted, from files as people hold them."""

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
from lamella.data.processing import MARK, Conversation, Message, Processing
from lamella.data.records import PROMPTS, RESPONSES
from lamella.data.rows import Rows
from lamella.data.sources import BUILT_IN, CALIBRATION_SHARE, SPLITS, Split, check_text, hub_rows
from lamella.errors import CalibrationError
from lamella.reading import RowFile, check_in_folder
from lamella.signature import Fixture
from lamella.stack import Model
from lamella.zoo.worlds import QUESTIONS, SIZE, ShapeExample, examples

SHAPES = "shapes"
FILES = (".jsonl", ".json", ".txt")
HINT = 'write {"image": "pictures/one.png", "prompt": "...", "answer": "..."}, or "messages" in place of the last two'
IMAGES = ("image", "images", "file_name")
CAPTIONS = ("caption", "text")
ROLES = {"human": "user", "gpt": "assistant"}  # as LLaVA's data call them


class ImageText(Rows[Conversation]):
    """Rows of images and text, which a model's own processor makes batches of.

    Opening a file reads the headers of its images. Rows are read, and images decoded, when they are asked for.

    Attributes:
        items: the rows, as they were found.
        processing: what reads them for the model.
        said: what provenance says of them.
    """

    metavar = "FILE"
    source_help = (
        'a .jsonl file: {"image": "pictures/one.png", "prompt": "...", "answer": "..."} on each line, or "messages" in '
        "place of the last two; paths are relative to the file. Or a folder with train.jsonl and test.jsonl, a "
        "datasets name, or shapes, shapes:caption, shapes:colour+count: rendered pictures, built in"
    )
    example = Fixture("shapes:colour", settings={"rows": 8})

    def __init__(
        self,
        rows: Iterable[Conversation],
        processing: Processing,
        said: Mapping[str, Any] | None = None,
        opened: Any = None,
    ) -> None:
        super().__init__(rows, processing.tokenizer, said)
        self.processing, self._opened = processing, opened

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, rows: int = 256, pixels: int = SIZE) -> ImageText:
        """Read rows of images and text.

        Args:
            name: a file, a folder, a ``datasets`` name (``name`` or ``name:config``), or ``shapes`` with some tasks of
                :data:`lamella.zoo.worlds.TASKS` (``shapes:colour+count``).
            rows: at most so many of them.
            pixels: on a side of rendered pictures.

        Raises:
            CalibrationError: for a source that is missing, or a row that is malformed, with its line.
        """
        if rows < 1:
            raise CalibrationError(f"rows {rows}: give at least 1")
        found = _source(str(name), context, rows, pixels)
        digest, images = hashlib.sha256(), 0
        for each in found:
            digest.update(each.check())
            images += len(each.images)
            if each.images and not context.processing.takes_images:
                raise CalibrationError(
                    f"{each.where} has an image, and this model reads text alone: give another model"
                )
        if not found:
            raise CalibrationError(f"{name} holds no rows for the split {context.split}: {HINT}")
        said = {"data": str(name), "split": context.split, "rows": len(found), "images": images}
        settings = {"rows": rows, "pixels": pixels}
        shown = Lazy(found, _Named.read)
        return cls(shown, context.processing, said | {"sha256": digest.hexdigest()}, (name, context, settings))

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that a source can be read, without reading it.

        Raises:
            CalibrationError: one line that says what is missing.
        """
        if str(name).partition(":")[0] == SHAPES:
            return
        if str(name) in BUILT_IN:
            raise CalibrationError(f"{name} is text without images: {HINT}")
        check_text(name)

    @classmethod
    def fits(cls, model: Model | None, given: Any) -> bool:
        """Whether a command that takes text too is given this for a model: one with images, and no built-in text."""
        sees = model is not None and any(each.architecture.images for each in model.stacks.values())
        is_text = given is None or str(given) in BUILT_IN or Path(str(given)).suffix in (".txt", ".md")
        return isinstance(given, cls) or (sees and not is_text)

    def part(self, split: Split, seed: int | None = None, rows: int | None = None) -> ImageText:
        """Another split of the same source.

        Args:
            seed: of rendered images; the one that these were drawn with when left out.
            rows: at most so many; as many as of these when left out.

        Raises:
            CalibrationError: for rows that were made in memory.
        """
        if self._opened is None:
            raise CalibrationError("these rows come from no source with splits: give the test rows too")
        name, context, settings = self._opened
        seed = context.seed if seed is None else seed
        settings = settings if rows is None else settings | {"rows": rows}
        return type(self).open(name, replace(context, split=split, seed=seed), **settings)

    def batch(self, rows: Sequence[Conversation]) -> dict[str, Tensor]:
        """See :meth:`lamella.data.Processing.batch`."""
        return self.processing.batch(rows)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows, so many in a batch."""
        return iter(batches(self, size, self.batch))

    def prompts(self, rows: Sequence[Conversation]) -> dict[str, Tensor]:
        """See :meth:`lamella.data.Processing.prompts`."""
        return self.processing.prompts(rows)

    def places(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`lamella.data.Processing.places`."""
        return self.processing.places(batch)


@dataclass(frozen=True)
class _Named:
    """A row whose images have not been decoded yet: files, or what a data set gives for them."""

    images: tuple[Any, ...]
    messages: tuple[Message, ...]
    where: str
    task: str = ""

    def read(self) -> Conversation:
        if any(MARK in each["content"] for each in self.messages) or not self.images:
            messages = self.messages
        else:  # images come first
            first, *others = self.messages
            messages = ({**first, "content": f"{MARK * len(self.images)}\n{first['content']}"}, *others)
        return Conversation(Lazy(self.images, partial(_decoded, where=self.where)), messages, self.where, self.task)

    def check(self) -> bytes:
        """Check the text of a row, and the headers of its images.

        Returns:
            What decides the row, to be hashed.
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
    except Exception as error:  # of a damaged image, anything
        reason = type(error).__name__
        raise CalibrationError(f"{where}: an image cannot be read ({reason}): leave this row out") from None


def _source(name: str, context: InputContext, rows: int, pixels: int) -> Sequence[_Named]:
    """The first rows of a source, which are read from a file when they are asked for."""
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
            _Named((each,), _conversation(each.prompt, each.answer), f"{name} row {number}", each.task)
            for number, each in enumerate(made)
        ]
    if file.is_dir():
        parts = {"calibration": file / "train.jsonl", "test": file / "test.jsonl"}
        if not all(each.is_file() for each in parts.values()):
            raise CalibrationError(f"{name} has no train.jsonl and test.jsonl: write them, or give one .jsonl file")
        return _of_file(check_in_folder(parts[context.split]))[:rows]
    rows_of = hub_rows(name, context.split, f"no images and text '{name}': it is neither shapes nor a file")
    return [_named(row, f"dataset '{name}' row {n}", None) for n, row in enumerate(islice(rows_of, rows))]


def _of_file(file: Path) -> Lazy[_Named]:
    rows = RowFile(file, HINT)
    return Lazy(rows.lines, partial(_of_line, rows))


def _of_line(rows: RowFile, line: tuple[int, int, int]) -> _Named:
    number, row = rows.read(line)
    return _named(row, f"{rows.path} line {number}", rows.path.parent)


def _named(row: Any, where: str, folder: Path | None) -> _Named:
    """A row of a file, whose images lie in its folder; or of a data set, which brings them along."""
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
    return _Named(tuple(images), messages, where)


def _messages(row: Mapping[str, Any], where: str, images: list[Any]) -> tuple[Message, ...]:
    """A row as a conversation; the images that it names are added to those of the row."""
    said = row.get("messages") or [
        {"role": ROLES.get(str(each.get("from")), each.get("from")), "content": each.get("value")}
        for each in row.get("conversations") or []
        if isinstance(each, Mapping)
    ]
    if isinstance(said, list) and said:
        try:
            return tuple({"role": str(each["role"]), "content": _joined(each["content"], images)} for each in said)
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
    """A message's content as one text: as it is, or of parts, in which images stand by themselves."""
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


def _part(rows: Lazy[_Named], split: Split, name: str) -> Lazy[_Named]:
    """The first four fifths of a user's rows, or the last one; rows with an image in common stay together."""
    groups = _together(rows)  # this checks every row, whatever the split
    if split == "whole":
        return rows
    names = list(dict.fromkeys(groups))
    if rows and len(names) < 2:
        raise CalibrationError(f"{name} has rows of one image alone, of which none can be kept for testing: give more")
    known = set(names[: min(max(1, int(len(names) * CALIBRATION_SHARE)), len(names) - 1)])
    chosen = [
        each for each, group in zip(rows.entries, groups, strict=True) if (group in known) == (split == "calibration")
    ]
    return Lazy(chosen, rows.decode)


def _together(rows: Sequence[_Named]) -> list[int]:
    """A number for each row, the same for all rows that share images, directly or through others."""
    first: dict[str, int] = {}
    same = list(range(len(rows)))

    def root(place: int) -> int:
        while same[place] != place:
            place = same[place]
        return place

    for place, row in enumerate(rows):
        for image in row.images:
            other = first.setdefault(str(image.resolve()), place)
            low, high = sorted((root(other), root(place)))
            same[high] = low
    return [root(place) for place in range(len(rows))]
