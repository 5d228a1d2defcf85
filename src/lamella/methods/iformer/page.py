"""From evidence to figures: spectra by depth, where the heads went, and what became of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, percent, share
from lamella.report.figures import Figure, Heatmap, Lines, Scatter
from lamella.results import Evidence, Summary, Table

SHOWN = 8  # layers in one figure of spectra


def figures(evidence: Evidence) -> list[Figure]:
    """Where heads stay, spectra by depth, and the loss of a training: whatever was found."""
    found = evidence.findings
    drawn: list[Figure] = []
    if "cost" in found:
        drawn.append(allocation(found["layers"], found["heads"]))
    if "spectra" in found:
        drawn += [by_depth(found["spectra"]), shares(found["spectra"])]
    losses = {"training": found.get("loss") or []}
    return [*drawn, Lines("point of the log", "loss", losses, caption="The loss of the training.")]


def by_depth(spectra: Sequence[Mapping[str, Any]]) -> Scatter:
    """The spectra of mixers, those of some layers where there are many."""
    step = -(-len(spectra) // SHOWN)
    lines = {
        f"layer {each['layer']}": list(zip(each["mixer"]["frequencies"], each["mixer"]["delta"], strict=True))
        for each in spectra[::step]
    }
    caption = (
        "What each layer's mixer adds: amplitude over frequency, relative to that of the mean. A frequency of 3.14 is "
        "a change of sign from each position to the next."
    )
    return Scatter("frequency, radians per position", "relative log amplitude", lines, joined=True, caption=caption)


def shares(spectra: Sequence[Mapping[str, Any]]) -> Scatter:
    """The share of high frequencies by layer, of mixers and of their branches; of heads, their mean."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in spectra:
        heads = [part["high"] for name, part in each.items() if name.startswith("head ")]
        parts = {name: part["high"] for name, part in each.items() if name != "layer" and not name.startswith("head ")}
        parts |= {"heads, mean": sum(heads) / len(heads)} if heads else {}
        for name, value in parts.items():
            lines.setdefault(name, []).append((each["layer"], value))
    caption = "The share of the energy beyond pi / 2, by layer, of each part."
    return Scatter("layer", "share of energy beyond pi / 2", lines, joined=True, caption=caption)


def allocation(layers: Sequence[Mapping[str, Any]], heads: int) -> Heatmap:
    """Where heads stay, and what each was worth where that was measured."""

    def name(place: int, layer: Mapping[str, Any]) -> str:
        return f"layer {place}" + (f": {layer['conv']} conv, {layer['pool']} pool" if layer["conv"] else "")

    return Heatmap(
        "head",
        "",
        [[int(head in layer["kept"]) for head in range(heads)] for layer in layers],
        "head",
        rows=[name(place, layer) for place, layer in enumerate(layers)],
        categories=("became local", "stays"),
        labels=[[f"{worth:.2g}" for worth in layer.get("worth", [])] for layer in layers]
        if all("worth" in layer for layer in layers)
        else (),
        title="Heads by layer",
        caption="A row is a layer, the first on top. The number on a head is what it was worth, in nats.",
    )


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for any command of the method."""
    found = evidence.findings
    if "accuracy" in found:
        verdict = (
            f"An iFormer of {counted(found['parameters'], 'parameter')} names {percent(found['accuracy'])} of the kept "
            "pictures."
        )
        return Summary(verdict)
    if "cost" not in found:
        return _of_spectra(found)
    kept = sum(len(each["kept"]) for each in found["layers"])
    whole = found["heads"] * len(found["layers"])
    judged = found["judged"]
    healed = " after healing" if "before" in found else ""
    verdict = (
        f"Of {counted(whole, 'head')} {kept} stay; with the others local the network agrees with what it was on "
        f"{percent(judged['agreement'])} of {counted(judged['pictures'], 'picture')}{healed}."
    )
    names = {"kl": "KL divergence, nats", "agreement": "same class", "accuracy before": "accuracy of what it was",
             "accuracy": "accuracy"}  # fmt: skip
    stages = [found[stage] for stage in ("before", "judged") if stage in found]
    rows = [[told, *(stage[name] for stage in stages)] for name, told in names.items() if name in judged]
    columns = ["", "fitted", "healed"] if healed else ["", "fitted"]
    costs = [
        [told, found["cost"][name]["before"], found["cost"][name]["after"],
         share(found["cost"][name]["after"], found["cost"][name]["before"])]
        for name, told in (("flops", "products for a picture"), ("parameters", "parameters"))
    ]  # fmt: skip
    tables = [
        Table("On pictures that judge", columns, rows),
        Table("What attention costs", ["", "before", "after", "share"], costs),
        _of_layers(found["layers"]),
    ]
    lines = [] if healed else ["Fitted and not healed: `lamella run iformer heal` trains it back."]
    return Summary(verdict, tables, lines)


def _of_layers(layers: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            place,
            ", ".join(map(str, each["kept"])) if "kept" in each else "",
            each.get("conv", ""),
            each.get("pool", ""),
            ", ".join(f"{worth:.2g}" for worth in each.get("worth", ())),
            ", ".join(f"{value:.2f}" for value in each.get("explained", ())),
            ", ".join(f"{value:.1f}" for value in each.get("distance", ())),
        ]
        for place, each in enumerate(layers)
    ]
    columns = ["layer", "heads that stay", "conv", "pool", "worth, nats", "R^2 of a convolution", "distance, places"]
    return Table("Layers, and their heads in order", columns, rows)


def _of_spectra(found: Mapping[str, Any]) -> Summary:
    rows = [
        [each["layer"], name, part["delta"][-1], part["high"]]
        for each in found["spectra"]
        for name, part in each.items()
        if name != "layer"
    ]
    first, last = (found["spectra"][place]["mixer"]["high"] for place in (0, -1))
    shares = percent(first), percent(last)
    verdict = f"Beyond pi / 2 lies {shares[0]} of the energy of what the first layer adds, and {shares[1]} of the last."
    tables = [Table("Spectra", ["layer", "part", "log amplitude at pi", "energy beyond pi / 2"], rows)]
    return Summary(verdict, [*tables, *([_of_layers(found["layers"])] if "layers" in found else [])])
