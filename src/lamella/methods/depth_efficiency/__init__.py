"""Do language models use their depth efficiently? After Csordas, Manning and Potts, 2025, arXiv 2505.13898."""

from lamella.methods.depth_efficiency.attribution import (
    deepest_use,
    integrated_gradients,
    mean_hidden,
    residual_erasure,
)
from lamella.methods.depth_efficiency.effects import SkipEffect, depth_score, local_effect, skip_effect, split_points
from lamella.methods.depth_efficiency.linear_maps import linear_maps
from lamella.methods.depth_efficiency.method import DepthStudy, depth_efficiency, study
from lamella.methods.depth_efficiency.profile import TokenMean, depth_profile, refinement, turning_point

__all__ = [
    "DepthStudy",
    "SkipEffect",
    "TokenMean",
    "deepest_use",
    "depth_efficiency",
    "depth_profile",
    "depth_score",
    "integrated_gradients",
    "linear_maps",
    "local_effect",
    "mean_hidden",
    "refinement",
    "residual_erasure",
    "skip_effect",
    "split_points",
    "study",
    "turning_point",
]
