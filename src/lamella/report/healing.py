"""The page of ``lamella heal``: the loss while training, and fidelity before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.report.figures import Lines
from lamella.report.page import filled, finite

ROWS = (
    ("perplexity", "perplexity"),
    ("kl", "KL from the original, nats"),
    ("top1", "same top token"),
)


def render_healing(evidence: dict[str, Any], selection: dict[str, Any] | None = None) -> str:
    """The page ``heal.html``: one file that needs no network.

    Args:
        evidence: as :func:`lamella.jobs.heal` returns it.
        selection: the report of what chose the samples, where they were chosen.
    """
    evidence = finite(evidence)
    before, after = (evidence[when]["perplexity"]["mean"] for when in ("before", "after"))
    verdict = f"Healing took {evidence['model']} with {evidence['method']} from perplexity {before:.4g} to {after:.4g}."
    figures = {"training": training(evidence["curve"])}
    context = {"evidence": evidence, "rows": ROWS, "verdict": verdict, "selection": finite(selection or {})}
    return filled("heal.html", figures, **context)


def training(curve: Sequence[Mapping[str, float]], title: str = "") -> Lines:
    """The loss of a training and its parts, by step.

    Args:
        curve: the points of the log, each with its step.
        title: of the figure.
    """
    names = [name for name in (curve[0] if curve else {}) if name != "step"]
    series = {name: [point.get(name) for point in curve] for name in names}
    return Lines("step", "loss, nats", series, positions=[point["step"] for point in curve], title=title)
