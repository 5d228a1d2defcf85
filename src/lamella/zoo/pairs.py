"""Paired continuations from files: to each prompt what a model shall not write, and what it shall write instead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lamella.errors import CalibrationError

ALIASES = {"good": ("good", "chosen"), "bad": ("bad", "rejected")}  # the second ones as preference data has them
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
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        row = _strings(line, where)
        bad, good = (next((row[name] for name in ALIASES[role] if name in row), None) for role in ("bad", "good"))
        if "prompt" not in row or bad is None or good is None:
            raise CalibrationError(f'{where}: write {{"prompt": "...", "bad": "...", "good": "..."}}')
        pairs.append(_checked(Pair(row["prompt"], bad, good), where))
    return pairs


def _continuations(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts with their continuations."""
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if path.suffix == ".jsonl":
            row = _strings(line, where)
            if not {"prompt", "text"} <= row.keys():
                raise CalibrationError(
                    f'{where}: the prompt or the text is missing: write {{"prompt": "...", "text": "..."}}'
                )
            yield row["prompt"], row["text"]
        else:
            prompt, tab, text = line.partition("\t")
            if not tab:
                raise CalibrationError(f"{where}: the prompt is missing: write prompt, tab and continuation")
            yield prompt, f" {text}"  # a tab parts words


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    if path.suffix not in SUFFIXES:
        raise CalibrationError(f"{path}: give a {', '.join(SUFFIXES)} file of continuations")
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read ({error.__class__.__name__}): give a text file") from None
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise CalibrationError(f"{path} is empty: give one continuation a line")
    return found


def _strings(line: str, where: str) -> dict[str, str]:
    """The fields of a row that are text."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is no JSON object: give one object a line")
    return {name: value for name, value in row.items() if isinstance(value, str)}


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
