"""Scores of a model on tasks, each with its standard error, its version and its number of questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import tensor

from lamella.errors import LamellaError, TaskError
from lamella.evaluate.fidelity import Estimate
from lamella.evaluate.tasks.opening import check_installed, open_tasks

DRAWS = 1000  # of the bootstrap, for metrics whose standard error has no formula


@dataclass(frozen=True)
class TaskScore:
    """The score of a model on a task.

    Attributes:
        task, metric: of the harness; if a metric is extracted from answers in several ways, its name includes the way.
        value: with its standard error over questions.
        questions: number of questions.
        version: of the task; scores of different versions are not comparable.
        shots: worked examples before each question.
        chat: whether the chat template was applied to the questions.
        each: the score of every question, in order, if ``value`` is their mean; else empty.
    """

    task: str
    metric: str
    value: Estimate
    questions: int
    version: str
    shots: int = 0
    chat: bool = False
    each: tuple[float, ...] = field(default=(), repr=False)

    def since(self, other: TaskScore) -> Estimate | None:
        """Return the difference to another score on the same questions, with its standard error.

        Both models face the same questions, so the paired difference is far more precise than the two scores. None if
        the score is not a mean over questions.
        """
        same = (self.task, self.metric, self.version, len(self.each))
        if not self.each or same != (other.task, other.metric, other.version, len(other.each)):
            return None
        return Estimate.of(tensor(self.each).double() - tensor(other.each).double())

    def as_dict(self) -> dict[str, Any]:
        """Return the score as JSON values."""
        return {
            "task": self.task,
            "metric": self.metric,
            "mean": self.value.mean,
            "error": self.value.error,
            "questions": self.questions,
            "version": self.version,
            "shots": self.shots,
            "chat": self.chat,
        }


def score(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    limit: int | None = None,
    seed: int = 0,
    *,
    chat: bool = False,
    batch: int = 16,
    trusted: bool = False,
    run_generated_code: bool = False,
    writer: Any = None,
) -> list[TaskScore]:
    """Score a model on tasks.

    A plan that treats prompt and generated tokens differently is scored as in generation: the question is prompt, and
    every answer, chosen or written, is generated.

    Args:
        model: a model, or a view with a plan; it continues text.
        tokenizer: the model's tokenizer.
        names: ``definitions``, ``gsm8k`` and ``humaneval``, which need no network; names of lm-eval's tasks, whose data
            it downloads; and task files (``.yaml``).
        limit: number of questions of each task; all by default.
        seed: of the choice of worked examples, and of sampled answers.
        chat: apply the chat template to the questions.
        batch: rows that run together.
        trusted: task files may name Python functions, files elsewhere and data of the hub.
        run_generated_code: run generated code in a restricted process, for programming tasks.
        writer: generates the answers in place of the model, such as :class:`~lamella.runtime.Drafted`.

    Returns:
        One score for each metric of each task, in the order of the names.

    Raises:
        TaskError: for a task that is unknown, damaged, or needs a permission that was not given.
        LamellaError: if lm-eval is missing.
    """
    check_installed()
    from lamella.evaluate.tasks.harness import run_harness
    from lamella.evaluate.tasks.language_model import PlannedLM

    if limit is not None and limit < 1:
        raise TaskError(f"a limit of {limit} questions leaves nothing to score: give 1 or more, or omit it")
    tasks = open_tasks(names, trusted=trusted, run_generated_code=run_generated_code)
    language_model = PlannedLM(model, tokenizer, batch, writer)
    found = run_harness(language_model, tasks, limit=limit, seed=seed, chat=chat, draws=DRAWS)
    return [each for task in tasks for each in _scores(task, found, chat)]


def _scores(task: str, found: dict[str, Any], chat: bool) -> list[TaskScore]:
    """Return the scores of one task from the harness's results, whose keys are ``metric,filter``."""
    results, samples = found["results"][task], found["samples"].get(task, [])
    filters = {key.partition(",")[2] for key in results if "," in key}
    scores = []
    for key, value in results.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        each = [row[metric] for row in samples if row["filter"] == way and metric in row]
        numbers = tuple(float(one) for one in each if isinstance(one, bool | int | float))
        is_mean = bool(numbers) and len(numbers) == len(each) and math.isclose(sum(numbers) / len(numbers), value)
        error = results.get(f"{metric}_stderr,{way}")
        if not math.isfinite(value):
            raise LamellaError(f"{task}: {metric} is {value}: the model's logits are not finite, try float32")
        scores.append(
            TaskScore(
                task=task,
                metric=metric if len(filters) == 1 else f"{metric} ({way})",
                value=Estimate(float(value), error if isinstance(error, float) else math.nan),
                questions=found["n-samples"][task]["effective"],
                version=str(found["versions"].get(task, "")),
                shots=int(found["n-shot"].get(task) or 0),
                chat=chat,
                each=numbers if is_mean else (),
            )
        )
    return scores
