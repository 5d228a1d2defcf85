"""Copying trained weights from a view back to its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.plan import Plan, keep_modules, modules_of
from lamella.stack import Stack, share


def with_weights_of(stack: Stack, view: Any) -> Stack:
    """Return the model of ``stack`` with the trained parameters of a view of it; it shares all the others.

    Args:
        stack: the original; it is not changed. For a model with several stacks, the same one is returned.
        view: a view of it, whose parameters have the same names (adapters merged and removed), except in layers that
            its plan moved.
    """
    model = share(stack.model)
    trained = {_original_name(stack, view, name): each for name, each in view.named_parameters(remove_duplicate=False)}
    for module_name, module in model.named_modules():
        for name in list(module._parameters):
            full = f"{module_name}.{name}" if module_name else name
            if full in trained:
                setattr(module, name, trained[full])
    return Stack(model, name=f"{stack.name}, healed", stack=stack.stack)


def with_modules_of(plan: Plan, stack: Stack, view: Any, folder: Path) -> Plan:
    """Return a plan with the trained inserted modules of a view, in side files of ``folder``.

    Args:
        plan: of the view; returned unchanged if it inserts no modules.
        stack: the original.
        view: the trained view.
        folder: the folder of the side files.
    """
    if not plan.modules:
        return plan
    networks = {site: each for one in stack.stacks.values() for site, each in modules_of(view, one).items()}
    return keep_modules(plan, networks, folder)


def _original_name(stack: Stack, view: Any, name: str) -> str:
    """Return the original's name of a parameter of a view, whose plan may have renumbered its layers."""
    plan = getattr(view, "lamella_plan", None)
    prefix = stack.architecture.prefix
    if plan is None or not plan.is_static or not name.startswith(prefix):
        return name
    chain = plan.chain(stack.stack)
    if chain.in_order:
        return name
    number, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{chain.runs('prefill')[int(number)].layer}.{rest}"
