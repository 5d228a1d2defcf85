"""The tests that a change can reach are selected, and few others."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from selection import ROOT, Selection

TESTS = ROOT / "tests"


@cache
def selection(*changed: str) -> Selection:
    """The selection of some changed files."""
    return Selection(changed)


def functions(path: Path) -> list[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def reached(path: str, *changed: str) -> set[str]:
    """The tests of a file that a change reaches."""
    file, chosen = TESTS / path, selection(*changed)
    return {name for name in functions(file) if chosen.reaches(file, name, {})}


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ("src/lamella/methods/finercut.py", "methods/test_finercut.py"),
        ("src/lamella/methods/muranet/raster.py", "methods/muranet/test_plans.py"),
        ("src/lamella/stack/stack.py", "methods/test_finercut.py"),
        ("src/lamella/data/transport.py", "data/test_endpoint.py"),
        ("src/lamella/report/templates/plots.js", "report/test_summary.py"),
        ("reproductions/harness/run.py", "reproductions/test_harness.py"),
        ("docs/index.md", "test_documentation.py"),
        ("src/lamella/methods/kore/tree.py", "test_house.py"),
    ],
)
def test_what_a_change_reaches_is_selected(changed: str, path: str) -> None:
    assert reached(path, changed)


def test_a_method_reaches_no_tests_of_another_one() -> None:
    for path in sorted((TESTS / "methods" / "muranet").glob("test_*.py")):
        assert not reached(str(path.relative_to(TESTS)), "src/lamella/methods/kore/tree.py")
    assert not reached("stack/test_stack.py", "src/lamella/methods/kore/tree.py")


def test_a_conformance_test_of_a_method_is_selected_by_its_parameter() -> None:
    file, chosen = TESTS / "conformance" / "test_results.py", selection("src/lamella/methods/kore/method.py")
    name = functions(file)[0]
    assert chosen.reaches(file, name, {"command": "kore augment"})
    assert not chosen.reaches(file, name, {"command": "muranet"})


def test_a_test_of_a_file_is_selected_when_that_file_has_changed() -> None:
    file, chosen = TESTS / "test_language.py", selection("src/lamella/methods/kore/method.py")
    name = "test_code_and_messages_use_the_terms_of_the_field"
    assert chosen.reaches(file, name, {"file": ROOT / "src" / "lamella" / "methods" / "kore" / "method.py"})
    assert not chosen.reaches(file, name, {"file": ROOT / "src" / "lamella" / "methods" / "kore" / "tree.py"})


@pytest.mark.parametrize("changed", ["tests/conftest.py", "pyproject.toml", "unknown.cfg"])
def test_what_the_graph_does_not_know_selects_everything(changed: str) -> None:
    assert selection(changed).everything


def test_a_changed_test_is_selected_and_no_other() -> None:
    chosen = selection("tests/methods/test_portfolio.py")
    assert chosen.reaches(TESTS / "methods" / "test_portfolio.py", "anything", {})
    assert not chosen.reaches(
        TESTS / "methods" / "test_finercut.py", functions(TESTS / "methods/test_finercut.py")[0], {}
    )
