"""Summary and figures of a run: the pool, the rewrites, both sets, and the cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.formatting import count, counted, number, percent
from lamella.report.corpora import cost_table, mixture_table
from lamella.report.figures import Excerpts, Figure, Lines
from lamella.results import Evidence, Summary, Table


def summary(evidence: Evidence) -> Summary:
    """Summarise the pool, the rewrites, and the training data."""
    found = evidence.findings
    if "scores" in found:
        rows = [[share, value] for share, value in found["scores"].items()]
        return Summary(
            f"Scores of {counted(found['documents'], 'document')}.", [Table("Scores", ("quantile", "score"), rows)]
        )
    sets, rewrites = found["sets"], found["rewrites"]
    verdict = (
        f"Of {counted(rewrites['requested'], 'requested rewrite')} {rewrites['parsed']} can be parsed; the best are "
        f"{counted(sets['synthetic']['documents'], 'rewrite')} and {counted(sets['raw']['documents'], 'raw document')}."
    )
    lines = []
    if sets["overlap"] is not None:
        lines.append(f"{percent(sets['overlap'])} of the documents of the rewritten set are in the raw set as well.")
    if sets["spearman"] is not None:
        lines.append(f"The rank correlation of both scores is {number(sets['spearman'])}.")
    tables = [_rewrites(rewrites), _sets(sets), mixture_table(found["mixture"])]
    if "pool" in found:  # not a selection among earlier rewrites
        tables = [_pool(found), *tables, cost_table(found["cost"])]
    return Summary(verdict, tables, lines)


def _pool(found: Mapping[str, Any]) -> Table:
    rows = [["input", found["documents"]["given"]], ["held out", found["documents"]["held out"]]]
    rows += [[f"excluded: {why}", many] for why, many in found["pool"]["excluded"].items()]
    return Table("The pool", ("", "documents"), [*rows, ["in the pool", found["pool"]["documents"]]])


def _rewrites(rewrites: Mapping[str, Any]) -> Table:
    rows = [
        ["requested", rewrites["requested"]],
        ["parsed", rewrites["parsed"]],
        *([f"failed: {why}", many] for why, many in rewrites["failed"].items()),
        ["ratio of tokens to the document", number(rewrites["ratio"])],
        ["shorter than the document", percent(rewrites["shorter"])],
        ["similarity to the document", number(rewrites["similarity"])],
        ["mostly new (below 0.4)", percent(rewrites["mostly new"])],
        ["mostly unchanged (above 0.8)", percent(rewrites["mostly the same"])],
    ]
    return Table("The rewrites", ("", ""), rows)


def _sets(sets: Mapping[str, Any]) -> Table:
    rows = [
        [name, sets[name]["documents"], count(sets[name]["tokens"]), number(sets[name].get("mean")),
         number(sets[name].get("median")), sets["bigrams"][name]]
        for name in ("raw", "synthetic")
    ]  # fmt: skip
    pairs = f"distinct bigrams per {sets['bigrams']['words']}"
    return Table("Selected sets", ("set", "documents", "tokens", "mean length", "median length", pairs), rows)


def figures(evidence: Evidence) -> list[Figure]:
    """Plot the lengths of documents and rewrites, and show some of both."""
    found = evidence.findings
    if "scores" in found:
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
