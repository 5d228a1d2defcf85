"""Rewriting a model into another form that computes the same, as a method derives it from the weights.

A plan names the method and its settings. The code is the module ``rewrite`` of the method, which imports nothing else
of the method, so that a checkpoint can carry it: a dataclass ``Form`` of the settings, a function ``rewrite(model,
wirings, form)`` that changes a copy in place, and ``EXACT``, which says whether the result computes the same from the
same weights. A model without weights becomes one with the right modules and shapes, so a checkpoint of the result is
opened with the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.errors import PlanError
from lamella.plan.entries import RewriteReference
from lamella.plan.parts import validated_settings
from lamella.registry import submodule
from lamella.stack import Architecture, Model, Wiring, open_model, share


def with_rewrite(model: Model, reference: RewriteReference | None) -> Model:
    """Return the model as a plan rewrites it; the same model if the plan has no rewriting.

    Args:
        model: the model, which is not changed.
        reference: the entry of the plan.

    Raises:
        PlanError: for a method that does not rewrite models, unknown settings, or a model that cannot be rewritten,
            with the reason.
    """
    if reference is None:
        return model
    view = share(model.model)
    carry_out(view, model.architectures, reference)
    return open_model(view, name=model.name)


def carry_out(model: Any, architectures: Mapping[str, Architecture], reference: RewriteReference) -> None:
    """Rewrite a model in place; see :func:`with_rewrite`.

    Args:
        model: the model.
        architectures: the entries of its stacks by name.
        reference: the entry of the plan.
    """
    where = f"rewrite '{reference.name}'"
    code = code_of(reference)
    form = code.Form(**validated_settings(code.Form, {}, reference, where))
    try:
        code.rewrite(model, wirings_of(architectures), form)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from None
    model.lamella_rewrite = reference


def code_of(reference: RewriteReference) -> Any:
    """Return the module ``rewrite`` of a method.

    Raises:
        PlanError: for a method that does not rewrite models.
    """
    code = submodule(reference.name, "rewrite")
    if not hasattr(code, "Form") or not hasattr(code, "rewrite"):
        raise PlanError(f"rewrite '{reference.name}': {reference.name} is a method that does not rewrite models")
    return code


def wirings_of(architectures: Mapping[str, Architecture]) -> dict[str, Wiring]:
    """Return which axes the modules of every stack read and write, by the path of its layers.

    Raises:
        PlanError: for a stack without a wiring.
    """
    found = {}
    for architecture in architectures.values():
        if architecture.wired is None:
            raise PlanError(f"the architecture table has no wiring of {architecture.name} models")
        found[architecture.prefix.removesuffix(".")] = architecture.wired
    return found
