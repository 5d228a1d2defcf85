"""REWIRE: rewrite documents that filters would discard, and combine the best rewrites with the best raw text.

Nguyen et al., "Recycling the Web: A Method to Enhance Pre-training Data Quality and Quantity for Language Models", COLM
2025, arXiv 2506.04689.

    documents --1--> pool --2--> the best tenth of the raw text -----------------+
                      |                                                          +--6--> train.jsonl
                      +----3, 4--> rewrites of all of it --5--> the best tenth --+

    1  pool.py       rules, and removal of near-duplicates
    2  quality.py    s_raw: good texts against the pool
    3  guiding.py    the rewriter first reasons about the purpose of the draft, then writes
    4  guiding.py    only the text between the markers is used; failures are counted
    5  quality.py    s_syn: the same good texts against the rewrites, all of which look good compared with raw text
    6  lamella.data  mixture of tokens, with a limit on epochs

The whole pool is rewritten, including good documents: the quality of a text hardly predicts that of its rewrite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from lamella.data import Blend, Document, Documents, Lazy, Sampling, Writer, hold_out
from lamella.data.lazy import at, column, mapped, where
from lamella.data.steps import DocumentGeneration, process_documents
from lamella.errors import CalibrationError
from lamella.evaluate import writing_cost
from lamella.files import Work
from lamella.measure import check_embedder
from lamella.methods.rewire.accounts import of_rewrites, of_sets, samples
from lamella.methods.rewire.guiding import Guide
from lamella.methods.rewire.pool import PoolRules, pool_of, texts_of
from lamella.methods.rewire.quality import Kind, Positives, TrainedFastText, cross_fitted, top
from lamella.methods.rewire.result import Rewritten, ScoredDocuments
from lamella.methods.rewire.steps import AnswerParser, RewriteRequests
from lamella.provenance import describe
from lamella.registry import command, method
from lamella.results import MixedCorpus
from lamella.workers import Workers

Unit = Literal["documents", "tokens"]
RAW, SYNTHETIC = "raw", "synthetic"


@dataclass(frozen=True)
class QualityFilter:
    """The quality classifier, and the fractions that are kept.

    Attributes:
        classifier: hashed, a linear classifier on hashed words, or fasttext, the paper's.
        negatives: maximum number of texts of each class per classifier; 200,000 in the paper.
        keep_raw: fraction of the pool that is kept; a tenth in the paper.
        keep_syn: fraction of the rewrites that is kept; a tenth in the paper.
        by: unit of these fractions: documents or tokens.
        trained: file of a trained fastText model (.bin) that scores raw documents in place of the first classifier,
            such as DCLM's, which the paper uses; None trains one.
        good_label: its label of good texts; DCLM's.
    """

    classifier: Kind = "hashed"
    negatives: Annotated[int, Ge(1)] = 200_000
    keep_raw: Annotated[float, Gt(0), Le(1)] = 0.1
    keep_syn: Annotated[float, Gt(0), Le(1)] = 0.1
    by: Unit = "documents"
    trained: str | None = None
    good_label: str = "__label__hq"

    def open_trained(self) -> TrainedFastText | None:
        """Open the trained classifier of raw documents, if there is one."""
        return None if self.trained is None else TrainedFastText(self.trained, self.good_label)


@dataclass(frozen=True)
class Rewriting:
    """How the pool is rewritten.

    Attributes:
        prompt: guided, with all parts of the paper's prompt; short, with an example for small models; or a .txt file
            with {document}.
        longest: maximum number of tokens of a document, within the rewriter's context length.
        answer: maximum number of tokens of an answer with its reasoning; 8192 in the paper, or the rewriter's limit.
        together: number of documents per task, which are distributed to workers and batched together.
        embedder: embedding of the similarity to the source: minilm, a sentence embedder, or words.
        floor: minimum similarity of a kept rewrite, against invented texts; none in the paper.
    """

    prompt: str = "guided"
    longest: Annotated[int, Ge(1)] = 4096
    answer: Annotated[int, Ge(1)] = 8192
    together: Annotated[int, Ge(1)] = 64
    embedder: Literal["minilm", "words"] = "minilm"
    floor: Annotated[float, Ge(-1), Le(1)] | None = None


RULES, JUDGING, REWRITING, BLEND, WORKERS = PoolRules(), QualityFilter(), Rewriting(), Blend(), Workers()
SAMPLING = Sampling(temperature=1.0, top_p=0.9)  # the paper's values


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
    rules: PoolRules = RULES,
    judging: QualityFilter = JUDGING,
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
        rewriter: a strong instruction model; 70B in the paper.
        positives: good texts, such as answers to instructions and explanations; OpenHermes 2.5 and r/ExplainLikeImFive
            in the paper.
        rules: rules for the documents of the pool.
        judging: the quality classifier, and the fractions that are kept.
        rewriting: how the pool is rewritten.
        sampling: sampling of the rewriter; the paper's values.
        blend: mixture of raw text and rewrites for training; 0.4 of rewrites for the paper's 3B model.
        workers: where tasks run; the machines of a cluster need access to the output folder.
        work: folder from which an interrupted run resumes; nothing is written twice.
        seed: random seed.

    Returns:
        Every document of the pool with its rewrite, both scores and its set, a mixture to train on, and statistics.

    Raises:
        CalibrationError: for a pool of fewer than two documents, or no positives.
        MethodError: for impossible fractions, or missing workers.
        LamellaError: for a rewriter that cannot be opened or does not answer.
    """
    workers.check()
    judging.open_trained()  # so that a model that cannot be used is refused at once
    guide = Guide.open(rewriting.prompt)
    check_embedder(rewriting.embedder)
    training, held_out = hold_out(documents, blend.held_out, seed)
    depends = {  # not on the selection: with the same folder, other fractions need no new rewrites
        "documents": describe(documents), "rewriter": rewriter.describe(), "prompt": guide.digest, "seed": seed,
        "held_out": blend.held_out, **asdict(rules), **asdict(replace(rewriting, floor=None)), **asdict(sampling),
    }  # fmt: skip
    folder = work.directory(hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12])

    pool, removed = pool_of(training, rules, folder / "minhash", workers)
    if len(pool) < 2:
        raise CalibrationError(
            f"{len(pool)} of {len(training)} documents are in the pool ({_describe(removed)}): give more documents, "
            "or change the rules"
        )

    generation = DocumentGeneration(rewriter, sampling, folder)
    requests = RewriteRequests(rewriter, guide, rewriting.longest, rewriting.answer, seed)
    parser = AnswerParser(rewriter, rewriting.embedder)
    written = process_documents(pool, requests, generation, parser, rewriting.together, workers)

    rows = select_best(written, texts_of(positives), judging, rewriting.floor, seed)
    sets = sets_of(rows)
    train, mixture = blend.mix(sets, rewriter, seed)
    return MixedCorpus.of(
        rows,
        documents,
        held_out,
        train,
        mixture,
        parquet=blend.parquet,
        notes=notes(sets),
        pool={"documents": len(pool), "excluded": removed},
        rewrites=of_rewrites(rows),
        sets=of_sets(rows),
        cost=writing_cost(rewriter, blend.student, rows, sets[SYNTHETIC], mixture, generation.seconds),
        samples=samples(rows),
    )


@command("rewire", "score", on="any")
def score(
    documents: Documents,
    positives: Positives | Documents | None = None,
    *,
    classifier: Kind = "hashed",
    negatives: Annotated[int, Ge(1)] = 200_000,
    trained: str | None = QualityFilter.trained,
    good_label: str = QualityFilter.good_label,
    seed: int = 0,
) -> ScoredDocuments:
    """Score the similarity of each document to good texts: step 2 alone, a quality filter for any pool.

    Args:
        documents: the pool, which is its own negatives: each half is scored by a classifier trained on the other half.
        positives: good texts; a trained classifier needs none.
        classifier: hashed, a linear classifier on hashed words, or fasttext, the paper's.
        negatives: maximum number of texts of each class per classifier.
        trained: file of a trained fastText model (.bin) that scores the documents, such as DCLM's, the paper's.
        good_label: its label of good texts; DCLM's.
        seed: random seed of the halves.

    Raises:
        CalibrationError: for a pool of fewer than two documents, no positives, or a model that cannot be used.
    """
    ids, texts = mapped(documents, lambda document: document.id), texts_of(documents)
    if trained is not None:
        scores = TrainedFastText(trained, good_label)(texts)
    elif positives is None:
        raise CalibrationError("there are no good texts: give positives, or trained, a fastText model")
    elif len(documents) < 2:
        raise CalibrationError(f"{len(documents)} document: give at least 2, since each half is scored by the other")
    else:
        scores = cross_fitted(texts_of(positives), ids, texts, negatives, classifier, seed)

    def row(number: int) -> dict[str, Any]:
        return {"id": ids[number], "text": texts[number], "score": round(float(scores[number]), 6)}

    tenths = {
        f"{100 * fraction:.0f} %": float(np.quantile(scores, fraction)) for fraction in (0.1, 0.25, 0.5, 0.75, 0.9)
    }
    return ScoredDocuments(
        items=Lazy(range(len(documents)), row),
        findings={"documents": len(documents), "scores": tenths},
        notes=documents.broken.note(),
    )


@command("rewire", "select", on="any")
def select(
    rewritten: Rewritten,
    positives: Positives | Documents,
    *,
    judging: QualityFilter = JUDGING,
    floor: Annotated[float, Ge(-1), Le(1)] | None = Rewriting.floor,
    synthetic: Annotated[float, Ge(0), Le(1)] = Blend.synthetic,
    epochs: Annotated[float, Gt(0)] = Blend.epochs,
    tokens: Annotated[int, Ge(1)] | None = Blend.tokens,
    parquet: bool = Blend.parquet,
    seed: int = 0,
) -> MixedCorpus:
    """Choose again among the rewrites of an earlier run: steps 2, 5 and 6, without a rewriter.

    Args:
        rewritten: the result of the earlier run; it is not changed.
        positives: good texts.
        judging: the quality classifier, and the fractions that are kept.
        floor: minimum similarity of a kept rewrite, against invented texts; none in the paper.
        synthetic: fraction of rewritten tokens among the tokens that are seen, as the rewriter's tokenizer counts them.
        epochs: maximum number of passes over one source; 4 in the paper.
        tokens: number of tokens that are seen; if omitted, each source is seen once, as far as ``epochs`` allows.
        parquet: write data.parquet in addition to data.jsonl.
        seed: random seed.

    Returns:
        What the earlier run would have written with these settings, but for the cost of rewriting.

    Raises:
        CalibrationError: for fewer than two documents, or no positives.
        MethodError: for impossible fractions.
    """
    if len(rewritten) < 2:
        raise CalibrationError(f"{len(rewritten)} document: give at least 2, since each half is scored by the other")
    rows = select_best(rewritten, texts_of(positives), judging, floor, seed)
    sets, blend = sets_of(rows), Blend(synthetic=synthetic, epochs=epochs, tokens=tokens)
    train, mixture = blend.mix_counted(sets, lambda row: row["n_out_tok"], seed)
    return MixedCorpus.of(
        rows,
        Documents(mapped(rows, lambda row: Document(row["id"], row["source_text"]))),
        rewritten.held_out,
        train,
        mixture,
        parquet=parquet,
        notes=notes(sets),
        rewrites=of_rewrites(rows),
        sets=of_sets(rows),
        samples=samples(rows),
    )


def sets_of(rows: Sequence[dict[str, Any]]) -> dict[str, Sequence[dict[str, Any]]]:
    """Return the documents of both sets, with ``id``, ``text`` and its number of tokens, ``n_out_tok``.

    Args:
        rows: one row per document, from :func:`select_best`.
    """
    raw = where(rows, lambda row: row["in_raw"])

    def source(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "text": row["source_text"], "n_out_tok": row["n_src_tok"]}

    return {RAW: mapped(raw, source), SYNTHETIC: where(rows, lambda row: row["in_syn"])}


def notes(sets: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Return a sentence for the report if there is no synthetic text."""
    return [] if sets[SYNTHETIC] else ["No rewrite is kept, so the mixture is raw text only."]


def select_best(
    rows: Sequence[dict[str, Any]], good: Sequence[str], judging: QualityFilter, floor: float | None, seed: int
) -> Lazy[dict[str, Any]]:
    """Run steps 2 and 5, and return the rows with both scores and the set of each document.

    The negatives of the first classifier are raw documents, unless it is given, those of the second one rewrites.

    Args:
        rows: one row per document.
        good: good texts.
        judging: the quality classifier, and the fractions that are kept.
        floor: minimum similarity of a kept rewrite, or None.
        seed: random seed.
    """
    sources, trained = column(rows, "source_text"), judging.open_trained()
    if trained is not None:
        raw = trained(sources)
    else:
        raw = cross_fitted(good, column(rows, "id"), sources, judging.negatives, judging.classifier, seed)
    raw_scores = raw.round(6).tolist()
    sizes = column(rows, "n_src_tok") if judging.by == "tokens" else [1] * len(rows)
    in_raw = set(top(raw_scores, column(rows, "id"), sizes, judging.keep_raw * sum(sizes)))

    kept = where(rows, lambda row: row["drop_reason"] is None)
    synthetic, in_synthetic = dict[int, float](), set[int]()
    if len(kept) > 1:
        ids, texts = column(kept, "id"), column(kept, "text")
        scores = cross_fitted(good, ids, texts, judging.negatives, judging.classifier, seed).round(6).tolist()
        synthetic = dict(zip(kept.entries, scores, strict=True))
        sizes = column(kept, "n_out_tok") if judging.by == "tokens" else [1] * len(kept)
        eligible = [n for n, row in enumerate(kept) if floor is None or row["sim"] >= floor]
        best = top(at(scores, eligible), at(ids, eligible), at(sizes, eligible), judging.keep_syn * sum(sizes))
        in_synthetic = {kept.entries[eligible[index]] for index in best}

    def row(number: int) -> dict[str, Any]:
        return rows[number] | {
            "raw_score": raw_scores[number],
            "syn_score": synthetic.get(number),
            "in_raw": number in in_raw,
            "in_syn": number in in_synthetic,
        }

    return Lazy(range(len(rows)), row)


def _describe(removed: dict[str, int]) -> str:
    return ", ".join(f"{why}: {count}" for why, count in removed.items()) or "none was excluded"
