"""Pairs from files of every form; what is no pair is refused in the tests of the command."""

from __future__ import annotations

import json
from pathlib import Path

from lamella.methods.irepair.pairs import ContinuationPair, read_pair_file, read_pairs

PAIRS = [
    ContinuationPair(f"The function f{n} returns", f" a fool, number {n}.", f" the value {n} of x.") for n in range(4)
]


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_two_files_of_rows_two_of_lines_and_one_of_both_give_the_same(tmp_path: Path) -> None:
    rows = [written(tmp_path / f"{name}.jsonl", [json.dumps({"prompt": each.prompt, "text": getattr(each, name)})
                                                 for each in PAIRS]) for name in ("bad", "good")]  # fmt: skip
    lines = [written(tmp_path / f"{name}.txt", [f"{each.prompt}\t{getattr(each, name).strip()}" for each in PAIRS])
             for name in ("bad", "good")]  # fmt: skip
    one = written(tmp_path / "pairs.jsonl", [json.dumps(each._asdict()) for each in PAIRS])
    rated = [json.dumps({"prompt": each.prompt, "rejected": each.bad, "chosen": each.good}) for each in PAIRS]
    assert read_pairs(*rows) == read_pairs(*lines) == read_pair_file(one) == PAIRS
    assert read_pair_file(written(tmp_path / "rated.jsonl", rated)) == PAIRS
