"""Results of commands, and how they are described, drawn, written and read."""

from lamella.plan import PlanSeries, SeriesEvidence
from lamella.result import Evidence, Result, Summary, Table
from lamella.results.adapted import Adapted
from lamella.results.corpus import Corpus
from lamella.results.image_corpus import IMAGES, ImageCorpus
from lamella.results.mixed import MixedCorpus
from lamella.results.network import TrainedNetwork
from lamella.results.record import Record
from lamella.results.study import Study
from lamella.results.tuned import Tuned
from lamella.runtime import Edit, EditEvidence
from lamella.train import Healed, Trained, TrainedEvidence

__all__ = [
    "IMAGES",
    "Adapted",
    "Corpus",
    "Edit",
    "EditEvidence",
    "Evidence",
    "Healed",
    "ImageCorpus",
    "MixedCorpus",
    "PlanSeries",
    "Record",
    "Result",
    "SeriesEvidence",
    "Study",
    "Summary",
    "Table",
    "Trained",
    "TrainedEvidence",
    "TrainedNetwork",
    "Tuned",
]
