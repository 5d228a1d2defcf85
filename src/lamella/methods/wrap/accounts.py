"""What became of all passages and rephrases, counted: kept and dropped is what was generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lamella.data import Document, seed_of
from lamella.measure import Embedder, similarities
from lamella.methods.wrap.cleaning import REASONS

Row = Mapping[str, Any]
COMPARED = 200  # kept rows whose lengths are drawn, and whose similarity is compared with that of strangers
SHOWN = 6  # kept rows that the page shows


def of_passages(rows: Sequence[Row], skipped: Sequence[Row]) -> dict[str, int]:
    """How many passages were rephrased, and how many were not, for which reason."""
    why = Counter(row["skipped"] for row in skipped)
    asked = {(row["id"], row["chunk_idx"]) for row in rows}
    return {"rephrased": len(asked), "too short": why["short"], "of evaluations": why["evaluation"]}


def of_style(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows of one style were generated, kept, and dropped for which reason; lengths of kept ones."""
    kept = [row for row in rows if row["kept"]]
    reasons = Counter(row["drop_reason"] for row in rows if not row["kept"])
    return {
        "generated": len(rows),
        "kept": len(kept),
        "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "kept tokens": sum(row["n_out_tok"] for row in kept),
        "ratio": fmean(row["n_out_tok"] / row["n_src_tok"] for row in kept) if kept else None,
        "lengths": [[row["n_src_tok"], row["n_out_tok"]] for row in kept[:COMPARED]],
    }


def of_similarity(rows: Sequence[Row], documents: Sequence[Document], embedder: Embedder) -> dict[str, Any]:
    """The mean cosine of kept rephrases to their own passage and to another's, and of both halves of a document."""
    kept = [row for row in rows if row["kept"]][:COMPARED]
    cut = [(each.text, len(each.text) // 2) for each in documents[:COMPARED]]
    halves = similarities(embedder, [text[:half] for text, half in cut], [text[half:] for text, half in cut])
    said = {"halves": float(halves.mean()) if len(halves) else None, "embedder": embedder}
    if not kept:
        return {"own": None, "another": None} | said
    half = len(kept) // 2  # far enough away to be of another document, as a rule
    others = [kept[(place + half) % len(kept)]["source_text"] for place in range(len(kept))]
    strangers = similarities(embedder, others, [row["text"] for row in kept])
    own = fmean(row["sim"] for row in kept)
    return {"own": own, "another": float(strangers.mean()) if half else None} | said


def samples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Some rows to look at: kept ones, and one that was dropped for each reason."""
    drawn = sorted(rows, key=lambda row: seed_of("shown", row["id"], row["chunk_idx"], row["style"]))
    first = {row["drop_reason"]: row for row in reversed(drawn) if not row["kept"]}
    shown = [row for row in drawn if row["kept"]][:SHOWN] + [first[why] for why in REASONS if why in first]
    return [{name: row[name] for name in ("id", "style", "source_text", "text", "sim", "drop_reason")} for row in shown]
