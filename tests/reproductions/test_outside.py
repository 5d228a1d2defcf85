"""The benchmark of outside programs: whatever a program answers, the row says what it made of the export."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from lamella.results import Record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outside(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("outside")


@pytest.fixture
def case(outside, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    return outside.Case(tmp_path, [-1.0, -2.5], list(range(outside.CONTINUED)))


@pytest.mark.parametrize(
    ("logprobs", "changed", "state"),
    [
        ([-1.0, -2.5], None, "yes"),
        ([-1.0, -2.5005], None, "yes"),
        ([-1.0, -2.6], None, "as another model"),
        ([-1.0, float("nan")], None, "as another model"),
        ([float("nan"), -2.5], None, "as another model"),
        ([-1.0, -2.5], 3, "as another model"),
    ],
)
def test_a_program_reads_an_export_only_where_its_answers_are_lamellas(outside, case, logprobs, changed, state):
    continued = [-1 if place == changed else token for place, token in enumerate(case.continued)]
    found = outside.compared(case, logprobs, continued)
    assert found.state == state
    assert found.alike == (outside.CONTINUED if changed is None else changed)


def test_a_program_without_a_continuation_is_judged_by_its_numbers(outside, case):
    assert outside.compared(case, case.logprobs, None).state == "yes"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "def answers(source, ids):\n    raise ValueError(f'{source}/config.json: unknown type')",
            "ValueError: config.json",
        ),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def answers(source, ids):\n    os.abort()", "exit code -6"),
    ],
    ids=["refuses", "cannot be imported", "ends in a crash"],
)
def test_a_program_that_does_not_answer_is_a_row_with_the_reason(outside, case, code, why):
    program = outside.Program((), "", code)
    found = outside.read(Path(sys.executable), program, case, "plain", [0, 1, 2])
    assert (found.state, found.difference) == ("no", None)
    assert why in found.why and str(case.folder) not in found.why


def test_what_a_program_answers_comes_back_from_its_own_process(outside, case):
    code = f"def answers(source, ids):\n    return [-1.0, -2.5], list(range({outside.CONTINUED}))"
    found = outside.read(Path(sys.executable), outside.Program((), "", code), case, "plain", [0, 1, 2])
    assert found == outside.Read(0.0, outside.CONTINUED)


def test_what_has_no_place_in_a_gguf_file_is_said_before_llama_cpp_is_asked(outside, case):
    (case.folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 8}))
    found = outside.read(Path(sys.executable), outside.PROGRAMS["llama.cpp"], case, "plain", [0, 1, 2])
    assert found.why.startswith("lamella quantize: ")


def test_a_program_that_reads_another_model_fails_a_check_and_one_that_is_missing_has_none(outside):
    cases, good, other = outside.CASES, outside.Read(1e-5, outside.CONTINUED), outside.Read(0.2, 4)
    told = {
        "transformers 5": outside.ProgramResults("5", dict.fromkeys(cases, good)),
        "transformers 4": outside.ProgramResults("4", dict.fromkeys(cases, good) | {"native": other}),
        "llama.cpp": outside.ProgramResults("1", dict.fromkeys(cases, good) | {"plain": outside.Read(why="no")}),
        "vLLM": outside.ProgramResults("", dict.fromkeys(cases, outside.Read(why="cannot be installed: no disk"))),
    }
    record = Record("outside", "none", 0)
    outside.report(record, "nano", told)
    failed = [check["name"] for check in record.checks if not check["passed"]]
    assert failed == ["transformers 4 reads nano as another model", "llama.cpp reads nano"]
    assert len(record.tables[0]["rows"]) == len(told) * len(cases)
    assert not any("vLLM" in check["name"] for check in record.checks)


def test_a_reason_names_no_place_of_this_machine(outside, tmp_path):
    reason = f"ImportError: cannot import name 'Layer' from 'cache' (/home/someone/packages/cache.py) of {tmp_path}"
    assert outside.one_line(reason, tmp_path) == "ImportError: cannot import name 'Layer' from 'cache' of FOLDER"
    reason = "OSError: Could not load this library: /home/someone/packages/lib/_audio.so"
    assert outside.one_line(reason, tmp_path) == "OSError: Could not load this library: _audio.so"
