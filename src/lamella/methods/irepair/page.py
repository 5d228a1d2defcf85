"""The page of ``lamella repair``: which layer was to blame at each step, and what the repair brought and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamella.report import numbers
from lamella.report.page import filled, finite

COLUMNS = 240  # steps that the drawing shows, at most
ROWS = (
    ("habit", "continuations with the habit", numbers.percent),
    ("preferred", "good one likelier than bad one, per token", numbers.percent),
    ("bad", "loss on bad continuations, nats per token", numbers.number),
    ("good", "loss on good continuations, nats per token", numbers.number),
    ("perplexity", "perplexity", numbers.estimate),
    ("kl", "KL from the original, nats", numbers.estimate),
    ("top1", "same top token", numbers.estimate),
)


def render_repair(evidence: dict[str, Any], chosen: Sequence[int], sensitivities: Sequence[Sequence[float]]) -> str:
    """The page ``repair.html``: one file that needs no network.

    Args:
        evidence: as :func:`lamella.methods.irepair.job.repair` returns it.
        chosen: the layer of each step [steps].
        sensitivities: what it was chosen by [steps, layers]; empty where it was not chosen by them.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    evidence = finite(evidence)
    whole = evidence["settings"]["select"] == "all"
    curves = {"train": evidence["curve"], "held": evidence["held_out"]}
    data = {
        "repair": {
            "chosen": None if whole else _chosen(chosen, sensitivities, evidence["model"]["layers"]),
            "profile": evidence["profile"],
            "curves": {name: {"curve": rows, "names": _names(rows)} for name, rows in curves.items() if rows},
        }
    }
    counts = sorted(evidence["measured"]["chosen"].items(), key=lambda item: -item[1])
    return filled(
        "repair.html",
        data,
        evidence=evidence,
        rows=[
            (label, unit(evidence["before"][name]), unit(evidence["after"][name]))
            for name, label, unit in ROWS
            if evidence["after"][name] is not None
        ],
        counts=[(layer, count, count / len(chosen)) for layer, count in counts],
        verdict=_verdict(evidence),
        facts=_facts(evidence),
    )


def _verdict(evidence: dict[str, Any]) -> str:
    before, after, name = evidence["before"], evidence["after"], evidence["model"]["name"]
    words = tuple(numbers.number(part["perplexity"]["mean"]) for part in (before, after))
    if after["habit"] is not None:
        shares = tuple(numbers.percent(part["habit"]) for part in (before, after))
        said = f"{name} shows the habit in {shares[1]} of its continuations, not {shares[0]}"
    else:
        shares = tuple(numbers.percent(part["preferred"]) for part in (before, after))
        said = f"{name} finds the good continuation likelier in {shares[1]} of pairs, not {shares[0]}"
    return f"{said}; perplexity goes from {words[0]} to {words[1]}."


def _names(curve: list[dict[str, float]]) -> list[str]:
    return [name for name in curve[0] if name != "step"]


def _chosen(chosen: Sequence[int], sensitivities: Sequence[Sequence[float]], layers: int) -> dict[str, Any]:
    """Evenly spread steps, with each step's sensitivities as shares of its largest."""
    count = min(COLUMNS, len(chosen))
    steps = [index * len(chosen) // count for index in range(count)]
    values = [sensitivities[step] for step in steps if sensitivities]
    shares = [[value / (max(row) or 1) for value in row] for row in values]
    return {
        "layers": layers,
        "steps": [step + 1 for step in steps],
        "chosen": [chosen[step] for step in steps],
        "shares": finite(shares),
        "values": finite(values),
    }


def _facts(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """How the model was made, for the provenance."""
    settings, pairs = evidence["settings"], evidence["data"]["pairs"]
    names = ("select", "objective", "beta", "gamma", "batch", "clip")
    model = evidence["model"]
    return [
        ("model", f"{model['name']} ({model['family']}, {model['layers']} layers)"),
        ("method", f"{evidence['method']}; " + ", ".join(f"{name} {settings[name]}" for name in names)),
        ("rate", f"{settings['schedule']['high']}, warm-up of {settings['schedule']['warmup']} steps"),
        ("pairs", f"{', '.join(pairs['files'])}: {evidence['counts']['trained']} trained on, "
         f"{evidence['counts']['judged']} kept; sha256 {pairs['sha256']}"),
        ("changed", ", ".join(evidence["sites"]) or "nothing"),
    ]  # fmt: skip
