"""Figures: inputs and results, sensitivity by layer, or the training loss."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.formatting import counted, listed, number, numbered
from lamella.report.figures import Bars, Figure, Images, Lines
from lamella.results import Evidence, Summary, Table

STUDY, RETEXTURED = "study", "retextured"


def figures(evidence: Evidence) -> list[Figure]:
    """Draw inputs and results, the sensitivity by layer, or the training loss."""
    found = evidence.findings
    if evidence.kind == RETEXTURED:
        strips = found["strips"]
        texts = [[name] for name in strips]
        caption = "The network's inputs and outputs."
        return [Images(list(strips.values()), texts, alt="frames", caption=caption)]
    if evidence.kind == STUDY:
        return [sensitivity(found["output"], found["chosen"])]
    return [Lines("point of the log", "loss", {"training": found["loss"]})]


def sensitivity(values: Sequence[float], chosen: Sequence[int]) -> Bars:
    """Draw a bar for each layer, with the chosen layers in another colour.

    Args:
        values: change of the output, by layer.
        chosen: indices of the layers that get hints.
    """
    series = {
        name: [value if (layer in chosen) is is_chosen else None for layer, value in enumerate(values)]
        for name, is_chosen in (("layers to add hints to", True), ("other layers", False))
    }
    caption = "Change of the output caused by a perturbation of the same norm at each layer."
    return Bars("layer", "change of the output", series, title="Sensitivity by layer", caption=caption)


def summary(evidence: Evidence) -> Summary:
    """Summarise a retexturing, a measurement or a training."""
    found = evidence.findings
    if evidence.kind == RETEXTURED:
        return of_images(evidence)
    if evidence.kind == STUDY:
        rows = [
            [layer, output, loss, "chosen" if layer in found["chosen"] else ""]
            for layer, (output, loss) in enumerate(zip(found["output"], found["loss"], strict=True))
        ]
        heads = ("layer", "change of the output", "rise of the loss", "")
        indices = ",".join(map(str, found["chosen"]))
        return Summary(
            f"A hint has the largest effect at {numbered('layer', found['chosen'])}: train with --layers {indices}.",
            [Table("Effect of a perturbation at each layer", heads, rows)],
            [f"the paper uses every second layer: {listed(found['every second'], most=32)}"],
        )
    what = "control branch" if "layers" in found else "texture remover"
    last = f"; the loss ends at {number(found['loss'][-1])}" if found["loss"] else ""
    where = f" for {numbered('layer', found['layers'])}" if "layers" in found else ""
    return Summary(f"A {what} of {counted(found['parameters'], 'parameter')} was trained{where}{last}.")


def of_images(evidence: Evidence) -> Summary:
    """Summarise how the images were generated."""
    found = evidence.findings
    height, width = found["size"]
    cells = "not jigsawed" if not found["cells"] else f"{found['cells']} cells of {found['side']} pixels"
    rows = [
        ["frames", f"{found['frames']} of {height} x {width} pixels"],
        ["reference", cells],
        ["PSNR of the background outside the hole before pasting, dB", found["background"]],
    ]
    count = found["frames"]
    what = "An image was" if count == 1 else f"{count} frames were"
    return Summary(f"{what} given the texture of the reference.", [Table("Sampling", ("", ""), rows)])
