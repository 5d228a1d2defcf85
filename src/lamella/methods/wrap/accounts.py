"""Statistics of all passages and rephrases; the numbers of kept and dropped rephrases add up to the generated ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from statistics import fmean
from typing import Any

from lamella.data import Document, seed_of
from lamella.data.lazy import first_of_each
from lamella.measure import Embedder, similarities
from lamella.methods.wrap.cleaning import REASONS

Row = Mapping[str, Any]
MAX_COMPARED = 200  # kept rows for the figure of lengths and for the comparison with other passages
MAX_SHOWN = 6  # kept rows on the page


def passage_counts(rows: Sequence[Row], skipped: Sequence[Row]) -> dict[str, int]:
    """Count the passages that were rephrased, and those that were skipped by reason.

    Args:
        rows: the rows of all rephrases.
        skipped: the rows of skipped passages.
    """
    reasons = Counter(row["skipped"] for row in skipped)
    rephrased = groupby(rows, lambda row: (row["id"], row["chunk_idx"]))  # the styles of a passage are adjacent
    return {
        "rephrased": sum(1 for _ in rephrased),
        "too short": reasons["short"],
        "of evaluations": reasons["evaluation"],
    }


def style_statistics(rows: Sequence[Row], styles: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Count the generated, kept and dropped rows of each style by reason, with the lengths of the first kept ones.

    Args:
        rows: the rows of all rephrases.
        styles: the names of the styles.
    """
    reasons = {name: Counter[str | None]() for name in styles}
    tokens, ratios = Counter[str](), Counter[str]()  # sums over kept rows
    lengths: dict[str, list[list[int]]] = {name: [] for name in styles}
    for row in rows:
        name, source, written = row["style"], row["n_src_tok"], row["n_out_tok"]
        reasons[name][row["drop_reason"]] += 1
        if row["kept"]:
            tokens[name] += written
            ratios[name] += written / source
            if len(lengths[name]) < MAX_COMPARED:
                lengths[name].append([source, written])
    return {
        name: {
            "generated": counts.total(),
            "kept": counts[None],
            "dropped": {reason: counts[reason] for reason in REASONS if counts[reason]},
            "kept tokens": tokens[name],
            "ratio": ratios[name] / counts[None] if counts[None] else None,
            "lengths": lengths[name],
        }
        for name, counts in reasons.items()
    }


def similarity_statistics(rows: Sequence[Row], documents: Sequence[Document], embedder: Embedder) -> dict[str, Any]:
    """Compute mean cosines of kept rephrases to their own passage and to another, and of both halves of documents.

    Args:
        rows: the rows of all rephrases.
        documents: the documents.
        embedder: the embedder.
    """
    kept = list(islice((row for row in rows if row["kept"]), MAX_COMPARED))
    texts = [(each.text, len(each.text) // 2) for each in documents[:MAX_COMPARED]]
    halves = similarities(embedder, [text[:half] for text, half in texts], [text[half:] for text, half in texts])
    fixed = {"halves": float(halves.mean()) if len(halves) else None, "embedder": embedder}
    if not kept:
        return {"own": None, "another": None} | fixed
    half = len(kept) // 2  # usually far enough to belong to another document
    others = [kept[(index + half) % len(kept)]["source_text"] for index in range(len(kept))]
    other_similarities = similarities(embedder, others, [row["text"] for row in kept])
    own = fmean(row["sim"] for row in kept)
    return {"own": own, "another": float(other_similarities.mean()) if half else None} | fixed


def samples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return some rows to inspect: kept ones, and one dropped row for each reason."""
    chosen = first_of_each(
        rows,
        key=lambda row: seed_of("shown", row["id"], row["chunk_idx"], row["style"]),
        group=lambda row: row["drop_reason"],
        most=lambda reason: MAX_SHOWN if reason is None else 1,
    )
    names = ("id", "style", "source_text", "text", "sim", "drop_reason")
    return [{name: row[name] for name in names} for reason in (None, *REASONS) for row in chosen.get(reason, ())]
