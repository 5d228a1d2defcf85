"""The page of ``lamella heal``: the loss while training, and fidelity before and after."""

from __future__ import annotations

from typing import Any

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
    data = {"training": training(evidence["curve"])}
    before, after = (evidence[when]["perplexity"]["mean"] for when in ("before", "after"))
    verdict = f"Healing took {evidence['model']} with {evidence['method']} from perplexity {before:.4g} to {after:.4g}."
    return filled("heal.html", data, evidence=evidence, rows=ROWS, verdict=verdict, selection=finite(selection or {}))


def training(curve: list[dict[str, float]]) -> dict[str, Any]:
    """What the page's drawing of a training curve is given."""
    return {"curve": curve, "names": [name for name in curve[0] if name != "step"] if curve else []}
