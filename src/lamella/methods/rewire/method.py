"""REWIRE: rewrite what filters would throw away, and keep the best of it beside the best raw text.

Nguyen et al., "Recycling the Web: A Method to Enhance Pre-training Data Quality and Quantity for Language Models", COLM
2025, arXiv 2506.04689.

    documents --1--> pool --2--> the best tenth of the raw ----------------------+
                      |                                                          +--6--> train.jsonl
                      +----3, 4--> rewrites of all of it --5--> the best tenth --+

    1  pool.py       rules, and no near-duplicates
    2  quality.py    s_raw: good texts against the pool
    3  guiding.py    the rewriter first reasons about what the draft was for, then writes
    4  guiding.py    only what stands between the markers; a failure is counted
    5  quality.py    s_syn: the same good texts against the rewrites, since against raw text all of them look good
    6  lamella.data  shares of the tokens that are seen, with a limit on epochs

All of the pool is rewritten, also what is good already: how good a text is says next to nothing of its rewrite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from lamella.data import Blend, Documents, Sampling, Writer, hold_out
from lamella.data.steps import DocumentGeneration, process_documents
from lamella.errors import CalibrationError
from lamella.evaluate import writing_cost
from lamella.files import Work
from lamella.measure import check_embedder
from lamella.methods.rewire.accounts import of_rewrites, of_sets, samples
from lamella.methods.rewire.guiding import Guide
from lamella.methods.rewire.pool import Rules, pool_of
from lamella.methods.rewire.quality import Kind, Positives, cross_fitted, top
from lamella.methods.rewire.result import Scored
from lamella.methods.rewire.steps import Guided, Parsed
from lamella.provenance import describe
from lamella.registry import command, method
from lamella.results import MixedCorpus
from lamella.workers import Workers

Unit = Literal["documents", "tokens"]
RAW, SYNTHETIC = "raw", "synthetic"


@dataclass(frozen=True)
class Judging:
    """What is good, and how much of it is kept.

    Attributes:
        classifier: hashed, a linear one on hashed words, or fasttext, the paper's.
        negatives: texts of each class that one classifier takes at most, the first of the good ones; the paper has
            200,000.
        keep_raw, keep_syn: the share of the pool, and of the rewrites, that is kept; the paper's tenths.
        by: what these are shares of: documents or tokens.
    """

    classifier: Kind = "hashed"
    negatives: Annotated[int, Ge(1)] = 200_000
    keep_raw: Annotated[float, Gt(0), Le(1)] = 0.1
    keep_syn: Annotated[float, Gt(0), Le(1)] = 0.1
    by: Unit = "documents"


@dataclass(frozen=True)
class Rewriting:
    """How the pool is rewritten.

    Attributes:
        prompt: guided, with all parts of the paper's; short, for small models; or a .txt file around {document}.
        longest: tokens of a document that is rewritten, at most, as far as the rewriter has room.
        answer: tokens of an answer, with its thinking, at most; the paper's 8192, or what room the rewriter has.
        together: documents of one task: what workers share out, and what stands in batches together.
        embedder: of the similarity to the source: minilm, a sentence embedder, or words.
        floor: the least similarity of a rewrite that may be kept, against invented texts; none in the paper.
    """

    prompt: str = "guided"
    longest: Annotated[int, Ge(1)] = 4096
    answer: Annotated[int, Ge(1)] = 8192
    together: Annotated[int, Ge(1)] = 64
    embedder: Literal["minilm", "words"] = "minilm"
    floor: Annotated[float, Ge(-1), Le(1)] | None = None


RULES, JUDGING, REWRITING, BLEND, WORKERS = Rules(), Judging(), Rewriting(), Blend(), Workers()
SAMPLING = Sampling(temperature=1.0, top_p=0.9)  # the paper's


@method(
    "rewire",
    paper="2506.04689",
    purpose="rewrite",
    on="any",
    brief={"words_least": 1, "held_out": 0.3, "embedder": "words", "together": 2, "answer": 4, "batch": 2},
)
def rewire(
    documents: Documents,
    rewriter: Writer,
    positives: Positives | Documents,
    *,
    rules: Rules = RULES,
    judging: Judging = JUDGING,
    rewriting: Rewriting = REWRITING,
    sampling: Sampling = SAMPLING,
    blend: Blend = BLEND,
    workers: Workers = WORKERS,
    work: Work = Work(),
    seed: int = 0,
) -> MixedCorpus:
    """Rewrite a pool of documents after reasoning about each, and mix the best rewrites with the best raw text.

    Args:
        documents: texts of moderate quality; those that are held out are not rewritten.
        rewriter: a strong instruction model; the paper's has 70B.
        positives: good texts, such as answers to instructions and explanations; the paper has OpenHermes 2.5 and
            r/ExplainLikeImFive.
        rules: what a document must be like to be in the pool.
        judging: what is good, and how much of it is kept.
        rewriting: how the pool is rewritten.
        sampling: how the rewriter draws; the paper's numbers.
        blend: what is trained on, raw text and rewrites; of rewrites the paper has 0.4 for its 3B model.
        workers: who does the tasks; the machines of a cluster must see the output folder.
        work: where a run that was stopped goes on from; nothing is written twice.
        seed: of what is drawn.

    Returns:
        Every document of the pool with its rewrite, both scores and which set it is in, a mixture to train on, and the
        account of all of it.

    Raises:
        CalibrationError: for a pool of fewer than two documents, or no positives.
        MethodError: for shares that cannot be had, or workers that are not there.
        LamellaError: for a rewriter that cannot be opened or does not answer.
    """
    workers.check()
    guide = Guide.open(rewriting.prompt)
    check_embedder(rewriting.embedder)
    learnt, held_out = hold_out(documents, blend.held_out, seed)
    depends = {  # not on what is chosen of it: with the same folder, other shares need no new rewrites
        "documents": describe(documents), "rewriter": rewriter.describe(), "prompt": guide.digest, "seed": seed,
        "held_out": blend.held_out, **asdict(rules), **asdict(replace(rewriting, floor=None)), **asdict(sampling),
    }  # fmt: skip
    folder = work.directory(hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12])

    pool, gone = pool_of(learnt, rules, folder / "minhash")
    if len(pool) < 2:
        raise CalibrationError(
            f"{len(pool)} of {len(learnt)} documents are in the pool ({_told(gone)}): give more, or change the rules"
        )

    rolled = DocumentGeneration(rewriter, sampling, folder)
    ask = Guided(rewriter, guide, rewriting.longest, rewriting.answer, seed)
    read = Parsed(rewriter, rewriting.embedder)
    rows = process_documents(pool, ask, rolled, read, rewriting.together, workers)

    judge(rows, [each.text for each in positives], judging, rewriting.floor, seed)
    kept = [row for row in rows if row["in_syn"]]
    raw = [{"id": row["id"], "text": row["source_text"]} for row in rows if row["in_raw"]]
    train, mixture = blend.mix({RAW: raw, SYNTHETIC: kept}, rewriter, seed)
    return MixedCorpus.of(
        rows,
        documents,
        held_out,
        train,
        mixture,
        parquet=blend.parquet,
        notes=[] if kept else ["No rewrite is kept, so the mixture is raw text alone."],
        pool={"documents": len(pool), "left out": gone},
        rewrites=of_rewrites(rows),
        sets=of_sets(rows),
        cost=writing_cost(rewriter, blend.student, rows, kept, mixture, rolled.seconds),
        samples=samples(rows),
    )


@command("rewire", "score", on="any")
def score(
    documents: Documents,
    positives: Positives | Documents,
    *,
    classifier: Kind = "hashed",
    negatives: Annotated[int, Ge(1)] = 200_000,
    seed: int = 0,
) -> Scored:
    """Say of each document how much it is like good ones: step 2 alone, a filter for any pool.

    Args:
        documents: the pool, which is its own negatives: each half is scored by a classifier fitted on the other.
        positives: good texts.
        classifier: hashed, a linear one on hashed words, or fasttext, the paper's.
        negatives: texts of each class that one classifier takes at most, the first of the good ones.
        seed: of the halves.

    Raises:
        CalibrationError: for a pool of fewer than two documents, or no positives.
    """
    if len(documents) < 2:
        raise CalibrationError(f"{len(documents)} document: give at least 2, of which each half is scored by the other")
    ids, texts = [each.id for each in documents], [each.text for each in documents]
    scores = cross_fitted([each.text for each in positives], ids, texts, negatives, classifier, seed)
    rows = [
        {"id": each.id, "text": each.text, "score": round(value, 6)}
        for each, value in zip(documents, scores.tolist(), strict=True)
    ]
    tenths = {f"{100 * share:.0f} %": float(np.quantile(scores, share)) for share in (0.1, 0.25, 0.5, 0.75, 0.9)}
    return Scored(items=rows, findings={"documents": len(rows), "scores": tenths}, notes=documents.broken.note())


def judge(
    rows: Sequence[dict[str, Any]], good: Sequence[str], judging: Judging, floor: float | None, seed: int
) -> None:
    """Steps 2 and 5, into the rows: both scores, and which set each document is in.

    The negatives of the first classifier are raw documents, those of the second one rewrites.
    """
    for row in rows:
        row |= {"raw_score": None, "syn_score": None, "in_raw": False, "in_syn": False}
    _judge(rows, "raw", "source_text", "n_src_tok", good, judging, judging.keep_raw, seed)
    rewritten = [row for row in rows if row["drop_reason"] is None]
    if len(rewritten) > 1:
        _judge(rewritten, "syn", "text", "n_out_tok", good, judging, judging.keep_syn, seed, floor)


def _judge(
    rows: Sequence[dict[str, Any]],
    which: str,
    text: str,
    tokens: str,
    good: Sequence[str],
    judging: Judging,
    share: float,
    seed: int,
    floor: float | None = None,
) -> None:
    ids = [row["id"] for row in rows]
    scores = cross_fitted(good, ids, [row[text] for row in rows], judging.negatives, judging.classifier, seed)
    for row, value in zip(rows, scores.tolist(), strict=True):
        row[f"{which}_score"] = round(value, 6)
    sizes = [row[tokens] if judging.by == "tokens" else 1 for row in rows]
    able = [n for n, row in enumerate(rows) if floor is None or row["sim"] >= floor]
    wanted = share * sum(sizes)
    for place in top(
        [rows[n][f"{which}_score"] for n in able], [ids[n] for n in able], [sizes[n] for n in able], wanted
    ):
        rows[able[place]][f"in_{which}"] = True


def _told(gone: dict[str, int]) -> str:
    return ", ".join(f"{why}: {count}" for why, count in gone.items()) or "none was refused"
