"""How trained weights get out of a view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.plan import Plan, keep_modules, modules_of
from lamella.stack import Stack, share


def with_weights_of(stack: Stack, view: Any) -> Stack:
    """The model of ``stack`` with the parameters that a view of it was trained to; it shares all the others.

    Args:
        stack: the original; it is not changed. Of a model with several stacks, the same one comes back.
        view: a view of it, whose parameters have the same names (adapters merged and removed), but for layers that its
            plan moved.
    """
    model = share(stack.model)
    trained = {_home(stack, view, name): each for name, each in view.named_parameters(remove_duplicate=False)}
    for module_name, module in model.named_modules():
        for name in list(module._parameters):
            full = f"{module_name}.{name}" if module_name else name
            if full in trained:
                setattr(module, name, trained[full])
    return Stack(model, name=f"{stack.name}, healed", stack=stack.stack)


def with_modules_of(plan: Plan, stack: Stack, view: Any, folder: Path) -> Plan:
    """A plan with the networks of a view of it, as they were trained, in side files of ``folder``.

    Args:
        plan: of the view; the same one comes back where it puts no networks anywhere.
        stack: the original.
    """
    if not plan.modules:
        return plan
    networks = {site: each for one in stack.stacks.values() for site, each in modules_of(view, one).items()}
    return keep_modules(plan, networks, folder)


def _home(stack: Stack, view: Any, name: str) -> str:
    """What the original calls a parameter of a view, whose plan may have given its layers other numbers."""
    plan = getattr(view, "lamella_plan", None)
    prefix = stack.architecture.prefix
    if plan is None or not plan.is_static or not name.startswith(prefix):
        return name
    chain = plan.chain(stack.stack)
    if chain.in_order:
        return name
    number, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{chain.runs('prefill')[int(number)].layer}.{rest}"
