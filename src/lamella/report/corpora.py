"""Tables of generated corpora: their mixture and their cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import MISSING, count, duration, number, percent
from lamella.result import Table


def mixture_table(mixture: Mapping[str, Any]) -> Table:
    """Return the table of the training tokens from each source.

    Args:
        mixture: the account of :func:`lamella.data.mix`.
    """
    rows = [
        [name, count(each["tokens"]), percent(each["share"]), percent(each["target"]), count(each["unique"]),
         number(each["epochs"])]
        for name, each in mixture["sources"].items()
    ]  # fmt: skip
    return Table(
        "Training mixture", ("source", "tokens seen", "share", "target share", "tokens available", "epochs"), rows
    )


def cost_table(cost: Mapping[str, Any]) -> Table:
    """Return the table of the generation cost.

    Args:
        cost: the result of :func:`lamella.evaluate.writing_cost`.
    """
    speed = cost["tokens written"] / cost["seconds"] if cost["seconds"] else None
    rows = [
        ["tokens read", count(cost["tokens read"])],
        ["tokens written", count(cost["tokens written"])],
        ["tokens written per kept token", number(cost["written for each kept token"])],
        ["generation time of all workers", duration(cost["seconds"])],
        ["tokens written per second", number(speed)],
        ["time per kept token", duration(cost["seconds for each kept token"])],
        ["operations per kept token", count(cost["flops for each kept token"])],
        ["operations relative to training", percent(cost["generation / training"])],
    ]
    return Table("Cost", ("", ""), [row for row in rows if row[1] != MISSING])
