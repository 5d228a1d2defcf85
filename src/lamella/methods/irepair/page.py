"""The report of a repair: which layer was trained at each step, and the effect and side effects of the repair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella import formatting
from lamella.report.figures import Bars, Figure, Heatmap, Scatter
from lamella.report.healing import training
from lamella.report.page import finite, render_page
from lamella.results import Evidence, Summary, Table

COLUMNS = 240  # maximum number of steps in the plot
ROWS = (
    ("habit", "continuations with the habit", formatting.percent),
    ("preferred", "good one more likely than bad one, per token", formatting.percent),
    ("bad", "loss on bad continuations, nats per token", formatting.number),
    ("good", "loss on good continuations, nats per token", formatting.number),
    ("perplexity", "perplexity", formatting.estimate),
    ("kl", "KL from the original, nats", formatting.estimate),
    ("top1", "same top token", formatting.estimate),
)


def page(evidence: Evidence) -> str:
    """Render the report: one file that needs no network.

    Raises:
        LamellaError: when plotly or jinja2 is missing.
    """
    record = finite(evidence.model_dump(by_alias=True))
    found, trace = record["findings"], record["findings"]["trace"]
    whole = found["settings"]["select"] == "all"
    curves = {"train": ("in training", found["curve"]), "held": ("on held-out pairs", found["held_out"])}
    figures: dict[str, Figure] = {name: training(rows, title) for name, (title, rows) in curves.items()}
    figures["profile"] = Bars(
        "layer", "gradient norm", {f"{name} text": each for name, each in found["profile"].items()}
    )
    by_sensitivity = bool(trace["sensitivities"])
    if not whole:
        figures["layers"] = _chosen(trace["chosen"], trace["sensitivities"], record["model"]["layers"])
    counts = sorted(found["measured"]["chosen"].items(), key=lambda item: -item[1])
    return render_page(
        Path(__file__).with_name("page.html"),
        figures,
        by_sensitivity=by_sensitivity,
        evidence=record,
        found=found,
        rows=_rows(record),
        counts=[(layer, count, count / len(trace["chosen"])) for layer, count in counts],
        verdict=_verdict(record),
    )


def summary(evidence: Evidence) -> Summary:
    """Summarise the habit on test pairs, and the side effects of the repair."""
    record = finite(evidence.model_dump(by_alias=True))
    found = record["findings"]
    count = found["counts"]["judged"]
    pairs = formatting.counted(count, "pair")
    title = f"{record['model']['name']} with {found['variant']}, on {pairs} not used in training"
    text = record["data"].get("test", {}).get("data", "no text")
    rows = [[f"{label} on {text}" if label == "perplexity" else label, *both] for label, *both in _rows(record)]
    changed = formatting.listed(record["sites"])
    line = f"changed: {changed} ({formatting.percent(found['share'])} of all parameters)"
    return Summary(_verdict(record), [Table(title, ["", "before", "after"], rows)], [line])


def _rows(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Metrics of both versions: on the pairs, and on other text."""
    found = record["findings"]
    before, after = (found[when] | _fidelity(record, when) for when in ("before", "after"))
    return [
        (label, "" if before.get(name) is None else unit(before[name]), unit(after[name]))
        for name, label, unit in ROWS
        if after.get(name) is not None
    ]


def _fidelity(record: dict[str, Any], when: str) -> dict[str, Any]:
    measured = record["fidelity"] or {}
    if when == "after" or not measured:
        return measured
    return {"perplexity": measured["base_perplexity"]}


def _verdict(record: dict[str, Any]) -> str:
    found, name = record["findings"], record["model"]["name"]
    before, after = found["before"], found["after"]
    if after["habit"] is not None:
        shares = tuple(formatting.percent(part["habit"]) for part in (before, after))
        verdict = f"{name} shows the habit in {shares[1]} of its continuations"
    else:
        shares = tuple(formatting.percent(part["preferred"]) for part in (before, after))
        verdict = f"{name} prefers the good continuation in {shares[1]} of pairs"
    verdict += ", as before" if shares[0] == shares[1] else f", previously {shares[0]}"
    measured = record["fidelity"]
    if not measured:
        return f"{verdict}."
    words = tuple(formatting.number(measured[which]["mean"]) for which in ("base_perplexity", "perplexity"))
    return f"{verdict}; perplexity goes from {words[0]} to {words[1]}."


def _chosen(chosen: Sequence[int], sensitivities: Sequence[Sequence[float]], layers: int) -> Figure:
    """Plot the trained layer of evenly spaced steps over each step's sensitivities, relative to its largest."""
    count = min(COLUMNS, len(chosen))
    steps = [index * len(chosen) // count for index in range(count)]
    if not sensitivities:
        at = [(step + 1.0, float(chosen[step])) for step in steps]
        return Scatter("step", "layer", {"trained": at})
    values = [[sensitivities[step][layer] for step in steps] for layer in range(layers)]
    most = [max(sensitivities[step]) or 1.0 for step in steps]
    return Heatmap(
        "step",
        "layer",
        [[value / largest for value, largest in zip(row, most, strict=True)] for row in values],
        "fraction of the largest",
        columns=[step + 1 for step in steps],
        upwards=True,
        least=0.0,
        most=1.0,
        hover=[
            [f"step {step + 1}, layer {layer}: {formatting.number(value)}"
             for step, value in zip(steps, row, strict=True)]
            for layer, row in enumerate(values)
        ],
        path=[(column, chosen[step]) for column, step in enumerate(steps)],
    )  # fmt: skip
