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
    WeightEdit,
    compose,
)
from lamella.plan.view import alter, apply_static, claim, materialise
from lamella.plan.weights import Masks, apply_masks, mask_edit, masks_of, read_masks, write_masks

__all__ = [
    "HeadWidth",
    "Masks",
    "ModelReference",
    "PhasedPath",
    "Plan",
    "PlanSeries",
    "Point",
    "PolicyReference",
    "Run",
    "StreamWidth",
    "WeightEdit",
    "alter",
    "apply_masks",
    "apply_static",
    "claim",
    "compose",
    "mask_edit",
    "masks_of",
    "materialise",
    "read_masks",
    "write_masks",
]
