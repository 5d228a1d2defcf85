"""Tasks by name: Lamella's own, custom task files, and lm-eval's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella.errors import DownloadError, TaskError
from lamella.extras import require

OWN = {  # descriptions by name, for help and documentation
    "definitions": "which of four everyday words a definition describes",
    "gsm8k": "school mathematics in words, after eight worked examples",
    "humaneval": "Python functions to be completed from their docstrings, and run",
}
FILES = (".yaml", ".yml")


def check_installed() -> None:
    """Check that tasks can be scored, before any long computation.

    Raises:
        LamellaError: if lm-eval is missing.
    """
    require("lm_eval", "eval", "scoring on tasks")


def open_tasks(names: Sequence[str], *, trusted: bool = False, run_generated_code: bool = False) -> dict[str, Any]:
    """Return the tasks of some names, ready to be evaluated once each.

    Args:
        names: names of tasks, or task files.
        trusted: task files may name Python functions, files elsewhere and data of the hub.
        run_generated_code: allow tasks that run generated code in a restricted process.

    Raises:
        TaskError: for a task that is unknown, damaged, or needs a permission that was not given.
        DownloadError: if the data of a task must be downloaded and cannot be.
        LamellaError: if lm-eval is missing.
    """
    check_installed()
    from lamella.evaluate.tasks.harness import confined

    if not names:
        raise TaskError(f"no task is named: give some of {', '.join(OWN)}, or a task file")
    tasks: dict[str, Any] = {}
    with confined():
        for name in names:
            tasks |= _open(name, trusted, run_generated_code)
    return tasks


def _open(name: str, trusted: bool, run_generated_code: bool) -> dict[str, Any]:
    from lamella.evaluate.tasks import own
    from lamella.evaluate.tasks.files import read_task

    if name == "definitions":
        return {name: own.definitions()}
    if name == "gsm8k":
        return {name: own.gsm8k()}
    if name == "humaneval":
        if not run_generated_code:
            raise TaskError(
                "humaneval runs code that the model generates: allow it with --run-generated-code "
                "(run_generated_code=True in Python), which uses a restricted process"
            )
        return {name: own.humaneval()}
    if name.endswith(FILES):
        return read_task(Path(name).expanduser(), trusted)
    return _known(name)


def _known(name: str) -> dict[str, Any]:
    """Return one of lm-eval's own tasks, whose code is installed with it and whose data come from the hub."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*OWN, *manager.all_tasks], n=1)
        hint = f"did you mean {near[0]}?" if near else "a task file ends in .yaml"
        raise TaskError(f"no task '{name}': there are {', '.join(OWN)} and those of lm-eval; {hint}")
    try:
        found = manager.load_task_or_group([name])
    except Exception as error:  # the hub client raises many kinds, from many libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(
            f"cannot load lm-eval's task '{name}' ({reason[:200]}); {', '.join(OWN)} need no network"
        ) from error
    tasks = _flat(found)
    for each, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(
                f"{each} of lm-eval runs generated code in this process: the only such task here is humaneval"
            )
    return tasks


def _flat(found: dict[Any, Any]) -> dict[str, Any]:
    """Return the tasks of a tree of groups."""
    tasks: dict[str, Any] = {}
    for name, value in found.items():
        tasks |= _flat(value) if isinstance(value, dict) else {str(name): value}
    return tasks
