"""Quantisation beside cutting, for the page, the card and the terminal."""

from __future__ import annotations

from typing import Any

from lamella import formatting

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


def points(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page draws: fidelity against speed, as large as the weights; those whose speed was measured."""
    return [
        {
            "name": each["name"],
            "speed": each["decode_speedup"],
            "kl": each["fidelity"]["kl"],
            "bytes": each["bytes"],
            "size": formatting.size(each["bytes"]),
            "quantised": each["form"] is not None,
        }
        for each in evidence.get("variants", ())
        if each["decode_speedup"]
    ]


def _speed(speed: dict[str, float] | None) -> str:
    return formatting.MISSING if speed is None else f"{formatting.ratio(speed['median'])} ({formatting.spread(speed)})"
