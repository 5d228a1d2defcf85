"""From evidence to what was kept, how close it is to its sources, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import count, counted, number, percent
from lamella.report.corpora import cost_table, mixture_table
from lamella.report.figures import Excerpts, Figure, Lines
from lamella.results import Evidence, Summary, Table


def summary(evidence: Evidence) -> Summary:
    """What was kept of each style, the mixture, and the cost."""
    found = evidence.findings
    styles, cost = found["styles"], found["cost"]
    generated, kept = (sum(each[name] for each in styles.values()) for name in ("generated", "kept"))
    passages = counted(found["passages"]["rephrased"], "passage")
    verdict = f"Kept: {kept} of {counted(generated, 'rephrase')} of {passages}, with {_tokens(cost['tokens kept'])}."
    near = found["similarity"]
    pairs = {
        "a rephrase and its own passage": near["own"],
        "a rephrase and another passage": near["another"],
        "both halves of a document": near["halves"],
    }
    known = [f"{who} {number(value)}" for who, value in pairs.items() if value is not None]
    lines = [f"Cosines ({near['embedder']}): {'; '.join(known)}."] if known else []
    return Summary(verdict, [_kept(styles), mixture_table(found["mixture"]), cost_table(cost)], lines)


def _tokens(many: int) -> str:
    """An amount of tokens, such as ``3.3 k tokens``."""
    return counted(many, "token") if many < 1000 else f"{count(many)} tokens"


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


def figures(evidence: Evidence) -> list[Figure]:
    """Lengths of passages and rephrases, and some of both to read."""
    found = evidence.findings
    parts: list[Figure] = []
    for name, style in found["styles"].items():
        lengths = sorted(style["lengths"])
        lines = {"passage": [source for source, _ in lengths], "rephrase": [out for _, out in lengths]}
        parts.append(Lines(f"kept rephrases of style {name}, by the length of their passage", "tokens", lines))
    return [*parts, Excerpts([_excerpt(row) for row in found["samples"]], title="Some passages with their rephrases")]


def _excerpt(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    status = f"dropped: {row['drop_reason']}" if row["drop_reason"] else "kept"
    close = "" if row["sim"] is None else f", {number(row['sim'])} close"
    return f"{row['style']}, {row['id']}: {status}{close}", [row["source_text"], row["text"]]
