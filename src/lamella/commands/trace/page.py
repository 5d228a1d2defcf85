"""Summary of a trace: a row for each token or pass on the terminal, and the page."""

from __future__ import annotations

from math import ceil
from typing import Any

from lamella.commands.trace.report import render_trace
from lamella.formatting import counted, percent
from lamella.result import Evidence, Summary, Table

CELLS = "·▀▄█"  # nothing, attention, MLP, both
LEVELS = "·▁▂▃▄▅▆▇█"  # shares


def page(evidence: Evidence) -> str:
    """Render the tokens of the answer and the layers that ran for each.

    Args:
        evidence: the evidence of the trace.
    """
    return render_trace(evidence.findings)


def summary(evidence: Evidence) -> Summary:
    """Summarise the trace: one row for each token or pass, with its layers from left to right.

    Args:
        evidence: the evidence of the trace.
    """
    found = evidence.findings
    table = _passes(found) if "passes" in found else _tokens(found)
    lines = [f"{phase}: {percent(share)} of sublayers" for phase, share in found["usage"].items()]
    layers = counted(found["model"]["layers"], "layer")
    return Summary(f"{found['model']['name']} has {layers}, shown from left to right.", [table], lines)


def _tokens(found: dict[str, Any]) -> Table:
    rows = []
    for token, attn, mlp in zip(found["tokens"], found["attn"], found["mlp"], strict=True):
        cells = "".join(CELLS[int(a) + 2 * int(m)] for a, m in zip(attn, mlp, strict=True))
        rows.append([repr(token["text"])[1:-1][:14], token["phase"], cells])
    return Table("█ both sublayers, ▀ attention, ▄ MLP, · nothing", ["token", "phase", "layers"], rows)


def _passes(found: dict[str, Any]) -> Table:
    rows = []
    for number, each in enumerate(found["passes"]):
        cells = "".join(LEVELS[ceil(share * (len(LEVELS) - 1))] for share in each["by_layer"])
        committed = "".join(token["text"] for token in found["tokens"] if token["step"] == each["step"])
        rows.append([number, cells, repr(committed)[1:-1]])
    return Table("█ for all tokens of the pass, ▄ for half of them, · for none", ["pass", "layers", "committed"], rows)
