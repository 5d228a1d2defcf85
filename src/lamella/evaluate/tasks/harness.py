"""lm-evaluation-harness without output, and with sandboxed templates that reach only their document.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import jinja2
import lm_eval
from datasets import Dataset
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import evaluator, utils
from lm_eval.api import task as task_module
from lm_eval.api.task import ConfigurableTask

from lamella.errors import LamellaError, TaskError


class CustomTask(ConfigurableTask):
    """A task of the harness with given documents, which the harness would otherwise load.

    Args:
        config: the values of a task file.
        documents: by the name of the split, rows of plain values.
    """

    def __init__(self, config: dict[str, Any], documents: Mapping[str, list[dict[str, Any]]]) -> None:
        self.documents = documents
        super().__init__(config=config)

    def download(self, *_: Any, **__: Any) -> None:
        """Make a dataset of the given documents."""
        self.dataset = {split: Dataset.from_list(rows) for split, rows in self.documents.items()}


@contextmanager
def confined() -> Iterator[None]:
    """Let the harness render templates in jinja's sandbox, without output.

    In its own environment, a template can reach Python's internals from any value, and so run anything.
    """
    original = getattr(utils, "env", None)
    if not isinstance(original, jinja2.Environment):
        raise LamellaError(
            f"lm-eval {lm_eval.__version__} renders templates in a way that Lamella does not support: pip install "
            "'lamella[eval]' installs a supported version"
        )
    sandbox = SandboxedEnvironment(undefined=original.undefined, keep_trailing_newline=original.keep_trailing_newline)
    sandbox.filters |= original.filters
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with patch.object(utils, "env", sandbox), patch.object(task_module, "tqdm", _silent(task_module.tqdm)):
            yield
    finally:
        logger.setLevel(level)


def _silent(bar: Any) -> Any:
    return partial(_without_disable, bar)


def _without_disable(bar: Any, *items: Any, disable: bool = False, **options: Any) -> Any:
    return bar(*items, disable=True, **options)


@contextmanager
def task_errors(name: str) -> Iterator[None]:
    """Turn any error of the harness on an invalid task into a one-line message."""
    try:
        yield
    except LamellaError:
        raise
    except Exception as error:  # of many kinds, from many libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"task {name}: lm-eval cannot use it ({type(error).__name__}: {reason[:300]})") from error


def run_harness(
    model: Any, tasks: Mapping[str, Any], *, limit: int | None, seed: int, chat: bool, draws: int
) -> dict[str, Any]:
    """Return the results of a model on tasks, as the harness reports them.

    Args:
        model: an ``lm_eval`` model.
        tasks: opened ones by name.
        limit: number of questions of each task; None: all.
        seed: of the choice of worked examples.
        chat: apply the chat template to the questions.
        draws: number of bootstrap resamples.
    """
    for task in tasks.values():
        task.set_fewshot_seed(seed=seed)
    with confined(), task_errors(", ".join(tasks)):
        found: dict[str, Any] = evaluator.evaluate(
            lm=model,
            task_dict=dict(tasks),
            limit=limit,
            bootstrap_iters=draws,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    return found
