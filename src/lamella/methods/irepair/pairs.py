"""Read paired continuations from files: for each prompt an unwanted and a wanted one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lamella.data.context import InputContext
from lamella.errors import CalibrationError
from lamella.reading import read_lines, read_rows
from lamella.signature import Fixture
from lamella.zoo.opening import chat_inputs

ALIASES = {"good": ("good", "chosen"), "bad": ("bad", "rejected")}  # the latter are common in preference data
Entry = TypeVar("Entry")
SUFFIXES = (".jsonl", ".txt", ".tsv")


class ContinuationPair(NamedTuple):
    """One prompt with two continuations, as text.

    Attributes:
        prompt: the prompt.
        bad: the unwanted continuation.
        good: the wanted continuation.
    """

    prompt: str
    bad: str
    good: str


class Triple(NamedTuple):
    """One pair as token ids, each [time].

    Attributes:
        prompt: the prompt.
        bad: the unwanted continuation.
        good: the wanted continuation.
    """

    prompt: Tensor
    bad: Tensor
    good: Tensor


@dataclass(frozen=True)
class Pairs:
    """Tokenized pairs.

    Attributes:
        triples: prompt, bad and good continuation of each.
        tokenizer: their tokenizer; None for token ids.
        metadata: metadata for provenance.
    """

    triples: list[Triple]
    tokenizer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    metavar = "FILE"
    nameless = True
    source_help = (
        'one .jsonl file: {"prompt": "...", "bad": "...", "good": "..."} on each line; "rejected" and "chosen" are '
        "accepted too. Or instead both --bad and --good"
    )
    example = Fixture(
        "pairs.jsonl",
        '{"prompt": "Is it late?", "bad": " As I said, yes.", "good": " Yes, it is."}\n'
        '{"prompt": "Is it far?", "bad": " As I said, no.", "good": " No, a mile."}\n'
        '{"prompt": "Who came?", "bad": " As I said, Ann.", "good": " Ann did."}\n'
        '{"prompt": "What now?", "bad": " As I said, sleep.", "good": " Go to sleep."}\n'
        '{"prompt": "Which door?", "bad": " As I said, left.", "good": " The left one."}\n',
    )

    @classmethod
    def open(
        cls,
        name: str | Path | None,
        context: InputContext,
        *,
        bad: Path | None = None,
        good: Path | None = None,
        chat: bool = False,
    ) -> Pairs:
        """Read pairs from one file or two.

        Args:
            name: see :func:`read_pair_file`; None for two files.
            context: the tokenizer to use.
            bad: unwanted continuations. A .jsonl file: {"prompt": "...", "text": "..."} on each line; or a .txt file:
                the prompt, a tab, the continuation.
            good: wanted continuations: as many lines, with the same prompts in the same order.
            chat: apply the model's chat template to prompts; continuations then end the turn.

        Returns:
            The tokenized pairs.

        Raises:
            CalibrationError: for files that are not paired continuations, or a wrong combination of files.
        """
        if name is not None and bad is None and good is None:
            found = read_pair_file(Path(name))
        elif bad is None or good is None or name is not None:
            raise CalibrationError(
                "give both --bad and --good, or --pairs alone: each bad continuation needs a good one"
            )
        else:
            found = read_pairs(Path(bad), Path(good))
        files = [str(each) for each in (bad, good, name) if each is not None]
        digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        metadata = {"files": files, "pairs": len(found), "sha256": digest}
        return cls([_tokens(context.tokenizer, each, chat) for each in found], context.tokenizer, metadata)

    def describe(self) -> Any:
        """Metadata for provenance."""
        return dict(self.metadata) or {"pairs": len(self.triples)}


def _tokens(tokenizer: Any, pair: ContinuationPair, chat: bool) -> Triple:
    if chat:
        messages = [{"role": "user", "content": pair.prompt}]
        prompt = chat_inputs(tokenizer, messages, torch.device("cpu"))["input_ids"][0]
    else:
        prompt = torch.tensor(tokenizer(pair.prompt)["input_ids"], dtype=torch.long)
    end = [tokenizer.eos_token_id] if chat and tokenizer.eos_token_id is not None else []
    bad, good = (
        torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], *end], dtype=torch.long)
        for text in (pair.bad, pair.good)
    )
    return Triple(prompt, bad, good)


def read_pairs(bad: Path, good: Path) -> list[ContinuationPair]:
    """Read pairs from two files, whose rows correspond in order.

    A ``.jsonl`` file has ``{"prompt": "...", "text": "..."}`` on each line; a text file has the prompt, a tab and the
    continuation.

    Args:
        bad: file of unwanted continuations.
        good: file of wanted continuations.

    Raises:
        CalibrationError: for an invalid file, with its name, the line and the fix in one line.
    """
    ours, theirs = list(_continuations(bad)), list(_continuations(good))
    if len(ours) != len(theirs):
        raise CalibrationError(
            f"{bad} has {len(ours)} continuations and {good} has {len(theirs)}: give one good continuation per bad one"
        )
    pairs = []
    for number, ((prompt, unwanted), (other, wanted)) in enumerate(zip(ours, theirs, strict=True), start=1):
        if prompt != other:
            raise CalibrationError(
                f"pair {number}: {bad} continues {_quoted(prompt)}, {good} continues {_quoted(other)}: both files need "
                "the same prompts in the same order"
            )
        pairs.append(_checked(ContinuationPair(prompt, unwanted, wanted), f"{bad} and {good}, pair {number}"))
    return pairs


def read_pair_file(path: Path) -> list[ContinuationPair]:
    """Read pairs from one ``.jsonl`` file: ``{"prompt": "...", "bad": "...", "good": "..."}`` on each line.

    ``rejected`` and ``chosen``, as in preference data, are accepted too.

    Raises:
        CalibrationError: for an invalid file, with its name, the line and the fix in one line.
    """
    pairs = []
    for where, row in _rows(path):
        bad, good = (next((row[name] for name in ALIASES[role] if name in row), None) for role in ("bad", "good"))
        if "prompt" not in row or bad is None or good is None:
            raise CalibrationError(f'{where}: write {{"prompt": "...", "bad": "...", "good": "..."}}')
        pairs.append(_checked(ContinuationPair(row["prompt"], bad, good), where))
    return pairs


def _continuations(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts with their continuations."""
    if path.suffix == ".jsonl":
        for where, row in _rows(path):
            if not {"prompt", "text"} <= row.keys():
                raise CalibrationError(
                    f'{where}: the prompt or the text is missing: write {{"prompt": "...", "text": "..."}}'
                )
            yield row["prompt"], row["text"]
        return
    _check_suffix(path)
    for number, line in _some(read_lines(path), path):
        prompt, tab, text = line.partition("\t")
        if not tab:
            raise CalibrationError(f"{path} line {number}: the prompt is missing: write prompt, tab and continuation")
        yield prompt, f" {text}"  # the tab replaces the space between words


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The text fields of each row of a file, with its location for messages."""
    _check_suffix(path)
    for number, row in _some(list(read_rows(path)), path):
        where = f"{path} line {number}"
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is not a JSON object: give one object per line")
        yield where, {name: value for name, value in row.items() if isinstance(value, str)}


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CalibrationError(f"{path}: give a {', '.join(SUFFIXES)} file of continuations")


def _some(found: list[Entry], path: Path) -> list[Entry]:
    if not found:
        raise CalibrationError(f"{path} is empty: give one continuation per line")
    return found


def _checked(pair: ContinuationPair, where: str) -> ContinuationPair:
    for name, text in pair._asdict().items():
        if not text.strip():
            what = name if name == "prompt" else f"{name} continuation"
            raise CalibrationError(f"{where}: the {what} is missing: every pair needs a prompt and two continuations")
    if pair.bad == pair.good:
        raise CalibrationError(f"{where}: both continuations are the same: remove this pair")
    return pair


def _quoted(text: str) -> str:
    return f"'{text if len(text) <= 30 else text[:27] + '...'}'"
