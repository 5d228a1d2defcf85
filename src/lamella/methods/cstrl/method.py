"""CSTRL: sequential transfer learning for summarisation: first which sentences matter, then summaries.

Naznin et al., "CSTRL: Context-Driven Sequential Transfer Learning for Abstractive Radiology Report Summarization",
Findings of ACL 2025, arXiv 2503.05750.

    1  gap sentences   mask the sentences of each source that overlap most with its summary       gaps.py
    2                  train to generate them                                                     recipe.py
    3  F               the importance of every parameter at the solution theta*                   anchor.py
    4  summaries       CE(theta) + lambda_e sum_i F_i (theta_i - theta*_i)^2
                       lambda_e = max( 0.2, 0.9 (1 - e/E) ), per epoch
    5  distillation    to a student of an eighth of the size or less: `cstrl distil`              student.py

Gap sentences come from training pairs only, since the summary decides what is masked. Sources without a summary can be
given in addition; their sentences are scored against each other.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from lamella.files import Work
from lamella.measure import Fisher
from lamella.methods.cstrl.anchor import Anchor, AnchoredLoss, read_fisher, sites_of_parameters
from lamella.methods.cstrl.gaps import Gap, GapData, Gaps, gap_sentences, spans
from lamella.methods.cstrl.judge import Judge
from lamella.methods.cstrl.recipe import (
    GAP_TRAINING,
    MIN_SOURCE,
    TRAINING,
    FisherFiles,
    GapTraining,
    PairEncoder,
    SummaryTraining,
    TextLengths,
    fill_gaps,
    importance_at,
    summarise,
    with_steps,
)
from lamella.methods.cstrl.summaries import Reports, Summaries, SummarySplits
from lamella.plan import ModelReference, Plan
from lamella.registry import command, method
from lamella.results import Trained
from lamella.signature import Split
from lamella.stack import Model
from lamella.train import TrainConfig, TrainingLog

FAINT = 1e-3  # an anchor whose gradient never exceeds this fraction of the task's has no effect
KEPT, GAINED = "gap sentences", "summaries"  # names of the held-out losses


@method(
    "cstrl",
    paper="2503.05750",
    purpose="adapt",
    brief={
        "gap_epochs": 2, "gap_batch": 4, "batch": 4, "fisher_batch": 4, "normalize": "mean",
        "summary_length": 16, "gap_length": 24, "test_samples": 2,
    },
)  # fmt: skip
def cstrl(
    model: Model,
    pairs: Summaries,
    reports: Reports | None = None,
    test: Annotated[Summaries | None, Split("test")] = None,
    *,
    stored: FisherFiles = FisherFiles(),  # noqa: B008, frozen
    gaps: Gaps = Gaps(),  # noqa: B008, frozen
    filling: GapTraining = GapTraining(),  # noqa: B008, frozen
    anchor: Anchor = Anchor(),  # noqa: B008, frozen
    lengths: TextLengths = TextLengths(),  # noqa: B008, frozen
    course: SummaryTraining = SummaryTraining(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train a model to summarise in sequence: gap sentences first, then summaries with a Fisher-weighted anchor.

    Example: lamella run cstrl t5-small --pairs reports.jsonl -o summarising

    Args:
        model: an encoder-decoder, such as T5, or a decoder; it is not changed.
        pairs: sources with their summaries. Without a test set, a tenth becomes one; a tenth of the rest is held out.
        reports: further sources, without summaries, for gap sentences only.
        test: test pairs.
        stored: files with Fisher information.
        gaps: selection of the masked sentences.
        filling: training on gap sentences; other settings are those of ``config``.
        anchor: strength of the anchor.
        lengths: maximum lengths of texts.
        course: training on summaries, and evaluation.
        config: training configuration for summaries. Its seed is also that of the splits.
        work: folder from which an interrupted run resumes, bit-exact.

    Returns:
        The model, its losses, and by epoch the statistics of the anchor and the drift of each layer.

    Raises:
        MethodError: for a model that generates no text, or Fisher information of other weights.
        CalibrationError: if all sources have a single sentence.
        TrainingError: if training cannot start, or the loss is not finite.
    """
    splits = SummarySplits.of(pairs, test, config.seed)
    encoder = PairEncoder(model, pairs.tokenizer)
    loaded = None if stored.fisher is None else read_fisher(stored.fisher, model)
    found = gap_sentences(splits.train, reports or (), gaps, config.seed)
    sides = _held_out(splits, encoder, gaps, lengths, course.prefix, config.seed)
    judge = Judge(encoder, splits.test[: course.test_samples], course.prefix, lengths)
    folder = work.directory()

    # Stages 2 and 3: the gap-sentence solution theta*, and F at theta*.
    start, log = model, None
    samples = encoder.gaps(found.gaps, lengths.gap_length)
    if loaded is None:
        filled = replace(config, lr=filling.gap_lr, batch=filling.gap_batch, steps=None, accumulate=1, eval_every=None)
        filled = with_steps(filled, len(samples), filling.gap_epochs)
        start, log = fill_gaps(model, samples, {KEPT: sides[KEPT]}, filled, folder / "gaps")
    importances = None
    if anchor.importance == "fisher" or stored.save_fisher is not None:
        importances = loaded or importance_at(start, samples, anchor, folder)
    if stored.save_fisher is not None and importances is not None:
        importances.save(stored.save_fisher)

    # Stage 4: summaries, anchored to theta*.
    learnt = encoder.samples(splits.train, course.prefix, lengths.source_length, lengths.summary_length)
    held = importances if anchor.importance == "fisher" else None
    trained, trace, hook = summarise(
        start, held, learnt, sides, anchor, with_steps(config, len(learnt), course.epochs), folder / "summaries"
    )

    scores = {
        "initial model": judge.of(model),
        **({} if start is model else {"after gap sentences": judge.of(start)}),
        "after summaries": judge.of(trained),
        "constant answer": judge.constant(splits.train),
    }
    findings = {
        "gaps": found.as_dict(),
        "gap losses": _curve(log),
        "importance": _mass(hook, start, importances),
        "epochs": hook.rows,
        "held_out_losses": [{"step": point.step, **point.parts} for point in trace.held_out],
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
    gap_length: Annotated[int, Ge(MIN_SOURCE)] = TextLengths.gap_length,
    epochs: Annotated[int, Ge(1)] = GapTraining.gap_epochs,
    config: TrainConfig = GAP_TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train on gap sentences only and measure the Fisher information: the first three stages.

    Example: lamella run cstrl gaps t5-small --pairs reports.jsonl --save-fisher fisher.safetensors -o filled
    lamella run cstrl filled --pairs reports.jsonl --fisher fisher.safetensors -o summarising

    Args:
        model: an encoder-decoder or a decoder; it is not changed.
        pairs: sources with their summaries, split as for summaries: with the same seed, nothing is trained here on the
            held-out and test pairs of the second command.
        reports: further sources, without summaries.
        test: test pairs of the second command; if None, a tenth of the pairs is reserved for them.
        save_fisher: save the Fisher information at the end to this file.
        gaps: selection of the masked sentences.
        fisher_batch: number of samples whose mean gradient is squared.
        gap_length: maximum number of tokens of a masked source, and of its target.
        epochs: number of epochs, if ``config`` has no steps.
        config: training configuration.
        work: folder from which an interrupted run resumes, bit-exact.

    Returns:
        The model, with the sum of the Fisher information by layer.
    """
    splits = SummarySplits.of(pairs, test, config.seed)
    encoder, lengths = PairEncoder(model, pairs.tokenizer), TextLengths(gap_length=gap_length)
    found = gap_sentences(splits.train, reports or (), gaps, config.seed)
    samples, folder = encoder.gaps(found.gaps, gap_length), work.directory()
    watched = _gap_samples(splits, encoder, gaps, lengths, config.seed)
    trained, log = fill_gaps(model, samples, {KEPT: watched}, with_steps(config, len(samples), epochs), folder / "gaps")
    importances = importance_at(trained, samples, Anchor(fisher_batch=fisher_batch), folder)
    if save_fisher is not None:
        importances.save(save_fisher)
    sites = sites_of_parameters(trained)
    sums: dict[str, float] = dict.fromkeys(sites.values(), 0.0)
    for name, importance in importances.tensors.items():
        sums[sites[name]] += float(importance.double().sum())
    return Trained(
        stack=trained,
        plan=Plan(model=ModelReference.of(trained)),
        log=log,
        findings={"gaps": found.as_dict(), "importance": {"sums": sums, "measured": importances.provenance}},
        notes=_left_out(found),
        files={"gaps.jsonl": _written(found.gaps)},
    )


def _held_out(
    splits: SummarySplits, encoder: PairEncoder, gaps: Gaps, lengths: TextLengths, prefix: str, seed: int
) -> dict[str, list[Any]]:
    """Return the held-out samples of summaries and gap sentences."""
    summaries = encoder.samples(splits.held_out, prefix, lengths.source_length, lengths.summary_length)
    return {GAINED: summaries, KEPT: _gap_samples(splits, encoder, gaps, lengths, seed)}


def _gap_samples(splits: SummarySplits, encoder: PairEncoder, gaps: Gaps, lengths: TextLengths, seed: int) -> list[Any]:
    """Return held-out gap sentences, or those of the training pairs if all held-out sources have a single sentence."""
    several = [pair for pair in splits.held_out if len(spans(pair.source)) > 1] or splits.train
    return encoder.gaps(gap_sentences(several, gaps=gaps, seed=seed).gaps, lengths.gap_length)


def _curve(log: TrainingLog | None) -> list[dict[str, float]]:
    return [] if log is None else [{"step": point.step, "loss": point.loss} for point in log.train]


def _mass(hook: AnchoredLoss, start: Model, importances: Fisher | None) -> dict[str, Any]:
    """Return F by layer, as weighted in the penalty, and its provenance."""
    provenance = None if importances is None else importances.provenance
    return {"sums": hook.penalty.mass(sites_of_parameters(start)), "measured": provenance}


def _left_out(found: GapData) -> list[str]:
    if not found.single:
        return []
    return [f"{found.single} sources have a single sentence, of which nothing would be left: they have no gaps."]


def _notes(found: GapData, splits: SummarySplits, hook: AnchoredLoss, scores: dict[str, dict[str, Any]]) -> list[str]:
    notes = _left_out(found)
    if splits.test_from_pairs:
        notes.append(f"No test set was given, so {len(splits.test)} of the pairs were used as one.")
    if splits.shared:
        notes.append(f"{splits.shared} sources of the test set also occur in the training data.")
    strongest = max((row["ratio"] for row in hook.rows), default=0.0)
    if hook.anchor.lam > 0 and strongest < FAINT:
        notes.append(
            f"The anchor had almost no effect: its gradient was at most {strongest:.1e} of the task's. Increase "
            "lambda, or set normalize to mean."
        )
    ours, constant = scores["after summaries"]["rouge1"], scores["constant answer"]["rouge1"]
    if ours <= constant:
        notes.append(f"A constant answer has {constant:.1f} ROUGE-1, these summaries have {ours:.1f}: train longer.")
    return notes


def _written(gaps: list[Gap]) -> str:
    """Format the gap sentences as JSON lines."""
    return "".join(json.dumps({"source": each.text, "target": each.target}, ensure_ascii=False) + "\n" for each in gaps)
