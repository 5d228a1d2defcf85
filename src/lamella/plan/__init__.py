"""Plans: what each layer of a given model computes, the views that apply a plan, and the exports that save it."""

from lamella.plan.adapters import SiteAdapter, attach, keep_adapters
from lamella.plan.chain import Chain, Run
from lamella.plan.entries import (
    AdapterReference,
    HeadWidth,
    HiddenWidth,
    ModuleReference,
    PhasedPath,
    PolicyReference,
    RewriteReference,
    WeightEdit,
)
from lamella.plan.modules import SiteModule, keep_modules, modules_of
from lamella.plan.reference import BlocksReference, ModelReference, StackReference
from lamella.plan.schema import Decision, Plan, Point, compose
from lamella.plan.selection import modules_at
from lamella.plan.series import PlanSeries, SeriesEvidence
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
    "AdapterReference",
    "BlocksReference",
    "Chain",
    "Decision",
    "Factors",
    "HeadWidth",
    "HiddenWidth",
    "Masks",
    "ModelReference",
    "ModuleReference",
    "PhasedPath",
    "Plan",
    "PlanSeries",
    "Point",
    "PolicyReference",
    "RewriteReference",
    "Run",
    "SeriesEvidence",
    "SiteAdapter",
    "SiteModule",
    "StackReference",
    "WeightEdit",
    "alter",
    "alter_stack",
    "apply_factors",
    "apply_masks",
    "apply_static",
    "apply_tensors",
    "attach",
    "can_stand_alone",
    "claim",
    "compose",
    "keep_adapters",
    "keep_modules",
    "mask_edit",
    "masks_of",
    "materialise",
    "modules_at",
    "modules_of",
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
