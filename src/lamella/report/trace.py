"""The page of ``lamella trace``: every token of one answer, and the layers that it ran."""

from __future__ import annotations

from typing import Any

from lamella.report.page import filled, finite

STATES = ("nothing ran", "attention ran", "MLP ran", "both ran")
ACTIVITY = ("void", "attention", "MLP", "active")  # of L2 Adaptive Computation, which judges whole layers
NAMES = {"first": "the first token", "prompt": "the prompt", "answer": "the answer"}


def render_trace(report: dict[str, Any]) -> str:
    """The page ``trace.html``: one file that needs no network.

    Args:
        report: as :func:`lamella.jobs.trace.trace` returns it.
    """
    report = finite(report)
    states = [
        [int(a) + 2 * int(m) for a, m in zip(attn, mlp, strict=True)]
        for attn, mlp in zip(report["attn"], report["mlp"], strict=True)
    ]
    names = ACTIVITY if _measures(report) else STATES
    data = {"trace": {"tokens": report["tokens"], "states": states, "names": names, "notes": report["notes"]}}
    return filled("trace.html", data, report=report, names=NAMES, verdict=_verdict(report))


def _measures(report: dict[str, Any]) -> bool:
    return bool(report["policy"] == "l2 adaptive computation")


def _verdict(report: dict[str, Any]) -> str:
    (phase, share), *others = report["usage"].items()
    were = "were active" if _measures(report) else "ran"
    rest = "".join(f", {100 * other:.0f} % on {NAMES[name]}" for name, other in others)
    return f"{100 * share:.0f} % of {report['model']['name']}'s layers {were} on {NAMES[phase]}{rest}."
