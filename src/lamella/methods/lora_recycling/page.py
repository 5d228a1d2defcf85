"""Figures and summary: all arms side by side, and the coefficients of the best merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, number
from lamella.methods.lora_recycling.result import WORTH
from lamella.report.figures import Bars, Figure, Heatmap
from lamella.result import Summary, Table
from lamella.results import Edit, Evidence
from lamella.runtime import EditEvidence

SURE = 1.96  # half width of a 95 % interval, in standard errors


def summary(evidence: Evidence) -> Summary:
    """Summarise the result of either command."""
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
    columns = ["arm", "uses the pool", "held-out loss", "exact on the test", "loss on the test", "difference"]
    arms = Table(f"All arms; paired differences to {found['verdict']['other']}", columns, rows)
    members = Table("Merged, the most useful first", ["adapter", "total scaled norm"],
                    [[name, found["norms"][name]] for name in found["selected"]])  # fmt: skip
    verdict = f"Merging {WORTH[found['verdict']['worth']]} on this pool."
    return Summary(verdict, [arms, members, *_refused(found)])


def _difference(row: Mapping[str, Any]) -> str:
    error = row["error"]
    return number(row["difference"]) + ("" if error is None else f" ± {number(error)}")


def _refused(found: Mapping[str, Any]) -> list[Table]:
    refused = found["refused"]
    return [Table("Rejected", ["adapter", "reason"], [list(each) for each in refused.items()])] if refused else []


def figures(evidence: Evidence) -> list[Figure]:
    """Plot all arms side by side, and the coefficients of the best merge."""
    found = evidence.findings
    if "arms" not in found:
        return []
    spreads = {row["arm"]: (row["accuracy"], SURE * (row["error"] or 0.0), row["of_pool"]) for row in found["arms"]}
    parts: list[Figure] = [by_arm(spreads)]
    if "coefficients" in found:
        fitted = found["coefficients"]
        modules: Mapping[str, Sequence[float]] = fitted["by module"]
        caption = (
            f"Coefficients of {fitted['arm']}: one row per linear layer of the model, first layer first; one column "
            "per adapter or rank. Red is above 0, blue below."
        )
        parts.append(
            Heatmap(
                "adapter or rank",
                "linear layer",
                list(modules.values()),
                "coefficient",
                diverging=True,
                hover=[
                    [f"{module}, {column}: {number(value)}" for column, value in enumerate(values)]
                    for module, values in modules.items()
                ],
                title="Coefficients by module",
                caption=caption,
            )
        )
    return parts


def by_arm(shares: Mapping[str, tuple[float, float, bool]]) -> Bars:
    """Plot the accuracy of each arm.

    Args:
        shares: by arm: the accuracy, half of its interval, and whether the arm uses the pool.
    """
    groups = {"with the pool": True, "without": False}
    return Bars(
        "arm",
        "fraction of exact answers",
        {
            name: [share if of_pool is wanted else None for share, _, of_pool in shares.values()]
            for name, wanted in groups.items()
        },
        positions=list(shares),
        intervals={name: [(share - half, share + half) for share, half, _ in shares.values()] for name in groups},
        labels={name: [number(share) for share, _, _ in shares.values()] for name in groups},
        horizontal=True,
        title="Fraction of exact answers by arm",
        caption="Fraction of the test that is answered exactly; lines are 95 % intervals of the difference to the best "
        "arm without the pool.",
    )
