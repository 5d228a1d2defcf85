"""Report of a run: kept rephrases, their similarity to the sources, and the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import count, counted, number, percent
from lamella.report.corpora import cost_table, mixture_table
from lamella.report.figures import Excerpts, Figure, Lines
from lamella.results import Evidence, Summary, Table


def summary(evidence: Evidence) -> Summary:
    """Tabulate the kept rephrases of each style, the mixture, and the cost."""
    found = evidence.findings
    styles, cost = found["styles"], found["cost"]
    generated, kept = (sum(each[name] for each in styles.values()) for name in ("generated", "kept"))
    passages = counted(found["passages"]["rephrased"], "passage")
    verdict = f"Kept: {kept} of {counted(generated, 'rephrase')} of {passages}, with {_tokens(cost['tokens kept'])}."
    similarity = found["similarity"]
    pairs = {
        "a rephrase and its own passage": similarity["own"],
        "a rephrase and another passage": similarity["another"],
        "both halves of a document": similarity["halves"],
    }
    available = [f"{pair} {number(value)}" for pair, value in pairs.items() if value is not None]
    lines = [f"Cosine similarities ({similarity['embedder']}): {'; '.join(available)}."] if available else []
    return Summary(verdict, [_kept(styles), mixture_table(found["mixture"]), cost_table(cost)], lines)


def _tokens(count_: int) -> str:
    """Return a number of tokens as text, such as ``3.3 k tokens``."""
    return counted(count_, "token") if count_ < 1000 else f"{count(count_)} tokens"


def _kept(styles: Mapping[str, Any]) -> Table:
    reasons = list(dict.fromkeys(reason for each in styles.values() for reason in each["dropped"]))
    rows = [
        [name, each["generated"], each["kept"],
         percent(each["kept"] / each["generated"] if each["generated"] else None),
         *(each["dropped"].get(reason, 0) for reason in reasons), number(each["ratio"])]
        for name, each in styles.items()
    ]  # fmt: skip
    heads = (
        "style",
        "generated",
        "kept",
        "fraction",
        *(f"dropped: {reason}" for reason in reasons),
        "tokens relative to the source",
    )
    return Table("Rephrases by style", heads, rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the lengths of passages and rephrases, and show some of them."""
    found = evidence.findings
    parts: list[Figure] = []
    for name, style in found["styles"].items():
        lengths = sorted(style["lengths"])
        lines = {"passage": [source for source, _ in lengths], "rephrase": [out for _, out in lengths]}
        parts.append(Lines(f"kept rephrases of style {name}, by the length of their passage", "tokens", lines))
    return [*parts, Excerpts([_excerpt(row) for row in found["samples"]], title="Some passages with their rephrases")]


def _excerpt(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    status = f"dropped: {row['drop_reason']}" if row["drop_reason"] else "kept"
    similarity = "" if row["sim"] is None else f", similarity {number(row['sim'])}"
    return f"{row['style']}, {row['id']}: {status}{similarity}", [row["source_text"], row["text"]]
