"""Measurements that planners consume."""

from lamella.scoring.activations import Importance, activation_importance
from lamella.scoring.distances import DISTANCES, Distance
from lamella.scoring.output_distance import OutputDistance
from lamella.scoring.scores import Scores
from lamella.scoring.streams import (
    Tokens,
    angular_distance,
    block_influence,
    describe,
    half_influence,
    sequences,
    stream_norms,
)

__all__ = [
    "DISTANCES",
    "Distance",
    "Importance",
    "OutputDistance",
    "Scores",
    "Tokens",
    "activation_importance",
    "angular_distance",
    "block_influence",
    "describe",
    "half_influence",
    "sequences",
    "stream_norms",
]
