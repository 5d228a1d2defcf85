"""Paired continuations from files: to each prompt what a model shall not write, and what it shall write instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from lamella.errors import CalibrationError
from lamella.reading import read_lines, read_rows

ALIASES = {"good": ("good", "chosen"), "bad": ("bad", "rejected")}  # the second ones as preference data has them
Entry = TypeVar("Entry")
SUFFIXES = (".jsonl", ".txt", ".tsv")


class Pair(NamedTuple):
    """One prompt with two continuations, as text.

    Attributes:
        prompt: what comes before them.
        bad: the unwanted one.
        good: the wanted one.
    """

    prompt: str
    bad: str
    good: str


def read_pairs(bad: Path, good: Path) -> list[Pair]:
    """Pairs from two files, whose rows belong together in their order.

    A ``.jsonl`` file has ``{"prompt": "...", "text": "..."}`` on each line; a text file has the prompt, a tab and the
    continuation.

    Raises:
        CalibrationError: one line that names the file, the line and the mend.
    """
    ours, theirs = list(_continuations(bad)), list(_continuations(good))
    if len(ours) != len(theirs):
        raise CalibrationError(
            f"{bad} has {len(ours)} continuations and {good} has {len(theirs)}: give one good one for each bad one"
        )
    pairs = []
    for number, ((prompt, unwanted), (other, wanted)) in enumerate(zip(ours, theirs, strict=True), start=1):
        if prompt != other:
            raise CalibrationError(
                f"pair {number}: {bad} continues {_quoted(prompt)}, {good} continues {_quoted(other)}: give both "
                "continuations the same prompt, in the same order"
            )
        pairs.append(_checked(Pair(prompt, unwanted, wanted), f"{bad} and {good}, pair {number}"))
    return pairs


def read_pair_file(path: Path) -> list[Pair]:
    """Pairs from one ``.jsonl`` file: ``{"prompt": "...", "bad": "...", "good": "..."}`` on each line.

    ``rejected`` and ``chosen``, as preference data has them, are understood too.

    Raises:
        CalibrationError: one line that names the file, the line and the mend.
    """
    pairs = []
    for where, row in _rows(path):
        bad, good = (next((row[name] for name in ALIASES[role] if name in row), None) for role in ("bad", "good"))
        if "prompt" not in row or bad is None or good is None:
            raise CalibrationError(f'{where}: write {{"prompt": "...", "bad": "...", "good": "..."}}')
        pairs.append(_checked(Pair(row["prompt"], bad, good), where))
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
        yield prompt, f" {text}"  # a tab parts words


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a file, each with where it stands: their fields that are text."""
    _check_suffix(path)
    for number, row in _some(list(read_rows(path)), path):
        where = f"{path} line {number}"
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is no JSON object: give one object a line")
        yield where, {name: value for name, value in row.items() if isinstance(value, str)}


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CalibrationError(f"{path}: give a {', '.join(SUFFIXES)} file of continuations")


def _some(found: list[Entry], path: Path) -> list[Entry]:
    if not found:
        raise CalibrationError(f"{path} is empty: give one continuation a line")
    return found


def _checked(pair: Pair, where: str) -> Pair:
    for name, text in pair._asdict().items():
        if not text.strip():
            what = name if name == "prompt" else f"{name} continuation"
            raise CalibrationError(f"{where}: the {what} is missing: give every pair a prompt and two continuations")
    if pair.bad == pair.good:
        raise CalibrationError(f"{where}: both continuations are the same: leave this pair out")
    return pair


def _quoted(text: str) -> str:
    return f"'{text if len(text) <= 30 else text[:27] + '...'}'"
