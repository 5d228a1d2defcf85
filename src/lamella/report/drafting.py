"""The table of what drafts gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lamella.evaluate import Ratio
from lamella.result import Table

PARTS = ("accepted", "verifying", "drafting", "predicted")


def gains_table(title: str, first: str, found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Table:
    """Return the table of what drafts gain, by name and kind of prompt.

    Args:
        title: of the table.
        first: what the names are, such as ``model``.
        found: for each name and kind of prompt the fields of :class:`lamella.evaluate.DraftGain` of each prompt.
    """
    rows = [
        [
            name,
            kind,
            *(mean(each[part] for each in gains) for part in PARTS),
            str(Ratio.of([each["measured"] for each in gains])),
            f"{sum(each['equal'] for each in gains)} of {len(gains)}",
        ]
        for name, kinds in found.items()
        for kind, gains in kinds.items()
    ]
    return Table(
        title, [first, "prompts", "accepted", "pass", "drafting", "predicted", "measured", "same tokens"], rows
    )
