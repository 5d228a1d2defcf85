"""Plans: what every layer should do, bound to a model; views that carry them out; exports that keep them."""

from lamella.plan.schema import ModelReference, PhasedPath, Plan, PlanSeries, Point, PolicyReference, Run, compose
from lamella.plan.view import apply_static, claim

__all__ = [
    "ModelReference",
    "PhasedPath",
    "Plan",
    "PlanSeries",
    "Point",
    "PolicyReference",
    "Run",
    "apply_static",
    "claim",
    "compose",
]
