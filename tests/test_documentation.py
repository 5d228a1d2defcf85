"""What the pages import is there, and what they type is a command with such options."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer

import lamella
from lamella.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("[!_]*.md"))]
BLOCK = re.compile(r"```(\w+)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(lamella [a-z][^`]*)`")
EXAMPLES = {"SLUG", "my-method", "most-alike"}  # names of methods that are not there


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(text) for language, text in found if language in languages]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_imports_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lamella":
                module = importlib.import_module(node.module)  # type: ignore[arg-type]
                for each in node.names:
                    assert hasattr(module, each.name), f"{node.module} has no {each.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lamella":
                assert hasattr(lamella, node.attr), f"lamella has no {node.attr}"


def typed(page: Path) -> list[list[str]]:
    """The arguments of each call of the program, in blocks and within sentences."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    inline = (shlex.split(re.sub(r"\s+", " ", each))[1:] for each in INLINE.findall(prose))
    found = [arguments for arguments in inline if not EXAMPLES & set(arguments)]
    for block in blocks(page, "console", "sh", "bash", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").split(" #")[0].strip()
            if command.startswith("lamella "):
                found.append(shlex.split(command)[1:])
    return found


def test_every_command_is_described_without_arguments() -> None:
    """The reference of the command line asks for the commands alone, and is given none of their arguments."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("lamella", ["--help"], resilient_parsing=True)
    described = {name: group.get_command(context, name) for name in group.list_commands(context)}
    assert "--speedup" in {option for each in described["compress"].params for option in each.opts}


@pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=name_of)
def test_what_a_page_types_is_a_command_with_these_options(page: Path) -> None:
    for arguments in typed(page):
        group: Any = typer.main.get_command(app)
        rest = list(arguments)
        while hasattr(group, "resolve_command") and rest and not rest[0].startswith("-"):
            context = group.make_context("lamella", ["--help"], resilient_parsing=True)
            _, group, rest = group.resolve_command(context, rest)
        known = {option for each in group.params for option in each.opts} | {"--help", "--threads"}
        used = {each.split("=")[0] for each in rest if re.match(r"--?[a-z]", each)}
        assert used <= known, f"lamella {' '.join(arguments)}: no {used - known}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "assets").glob("*.svg")), ids=lambda path: path.stem)
def test_a_figure_is_a_complete_file(path: Path) -> None:
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
