"""Plans: what every layer should do, bound to a model; views that carry them out; exports that keep them."""

from lamella.plan.chain import Chain, Run
from lamella.plan.entries import HeadWidth, ModuleReference, PhasedPath, PolicyReference, StreamWidth, WeightEdit
from lamella.plan.modules import SiteModule
from lamella.plan.reference import ModelReference, StackReference
from lamella.plan.schema import Decision, Plan, PlanSeries, Point, compose
from lamella.plan.view import alter, alter_stack, apply_static, can_stand_alone, claim, materialise, own_saving, shaped
from lamella.plan.weights import (
    Factors,
    Masks,
    apply_factors,
    apply_masks,
    apply_tensors,
    mask_edit,
    masks_of,
    parameters_at,
    read_factors,
    read_masks,
    replace_edit,
    restore_edit,
    scale_edit,
    touched,
    write_masks,
)

__all__ = [
    "Chain",
    "Decision",
    "Factors",
    "HeadWidth",
    "Masks",
    "ModelReference",
    "ModuleReference",
    "PhasedPath",
    "Plan",
    "PlanSeries",
    "Point",
    "PolicyReference",
    "Run",
    "SiteModule",
    "StackReference",
    "StreamWidth",
    "WeightEdit",
    "alter",
    "alter_stack",
    "apply_factors",
    "apply_masks",
    "apply_static",
    "apply_tensors",
    "can_stand_alone",
    "claim",
    "compose",
    "mask_edit",
    "masks_of",
    "materialise",
    "own_saving",
    "parameters_at",
    "read_factors",
    "read_masks",
    "replace_edit",
    "restore_edit",
    "scale_edit",
    "shaped",
    "touched",
    "write_masks",
]
