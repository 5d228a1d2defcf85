"""Running plans: one entry, :func:`apply`, for plans of every kind."""

from lamella.runtime.cache import Phase, PlanCache
from lamella.runtime.policy import Block, Pass, Policy, keep_policy
from lamella.runtime.trace import Trace
from lamella.runtime.views import apply, parallel, phase_options, traced, untraced, with_policy

__all__ = [
    "Block",
    "Pass",
    "Phase",
    "PlanCache",
    "Policy",
    "Trace",
    "apply",
    "keep_policy",
    "parallel",
    "phase_options",
    "traced",
    "untraced",
    "with_policy",
]
