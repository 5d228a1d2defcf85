"""Quantisation beside cutting, for the page, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lamella import formatting
from lamella.report.figures import Points, Scatter

COLUMNS = ("model", "weights", "decode speed-up", "KL, nats", "perplexity", "same top token")


def rows(evidence: dict[str, Any]) -> list[list[str]]:
    """A row for each model, as it is and quantised; nothing in evidence that is older than that."""
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
    """What ran in the place of each form."""
    said = {each["form"]: each["run"] for each in evidence.get("variants", ()) if each["form"]}
    return [f"{form}: {run}." for form, run in said.items()]


def figure(evidence: dict[str, Any]) -> Scatter:
    """Fidelity against speed, as large as the weights; of those models whose speed was measured."""
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
