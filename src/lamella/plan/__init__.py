"""Plans: what every layer should do, bound to a model; views that carry them out; exports that keep them."""

from lamella.plan.schema import (
    HeadWidth,
    ModelReference,
    PhasedPath,
    Plan,
    PlanSeries,
    Point,
    PolicyReference,
    Run,
    StreamWidth,
    compose,
)
from lamella.plan.view import apply_static, claim, materialise, narrow

__all__ = [
    "HeadWidth",
    "ModelReference",
    "PhasedPath",
    "Plan",
    "PlanSeries",
    "Point",
    "PolicyReference",
    "Run",
    "StreamWidth",
    "apply_static",
    "claim",
    "compose",
    "materialise",
    "narrow",
]
