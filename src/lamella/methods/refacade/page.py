"""From evidence to figures: what went in and what came out, what each layer does, or the loss of a training."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lamella.formatting import counted, listed, number, numbered
from lamella.report.chart import chart
from lamella.report.figure import figure
from lamella.report.pictures import shown
from lamella.results import Evidence, Summary, Table

STUDY, PICTURES = "study", "retextured"
WIDE, HIGH, LEFT, BELOW = 640, 220, 60, 40  # of the bars, in pixels
CHOSEN, OTHER = "#0d9488", "#94a3b8"


def figures(evidence: Evidence) -> str:
    """The pictures as HTML that needs no script."""
    found = evidence.findings
    if evidence.kind == PICTURES:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{shown(picture, escape(name))}</td></tr>"
            for name, picture in found["strips"].items()
        )
        return figure(f"<table>{rows}</table>", "What the network was shown, and drew.")
    if evidence.kind == STUDY:
        caption = "What a push of one size at each layer changes of the output; coloured where hints should be added."
        return figure(bars(found["output"], found["chosen"]), caption)
    return figure(chart({"training": found["loss"]}, "loss", "point of the log"))


def bars(values: Sequence[float], chosen: Sequence[int]) -> str:
    """A bar for each layer, as one SVG."""
    most = max([*values, 1e-12])
    wide = (WIDE - LEFT) / len(values)
    drawn = [
        f'<svg viewBox="0 0 {WIDE} {HIGH + BELOW}" xmlns="http://www.w3.org/2000/svg" role="img" '
        'font-family="sans-serif" font-size="12"><title>Sensitivity by layer</title>'
        f'<text x="{LEFT - 6}" y="14" text-anchor="end" fill="#888">{most:.2g}</text>'
        f'<text x="{LEFT - 6}" y="{HIGH}" text-anchor="end" fill="#888">0</text>'
    ]
    for layer, value in enumerate(values):
        high = max(value, 0) / most * (HIGH - 10)
        x, colour = LEFT + layer * wide, CHOSEN if layer in chosen else OTHER
        drawn.append(
            f'<g><title>layer {layer}: {number(value)}</title><rect x="{x + 2:.1f}" y="{HIGH - high:.1f}" '
            f'width="{max(wide - 4, 1):.1f}" height="{high:.1f}" fill="{colour}"/></g>'
        )
        if layer % max(1, len(values) // 20) == 0:
            drawn.append(
                f'<text x="{x + wide / 2:.1f}" y="{HIGH + 16}" text-anchor="middle" fill="#888">{layer}</text>'
            )
    middle = LEFT + (WIDE - LEFT) / 2
    drawn.append(f'<text x="{middle}" y="{HIGH + 34}" text-anchor="middle" fill="#888">layer</text></svg>')
    return "".join(drawn)


def summary(evidence: Evidence) -> Summary:
    """What was drawn, measured or trained."""
    found = evidence.findings
    if evidence.kind == PICTURES:
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
