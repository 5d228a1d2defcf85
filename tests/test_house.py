"""The rules of the house: one slug, one file or folder; methods know nothing of each other, engines of none."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamella
from lamella.registry import methods

HOME = Path(lamella.__file__).parent
METHODS = {slug: each for slug, each in methods().items() if each.module.startswith("lamella.")}
OVER = {"cli", "commands"}  # who may know methods


def imports(file: Path) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


@pytest.mark.parametrize("slug", METHODS)
def test_the_module_of_a_method_is_its_slug(slug: str) -> None:
    source = Path(inspect.getsourcefile(inspect.unwrap(METHODS[slug].call)) or "")
    name = slug.replace("-", "_")
    assert source in (HOME / "methods" / f"{name}.py", HOME / "methods" / name / "method.py")


def test_methods_do_not_import_each_other() -> None:
    for file in (HOME / "methods").rglob("*.py"):
        own = file.relative_to(HOME / "methods").parts[0].removesuffix(".py")
        for module in imports(file):
            if module.startswith("lamella.methods."):
                assert module.split(".")[2] == own, f"{file} imports {module}"


def test_engines_do_not_import_methods() -> None:
    for file in HOME.rglob("*.py"):
        room = file.relative_to(HOME).parts[0]
        if room not in OVER | {"methods"}:
            assert not [module for module in imports(file) if module.startswith("lamella.methods")], file


def test_a_method_is_one_file_or_a_folder_with_its_method() -> None:
    for place in (HOME / "methods").iterdir():
        if place.is_dir() and place.name != "__pycache__":
            assert (place / "method.py").is_file() and (place / "__init__.py").is_file(), place
    assert {place.stem for place in (HOME / "methods").iterdir()} - {"__pycache__", "__init__"} == {
        slug.replace("-", "_") for slug in METHODS
    }


# Messages

PYTHON = (  # how values and calls are written in Python, and nowhere else
    (re.compile(r"\w=(?=[\w'\"\[({\x00-])"), "an option is written NAME VALUE"),
    (re.compile(r"\w\((?!s\))"), "a call"),
    (re.compile(r"\w\[(?!\w+\])|\.\w+\["), "a subscript"),
    (re.compile(r"\b(None|True|False)\b"), "a constant"),
)
SHELL = re.compile(r"NAME=\w+|--set \w+=\S+|--[\w-]+='|pip install '[^']*'|@method\(\"\x00\", \.\.\.\)")
LISTS = re.compile(r"^(list|tuple|sorted|set|dict)\((?!.*shape)")
ELSEWHERE: tuple[str, ...] = ()


def without_marked(text: str) -> str:
    """A message without what it marks as Python's: brackets that end or begin with ``in Python``."""
    begins: list[int] = []
    for place, each in enumerate(text):
        if each == "(":
            begins.append(place)
        elif each == ")" and begins:
            begin = begins.pop()
            inside = text[begin + 1 : place]
            if inside.startswith("in Python ") or inside.endswith(" in Python"):
                return text[:begin] + without_marked(text[place + 1 :])
    return text


def texts(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """The strings of an expression, with a null for each value in them; and these values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, []
    elif isinstance(node, ast.JoinedStr):
        values = [each for each in node.values if isinstance(each, ast.FormattedValue)]
        shown = (each.value if isinstance(each, ast.Constant) else "\x00" for each in node.values)
        yield "".join(map(str, shown)), [ast.unparse(each.value) + "!r" * (each.conversion == 114) for each in values]
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)


def messages(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    """What errors, warnings and notes of a file say, by line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(("Error", "Exit", "warnings.warn", "notes.append")):
                for text, values in (found for each in node.args for found in texts(each)):
                    yield node.lineno, text, values


def test_bounds_of_options_are_declared_and_not_checked_by_hand() -> None:
    """Of commands: ``if not 0 < share <= 1: raise`` is an annotation, which help shows and tests are made of."""
    found = []
    for file in sorted(HOME.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            declared = isinstance(node, ast.FunctionDef) and any(
                ast.unparse(each).startswith(("method(", "command(")) for each in node.decorator_list
            )
            if declared:
                found += [f"{file.name}: {check}" for check in _checked_by_hand(node)]
    assert found == []


def _checked_by_hand(function: ast.FunctionDef) -> list[str]:
    """The conditions of refusals that compare an option with a number."""
    options = {each.arg for each in function.args.kwonlyargs}
    refusals = [each for each in ast.walk(function) if isinstance(each, ast.If) and isinstance(each.body[0], ast.Raise)]
    return [
        ast.unparse(compare)
        for refusal in refusals
        for compare in ast.walk(refusal.test)
        if isinstance(compare, ast.Compare)
        and any(isinstance(each, ast.Name) and each.id in options for each in (compare.left, *compare.comparators))
        and any(
            isinstance(each, ast.Constant) and type(each.value) in (int, float)
            for each in (compare.left, *compare.comparators)
        )
    ]


def test_messages_read_well_on_the_command_line_and_in_python() -> None:
    """Options stand in them by name and value; what is Python's is marked as such: ``(of_stack in Python)``."""
    wrong = []
    for file in sorted(HOME.rglob("*.py")):
        if str(file.relative_to(HOME)).startswith(ELSEWHERE):
            continue
        for line, text, values in messages(file):
            plain = SHELL.sub("", without_marked(text))
            found = [why for pattern, why in PYTHON if pattern.search(plain)]
            found += [f"{{{each}}}" for each in values if each.endswith("!r") or LISTS.match(each)]
            if found:
                wrong.append(f"{file}:{line}: {', '.join(found)}: {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "layers=[77]: give others",
        "take stacks['decoder']",
        "normalize='mean'",
        "call run(x)",
        "give None",
        "r=\x00",
        "a=-1",
    ],
)
def test_the_rule_of_messages_finds_python(text: str) -> None:
    assert any(pattern.search(text) for pattern, _ in PYTHON)
