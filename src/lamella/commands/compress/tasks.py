"""Tables of task scores, for the page, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lamella import formatting


def columns(evidence: dict[str, Any]) -> list[str]:
    """Return the headers: the task, and the models.

    Args:
        evidence: the evidence of the compression.
    """
    return ["task", *evidence["tasks"][0]["scores"]]


def rows(evidence: dict[str, Any]) -> list[list[str]]:
    """Return a row for each metric of each task, ± one standard error over questions; empty without tasks.

    Args:
        evidence: the evidence of the compression.
    """
    return [
        [
            f"{each['task']}, {each['metric']} ({each['questions']} questions)",
            *(formatting.estimate(score) for score in each["scores"].values()),
        ]
        for each in evidence.get("tasks", ())
    ]
