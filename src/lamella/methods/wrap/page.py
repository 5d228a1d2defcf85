"""From evidence to what was kept, how close it is to its sources, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lamella.report.chart import chart
from lamella.report.corpora import cost_table, mixture_table
from lamella.report.figure import figure
from lamella.report.numbers import count, number, percent
from lamella.results import Evidence, Summary, Table


def summary(evidence: Evidence) -> Summary:
    """What was kept of each style, the mixture, and the cost."""
    found = evidence.findings
    styles, cost = found["styles"], found["cost"]
    generated, kept = (sum(each[name] for each in styles.values()) for name in ("generated", "kept"))
    verdict = (
        f"{kept} of {generated} rephrases of {found['passages']['rephrased']} passages are kept, "
        f"{count(cost['tokens kept']).strip()} tokens."
    )
    near = found["similarity"]
    own, other, halves = (number(near[each]) for each in ("own", "another", "halves"))
    lines = [
        f"A rephrase is {own} close to its own passage and {other} to another; both halves of a document are {halves} "
        f"close to each other ({near['embedder']}, cosine)."
    ]
    return Summary(verdict, [_kept(styles), mixture_table(found["mixture"]), cost_table(cost)], lines)


def _kept(styles: Mapping[str, Any]) -> Table:
    reasons = list(dict.fromkeys(why for each in styles.values() for why in each["dropped"]))
    rows = [
        [name, each["generated"], each["kept"],
         percent(each["kept"] / each["generated"] if each["generated"] else None),
         *(each["dropped"].get(why, 0) for why in reasons), number(each["ratio"])]
        for name, each in styles.items()
    ]  # fmt: skip
    heads = (
        "style",
        "generated",
        "kept",
        "share",
        *(f"dropped: {why}" for why in reasons),
        "tokens by those of the source",
    )
    return Table("What became of the rephrases", heads, rows)


def figures(evidence: Evidence) -> str:
    """Lengths of passages and rephrases, and some of both to read."""
    found = evidence.findings
    parts = []
    for name, style in found["styles"].items():
        lengths = sorted(style["lengths"])
        lines = {"passage": [source for source, _ in lengths], "rephrase": [out for _, out in lengths]}
        across = f"kept rephrases of style {name}, by the length of their passage"
        parts.append(figure(chart(lines, "tokens", across)))
    return "\n".join([*parts, *map(_shown, found["samples"])])


def _shown(row: Mapping[str, Any]) -> str:
    what = f"dropped: {row['drop_reason']}" if row["drop_reason"] else "kept"
    close = "" if row["sim"] is None else f", {number(row['sim'])} close"
    return (
        f"<details><summary>{escape(row['style'])}, {escape(str(row['id']))}: {what}{close}</summary>"
        f"<blockquote>{escape(row['source_text'])}</blockquote><blockquote>{escape(row['text'])}</blockquote></details>"
    )
