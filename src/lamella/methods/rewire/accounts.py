"""Statistics of a run: failures of the rewriter, both selected sets, and their relation."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from statistics import fmean, median
from typing import Any

from lamella.data import seed_of
from lamella.data.lazy import column, first_of_each, where
from lamella.measure import spearman
from lamella.methods.rewire.guiding import FAILURES

Row = Mapping[str, Any]
INVENTED, PARAPHRASED = 0.4, 0.8  # cosines below which a text is mostly new, above which mostly unchanged
SHOWN = 6  # rewrites shown on the page
COMPARED = 200  # rewrites whose lengths are plotted
WORDS = 1_000_000  # maximum number of words whose bigrams are counted


def of_rewrites(rows: Sequence[Row]) -> dict[str, Any]:
    """Count the rewrites and the reasons of failures, with lengths and similarities."""
    done = where(rows, lambda row: row["drop_reason"] is None)
    reasons = Counter(row["drop_reason"] for row in rows if row["drop_reason"] is not None)
    cosines = array("d", (row["sim"] for row in done))
    return {
        "requested": len(rows) - reasons["too long"],
        "parsed": len(done),
        "failed": {reason: reasons[reason] for reason in ("too long", *FAILURES) if reasons[reason]},
        "ratio": fmean(row["n_out_tok"] / row["n_src_tok"] for row in done) if done else None,
        "shorter": fmean(row["n_out_tok"] < row["n_src_tok"] for row in done) if done else None,
        "similarity": fmean(cosines) if done else None,
        "mostly new": fmean(each < INVENTED for each in cosines) if done else None,
        "mostly the same": fmean(each > PARAPHRASED for each in cosines) if done else None,
        "lengths": [[row["n_src_tok"], row["n_out_tok"]] for row in done[:COMPARED]],
    }


def of_sets(rows: Sequence[Row]) -> dict[str, Any]:
    """Describe both sets: their sizes, the overlap of their documents, and the rank correlation of both scores."""
    raw, synthetic = where(rows, lambda row: row["in_raw"]), where(rows, lambda row: row["in_syn"])
    both = sum(row["in_raw"] for row in synthetic)
    scored = where(rows, lambda row: row["syn_score"] is not None)
    return {
        "raw": _lengths(array("Q", column(raw, "n_src_tok"))),
        "synthetic": _lengths(array("Q", column(synthetic, "n_out_tok"))),
        "overlap": both / len(synthetic) if synthetic else None,
        "spearman": spearman(*(array("d", column(scored, name)) for name in ("raw_score", "syn_score"))),
        "bigrams": diversity({"raw": column(raw, "source_text"), "synthetic": column(synthetic, "text")}),
    }


def _lengths(tokens: Sequence[int]) -> dict[str, Any]:
    sizes = {"documents": len(tokens), "tokens": sum(tokens)}
    return sizes | ({"mean": fmean(tokens), "median": median(tokens), "longest": max(tokens)} if tokens else {})


def diversity(texts: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Count distinct word bigrams of each set, over the same number of its first words, at most :data:`WORDS`."""
    words = {
        name: list(islice((word for text in each for word in re.findall(r"\w+", text.lower())), WORDS))
        for name, each in texts.items()
    }
    count = min(map(len, words.values()))
    return {"words": count} | {name: len(set(pairwise(each[:count]))) for name, each in words.items()}


def samples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return some documents for the report: some of the best rewrites, some others, and one failure of each kind."""
    chosen = first_of_each(
        rows,
        key=lambda row: seed_of("shown", row["id"]),
        group=lambda row: row["drop_reason"] or row["in_syn"],
        most=lambda group: SHOWN // 2 if isinstance(group, bool) else 1,
    )
    names = ("id", "source_text", "text", "sim", "raw_score", "syn_score", "in_raw", "in_syn", "drop_reason")
    return [
        {name: row[name] for name in names}
        for group in (True, False, "too long", *FAILURES)
        for row in chosen.get(group, ())
    ]
