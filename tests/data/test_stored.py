"""Stored sequences: what was put in comes out, and memory does not grow with it."""

from __future__ import annotations

import gc
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from lamella.data import Documents, InputContext, hold_out
from lamella.data.lazy import at, column, first_of_each, grouped, where
from lamella.data.stored import stored
from lamella.errors import ExportError

VALUES = [{"n": n, "text": f"über {n} \ud800\u2028\n" * (n % 5)} for n in range(200)]


def test_values_come_back_in_any_order_and_may_be_picked() -> None:
    found = stored(iter(VALUES))
    assert found == VALUES and found[-1] == VALUES[-1] and found[5:8] == VALUES[5:8]
    even = where(found, lambda row: row["n"] % 2 == 0)
    assert even == VALUES[::2] and where(even, lambda row: row["n"] > 190) == VALUES[192::2]
    thirds = grouped(found, lambda row: row["n"] % 3)
    assert thirds(lambda rest: rest == 1) == VALUES[1::3] and thirds(bool) == [v for v in VALUES if v["n"] % 3]
    assert at(even, [3, 1]) == [VALUES[6], VALUES[2]] and column(even, "n") == list(range(0, 200, 2))
    assert stored([]) == [] and not stored([])
    with pytest.raises(IndexError):
        found[200]


def test_the_file_goes_with_the_sequence() -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = stored(VALUES)
    part = where(found, lambda row: row["n"] > 100)
    del found
    assert part[0]["n"] == 101 and len(os.listdir("/proc/self/fd")) == before + 1
    del part
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_processes_that_share_a_file_do_not_disturb_each_other() -> None:
    found = stored(VALUES)
    child = os.fork()
    same = all(found[n] == VALUES[n] for _ in range(20) for n in random.Random(child).sample(range(200), 200))
    if child == 0:
        os._exit(0 if same else 1)
    assert same and os.waitpid(child, 0)[1] == 0


def test_a_full_disk_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
    with pytest.raises(ExportError, match="No space left on device; set TMPDIR") as error:
        stored(VALUES)
    assert "\n" not in str(error.value)


def test_the_first_of_each_group_are_those_of_a_sorted_list() -> None:
    drawn = random.Random(0)
    items = [(drawn.choice("abc"), drawn.randrange(20), n) for n in range(300)]
    found = first_of_each(items, key=lambda each: each[1], group=lambda each: each[0], most=lambda name: ord(name) - 94)
    for name in "abc":
        ordered = sorted((each for each in items if each[0] == name), key=lambda each: each[1])
        assert found[name] == ordered[: ord(name) - 94]


def peak_of(file: Path) -> int:
    """The most memory in bytes that reading, splitting and going through documents takes."""
    tracemalloc.start()
    documents = Documents.open(file, InputContext())
    train, held_out = hold_out(documents, 0.1, 0)
    assert len(documents.digest) == 64 and sum(len(each.text) for part in (train, held_out) for each in part) > 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_documents_take_no_more_memory_than_their_offsets(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 4000):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as lines:
            for n in range(count):
                lines.write(json.dumps({"id": f"a{n}", "text": f"{n} " * 500}) + "\n")
        peaks.append(peak_of(file))
        size = file.stat().st_size
    assert size > 8e6 and peaks[1] - peaks[0] < 0.1 * size
