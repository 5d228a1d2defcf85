"""WRAP: rephrase the web, and train on what it says together with how it says it.

Maini et al., "Rephrasing the Web: A Recipe for Compute and Data-Efficient Language Modeling", ACL 2024, arXiv
2401.16380.

    documents --1--> passages --2, 3--> rephrases --4--> kept | dropped, for a reason
        |            <= 300 tokens      styles                |
        +-------------------- 5: half and half, by tokens ----+--> train.jsonl

    1  chunks.py     cut at paragraphs, else sentences; nothing is lost
    2  styles.py     easy, medium, hard, qa
    3  lamella.data  a frozen rephraser, each (document, passage, style) once
    4  cleaning.py   preambles go; what is no rephrase is dropped and counted
    5  lamella.data  shares of the tokens that are seen, with a limit on epochs

Real text stays in, since rephrases have no typos, slang or boilerplate, and a student of rephrases alone does worse on
text that has. The paper compares at equal training; what generation costs comes on top, and is reported as a share of
it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from lamella.data import Blend, Document, Documents, Sampling, Writer, hold_out, load_text
from lamella.data.steps import DocumentGeneration, process_documents
from lamella.errors import MethodError
from lamella.evaluate import writing_cost
from lamella.files import Work
from lamella.measure import check_embedder
from lamella.methods.wrap.accounts import of_passages, of_similarity, of_style, samples
from lamella.methods.wrap.chunks import passages
from lamella.methods.wrap.cleaning import LEAST, Evaluations, Filters
from lamella.methods.wrap.steps import Cleaned, Cut
from lamella.methods.wrap.styles import REAL, open_styles
from lamella.provenance import describe
from lamella.registry import method
from lamella.results import MixedCorpus
from lamella.workers import Workers


@dataclass(frozen=True)
class Cutting:
    """How documents are cut and shared out.

    Attributes:
        longest: tokens of a passage at most, by the rephraser's tokenizer: the paper's 300, since content is lost
            in longer ones.
        shortest: tokens below which a passage is not rephrased.
        together: documents of one task: what workers share out, and what stands in batches together.
    """

    longest: Annotated[int, Ge(1)] = 300
    shortest: Annotated[int, Ge(1)] = 20
    together: Annotated[int, Ge(1)] = 64


CUTTING, SAMPLING, FILTERS, BLEND, WORKERS = Cutting(), Sampling(), Filters(), Blend(), Workers()


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
    cutting: Cutting = CUTTING,
    sampling: Sampling = SAMPLING,
    filters: Filters = FILTERS,
    blend: Blend = BLEND,
    evaluations: tuple[str, ...] = (),
    workers: Workers = WORKERS,
    work: Work = Work(),
    seed: int = 0,
) -> MixedCorpus:
    """Rephrase documents passage by passage, and mix what is kept with them by tokens.

    Args:
        documents: texts; those that are held out are not rephrased.
        rephraser: a small instruction model is enough, since it only edits: the paper's has 7B, and 1.8B did as well.
        styles: easy, medium, hard, qa, or .txt files that say what is wanted around {passage}.
        cutting: how documents become passages.
        sampling: how the rephraser draws; the paper's numbers are not known.
        filters: what is dropped.
        blend: what is trained on, real text and rephrases.
        evaluations: texts that models will be judged on, such as gsm8k or files, each row, paragraph or line of them by
            itself: what shares words with them is left out, of rephrases and of real text.
        workers: who does the tasks; the machines of a cluster must see the output folder.
        work: where a run that was stopped goes on from; nothing is written twice.
        seed: of what is drawn.

    Returns:
        Every rephrase with its source and whether it is kept, a mixture to train on, and the account of both.

    Raises:
        MethodError: for an unknown style, shares that cannot be had, or workers that are not there.
        LamellaError: for a rephraser that cannot be opened or does not answer.
    """
    workers.check()
    chosen = open_styles(styles)
    _check(cutting)
    check_embedder(filters.embedder)
    judged = Evaluations((text for name in evaluations for text in _texts(name)), filters.ngram)
    learnt, held_out = hold_out(documents, blend.held_out, seed)

    depends = {
        "documents": describe(documents), "rephraser": rephraser.describe(), "seed": seed, "held_out": blend.held_out,
        "styles": [(style.name, style.digest) for style in chosen], "evaluations": judged.digest,
        **asdict(cutting), **asdict(sampling), **asdict(filters),
    }  # fmt: skip
    folder = work.directory(hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12])
    rolled = DocumentGeneration(rephraser, sampling, folder)
    ask = Cut(rephraser, chosen, cutting.longest, cutting.shortest, judged, seed)
    read = Cleaned(rephraser, chosen, filters, judged)
    found = process_documents(learnt, ask, rolled, read, cutting.together, workers)

    rows = [row for row in found if "style" in row]
    skipped = [row for row in found if "skipped" in row]
    kept = [row for row in rows if row["kept"]]
    by_style = {style.name: [row for row in kept if row["style"] == style.name] for style in chosen}
    real = real_rows(learnt, skipped, rephraser, cutting)
    train, mixture = blend.mix({REAL: real} | by_style, rephraser, seed)
    notes = [f"Nothing was kept of style {name}." for name, each in by_style.items() if not each]
    if judged.short:
        notes.append(f"{judged.short} texts of the evaluation sets have fewer than {LEAST} words: none is looked for.")
    return MixedCorpus.of(
        rows,
        documents,
        held_out,
        train,
        mixture,
        parquet=blend.parquet,
        notes=notes,
        passages=of_passages(rows, skipped),
        styles={style.name: of_style([row for row in rows if row["style"] == style.name]) for style in chosen},
        similarity=of_similarity(rows, learnt, filters.embedder),
        cost=writing_cost(rephraser, blend.student, rows, kept, mixture, rolled.seconds),
        samples=samples(rows),
    )


def _check(cutting: Cutting) -> None:
    if cutting.shortest > cutting.longest:
        raise MethodError(
            f"passages of {cutting.shortest} to {cutting.longest} tokens: give a longest not below the shortest"
        )


def _texts(name: str) -> Sequence[str]:
    """What an evaluation set asks, one by one: the rows of a file or of a test split, else paragraphs, else lines."""
    found = load_text(name, "whole" if Path(name).expanduser().is_file() else "test").texts
    if len(found) > 1:
        return found
    paragraphs = re.split(r"\n\s*\n", "".join(found).strip())
    return paragraphs if len(paragraphs) > 1 else paragraphs[0].splitlines()


def real_rows(
    documents: Sequence[Document], skipped: Sequence[dict[str, Any]], writer: Writer, cutting: Cutting
) -> list[dict[str, Any]]:
    """Documents as they are, but for passages that evaluation sets have, too."""
    gone: dict[str, set[int]] = {}
    for row in skipped:
        if row["skipped"] == "evaluation":
            gone.setdefault(row["id"], set()).add(row["chunk_idx"])
    rows = []
    for each in documents:
        parts = passages(each.text, writer.count, cutting.longest) if each.id in gone else [each.text]
        text = "".join(part for place, part in enumerate(parts) if place not in gone.get(each.id, ()))
        rows += [{"id": each.id, "text": text}] if text.strip() else []
    return rows
