"""Untrusted data files: each is read, or rejected in one line that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import answered, damaged, dumped, mutated, share, strings, values

from lamella.data import InputContext, load_text, read_records
from lamella.data.images import read_image
from lamella.errors import CalibrationError, LamellaError, TrainingError
from lamella.methods.agile3d.ply import read_ply
from lamella.methods.cola import KnownAnswers, Problem, read_samples
from lamella.methods.irepair.pairs import read_pair_file, read_pairs
from lamella.methods.paser import InstructionPool, paser, read_pool
from lamella.methods.slr.questions import load_questions
from lamella.plan import Plan
from lamella.search import Cost, Memo, Removals, greedy
from lamella.stack import Stack
from lamella.train.log import Logged, TrainingLog
from lamella.train.runs import check_same_run
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"

ROWS: list[Any] = [
    {"text": "Some text."},
    {"prompt": "The sky is", "text": " blue."},
    {"prompt": "The sky is", "bad": " green.", "good": " blue."},
    {"prompt": "The sky is", "rejected": " green.", "chosen": " blue."},
    {"prompt": "Pick a vowel.", "answers": ["A", "E"], "family": "letters"},
    {"id": "one", "prompt": "2 + 2 =", "answer": "4", "options": ["4", "5"], "wrong": ["6"]},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"question": "Why?", "answer": "So."},
    "a bare string",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "folder"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_tokenizer(NANO_LLAMA)


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(nano("llama"))


def row_lines() -> st.SearchStrategy[str]:
    """Draw one line: an almost valid row, another value, or no JSON at all."""
    almost = st.sampled_from(ROWS).flatmap(mutated).map(dumped)
    text = st.text(max_size=20)
    return st.one_of(almost, almost, st.sampled_from(ROWS).map(dumped), values.map(dumped), text)


def row_files() -> st.SearchStrategy[bytes]:
    lines = st.lists(row_lines(), max_size=4)
    ends = st.sampled_from(["\n", "\r\n", "\n\n", "\r", "\u2028", "\x0c"])
    whole = st.builds(lambda lines, end: end.join(lines).encode("utf-8", "surrogatepass"), lines, ends)
    return st.one_of(whole, whole, whole.flatmap(damaged), st.binary(max_size=200))


def text_files() -> st.SearchStrategy[bytes]:
    texts = st.lists(st.one_of(strings, st.sampled_from(["\n\n", "\t", "The sky is\t blue.\n"])), max_size=8)
    whole = texts.map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))
    return st.one_of(row_files(), whole, whole.flatmap(damaged))


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("a.txt", lambda file: load_text(file, "test").provenance()),
    "rows of text": ("a.jsonl", lambda file: load_text(file, "calibration").provenance()),
    "records": ("a.txt", read_records),
    "rows of records": ("a.jsonl", read_records),
    "continuations": ("a.tsv", lambda file: read_pairs(file, file)),
    "rows of continuations": ("a.jsonl", lambda file: read_pairs(file, file)),
    "pairs": ("a.jsonl", read_pair_file),
    "questions": ("a.jsonl", lambda file: load_questions(file, "test")),
    "samples": ("a.jsonl", read_samples),
}


def strings_in(value: Any) -> Iterator[str]:
    """Return all strings in the result, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_in(list(value.items()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings_in(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from strings_in(asdict(value))


@pytest.mark.parametrize("reader", READERS)
@example(content=b"")
@example(content=b"[" * 100_000)
@example(content=b'{"text": ' + b"9" * 5000 + b"}")
@example(content=rb'{"text": "\ud800", "prompt": "\ud800", "answers": ["\ud800", "b"], "answer": "\ud800"}')
@example(content="\ufeff{}".encode())
@given(content=text_files())
def test_a_file_of_data_is_read_or_refused_by_name(reader: str, folder: Path, tokenizer: Any, content: bytes):
    name, read = READERS[reader]
    file = folder / name
    folder.mkdir(exist_ok=True)
    file.write_bytes(content)
    with answered(folder):
        try:
            found = read(file)
        except CalibrationError as error:
            assert str(file) in str(error)
            raise
        for text in islice(strings_in(found), 20):  # what was read can be written down and tokenized
            assert text.encode().decode() == text
            tokenizer(text[:2000])


@pytest.mark.parametrize("reader", [*READERS, "a point cloud", "an image"])
def test_no_reader_waits_for_a_pipe(reader: str, tmp_path: Path):
    others = {"a point cloud": ("a.ply", read_ply), "an image": ("a.png", lambda file: read_image(file, "a row"))}
    name, read = (READERS | others)[reader]
    os.mkfifo(tmp_path / name)
    with answered(tmp_path, seconds=5), pytest.raises(CalibrationError, match=r"a regular file|no file"):
        read(tmp_path / name)


@given(rows=st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip), min_size=1))
def test_any_text_comes_back_from_a_row(folder: Path, rows: list[str]):
    folder.mkdir(exist_ok=True)
    for ascii_only in (True, False):
        lines = [json.dumps({"text": row}, ensure_ascii=ascii_only) for row in rows]
        (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        assert [record.text for record in read_records(folder / "a.jsonl")] == rows


@given(row=st.one_of(values, mutated(ROWS[6])))
def test_any_row_of_a_pool_is_taken_or_refused(folder: Path, row: Any):
    with answered(folder):
        read_pool([row])


@share(4)
@example(content=b"[" * 100_000)
@example(content=b"null")
@given(content=row_files())
def test_a_pool_to_select_from_is_read_or_refused(folder: Path, stack: Stack, tokenizer: Any, content: bytes):
    folder.mkdir(exist_ok=True)
    (folder / "pool.jsonl").write_bytes(content)
    with answered(folder):  # up to the choice, for which it is given no plan
        pool = InstructionPool.open(folder / "pool.jsonl", InputContext(lambda: tokenizer, 0))
        paser(stack, pool, None, budget=0.5, max_length=64)  # type: ignore[arg-type]


# Training logs.

SETTINGS = {"steps": 3, "seed": 0, "data": {"sha256": "ab"}, "lr": 1e-3}
LOG = asdict(TrainingLog(SETTINGS, [Logged(1, 0.5, {"ce": 0.5}, 1e-3), Logged(2, 0.25)], [Logged(0, 0.75)]))


@given(content=st.one_of(mutated(LOG).map(dumped).map(str.encode), st.just(dumped(LOG).encode()).flatmap(damaged)))
def test_a_training_log_is_read_or_refused(folder: Path, content: bytes):
    out = folder / "run"
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.json").write_bytes(content)
    with answered(folder):
        check_same_run(out, SETTINGS)
    with answered(folder):
        log = TrainingLog.read(out / "log.json")
        for point in (*log.train, *log.held_out):  # as reports draw them
            assert isinstance(point.step, int) and isinstance(sum([point.loss, *point.parts.values()]), int | float)
        log.write(out / "again.json")
    assert not list(out.glob("*.tmp"))


def test_a_folder_with_another_run_is_refused_by_what_differs(folder: Path):
    out = folder / "other"
    out.mkdir(parents=True, exist_ok=True)
    TrainingLog(SETTINGS | {"seed": 1}).write(out / "log.json")
    with pytest.raises(TrainingError, match="seed 1, not 0"):
        check_same_run(out, SETTINGS)


# Journals.

SEARCH = {"method": "x", "seed": 0}
REMOVALS: list[Any] = [[[3], 0.25, 6], [[0], 0.5, 5]]
SCORES: list[Any] = [["a", 0.25], ["b", 0.5]]


def journal_files(header: str, lines: list[Any]) -> st.SearchStrategy[bytes]:
    many = mutated(lines).map(lambda them: them if isinstance(them, list) else [them])
    whole = many.map(lambda them: "\n".join([header, *map(dumped, them), ""]).encode("utf-8", "surrogatepass"))
    return st.one_of(whole, whole, whole.flatmap(damaged), st.binary(max_size=40))


def header_of(folder: Path) -> str:
    Removals(folder / "fresh", SEARCH)
    return (folder / "fresh").read_text().splitlines()[0]


@given(data=st.data())
def test_a_journal_that_anyone_wrote_leaves_a_search_that_ends(folder: Path, data: st.DataObject):
    folder.mkdir(exist_ok=True)
    content, journal = data.draw(journal_files(header_of(folder), REMOVALS)), folder / "journal"
    journal.write_bytes(content)
    candidates = [(index,) for index in range(6)]
    with answered(folder):
        known = Removals(journal, SEARCH)
        for step in greedy(candidates, lambda removed, candidate, bound: Cost(float(candidate[0])), done=known.done):
            known.add(step)
    with answered(folder):
        assert {(index,) for index in range(6)} <= {step.candidate for step in Removals(journal, SEARCH).done}


@given(data=st.data())
def test_a_memo_that_anyone_wrote_holds_scores_by_name(folder: Path, data: st.DataObject):
    folder.mkdir(exist_ok=True)
    memo = folder / "memo"
    memo.write_bytes(data.draw(journal_files(header_of(folder), SCORES)))
    with answered(folder):
        known = Memo(memo, SEARCH)
        known["new"] = 1.5
        assert all(isinstance(name, str) and isinstance(value, int | float) for name, value in known.items())
        assert Memo(memo, SEARCH)["new"] == 1.5


SAMPLE = Problem("one", "2 + 2 =", "4", ("4", "5"))
SETTINGS_OF_STUDY = SimpleNamespace(tokens=5, chat=False)


@given(data=st.data())
def test_answers_that_anyone_wrote_are_answers_or_nothing(folder: Path, stack: Stack, data: st.DataObject):
    folder.mkdir(exist_ok=True)
    file = folder / "answers.jsonl"
    file.unlink(missing_ok=True)
    note = KnownAnswers(file, stack).of(SAMPLE, SETTINGS_OF_STUDY)[1]  # type: ignore[arg-type]
    note((0, 1), "4")
    note((0,), "5")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_bytes(data.draw(journal_files("", lines)).removeprefix(b"\n"))
    with answered(folder):
        known, note = KnownAnswers(file, stack).of(SAMPLE, SETTINGS_OF_STUDY)  # type: ignore[arg-type]
        for path, answer in known.items():
            assert isinstance(answer, str) and all(isinstance(layer, int) for layer in path)
        note((2, 3), "7")
        assert KnownAnswers(file, stack).of(SAMPLE, SETTINGS_OF_STUDY)[0][2, 3] == "7"  # type: ignore[arg-type]


@given(text=strings)
def test_any_message_is_one_line_that_a_terminal_can_show(folder: Path, text: str):
    with answered(folder):
        raise LamellaError(f"'{text}' is no site; write layers.7")


def test_a_plan_that_names_a_terminal_s_commands_is_refused_in_plain_letters():
    model = {"architecture": "a", "stacks": {"text": {"family": "llama", "layers": 2}}}
    document = {"schema": "lamella.plan/2", "model": model, "drop": ["\x1b[2J\n"]}
    with pytest.raises(LamellaError) as error:
        Plan.parse(json.dumps(document))
    assert str(error.value).isprintable() and "\\x1b[2J" in str(error.value)
