"""Scores on tasks, for the page, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lamella import formatting


def columns(evidence: dict[str, Any]) -> list[str]:
    return ["task", *evidence["tasks"][0]["scores"]]


def rows(evidence: dict[str, Any]) -> list[list[str]]:
    """A row for each metric of each task, ± one standard error over questions; nothing where none was asked for."""
    return [
        [
            f"{each['task']}, {each['metric']} ({each['questions']} questions)",
            *(formatting.estimate(score) for score in each["scores"].values()),
        ]
        for each in evidence.get("tasks", ())
    ]
