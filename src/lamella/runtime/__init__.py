"""Running plans: :func:`apply` handles plans of every kind."""

from lamella.runtime.cache import Phase, PlanCache
from lamella.runtime.denoising import Denoising, Sampler, check_masked, denoise
from lamella.runtime.drafting import Clock, Draft, Drafted, generate_counted
from lamella.runtime.edit import Edit, EditEvidence, fidelity_table
from lamella.runtime.gathering import Gathering, Keep, PositionInputs
from lamella.runtime.generation import empty_cache
from lamella.runtime.layer_call import LayerCall, Pass
from lamella.runtime.policy import Policy, keep_policy
from lamella.runtime.trace import Trace
from lamella.runtime.views import apply, encodes, parallel, phase_options, traced, untraced, with_policies, with_policy

__all__ = [
    "Clock",
    "Denoising",
    "Draft",
    "Drafted",
    "Edit",
    "EditEvidence",
    "Gathering",
    "Keep",
    "LayerCall",
    "Pass",
    "Phase",
    "PlanCache",
    "Policy",
    "PositionInputs",
    "Sampler",
    "Trace",
    "apply",
    "check_masked",
    "denoise",
    "empty_cache",
    "encodes",
    "fidelity_table",
    "generate_counted",
    "keep_policy",
    "parallel",
    "phase_options",
    "traced",
    "untraced",
    "with_policies",
    "with_policy",
]
