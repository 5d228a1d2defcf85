"""CSTRL: sequential transfer learning for summarisation with a Fisher-weighted anchor, and distillation."""

from lamella.methods.cstrl.anchor import Anchor, AnchoredLoss, Penalty, measure_fisher, read_fisher, sites_of_parameters
from lamella.methods.cstrl.baselines import Unfreezing, encoder_names, unfrozen_fraction
from lamella.methods.cstrl.gaps import Gap, Gaps, gap_sentences, mask_sentences, spans
from lamella.methods.cstrl.judge import Judge, generate_texts
from lamella.methods.cstrl.method import cstrl, fill
from lamella.methods.cstrl.recipe import GapTraining, PairEncoder, TextLengths, fill_gaps, summarise, with_steps
from lamella.methods.cstrl.student import distil, new_student, student_config, student_loss
from lamella.methods.cstrl.summaries import Reports, Summaries, SummaryPair, SummarySplits

__all__ = [
    "Anchor",
    "AnchoredLoss",
    "Gap",
    "GapTraining",
    "Gaps",
    "Judge",
    "PairEncoder",
    "Penalty",
    "Reports",
    "Summaries",
    "SummaryPair",
    "SummarySplits",
    "TextLengths",
    "Unfreezing",
    "cstrl",
    "distil",
    "encoder_names",
    "fill",
    "fill_gaps",
    "gap_sentences",
    "generate_texts",
    "mask_sentences",
    "measure_fisher",
    "new_student",
    "read_fisher",
    "sites_of_parameters",
    "spans",
    "student_config",
    "student_loss",
    "summarise",
    "unfrozen_fraction",
    "with_steps",
]
