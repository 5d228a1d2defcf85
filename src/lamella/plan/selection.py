"""Selection of the parameters that an edit may change: by sites, names with wildcards, and excluded kinds."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from lamella.errors import MethodError
from lamella.plan.reference import EMBED, HEAD, NORM
from lamella.plan.weights import parameters_at
from lamella.stack import Stack, positions_at, weights

Skip = Literal["norm", "bias"]


def select_parameters(model: nn.Module | Stack, layers: Sequence[str] = (), skip: Sequence[Skip] = ()) -> list[str]:
    """Return the names of selected parameters of a model; tied parameters are listed once.

    Args:
        model: any torch module, or a stack.
        layers: sites of a stack (``layers.3``, ``layers.5.mlp``, ``head``), or names of modules and parameters with
            wildcards (``conv1``, ``*.down_proj.*``); all parameters if empty.
        skip: kinds to exclude: parameters of ``norm`` modules, or every ``bias``.

    Raises:
        MethodError: if an entry matches nothing, or no parameter is left.
    """
    module = model.model if isinstance(model, Stack) else model
    if wrong := sorted(set(skip) - {"norm", "bias"}):
        raise MethodError(f"skip '{wrong[0]}': choose norm or bias")
    every = weights(module)
    chosen = set() if layers else set(every)
    for entry in layers:
        if isinstance(model, Stack) and (entry in (EMBED, NORM, HEAD) or entry.startswith("layers.")):
            named = parameters_at(model, [entry])
        else:
            named = [name for name in every if fnmatchcase(name, entry) or name.startswith(f"{entry}.")]
        if not named:
            raise MethodError(f"layers '{entry}' names no parameter; a name is like '{next(iter(every))}'")
        chosen.update(named)
    left = [name for name in every if name in chosen and not _skipped(module, every[name].occurrences[0], skip)]
    if not left:
        raise MethodError("skip leaves no parameter: skip less")
    return left


def modules_at(stack: Stack, sites: Sequence[str]) -> tuple[str, ...]:
    """Return the prefixes of the names of the modules at some sites.

    >>> from lamella.zoo.nano import nano
    >>> modules_at(Stack(nano("llama")), ["layers.0", "layers.2.mlp"])
    ('model.layers.0.', 'model.layers.2.mlp.', 'model.layers.2.post_attention_layernorm.')

    Args:
        stack: the stack.
        sites: sites of the stack.

    Raises:
        PlanError: for a site that the stack does not have.
    """
    names: list[str] = []
    for site in sites:
        covered = positions_at(site, stack.positions)
        layer = f"{stack.architecture.prefix}{covered[0].layer}."
        children = [child for each in covered for child in stack.architecture[each.sublayer].modules]
        whole = len(covered) == len(stack.architecture.names)
        names += [layer] if whole else [f"{layer}{child}." for child in children]
    return tuple(names)


def _skipped(module: nn.Module, occurrence: tuple[str, str], skip: Sequence[Skip]) -> bool:
    path, name = occurrence
    of_norm = "norm" in type(module.get_submodule(path)).__name__.lower()
    return ("bias" in skip and "bias" in name) or ("norm" in skip and of_norm)
