"""Selective computation and reuse in trained models.

>>> import lamella
>>> stack = lamella.open("smollm2")                                # doctest: +SKIP
>>> series = lamella.make_plan("finercut", stack, share=0.1)            # doctest: +SKIP
>>> small = lamella.apply(stack, series[-1])                       # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella.data import Text as Text
    from lamella.data import load_text as load_text
    from lamella.data import windows as windows
    from lamella.evaluate import Budget as Budget
    from lamella.evaluate import FidelityTest as FidelityTest
    from lamella.evaluate import bench as bench
    from lamella.evaluate import cost as cost
    from lamella.files import Work as Work
    from lamella.plan import ModelReference as ModelReference
    from lamella.plan import Plan as Plan
    from lamella.plan import PlanSeries as PlanSeries
    from lamella.plan import compose as compose
    from lamella.plan.export import export as export
    from lamella.planners import planner as planner
    from lamella.registry import get_method as get_method
    from lamella.runner import compress as compress
    from lamella.runner import make_plan as make_plan
    from lamella.runner import run as run
    from lamella.runtime import PlanCache as PlanCache
    from lamella.runtime import apply as apply
    from lamella.runtime import parallel as parallel
    from lamella.stack import Model as Model
    from lamella.stack import Stack as Stack
    from lamella.zoo import load as load
    from lamella.zoo import open_model as open  # noqa: F401
    from lamella.zoo import pull as pull

__version__ = "0.1.0"

# Names are imported when they are first used, so that `import lamella` and `lamella --help` stay quick.
_HOMES = {
    "Budget": "lamella.evaluate",
    "FidelityTest": "lamella.evaluate",
    "Model": "lamella.stack",
    "ModelReference": "lamella.plan",
    "Plan": "lamella.plan",
    "PlanCache": "lamella.runtime",
    "PlanSeries": "lamella.plan",
    "Stack": "lamella.stack",
    "Text": "lamella.data",
    "Work": "lamella.files",
    "apply": "lamella.runtime",
    "bench": "lamella.evaluate",
    "compose": "lamella.plan",
    "compress": "lamella.runner",
    "cost": "lamella.evaluate",
    "export": "lamella.plan.export",
    "get_method": "lamella.registry",
    "load": "lamella.zoo",
    "load_text": "lamella.data",
    "open": "lamella.zoo",
    "parallel": "lamella.runtime",
    "make_plan": "lamella.runner",
    "planner": "lamella.planners",
    "pull": "lamella.zoo",
    "run": "lamella.runner",
    "windows": "lamella.data",
}
_RENAMED = {"open": "open_model"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lamella' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value
