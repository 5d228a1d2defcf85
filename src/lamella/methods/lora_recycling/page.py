"""From evidence to figures: all arms side by side, and what the coefficients of the best merge are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lamella.formatting import counted, number
from lamella.methods.lora_recycling.result import SAID
from lamella.report.figure import figure
from lamella.result import Summary, Table
from lamella.results import Edit, Evidence
from lamella.runtime import EditEvidence

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 220, 60, 24, 10
CELL = 9  # of the drawing of coefficients
OURS, OTHERS, RED, BLUE = "#ea580c", "#0d9488", "220, 38, 38", "37, 99, 235"
SURE = 1.96  # standard errors of a 95 % interval


def summary(evidence: Evidence) -> Summary:
    """The verdict in words and tables, for either command."""
    found = evidence.findings
    if "arms" not in found:
        assert isinstance(evidence, EditEvidence)
        plain = Edit.summary(evidence)
        name = (evidence.model or {}).get("name", "the model")
        return Summary(f"Merged into {name} by {found['how']}: {counted(len(found['merged']), 'adapter')}.",
                       [*plain.tables, *_refused(found)])  # fmt: skip
    rows = [
        [row["arm"], "yes" if row["of_pool"] else "", row["held_out_loss"], row["accuracy"], row["loss"],
         _difference(row)]
        for row in found["arms"]
    ]  # fmt: skip
    columns = ["arm", "weights of the pool", "held-out loss", "exact on the test", "loss on the test", "difference"]
    arms = Table(f"All arms; differences are to {found['verdict']['other']}, in pairs", columns, rows)
    members = Table("Merged, the most useful first", ["adapter", "total scaled norm"],
                    [[name, found["norms"][name]] for name in found["selected"]])  # fmt: skip
    verdict = f"Merging {SAID[found['verdict']['worth']]} on this pool."
    return Summary(verdict, [arms, members, *_refused(found)])


def _difference(row: Mapping[str, Any]) -> str:
    error = row["error"]
    return number(row["difference"]) + ("" if error is None else f" ± {number(error)}")


def _refused(found: Mapping[str, Any]) -> list[Table]:
    refused = found["refused"]
    return [Table("Refused", ["adapter", "why"], [list(each) for each in refused.items()])] if refused else []


def figures(evidence: Evidence) -> str:
    """The fragment of a page, as HTML that needs no script."""
    found = evidence.findings
    if "arms" not in found:
        return ""
    spreads = {row["arm"]: (row["accuracy"], SURE * (row["error"] or 0.0), row["of_pool"]) for row in found["arms"]}
    said = "Share of the test that is answered exactly; lines are 95 % intervals of the difference to the best arm "
    parts = [figure(bars(spreads), f"{said}without weights of the pool.")]
    if "coefficients" in found:
        fitted = found["coefficients"]
        said = (
            f"Coefficients of {fitted['arm']}: a row for each linear layer of the model, first layer first; a column "
            "for each adapter or rank. Red is above 0, blue below."
        )
        parts.append(figure(heat(fitted["by module"]), said))
    return "".join(parts)


def bars(arms: Mapping[str, tuple[float, float, bool]]) -> str:
    """Shares by arm, as one SVG.

    Args:
        arms: by name: the share, half of its interval, and whether it has weights of the pool.
    """
    room, height = WIDTH - LEFT - RIGHT, 2 * TOP + ROW * len(arms)
    most = max((share + half for share, half, _ in arms.values()), default=1.0) or 1.0
    drawn = [f'<svg viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg" role="img" '
             'font-family="sans-serif" font-size="12"><title>Share of exact answers by arm</title>']  # fmt: skip
    for place, (name, (share, half, of_pool)) in enumerate(arms.items()):
        y, colour = TOP + ROW * place, OURS if of_pool else OTHERS
        length, low, high = (room * max(value, 0.0) / most for value in (share, share - half, share + half))
        drawn.append(
            f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end" fill="#888">{escape(name)}</text>'
            f'<rect x="{LEFT}" y="{y + 4}" width="{length:.1f}" height="{ROW - 10}" fill="{colour}"/>'
            f'<line x1="{LEFT + low:.1f}" x2="{LEFT + high:.1f}" y1="{y + 11}" y2="{y + 11}" stroke="#888"/>'
            f'<text x="{LEFT + max(length, high) + 6:.1f}" y="{y + 15}" fill="#888">{number(share)}</text>'
        )
    return "".join([*drawn, "</svg>"])


def heat(coefficients: Mapping[str, Sequence[float]]) -> str:
    """Coefficients as coloured cells, as one SVG: a row for each module."""
    most = max((abs(each) for values in coefficients.values() for each in values), default=0.0) or 1.0
    columns = max(map(len, coefficients.values()), default=1)
    drawn = [f'<svg viewBox="0 0 {CELL * columns} {CELL * len(coefficients)}" xmlns="http://www.w3.org/2000/svg" '
             f'role="img" width="{min(WIDTH, 3 * CELL * columns)}"><title>Coefficients by module</title>']  # fmt: skip
    for row, (module, values) in enumerate(coefficients.items()):
        for column, value in enumerate(values):
            strength = abs(value) / most
            colour = f"rgba({RED if value > 0 else BLUE}, {strength:.2f})"
            drawn.append(f'<rect x="{CELL * column}" y="{CELL * row}" width="{CELL}" height="{CELL}" fill="{colour}">'
                         f"<title>{escape(module)}, {column}: {number(value)}</title></rect>")  # fmt: skip
    return "".join([*drawn, "</svg>"])
