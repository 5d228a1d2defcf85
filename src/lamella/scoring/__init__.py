"""Measurements that planners consume."""

from lamella.scoring.activations import Importance, activation_importance
from lamella.scoring.gradient_traces import GradientTraces, Saliency, Traces, cosine, pearson
from lamella.scoring.intervals import Interval, answer_restored, intervals
from lamella.scoring.percentile import percentile
from lamella.scoring.rate_distortion import Curve, Curves, Distortion, joint_distortion, rate_distortion
from lamella.scoring.sensitivity import gradient_norms, layer_parameters, sensitivity

__all__ = [
    "Curve",
    "Curves",
    "Distortion",
    "GradientTraces",
    "Importance",
    "Interval",
    "Saliency",
    "Traces",
    "activation_importance",
    "answer_restored",
    "cosine",
    "gradient_norms",
    "intervals",
    "joint_distortion",
    "layer_parameters",
    "pearson",
    "percentile",
    "rate_distortion",
    "sensitivity",
]
