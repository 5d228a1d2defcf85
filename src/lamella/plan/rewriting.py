"""Models that are written otherwise, and compute the same: what a method makes of weights and norms, wherever they are.

A plan names the method and its settings. Its code is the room ``rewrite`` of the method, which stands alone, so that a
checkpoint can carry it: a dataclass ``Form`` of the settings, a function ``rewrite(model, wirings, form)`` that changes
a copy in place, and ``EXACT``, whether what it makes computes the same of the same weights. A model without weights
becomes one with the right modules and shapes, so a checkpoint of the result is opened by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.errors import PlanError
from lamella.plan.entries import RewriteReference
from lamella.plan.parts import settled
from lamella.registry import submodule
from lamella.stack import Architecture, Model, Wiring, open_model, share


def rewritten(model: Model, reference: RewriteReference | None) -> Model:
    """The model as a plan writes it; the same one where the plan says nothing of it.

    Raises:
        PlanError: for a method that rewrites no models, settings that it does not have, or a model that it cannot
            rewrite, with the reason.
    """
    if reference is None:
        return model
    view = share(model.model)
    carry_out(view, model.architectures, reference)
    return open_model(view, name=model.name)


def carry_out(model: Any, architectures: Mapping[str, Architecture], reference: RewriteReference) -> None:
    """Rewrite a model in place; see :func:`rewritten`."""
    where = f"rewrite '{reference.name}'"
    code = code_of(reference)
    form = code.Form(**settled(code.Form, {}, reference, where))
    try:
        code.rewrite(model, wirings_of(architectures), form)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from None
    model.lamella_rewrite = reference


def code_of(reference: RewriteReference) -> Any:
    """The module of a method that rewrites models."""
    code = submodule(reference.name, "rewrite")
    if not hasattr(code, "Form") or not hasattr(code, "rewrite"):
        raise PlanError(f"rewrite '{reference.name}': {reference.name} is a method that rewrites no models")
    return code


def wirings_of(architectures: Mapping[str, Architecture]) -> dict[str, Wiring]:
    """What the modules of every stack read and write, by the path of its layers.

    Raises:
        PlanError: for a stack of which that is not known.
    """
    found = {}
    for architecture in architectures.values():
        if architecture.wired is None:
            raise PlanError(f"nothing says what the modules of {architecture.name} models read and write")
        found[architecture.prefix.removesuffix(".")] = architecture.wired
    return found
