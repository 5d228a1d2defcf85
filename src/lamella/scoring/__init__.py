"""Measurements that planners consume."""

from lamella.scoring.activations import Importance, activation_importance
from lamella.scoring.answers import Answers, Asked, Question, answer
from lamella.scoring.distances import DISTANCES, Distance
from lamella.scoring.fisher import Estimator, Fisher, fisher
from lamella.scoring.gradient_traces import GradientTraces, Saliency, Traces, cosine, pearson
from lamella.scoring.intervals import Interval, answer_restored, intervals
from lamella.scoring.labelled import Data, check_disjoint
from lamella.scoring.output_distance import OutputDistance
from lamella.scoring.percentile import percentile
from lamella.scoring.rate_distortion import Curve, Curves, Distortion, joint_distortion, rate_distortion
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
    "Answers",
    "Asked",
    "Curve",
    "Curves",
    "Data",
    "Distance",
    "Distortion",
    "Estimator",
    "Fisher",
    "GradientTraces",
    "Importance",
    "Interval",
    "OutputDistance",
    "Question",
    "Saliency",
    "Scores",
    "Tokens",
    "Traces",
    "activation_importance",
    "angular_distance",
    "answer",
    "answer_restored",
    "block_influence",
    "check_disjoint",
    "cosine",
    "describe",
    "fisher",
    "gradient_norms",
    "half_influence",
    "intervals",
    "joint_distortion",
    "layer_parameters",
    "pearson",
    "percentile",
    "rate_distortion",
    "sensitivity",
    "sequences",
    "stream_norms",
]
