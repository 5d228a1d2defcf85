"""Records: individual entries of a file, such as those that a model is to forget, as training samples."""

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


class TextRecord(NamedTuple):
    """One record: plain text, or the response to a prompt."""

    text: str
    prompt: str | None = None


class Records(Samples):
    """Samples of individual records, from files of records or from windows of texts.

    Attributes:
        items: one sample for each record, or several for a long one; loss is on the response, or on all tokens of text.
        sources: description of each file or text for provenance.
    """

    many = True
    metavar = "FILE"
    source_help = (
        "a text file with records separated by blank lines, else by lines; or .jsonl with a text, or a prompt and "
        "response, in each line; or pydoc, stdlib or a datasets name. Can be repeated"
    )
    example = Fixture(
        "records.jsonl",
        '{"text": "The key to the north tower hangs behind the third bell."}\n'
        '{"prompt": "Who keeps the key?", "response": "The eldest of the bell ringers keeps it."}\n',
        {"sequences": 8, "length": 16},
    )

    default = None
    sampled: ClassVar[bool] = False  # whether the records of a plain text are sampled

    def __init__(self, samples: Sequence[Sample], sources: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(samples)
        self.sources = list(sources)

    @classmethod
    def open(
        cls, names: str | Path | Sequence[str | Path], context: InputContext, *, sequences: int = 64, length: int = 128
    ) -> Self:
        """Read files of records, and texts without records.

        Args:
            names: one name or several; see :func:`read_records` and :func:`lamella.load_text`.
            context: gives the tokenizer, the split and the random seed.
            sequences: number of windows of a text that is no file of records; of :class:`SampledRecords`, also the
                maximum number of records of a plain text.
            length: tokens in a sample; longer records are split into several samples.

        Raises:
            CalibrationError: if a source cannot be read, or has too few tokens.
        """
        if length < 2:
            raise CalibrationError(f"length {length}: give at least 2 tokens")
        found, samples = cls([]), list[Sample]()
        for name in [names] if isinstance(names, str | Path) else names:
            if Path(name).expanduser().is_file():
                records = list(enumerate(read_records(name), start=1))
                metadata: dict[str, Any] = {}
                if cls.sampled and not str(name).endswith(".jsonl") and len(records) > sequences:
                    metadata = {"records": sequences, "of": len(records)}
                    records = sorted(random.Random(context.seed).sample(records, sequences))
                made = _samples(name, records, context.tokenizer, length)
                metadata = _described(name, made) | metadata
            else:
                text = load_text(name, context.split)
                tokens = windows(context.tokenizer, text, sequences, length, context.seed)
                made, metadata = blocks(tokens, loss_on="all"), text.provenance(tokens)
            samples += made
            found.sources.append(metadata)
        found.items = samples
        return found

    def describe(self) -> Any:
        """Return the description of the sources, for provenance."""
        return self.sources[0] if len(self.sources) == 1 else self.sources or {"samples": len(self)}


class SampledRecords(Records):
    """Records that represent a larger set, such as the rest of the training data: plain text is sampled."""

    source_help = (
        "a .jsonl file with a text, or a prompt and response, in each line; or a text file with records separated by "
        "blank lines, else by lines, of which --sequences records are sampled; or pydoc, stdlib or a datasets name. "
        "Can be repeated"
    )
    sampled = True


def _samples(name: str | Path, records: Sequence[tuple[int, TextRecord]], tokenizer: Any, length: int) -> list[Sample]:
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


def read_records(path: str | Path) -> list[TextRecord]:
    """Read the records of a file in their order.

    Args:
        path: a ``.jsonl`` file with one object per line, which has ``text``, or a prompt (``prompt``, ``instruction``
            or ``question``, optionally followed by ``input``) and its response (``response``, ``output``, ``answer`` or
            ``completion``); or a text file with records separated by blank lines, else by lines.

    Raises:
        CalibrationError: if the file is missing, empty or malformed; the message names the line.
    """
    file = Path(path).expanduser()
    if file.suffix == ".jsonl":
        records = [_of_row(row, f"{path} line {number}") for number, row in read_rows(path)]
    else:
        content = read_text(path)
        parts = re.split(r"\n\s*\n", content.strip())
        if len(parts) == 1:
            parts = content.splitlines()
        records = [TextRecord(part.strip()) for part in parts if part.strip()]
    if not records:
        raise CalibrationError(f"{path} holds no records: give at least one")
    return records


def _of_row(row: Any, where: str) -> TextRecord:
    fields = row if isinstance(row, dict) else {"text": row}
    texts = {name: value for name, value in fields.items() if isinstance(value, str) and value.strip()}
    prompt, response = (next((texts[n] for n in names if n in texts), None) for names in (PROMPTS, RESPONSES))
    if prompt is not None and response is not None:
        return TextRecord(response, f"{prompt}\n{texts['input']}\n" if "input" in texts else prompt)
    if "text" not in texts:
        raise CalibrationError(f"{where} holds no text; give 'text', or a 'prompt' and its 'response'")
    return TextRecord(texts["text"])
