"""Plans: what every layer should do, bound to a model; views that carry them out; exports that keep them."""

from lamella.plan.schema import (
    ModelReference,
    PhasedPath,
    Plan,
    PlanSeries,
    Point,
    PolicyReference,
    Run,
    WeightEdit,
    compose,
)
from lamella.plan.view import apply_static, claim
from lamella.plan.weights import Masks, apply_masks, mask_edit, masks_of, read_masks, write_masks

__all__ = [
    "Masks",
    "ModelReference",
    "PhasedPath",
    "Plan",
    "PlanSeries",
    "Point",
    "PolicyReference",
    "Run",
    "WeightEdit",
    "apply_masks",
    "apply_static",
    "claim",
    "compose",
    "mask_edit",
    "masks_of",
    "read_masks",
    "write_masks",
]
