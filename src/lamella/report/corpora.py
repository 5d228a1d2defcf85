"""What every rewritten corpus shows: what it is mixed of, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import MISSING, count, duration, number, percent
from lamella.result import Table


def mixture_table(mixture: Mapping[str, Any]) -> Table:
    """What is seen of each source.

    Args:
        mixture: what :func:`lamella.data.mix` said.
    """
    rows = [
        [name, count(each["tokens"]), percent(each["share"]), percent(each["target"]), count(each["unique"]),
         number(each["epochs"])]
        for name, each in mixture["sources"].items()
    ]  # fmt: skip
    return Table("What is trained on", ("source", "tokens seen", "share", "target", "tokens available", "epochs"), rows)


def cost_table(cost: Mapping[str, Any]) -> Table:
    """What writing took.

    Args:
        cost: what :func:`lamella.evaluate.writing_cost` said.
    """
    speed = cost["tokens written"] / cost["seconds"] if cost["seconds"] else None
    rows = [
        ["tokens read", count(cost["tokens read"])],
        ["tokens written", count(cost["tokens written"])],
        ["tokens written for each that is kept", number(cost["written for each kept token"])],
        ["time of writing, of all workers together", duration(cost["seconds"])],
        ["tokens written a second", number(speed)],
        ["time for each kept token", duration(cost["seconds for each kept token"])],
        ["operations for each kept token", count(cost["flops for each kept token"])],
        ["operations, as a share of the training's", percent(cost["generation / training"])],
    ]
    return Table("What it cost", ("", ""), [row for row in rows if row[1] != MISSING])
