"""From evidence to figures: spectra by depth, where the heads went, and what became of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.formatting import counted, number, percent, share
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.report.plane import plane
from lamella.results import Evidence, Summary, Table

CELL, GAP, LEFT, TOP = 22, 3, 70, 26
STAYS, GONE = "#0d9488", "#ea580c"
SHOWN = 8  # layers in one picture of spectra


def figures(evidence: Evidence) -> str:
    """Pictures of whatever was found, as HTML that needs no script."""
    found = evidence.findings
    drawn = []
    if "cost" in found:
        told = "A row is a layer, the first on top. Heads that stay are green, those that became local orange, "
        drawn.append(
            (allocation(found["layers"], found["heads"]), told + "and the paler they are, the less they were worth.")
        )
    if "spectra" in found:
        told = (
            "What each layer's mixer adds: amplitude over frequency, beside that of the mean. 3.14 is a change of sign "
        )
        drawn.append((by_depth(found["spectra"]), told + "from each place to the next."))
        drawn.append((shares(found["spectra"]), "The share of the energy beyond pi / 2, by layer, of each part."))
    if found.get("loss"):
        drawn.append((chart({"training": found["loss"]}, "loss", "point of the log"), "The loss of the training."))
    return "".join(figure(picture, told) for picture, told in drawn)


def by_depth(spectra: Sequence[Mapping[str, Any]]) -> str:
    """The spectra of mixers, those of some layers where there are many."""
    step = -(-len(spectra) // SHOWN)
    lines = {
        f"layer {each['layer']}": list(zip(each["mixer"]["frequencies"], each["mixer"]["delta"], strict=True))
        for each in spectra[::step]
    }
    return plane(lines, "frequency, radians from place to place", "relative log amplitude")


def shares(spectra: Sequence[Mapping[str, Any]]) -> str:
    """The share of high frequencies by layer, of mixers and of their branches; of heads, their mean."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in spectra:
        heads = [part["high"] for name, part in each.items() if name.startswith("head ")]
        parts = {name: part["high"] for name, part in each.items() if name != "layer" and not name.startswith("head ")}
        parts |= {"heads, mean": sum(heads) / len(heads)} if heads else {}
        for name, value in parts.items():
            lines.setdefault(name, []).append((each["layer"], value))
    return plane(lines, "layer", "share of energy beyond pi / 2")


def allocation(layers: Sequence[Mapping[str, Any]], heads: int) -> str:
    """Where heads stay, as one SVG."""
    most = max((worth for each in layers for worth in each.get("worth", ())), default=0.0) or 1.0
    width, height = LEFT + heads * (CELL + GAP) + 150, TOP + len(layers) * (CELL + GAP)
    drawn = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" font-family="sans-serif" '
        f'font-size="12" style="max-width:{width}px"><title>Heads by layer</title>'
    ]
    for row, layer in enumerate(layers):
        y = TOP + row * (CELL + GAP)
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end" fill="#888">layer {row}</text>')
        for head in range(heads):
            stays = head in layer["kept"]
            worth = layer["worth"][head] if "worth" in layer else None
            pale = 1.0 if worth is None else 0.25 + 0.75 * (worth / most) ** 0.5
            told = f"layer {row}, head {head}" + ("" if worth is None else f": worth {number(worth)} nats")
            drawn.append(
                f'<rect x="{LEFT + head * (CELL + GAP)}" y="{y}" width="{CELL}" height="{CELL}" rx="3" '
                f'fill="{STAYS if stays else GONE}" fill-opacity="{pale:.2f}"><title>{escape(told)}</title></rect>'
            )
        said = f"{layer['conv']} conv, {layer['pool']} pool" if layer["conv"] else ""
        drawn.append(f'<text x="{LEFT + heads * (CELL + GAP) + 8}" y="{y + 16}" fill="#888">{said}</text>')
    return "".join([*drawn, "</svg>"])


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
