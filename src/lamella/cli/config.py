"""Runs as files: ``run.yaml`` records the arguments of a command, and ``--config`` repeats them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.errors import MethodError
from lamella.reading import read_text
from lamella.registry import PERMISSIONS, Method

COMMAND, PLANNERS = "command", "planners"


def read_config(file: Path) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        file: the file.

    Raises:
        MethodError: if the file is no mapping of names to values.
    """
    import yaml

    try:
        found = yaml.safe_load(read_text(file))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MethodError(f"{file}: cannot be read as YAML ({reason}): give the run.yaml of a run") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise MethodError(f"{file}: is no mapping of names to values: give the run.yaml of a run")
    return found


def defaults_of(file: Path, entry: Method) -> dict[str, Any]:
    """Return the values of a file in the form of the command line: lists of an option are joined by commas.

    Args:
        file: the file.
        entry: the command.

    Raises:
        MethodError: for a permission, which a file cannot give.
    """
    found = {name: each for name, each in read_config(file).items() if name not in (COMMAND, PLANNERS)}
    options = entry.declared.options
    permission = next((name for name in found if name in PERMISSIONS and found[name]), None)
    if permission is not None:
        raise MethodError(
            f"{file}: {permission} cannot be set by a file: remove it, and type --{permission.replace('_', '-')}"
        )
    return {
        name: ",".join(map(str, each)) if name in options and isinstance(each, list) else each
        for name, each in found.items()
    }


def arguments_of(arguments: list[str]) -> list[str]:
    """Expand a command line that begins with ``--config FILE`` to one of the command that the file names.

    Args:
        arguments: the command line.

    Raises:
        MethodError: if the file names no command.
    """
    if arguments[:1] != ["--config"] or len(arguments) < 2:
        return arguments
    found = read_config(Path(arguments[1]))
    command = found.get(COMMAND)
    options = found.get(PLANNERS) or {}
    if not isinstance(command, str) or any(word.startswith("-") for word in command.split()):
        raise MethodError(f"{arguments[1]}: names no command: give the run.yaml of a run, or name the command")
    if not isinstance(options, dict) or not all(isinstance(each, dict) for each in options.values()):
        raise MethodError(
            f"{arguments[1]}: {PLANNERS} is no mapping of planners to options: give the run.yaml of a run"
        )
    dotted = [part for slug, given in options.items() for name, value in given.items()
              for part in (f"--{slug}.{name.replace('_', '-')}", str(value))]  # fmt: skip
    return [*command.split(), "--config", *arguments[1:], *dotted]
