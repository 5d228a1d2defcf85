"""What the source says of a command without being imported is what its import says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_origin

import pytest

from lamella.registry import Method, all_commands
from lamella.signature import Parameter, entries
from lamella.source import UNKNOWN, Instance

COMMANDS = {f"{slug} {name}".strip(): each for slug, found in all_commands().items() for name, each in found.items()}
HELP = """
import sys
from lamella.cli import app
from lamella.registry import all_commands
from typer.testing import CliRunner

for slug, commands in all_commands().items():
    for name, entry in commands.items():
        before = [] if entry.is_own else ["run"]
        outcome = CliRunner().invoke(app, [*before, *f"{slug} {name}".split(), "--help"])
        assert outcome.exit_code == 0 and "Usage:" in outcome.output, (slug, name, outcome.output)
    outcome = CliRunner().invoke(app, ["methods", slug])
    assert outcome.exit_code == 0, (slug, outcome.output)
heavy = {"torch", "transformers", "diffusers", "timm", "lamella.methods", "lamella.data"} & set(sys.modules)
assert not heavy, heavy
"""


def plain(value: Any) -> Any:
    """A dataclass, or what the source says of one, as a dictionary."""
    if isinstance(value, Instance):
        return {name: plain(getattr(value, name)) for name in value.cls.fields}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value) if each.init}
    return value


def named(kinds: tuple[Any, ...]) -> list[str]:
    return [getattr(kind, "__name__", "") if not getattr(kind, "__args__", ()) else _generic(kind) for kind in kinds]


def _generic(kind: Any) -> str:
    parts = entries(kind) if get_origin(kind) is tuple else kind.__args__
    arguments = [getattr(each, "__name__", str(each)) for each in parts]
    return f"{getattr(kind, '__origin__', kind)}{arguments}"


def telling(parameter: Parameter) -> tuple[Any, ...]:
    return (
        parameter.name,
        parameter.help,
        parameter.spelling,
        parameter.bounds,
        parameter.group,
        parameter.split,
        plain(parameter.default),
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_source_says_what_the_import_says(command: str) -> None:
    entry: Method = COMMANDS[command]
    read, imported = entry.declared, entry.signature
    assert set(read.groups) == set(imported.groups) and read.work == imported.work
    assert named((read.result,)) == named((imported.result,))
    for ours, theirs in ((read.inputs, imported.inputs), (read.options, imported.options)):
        assert list(ours) == list(theirs)
        for name, each in ours.items():
            assert telling(each) == telling(theirs[name])
            if UNKNOWN in each.kinds:  # what only Python can give
                assert Callable in [getattr(kind, "__origin__", None) for kind in theirs[name].kinds] or all(
                    "Sequence" in str(kind) for kind in theirs[name].kinds
                )
                continue
            assert named(each.kinds) == named(theirs[name].kinds)


def test_help_imports_neither_torch_nor_a_method() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
