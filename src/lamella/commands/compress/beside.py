"""Comparison with quantisation, for the page, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lamella import formatting
from lamella.report.figures import Points, Scatter

COLUMNS = ("model", "weights", "decode speed-up", "KL, nats", "perplexity", "same top token")


def rows(evidence: dict[str, Any]) -> list[list[str]]:
    """Return a row for each model, unquantised and quantised; empty for older evidence.

    Args:
        evidence: the evidence of the compression.
    """
    return [
        [
            each["name"],
            formatting.size(each["bytes"]),
            _speed(each["decode_speedup"]),
            formatting.estimate(each["fidelity"]["kl"]),
            formatting.estimate(each["fidelity"]["perplexity"]),
            formatting.percent(each["fidelity"]["top1"]["mean"]),
        ]
        for each in evidence.get("variants", ())
    ]


def notes(evidence: dict[str, Any]) -> list[str]:
    """Describe what was run for each form.

    Args:
        evidence: the evidence of the compression.
    """
    runs = {each["form"]: each["run"] for each in evidence.get("variants", ()) if each["form"]}
    return [f"{form}: {run}." for form, run in runs.items()]


def figure(evidence: dict[str, Any]) -> Scatter:
    """Plot fidelity against speed, with areas proportional to weights, for models whose speed was measured.

    Args:
        evidence: the evidence of the compression.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in evidence.get("variants", ()):
        if each["decode_speedup"]:
            groups.setdefault("quantised" if each["form"] else "not quantised", []).append(each)
    return Scatter(
        "decode speed-up over the original",
        "KL from the original, nats",
        {name: _points(models) for name, models in groups.items()},
        suffix="\u00d7",
    )


def _points(models: list[dict[str, Any]]) -> Points:
    kl = [each["fidelity"]["kl"] for each in models]
    speeds = [each["decode_speedup"] for each in models]
    return Points(
        [(speed["median"], each["mean"]) for speed, each in zip(speeds, kl, strict=True)],
        x_range=[(speed["low"], speed["high"]) for speed in speeds],
        y_range=[(each["mean"] - (each["error"] or 0.0), each["mean"] + (each["error"] or 0.0)) for each in kl],
        sizes=[each["bytes"] for each in models],
        labels=[each["name"] for each in models],
        hover=[
            f"{each['name']}\n{_speed(each['decode_speedup'])}, KL {formatting.estimate(each['fidelity']['kl'])}\n"
            f"weights: {formatting.size(each['bytes'])}"
            for each in models
        ],
    )


def _speed(speed: dict[str, float] | None) -> str:
    return formatting.MISSING if speed is None else f"{formatting.ratio(speed['median'])} ({formatting.spread(speed)})"
