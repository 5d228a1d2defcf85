"""Measurements that planners consume."""

from lamella.scoring.activations import Importance, activation_importance
from lamella.scoring.distances import DISTANCES, Distance
from lamella.scoring.gradient_traces import GradientTraces, Saliency, Traces, cosine, pearson
from lamella.scoring.output_distance import OutputDistance
from lamella.scoring.rate_distortion import (
    Curve,
    Curves,
    Distortion,
    joint_distortion,
    rate_distortion,
)
from lamella.scoring.scores import Scores
from lamella.scoring.sensitivity import gradient_norms, layer_parameters, sensitivity
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
    "Curve",
    "Curves",
    "Distance",
    "Distortion",
    "GradientTraces",
    "Importance",
    "OutputDistance",
    "Saliency",
    "Scores",
    "Tokens",
    "Traces",
    "activation_importance",
    "angular_distance",
    "block_influence",
    "cosine",
    "describe",
    "gradient_norms",
    "half_influence",
    "joint_distortion",
    "layer_parameters",
    "pearson",
    "rate_distortion",
    "sensitivity",
    "sequences",
    "stream_norms",
]
