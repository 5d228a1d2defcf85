"""Running plans: one entry, :func:`apply`, for plans of every kind."""

from lamella.runtime.cache import Phase, PlanCache
from lamella.runtime.phased import apply, parallel, phase_options

__all__ = ["Phase", "PlanCache", "apply", "parallel", "phase_options"]
