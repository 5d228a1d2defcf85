"""Report parts for healing: the loss curve, corrections in closed form, and the rows of a table of fidelities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.report.figures import Lines
from lamella.result import Table

ROWS = (
    ("perplexity", "perplexity"),
    ("kl", "KL from the original, nats"),
    ("top1", "same top token"),
)


def training(curve: Sequence[Mapping[str, float]], title: str = "") -> Lines:
    """Return the figure of the training loss and its parts, by step.

    Args:
        curve: the points of the log, each with its step.
        title: of the figure.
    """
    names = [name for name in (curve[0] if curve else {}) if name != "step"]
    series = {name: [point.get(name) for point in curve] for name in names}
    return Lines("step", "loss, nats", series, positions=[float(point["step"]) for point in curve], title=title)


def corrections(gaps: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of corrections in closed form.

    Args:
        gaps: for each gap its ``site`` and ``ridge``, and the error ``before`` and ``after``; see
            :func:`lamella.train.refit`.
    """
    rows = [
        [gap["site"], "none: unchanged" if gap["ridge"] is None else gap["ridge"], gap["before"], gap["after"]]
        for gap in gaps
    ]
    title = "Squared relative error of the residual stream behind each gap, on held-out text"
    return Table(title, ["corrected", "ridge", "before", "after"], rows)
