"""Report parts for training: the loss curve, and the rows of a table of fidelities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lamella.report.figures import Lines

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
