"""Do language models use their depth efficiently? (Csordas, Manning and Potts, 2025, arXiv 2505.13898)"""

from lamella.methods.depth_efficiency.attribution import (
    deepest_use,
    integrated_gradients,
    mean_stream,
    residual_erasure,
)
from lamella.methods.depth_efficiency.job import depth_report
from lamella.methods.depth_efficiency.linear_maps import linear_maps
from lamella.methods.depth_efficiency.method import (
    Mean,
    SkipEffect,
    depth_efficiency,
    depth_profile,
    depth_score,
    local_effect,
    refinement,
    skip_effect,
    split_points,
    turning,
)
from lamella.methods.depth_efficiency.page import render_depth

__all__ = [
    "Mean",
    "SkipEffect",
    "deepest_use",
    "depth_efficiency",
    "depth_profile",
    "depth_report",
    "depth_score",
    "integrated_gradients",
    "linear_maps",
    "local_effect",
    "mean_stream",
    "refinement",
    "render_depth",
    "residual_erasure",
    "skip_effect",
    "split_points",
    "turning",
]
