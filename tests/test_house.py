"""The rules of the house: one slug, one file or folder; methods know nothing of each other, engines of none."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamella
from lamella.registry import methods

HOME = Path(lamella.__file__).parent
METHODS = {slug: each for slug, each in methods().items() if each.module.startswith("lamella.")}
OVER = {"cli", "jobs"}  # who may know methods


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
