"""Records: single pieces of a file, such as those that a model shall forget, as samples for a model."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from lamella.data.context import InputContext
from lamella.data.samples import Sample, Samples, blocks, pairs
from lamella.data.sources import load_text, windows
from lamella.errors import CalibrationError
from lamella.progress import track
from lamella.reading import read_rows, read_text
from lamella.signature import Fixture

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "output", "answer", "completion")


class Piece(NamedTuple):
    """One piece: plain text, or the response to a prompt."""

    text: str
    prompt: str | None = None


class Records(Samples):
    """Samples that stand for themselves, from files of records or from windows of texts.

    Attributes:
        items: a record each, or several where it is long; of a prompt and its response, the response carries loss.
        sources: what provenance says of each file or text.
    """

    many = True
    metavar = "FILE"
    source_help = (
        "a file of text parted by blank lines, else by lines; or .jsonl with a text, or a prompt and its response, in "
        "each line; or pydoc, stdlib or a datasets name. Repeat it for several"
    )
    example = Fixture(
        "records.jsonl",
        '{"text": "The key to the north tower hangs behind the third bell."}\n'
        '{"prompt": "Who keeps the key?", "response": "The eldest of the bell ringers keeps it."}\n',
        {"sequences": 8, "length": 16},
    )

    default = None
    sampled: ClassVar[bool] = False  # whether some records of a plain text stand for all of them

    def __init__(self, samples: Sequence[Sample], sources: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(samples)
        self.sources = list(sources)

    @classmethod
    def open(
        cls, names: str | Path | Sequence[str | Path], context: InputContext, *, sequences: int = 64, length: int = 128
    ) -> Self:
        """Read files of records, and texts that are none.

        Args:
            names: one or several; see :func:`read_records` and :func:`lamella.load_text`.
            sequences: sequences of a text that is no file of records, and records of a plain text that stands for more.
            length: tokens in a sample; longer records are cut into several.

        Raises:
            CalibrationError: for what cannot be read, or has too few tokens.
        """
        if length < 2:
            raise CalibrationError(f"length {length}: give at least 2 tokens")
        found, samples = cls([]), list[Sample]()
        for name in [names] if isinstance(names, str | Path) else names:
            if Path(name).expanduser().is_file():
                records = list(enumerate(read_records(name), start=1))
                said: dict[str, Any] = {}
                if cls.sampled and not str(name).endswith(".jsonl") and len(records) > sequences:
                    said = {"records": sequences, "of": len(records)}
                    records = sorted(random.Random(context.seed).sample(records, sequences))
                made = _samples(name, records, context.tokenizer, length)
                said = _described(name, made) | said
            else:
                text = load_text(name, context.split)
                tokens = windows(context.tokenizer, text, sequences, length, context.seed)
                made, said = blocks(tokens, loss_on="all"), text.provenance(tokens)
            samples += made
            found.sources.append(said)
        found.items = samples
        return found

    def describe(self) -> Any:
        """What provenance says of them."""
        return self.sources[0] if len(self.sources) == 1 else self.sources or {"samples": len(self)}


class SampledRecords(Records):
    """Records that stand for more of their kind, such as all other training data: a plain text is sampled."""

    told = (
        "a .jsonl file with a text, or a prompt and its response, in each line; or a file of text parted by blank "
        "lines, else by lines, of which --sequences records are drawn; or pydoc, stdlib or a datasets name. Repeat it "
        "for several"
    )
    sampled = True


def _samples(name: str | Path, records: Sequence[tuple[int, Piece]], tokenizer: Any, length: int) -> list[Sample]:
    samples = []
    for number, record in track(records, "reading records"):
        if record.prompt is not None:
            samples += pairs([(record.prompt, record.text)], tokenizer, max_length=length)
            continue
        ids = tokenizer(record.text, return_tensors="pt", verbose=False)["input_ids"]
        parts = [part for part in ids.split(length, dim=1) if part.shape[1] > 1]
        if not parts:
            raise CalibrationError(f"{name}: record {number} has {ids.shape[1]} tokens: at least 2 are needed")
        samples += [sample for part in parts for sample in blocks(part, loss_on="all")]
    return samples


def _described(name: str | Path, samples: Sequence[Sample]) -> dict[str, Any]:
    content = Path(name).expanduser().read_bytes()
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    return {"data": str(name), "split": "whole", "tokens": tokens, "sha256": hashlib.sha256(content).hexdigest()}


def read_records(path: str | Path) -> list[Piece]:
    """The records of a file, in their order.

    Args:
        path: ``.jsonl`` with one object a line, which has ``text``, or a prompt (``prompt``, ``instruction`` or
            ``question``, with ``input`` after it) and its response (``response``, ``output``, ``answer`` or
            ``completion``); or any text file, whose records are parted by blank lines, else by lines.

    Raises:
        CalibrationError: for a file that is missing, empty or malformed, with its line.
    """
    file = Path(path).expanduser()
    if file.suffix == ".jsonl":
        records = [_of_row(row, f"{path} line {number}") for number, row in read_rows(path)]
    else:
        content = read_text(path)
        pieces = re.split(r"\n\s*\n", content.strip())
        if len(pieces) == 1:
            pieces = content.splitlines()
        records = [Piece(piece.strip()) for piece in pieces if piece.strip()]
    if not records:
        raise CalibrationError(f"{path} holds no records: give at least one")
    return records


def _of_row(row: Any, where: str) -> Piece:
    fields = row if isinstance(row, dict) else {"text": row}
    texts = {name: value for name, value in fields.items() if isinstance(value, str) and value.strip()}
    prompt, response = (next((texts[n] for n in names if n in texts), None) for names in (PROMPTS, RESPONSES))
    if prompt is not None and response is not None:
        return Piece(response, f"{prompt}\n{texts['input']}\n" if "input" in texts else prompt)
    if "text" not in texts:
        raise CalibrationError(f"{where} holds no text; give 'text', or a 'prompt' and its 'response'")
    return Piece(texts["text"])
