"""From evidence to figures: what went in and what came out, what each layer does, or the loss of a training."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.formatting import counted, listed, number, numbered
from lamella.report.figures import Bars, Figure, Images, Lines
from lamella.results import Evidence, Summary, Table

STUDY, RETEXTURED = "study", "retextured"


def figures(evidence: Evidence) -> list[Figure]:
    """What went in and what came out, what each layer does, or the loss of a training."""
    found = evidence.findings
    if evidence.kind == RETEXTURED:
        strips = found["strips"]
        texts = [[name] for name in strips]
        caption = "What the network was given, and what it generated."
        return [Images(list(strips.values()), texts, alt="frames", caption=caption)]
    if evidence.kind == STUDY:
        return [sensitivity(found["output"], found["chosen"])]
    return [Lines("point of the log", "loss", {"training": found["loss"]})]


def sensitivity(values: Sequence[float], chosen: Sequence[int]) -> Bars:
    """A bar for each layer, those that were chosen in a colour of their own."""
    series = {
        name: [value if (layer in chosen) is wanted else None for layer, value in enumerate(values)]
        for name, wanted in (("hints should be added", True), ("other layers", False))
    }
    caption = "What a push of one size at each layer changes of the output."
    return Bars("layer", "change of the output", series, title="Sensitivity by layer", caption=caption)


def summary(evidence: Evidence) -> Summary:
    """What was drawn, measured or trained."""
    found = evidence.findings
    if evidence.kind == RETEXTURED:
        return of_pictures(evidence)
    if evidence.kind == STUDY:
        rows = [
            [layer, output, loss, "chosen" if layer in found["chosen"] else ""]
            for layer, (output, loss) in enumerate(zip(found["output"], found["loss"], strict=True))
        ]
        heads = ("layer", "change of the output", "rise of the loss", "")
        given = ",".join(map(str, found["chosen"]))
        return Summary(
            f"A hint does most at {numbered('layer', found['chosen'])}: train with --layers {given}.",
            [Table("What a push at each layer changes", heads, rows)],
            [f"the paper has every second layer: {listed(found['every second'], most=32)}"],
        )
    what = "control branch" if "layers" in found else "texture remover"
    last = f"; the loss ends at {number(found['loss'][-1])}" if found["loss"] else ""
    where = f" for {numbered('layer', found['layers'])}" if "layers" in found else ""
    return Summary(f"A {what} of {counted(found['parameters'], 'parameter')} was trained{where}{last}.")


def of_pictures(evidence: Evidence) -> Summary:
    """How the pictures were made."""
    found = evidence.findings
    height, width = found["size"]
    cells = "not jigsawed" if not found["cells"] else f"{found['cells']} cells of {found['side']} pixels"
    rows = [
        ["frames", f"{found['frames']} of {height} x {width} pixels"],
        ["reference", cells],
        ["background outside the hole, dB, before anything is pasted", found["background"]],
    ]
    count = found["frames"]
    what = "A picture was" if count == 1 else f"{count} frames were"
    return Summary(f"{what} given the texture of the reference.", [Table("How it was drawn", ("", ""), rows)])
