"""WRAP: rephrase web documents with an instruction model, and train on both versions.

Maini et al., "Rephrasing the Web: A Recipe for Compute and Data-Efficient Language Modeling", ACL 2024, arXiv
2401.16380.

    documents --1--> passages --2, 3--> rephrases --4--> kept | dropped, with a reason
        |            <= 300 tokens      styles                |
        +-------------------- 5: half and half, by tokens ----+--> train.jsonl

    1  chunks.py     split at paragraphs, otherwise sentences; no text is lost
    2  styles.py     easy, medium, hard, qa
    3  lamella.data  a frozen rephraser, each (document, passage, style) once
    4  cleaning.py   preambles are removed; outputs that are no rephrases are dropped and counted
    5  lamella.data  fractions of the trained tokens, with a limit on epochs

Real text is kept in the mixture: rephrases contain no typos, slang or boilerplate, and a student trained on rephrases
only is worse on text that does. The paper compares at equal training; the cost of generation is additional, and is
reported relative to it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from lamella.data import Blend, Document, Documents, Sampling, Writer, hold_out, load_text
from lamella.data.lazy import grouped, mapped, where
from lamella.data.steps import DocumentGeneration, process_documents
from lamella.errors import MethodError
from lamella.evaluate import writing_cost
from lamella.files import Work
from lamella.measure import check_embedder
from lamella.methods.wrap.accounts import passage_counts, samples, similarity_statistics, style_statistics
from lamella.methods.wrap.chunks import passages
from lamella.methods.wrap.cleaning import MIN_WORDS, Evaluations, Filters
from lamella.methods.wrap.steps import CleanRephrases, PassageRequests
from lamella.methods.wrap.styles import REAL, open_styles
from lamella.provenance import describe
from lamella.registry import method
from lamella.results import MixedCorpus
from lamella.workers import Workers


@dataclass(frozen=True)
class PassageSettings:
    """How documents are split into passages and distributed.

    Attributes:
        longest: maximum tokens per passage, by the rephraser's tokenizer: the paper's 300, since content is lost in
            longer ones.
        shortest: minimum tokens of a passage to be rephrased.
        together: documents per task, which is the unit of distribution to workers and of batching.
    """

    longest: Annotated[int, Ge(1)] = 300
    shortest: Annotated[int, Ge(1)] = 20
    together: Annotated[int, Ge(1)] = 64


PASSAGES, SAMPLING, FILTERS, BLEND, WORKERS = PassageSettings(), Sampling(), Filters(), Blend(), Workers()


@method(
    "wrap",
    paper="2401.16380",
    purpose="rewrite",
    on="any",
    brief={"longest": 24, "shortest": 2, "together": 2, "held_out": 0.3, "embedder": "words", "batch": 2},
)
def wrap(
    documents: Documents,
    rephraser: Writer,
    *,
    styles: Annotated[tuple[str, ...], MinLen(1)] = ("medium",),
    cutting: PassageSettings = PASSAGES,
    sampling: Sampling = SAMPLING,
    filters: Filters = FILTERS,
    blend: Blend = BLEND,
    evaluations: tuple[str, ...] = (),
    workers: Workers = WORKERS,
    work: Work = Work(),
    seed: int = 0,
) -> MixedCorpus:
    """Rephrase documents passage by passage, and mix the kept rephrases with them by tokens.

    Args:
        documents: the texts; held-out ones are not rephrased.
        rephraser: a small instruction model is sufficient, since it only edits: the paper uses 7B, and 1.8B was as
            good.
        styles: easy, medium, hard, qa, or .txt files with an instruction that contains {passage}.
        cutting: how documents are split into passages.
        sampling: sampling settings of the rephraser; the paper's values are unknown.
        filters: the filters of rephrases.
        blend: the mixture of real text and rephrases.
        evaluations: evaluation sets, such as gsm8k or files; each row, paragraph or line is one text. Rephrases and
            real text that share words with them are removed.
        workers: the workers; the machines of a cluster must share the output folder.
        work: the directory from which an interrupted run resumes; nothing is generated twice.
        seed: random seed.

    Returns:
        Every rephrase with its source and whether it is kept, a mixture to train on, and statistics of both.

    Raises:
        MethodError: for an unknown style, impossible fractions, or unavailable workers.
        LamellaError: for a rephraser that cannot be opened or does not answer.
    """
    workers.check()
    chosen = open_styles(styles)
    _check(cutting)
    check_embedder(filters.embedder)
    evaluation_texts = Evaluations((text for name in evaluations for text in _texts(name)), filters.ngram)
    training, held_out = hold_out(documents, blend.held_out, seed)

    dependencies = {
        "documents": describe(documents), "rephraser": rephraser.describe(), "seed": seed, "held_out": blend.held_out,
        "styles": [(style.name, style.digest) for style in chosen], "evaluations": evaluation_texts.digest,
        **asdict(cutting), **asdict(sampling), **asdict(filters),
    }  # fmt: skip
    folder = work.directory(hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:12])
    generation = DocumentGeneration(rephraser, sampling, folder)
    requests = PassageRequests(rephraser, chosen, cutting.longest, cutting.shortest, evaluation_texts, seed)
    clean = CleanRephrases(rephraser, chosen, filters, evaluation_texts)
    results = process_documents(training, requests, generation, clean, cutting.together, workers)

    of_group = grouped(results, lambda row: (row.get("style"), row.get("kept", False)))
    skipped, rows = of_group(lambda group: group[0] is None), of_group(lambda group: group[0] is not None)
    kept = of_group(lambda group: group[1])
    by_style = {style.name: of_group(partial(operator.eq, (style.name, True))) for style in chosen}
    real = real_rows(training, skipped, rephraser, cutting)
    train, mixture = blend.mix({REAL: real, **by_style}, rephraser, seed)
    notes = [f"No rephrase of style {name} was kept." for name, each in by_style.items() if not each]
    if evaluation_texts.short:
        notes.append(
            f"{evaluation_texts.short} texts of the evaluation sets have fewer than {MIN_WORDS} words and are ignored."
        )
    return MixedCorpus.of(
        rows,
        documents,
        held_out,
        train,
        mixture,
        parquet=blend.parquet,
        notes=notes,
        passages=passage_counts(rows, skipped),
        styles=style_statistics(rows, list(by_style)),
        similarity=similarity_statistics(rows, training, filters.embedder),
        cost=writing_cost(rephraser, blend.student, rows, kept, mixture, generation.seconds),
        samples=samples(rows),
    )


def _check(cutting: PassageSettings) -> None:
    if cutting.shortest > cutting.longest:
        raise MethodError(
            f"passages of {cutting.shortest} to {cutting.longest} tokens: longest must be at least shortest"
        )


def _texts(name: str) -> Sequence[str]:
    """Return the texts of an evaluation set: rows of a file or of a test split, else paragraphs, else lines."""
    results = load_text(name, "whole" if Path(name).expanduser().is_file() else "test").texts
    if len(results) > 1:
        return results
    paragraphs = re.split(r"\n\s*\n", "".join(results).strip())
    return paragraphs if len(paragraphs) > 1 else paragraphs[0].splitlines()


def real_rows(
    documents: Sequence[Document], skipped: Sequence[dict[str, Any]], writer: Writer, cutting: PassageSettings
) -> Sequence[dict[str, Any]]:
    """Return the original documents, without passages that overlap with evaluation sets.

    Args:
        documents: the documents.
        skipped: the rows of skipped passages.
        writer: the rephraser.
        cutting: how documents are split into passages.
    """
    removed: dict[str, set[int]] = {}
    for row in skipped:
        if row["skipped"] == "evaluation":
            removed.setdefault(row["id"], set()).add(row["chunk_idx"])

    def rest(each: Document) -> dict[str, Any]:
        parts = passages(each.text, writer.count, cutting.longest) if each.id in removed else [each.text]
        text = "".join(part for index, part in enumerate(parts) if index not in removed.get(each.id, ()))
        return {"id": each.id, "text": text}

    return where(mapped(documents, rest), lambda row: bool(row["text"].strip()))
