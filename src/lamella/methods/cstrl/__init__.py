"""CSTRL: learn to summarise in sequence, held where the first task has left the model, and distil to a student."""

from lamella.methods.cstrl.anchor import Anchor, Anchored, Penalty, measured, read_fisher, sites_of_parameters
from lamella.methods.cstrl.baselines import Unfreezing, encoder_names, unfrozen
from lamella.methods.cstrl.gaps import Gap, Gaps, gap_sentences, masked, spans
from lamella.methods.cstrl.judge import Judge, written
from lamella.methods.cstrl.method import cstrl, fill
from lamella.methods.cstrl.recipe import GapTraining, Lengths, Reading, fill_gaps, lasting, summarise
from lamella.methods.cstrl.student import distil, fresh, shrunk, student_loss
from lamella.methods.cstrl.summaries import Pair, Reports, Splits, Summaries

__all__ = [
    "Anchor",
    "Anchored",
    "Gap",
    "GapTraining",
    "Gaps",
    "Judge",
    "Lengths",
    "Pair",
    "Penalty",
    "Reading",
    "Reports",
    "Splits",
    "Summaries",
    "Unfreezing",
    "cstrl",
    "distil",
    "encoder_names",
    "fill",
    "fill_gaps",
    "fresh",
    "gap_sentences",
    "lasting",
    "masked",
    "measured",
    "read_fisher",
    "shrunk",
    "sites_of_parameters",
    "spans",
    "student_loss",
    "summarise",
    "unfrozen",
    "written",
]
