"""From evidence to what the rewriter made of the pool, both sets, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import count, counted, number, percent
from lamella.report.corpora import cost_table, mixture_table
from lamella.report.figures import Excerpts, Figure, Lines
from lamella.results import Evidence, Summary, Table


def summary(evidence: Evidence) -> Summary:
    """What is in the pool, what became of it, and what is trained on."""
    found = evidence.findings
    if "pool" not in found:  # scores alone
        rows = [[share, value] for share, value in found["scores"].items()]
        return Summary(
            f"Scores of {counted(found['documents'], 'document')}.", [Table("Scores", ("share below", "score"), rows)]
        )
    sets, rewrites = found["sets"], found["rewrites"]
    verdict = (
        f"Of {counted(rewrites['asked'], 'rewrite')} {rewrites['parsed']} can be read; the best are "
        f"{counted(sets['synthetic']['documents'], 'rewrite')} and {counted(sets['raw']['documents'], 'raw document')}."
    )
    lines = []
    if sets["overlap"] is not None:
        lines.append(f"{percent(sets['overlap'])} of the rewritten set are documents of the raw set, too.")
    if sets["spearman"] is not None:
        lines.append(f"The ranks of both scores correlate by {number(sets['spearman'])}.")
    tables = [
        _pool(found),
        _rewrites(rewrites),
        _sets(sets),
        mixture_table(found["mixture"]),
        cost_table(found["cost"]),
    ]
    return Summary(verdict, tables, lines)


def _pool(found: Mapping[str, Any]) -> Table:
    rows = [["given", found["documents"]["given"]], ["held out", found["documents"]["held out"]]]
    rows += [[f"left out: {why}", many] for why, many in found["pool"]["left out"].items()]
    return Table("The pool", ("", "documents"), [*rows, ["in the pool", found["pool"]["documents"]]])


def _rewrites(rewrites: Mapping[str, Any]) -> Table:
    rows = [
        ["asked for", rewrites["asked"]],
        ["parsed", rewrites["parsed"]],
        *([f"failed: {why}", many] for why, many in rewrites["failed"].items()),
        ["tokens by those of the document", number(rewrites["ratio"])],
        ["shorter than the document", percent(rewrites["shorter"])],
        ["similarity to it", number(rewrites["similarity"])],
        ["mostly new (below 0.4)", percent(rewrites["mostly new"])],
        ["mostly the same (above 0.8)", percent(rewrites["mostly the same"])],
    ]
    return Table("The rewrites", ("", ""), rows)


def _sets(sets: Mapping[str, Any]) -> Table:
    rows = [
        [name, sets[name]["documents"], count(sets[name]["tokens"]), number(sets[name].get("mean")),
         number(sets[name].get("median")), sets["bigrams"][name]]
        for name in ("raw", "synthetic")
    ]  # fmt: skip
    pairs = f"pairs of words in {sets['bigrams']['words']}"
    return Table("The best", ("set", "documents", "tokens", "mean length", "median length", pairs), rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Lengths of documents and rewrites, and some of both to read."""
    found = evidence.findings
    if "pool" not in found:
        return []
    lengths = sorted(found["rewrites"]["lengths"])
    lines = {"document": [source for source, _ in lengths], "rewrite": [out for _, out in lengths]}
    return [
        Lines("rewrites, by the length of their document", "tokens", lines),
        Excerpts([_excerpt(row) for row in found["samples"]], title="Some documents with their rewrites"),
    ]


def _excerpt(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    status = f"failed: {row['drop_reason']}" if row["drop_reason"] else f"scored {number(row['syn_score'])}"
    where = " and ".join(name for name in ("raw", "synthetic") if row[f"in_{name[:3]}"]) or "neither set"
    return f"{row['id']}: {status}; in {where}", [row["source_text"], row["text"]]
