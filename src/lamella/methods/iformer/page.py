"""Figures and summary: spectra by depth, the allocation of heads, and the quality of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, percent, share
from lamella.report.figures import Figure, Heatmap, Lines, Scatter
from lamella.results import Evidence, Summary, Table

SHOWN = 8  # layers in one figure of spectra


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the allocation of heads, spectra by depth, and the training loss, as far as they are available."""
    found = evidence.findings
    drawn: list[Figure] = []
    if "cost" in found:
        drawn.append(allocation(found["layers"], found["heads"]))
    if "spectra" in found:
        drawn += [by_depth(found["spectra"]), shares(found["spectra"])]
    losses = {"training": found.get("loss") or []}
    return [*drawn, Lines("log entry", "loss", losses, caption="Training loss.")]


def by_depth(spectra: Sequence[Mapping[str, Any]]) -> Scatter:
    """Plot the spectra of mixers, of a subset of layers if there are many."""
    step = -(-len(spectra) // SHOWN)
    lines = {
        f"layer {each['layer']}": list(zip(each["mixer"]["frequencies"], each["mixer"]["delta"], strict=True))
        for each in spectra[::step]
    }
    caption = (
        "Output of each layer's mixer: amplitude over frequency, relative to that of the mean. A frequency of 3.14 is "
        "a change of sign from each position to the next."
    )
    return Scatter("frequency, radians per position", "relative log amplitude", lines, joined=True, caption=caption)


def shares(spectra: Sequence[Mapping[str, Any]]) -> Scatter:
    """Plot the fraction of high frequencies by layer, of mixers and of their branches; for heads, their mean."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in spectra:
        heads = [part["high"] for name, part in each.items() if name.startswith("head ")]
        parts = {name: part["high"] for name, part in each.items() if name != "layer" and not name.startswith("head ")}
        parts |= {"heads, mean": sum(heads) / len(heads)} if heads else {}
        for name, value in parts.items():
            lines.setdefault(name, []).append((each["layer"], value))
    caption = "Fraction of the energy beyond pi / 2, by layer and part."
    return Scatter("layer", "fraction of energy beyond pi / 2", lines, joined=True, caption=caption)


def allocation(layers: Sequence[Mapping[str, Any]], heads: int) -> Heatmap:
    """Plot which heads remain in each layer, with their importance if it was measured.

    Args:
        layers: findings of each layer: ``kept``, ``conv``, ``pool``, and ``worth`` if measured.
        heads: number of heads of a layer before the change.
    """

    def name(index: int, layer: Mapping[str, Any]) -> str:
        return f"layer {index}" + (f": {layer['conv']} conv, {layer['pool']} pool" if layer["conv"] else "")

    return Heatmap(
        "head",
        "",
        [[int(head in layer["kept"]) for head in range(heads)] for layer in layers],
        "head",
        rows=[name(index, layer) for index, layer in enumerate(layers)],
        categories=("replaced", "kept"),
        labels=[[f"{worth:.2g}" for worth in layer.get("worth", [])] for layer in layers]
        if all("worth" in layer for layer in layers)
        else (),
        title="Heads by layer",
        caption="One row per layer, the first at the top. Numbers: importance of the head, in nats.",
    )


def summary(evidence: Evidence) -> Summary:
    """Summarise the result of any command of the method."""
    found = evidence.findings
    if "accuracy" in found:
        verdict = (
            f"An iFormer of {counted(found['parameters'], 'parameter')} has an accuracy of "
            f"{percent(found['accuracy'])} on held-out images."
        )
        return Summary(verdict)
    if "cost" not in found:
        return _of_spectra(found)
    kept = sum(len(each["kept"]) for each in found["layers"])
    whole = found["heads"] * len(found["layers"])
    judged = found["judged"]
    healed = " after healing" if "before" in found else ""
    verdict = (
        f"{kept} of {counted(whole, 'head')} remain; with the others replaced, the network agrees with the original on "
        f"{percent(judged['agreement'])} of {counted(judged['images'], 'image')}{healed}."
    )
    names = {"kl": "KL divergence, nats", "agreement": "agreement of the class", "accuracy_before": "original accuracy",
             "accuracy": "accuracy"}  # fmt: skip
    stages = [found[stage] for stage in ("before", "judged") if stage in found]
    rows = [[label, *(stage[name] for stage in stages)] for name, label in names.items() if name in judged]
    columns = ["", "fitted", "healed"] if healed else ["", "fitted"]
    costs = [
        [label, found["cost"][name]["before"], found["cost"][name]["after"],
         share(found["cost"][name]["after"], found["cost"][name]["before"])]
        for name, label in (("flops", "multiply-adds per image"), ("parameters", "parameters"))
    ]  # fmt: skip
    tables = [
        Table("On held-out images", columns, rows),
        Table("Cost of attention", ["", "before", "after", "fraction"], costs),
        _of_layers(found["layers"]),
    ]
    lines = [] if healed else ["Fitted but not healed: `lamella run iformer heal` re-trains it."]
    return Summary(verdict, tables, lines)


def _of_layers(layers: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            index,
            ", ".join(map(str, each["kept"])) if "kept" in each else "",
            each.get("conv", ""),
            each.get("pool", ""),
            ", ".join(f"{worth:.2g}" for worth in each.get("worth", ())),
            ", ".join(f"{value:.2f}" for value in each.get("explained", ())),
            ", ".join(f"{value:.1f}" for value in each.get("distance", ())),
        ]
        for index, each in enumerate(layers)
    ]
    columns = [
        "layer",
        "remaining heads",
        "conv",
        "pool",
        "importance, nats",
        "R^2 of a convolution",
        "distance, tokens",
    ]
    return Table("Layers, and their heads in order", columns, rows)


def _of_spectra(found: Mapping[str, Any]) -> Summary:
    rows = [
        [each["layer"], name, part["delta"][-1], part["high"]]
        for each in found["spectra"]
        for name, part in each.items()
        if name != "layer"
    ]
    first, last = (found["spectra"][index]["mixer"]["high"] for index in (0, -1))
    shares = percent(first), percent(last)
    verdict = f"Energy beyond pi / 2: {shares[0]} of the first layer's output, {shares[1]} of the last layer's."
    tables = [Table("Spectra", ["layer", "part", "log amplitude at pi", "energy beyond pi / 2"], rows)]
    return Summary(verdict, [*tables, *([_of_layers(found["layers"])] if "layers" in found else [])])
