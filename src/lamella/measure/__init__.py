"""Measurements that planners and other methods use."""

from lamella.measure.distances import DISTANCES, Distance, DistanceName, divergences
from lamella.measure.embedding import Embed, Embedder, check_embedder, embed, similarities
from lamella.measure.fisher import Estimator, Fisher, fisher
from lamella.measure.hidden_states import (
    Tokens,
    angular_distance,
    block_influence,
    by_name,
    describe,
    hidden_norms,
    sequences,
    sublayer_influence,
)
from lamella.measure.labelled import Data, check_disjoint
from lamella.measure.noise import RATIOS, Draw, draws, masked, masked_by_count, nats_per_token, predicting
from lamella.measure.output_distance import OutputDistance
from lamella.measure.ranks import spearman
from lamella.measure.recording import Recording, record
from lamella.measure.scores import Scores

__all__ = [
    "DISTANCES",
    "RATIOS",
    "Data",
    "Distance",
    "DistanceName",
    "Draw",
    "Embed",
    "Embedder",
    "Estimator",
    "Fisher",
    "OutputDistance",
    "Recording",
    "Scores",
    "Tokens",
    "angular_distance",
    "block_influence",
    "by_name",
    "check_disjoint",
    "check_embedder",
    "describe",
    "divergences",
    "draws",
    "embed",
    "fisher",
    "hidden_norms",
    "masked",
    "masked_by_count",
    "nats_per_token",
    "predicting",
    "record",
    "sequences",
    "similarities",
    "spearman",
    "sublayer_influence",
]
