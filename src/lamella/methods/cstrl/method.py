"""CSTRL: learn to summarise in sequence: first which sentences matter, then summaries, without losing the first.

Naznin et al., "CSTRL: Context-Driven Sequential Transfer Learning for Abstractive Radiology Report Summarization",
Findings of ACL 2025, arXiv 2503.05750.

    1  gap sentences   mask the sentences of each source that overlap most with its summary       gaps.py
    2                  learn to write them back                                                   recipe.py
    3  F               the importance of every parameter there, at theta*                         anchor.py
    4  summaries       CE(theta) + lambda_e sum_i F_i (theta_i - theta*_i)^2
                       lambda_e = max( 0.2, 0.9 (1 - e/E) ), once an epoch
    5  distillation    to a student of an eighth of the size and less: `cstrl distil`             student.py

Gap sentences come from the training pairs alone: the summary decides what is masked. Sources without a summary can be
given beside them; their sentences are scored against each other.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from lamella.files import Work
from lamella.measure import Fisher
from lamella.methods.cstrl.anchor import Anchor, Anchored, read_fisher, sites_of_parameters
from lamella.methods.cstrl.gaps import Gap, GapData, Gaps, gap_sentences, spans
from lamella.methods.cstrl.judge import Judge
from lamella.methods.cstrl.recipe import (
    GAP_TRAINING,
    LEAST,
    TRAINING,
    Course,
    GapTraining,
    Lengths,
    Reading,
    Stored,
    fill_gaps,
    importance_at,
    lasting,
    summarise,
)
from lamella.methods.cstrl.summaries import Reports, Splits, Summaries
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.results import Trained
from lamella.signature import Split
from lamella.stack import Model
from lamella.train import TrainConfig, TrainingLog

FAINT = 1e-3  # of the task's gradient: an anchor whose gradient is never larger does nothing
KEPT, GAINED = "gap sentences", "summaries"  # what is watched on held-out pairs


@method(
    "cstrl",
    paper="2503.05750",
    purpose="adapt",
    brief={
        "gap_epochs": 2, "gap_batch": 4, "batch": 4, "fisher_batch": 4, "normalize": "mean",
        "summary_length": 16, "gap_length": 24, "judged": 2,
    },
)  # fmt: skip
def cstrl(
    model: Model,
    pairs: Summaries,
    reports: Reports | None = None,
    test: Annotated[Summaries | None, Split("test")] = None,
    *,
    stored: Stored = Stored(),  # noqa: B008, frozen
    gaps: Gaps = Gaps(),  # noqa: B008, frozen
    filling: GapTraining = GapTraining(),  # noqa: B008, frozen
    anchor: Anchor = Anchor(),  # noqa: B008, frozen
    lengths: Lengths = Lengths(),  # noqa: B008, frozen
    course: Course = Course(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Learn to summarise in sequence: which sentences matter, then summaries, held by a Fisher-weighted anchor.

    Example: lamella run cstrl t5-small --pairs reports.jsonl -o summarising

    Args:
        model: an encoder-decoder, such as T5, or a decoder; it is not changed.
        pairs: sources with their summaries. Without a test, a tenth becomes one; a tenth of the rest is watched.
        reports: further sources, without summaries, for gap sentences alone.
        test: pairs to judge by.
        stored: files of importances.
        gaps: which sentences are masked.
        filling: how gap sentences are learnt; whatever is not said here is as in ``config``.
        anchor: how strongly the model is held.
        lengths: what is read and written.
        course: how summaries are learnt, and judged.
        config: of the training on summaries. Its seed is that of the splits, too.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The model, its losses, and by epoch what the anchor did and how far each layer has moved.

    Raises:
        MethodError: for a model that writes no text, or importances of other weights.
        CalibrationError: for sources of one sentence only.
        TrainingError: when training cannot start or stay finite.
    """
    splits = Splits.of(pairs, test, config.seed)
    reading = Reading(model, pairs.tokenizer)
    given = None if stored.fisher is None else read_fisher(stored.fisher, model)
    found = gap_sentences(splits.train, reports or (), gaps, config.seed)
    sides = _held_out(splits, reading, gaps, lengths, course.prefix, config.seed)
    judge = Judge(reading, splits.test[: course.judged], course.prefix, lengths)
    folder = work.directory()

    # Stages 2 and 3: the gap-sentence solution theta*, and F there.
    start, log = model, None
    samples = reading.gaps(found.gaps, lengths.gap_length)
    if given is None:
        filled = replace(config, lr=filling.gap_lr, batch=filling.gap_batch, steps=None, accumulate=1, eval_every=None)
        filled = lasting(filled, len(samples), filling.gap_epochs)
        start, log = fill_gaps(model, samples, {KEPT: sides[KEPT]}, filled, folder / "gaps")
    measured = None
    if anchor.importance == "fisher" or stored.save_fisher is not None:
        measured = given or importance_at(start, samples, anchor, folder)
    if stored.save_fisher is not None and measured is not None:
        measured.save(stored.save_fisher)

    # Stage 4: summaries, held to theta*.
    learnt = reading.samples(splits.train, course.prefix, lengths.source_length, lengths.summary_length)
    held = measured if anchor.importance == "fisher" else None
    trained, trace, hook = summarise(
        start, held, learnt, sides, anchor, lasting(config, len(learnt), course.epochs), folder / "summaries"
    )

    scores = {
        "the model as it was": judge.of(model),
        **({} if start is model else {"after gap sentences": judge.of(start)}),
        "after summaries": judge.of(trained),
        "one constant answer": judge.constant(splits.train),
    }
    findings = {
        "gaps": found.described(),
        "gap curve": _curve(log),
        "importance": _mass(hook, start, measured),
        "epochs": hook.rows,
        "watched": [{"step": point.step, **point.parts} for point in trace.held_out],
        "scores": scores,
    }
    return Trained(
        stack=trained,
        plan=Plan(model=ModelReference.of(trained)),
        log=trace,
        findings=findings,
        notes=_notes(found, splits, hook, scores),
        files={"gaps.jsonl": _written(found.gaps)},
    )


@command(
    "cstrl",
    "gaps",
    brief={"batch": 4, "gap_length": 24, "fisher_batch": 4},
)
def fill(
    model: Model,
    pairs: Summaries,
    reports: Reports | None = None,
    test: Annotated[Summaries | None, Split("test")] = None,
    *,
    save_fisher: Path | None = None,
    gaps: Gaps = Gaps(),  # noqa: B008, frozen
    fisher_batch: Annotated[int, Ge(1)] = Anchor.fisher_batch,
    gap_length: Annotated[int, Ge(LEAST)] = Lengths.gap_length,
    epochs: Annotated[int, Ge(1)] = GapTraining.gap_epochs,
    config: TrainConfig = GAP_TRAINING,
    work: Work = Work(),
) -> Trained:
    """Learn gap sentences alone, and measure what matters for them: the first three stages.

    Example: lamella run cstrl gaps t5-small --pairs reports.jsonl --save-fisher fisher.safetensors -o filled
    lamella run cstrl filled --pairs reports.jsonl --fisher fisher.safetensors -o summarising

    Args:
        model: an encoder-decoder or a decoder; it is not changed.
        pairs: sources with their summaries, parted as for summaries: with the same seed, nothing is learnt here of
            what is watched and tested there.
        reports: further sources, without summaries.
        test: pairs that summaries will be judged by; a tenth of the others is set aside for them when left out.
        save_fisher: keep the importances at the end in this file.
        gaps: which sentences are masked.
        fisher_batch: samples whose mean gradient is squared.
        gap_length: tokens of a source with gaps, and of what stood there.
        epochs: passes, where ``config`` has no steps.
        config: of the training.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The model, with the sum of its importances by layer.
    """
    splits = Splits.of(pairs, test, config.seed)
    reading, lengths = Reading(model, pairs.tokenizer), Lengths(gap_length=gap_length)
    found = gap_sentences(splits.train, reports or (), gaps, config.seed)
    samples, folder = reading.gaps(found.gaps, gap_length), work.directory()
    watched = _gap_samples(splits, reading, gaps, lengths, config.seed)
    trained, log = fill_gaps(model, samples, {KEPT: watched}, lasting(config, len(samples), epochs), folder / "gaps")
    measured = importance_at(trained, samples, Anchor(fisher_batch=fisher_batch), folder)
    if save_fisher is not None:
        measured.save(save_fisher)
    sites = sites_of_parameters(trained)
    sums: dict[str, float] = dict.fromkeys(sites.values(), 0.0)
    for name, importance in measured.tensors.items():
        sums[sites[name]] += float(importance.double().sum())
    return Trained(
        stack=trained,
        plan=Plan(model=ModelReference.of(trained)),
        log=log,
        findings={"gaps": found.described(), "importance": {"sums": sums, "measured": measured.provenance}},
        notes=_left_out(found),
        files={"gaps.jsonl": _written(found.gaps)},
    )


def _held_out(
    splits: Splits, reading: Reading, gaps: Gaps, lengths: Lengths, prefix: str, seed: int
) -> dict[str, list[Any]]:
    """What is watched: summaries and gap sentences of pairs that nothing is learnt from."""
    summaries = reading.samples(splits.held_out, prefix, lengths.source_length, lengths.summary_length)
    return {GAINED: summaries, KEPT: _gap_samples(splits, reading, gaps, lengths, seed)}


def _gap_samples(splits: Splits, reading: Reading, gaps: Gaps, lengths: Lengths, seed: int) -> list[Any]:
    """Gap sentences of held-out pairs, to watch by; those of the training pairs where held-out ones are too short."""
    several = [pair for pair in splits.held_out if len(spans(pair.source)) > 1] or splits.train
    return reading.gaps(gap_sentences(several, gaps=gaps, seed=seed).gaps, lengths.gap_length)


def _curve(log: TrainingLog | None) -> list[dict[str, float]]:
    return [] if log is None else [{"step": point.step, "loss": point.loss} for point in log.train]


def _mass(hook: Anchored, start: Model, measured: Fisher | None) -> dict[str, Any]:
    """F by layer, as it weighs in the penalty, and how it was measured."""
    told = None if measured is None else measured.provenance
    return {"sums": hook.penalty.mass(sites_of_parameters(start)), "measured": told}


def _left_out(found: GapData) -> list[str]:
    if not found.single:
        return []
    return [f"{found.single} sources have one sentence only, of which nothing would be left: they have no gaps."]


def _notes(found: GapData, splits: Splits, hook: Anchored, scores: dict[str, dict[str, Any]]) -> list[str]:
    notes = _left_out(found)
    if splits.set_aside:
        notes.append(f"No test was given, so {len(splits.test)} of the pairs were set aside as one.")
    if splits.shared:
        notes.append(f"{splits.shared} sources of the test are among those that were learnt from.")
    strongest = max((row["ratio"] for row in hook.rows), default=0.0)
    if hook.anchor.lam > 0 and strongest < FAINT:
        notes.append(
            f"The anchor did next to nothing: its gradient was at most {strongest:.1e} of the task's. Raise lambda, or "
            "set normalize to mean."
        )
    ours, constant = scores["after summaries"]["rouge1"], scores["one constant answer"]["rouge1"]
    if ours <= constant:
        notes.append(f"One constant answer has {constant:.1f} ROUGE-1, and these summaries {ours:.1f}: train longer.")
    return notes


def _written(gaps: list[Gap]) -> str:
    """The gap sentences as JSON lines."""
    return "".join(json.dumps({"source": each.text, "target": each.wanted}, ensure_ascii=False) + "\n" for each in gaps)
