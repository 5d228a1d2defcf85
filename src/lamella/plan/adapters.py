"""Adapters that a plan adds to linear layers, for what a LoRA cannot express.

    y = a(x, W x + c)          W keeps its values, its name and its module

A plan contains names and tensors only; the code comes from a method, which is found by its slug. An adapter belongs to
a linear layer and not to a position in the order of layers, so it follows the linear layer wherever a plan moves,
repeats or routes around it. It is built for the size that the plan's weights and widths give the linear layer, and is
refused for any other size. What can be merged into weights needs none of this: it is a plain adapter
(:mod:`lamella.train.adapters`) or a weight edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import PlanError
from lamella.plan import sidefile
from lamella.plan.entries import AdapterReference
from lamella.plan.fingerprint import revision
from lamella.plan.parts import fill, parts_in, tensors_of, validated_settings
from lamella.plan.schema import Plan
from lamella.plan.selection import modules_at
from lamella.registry import submodule
from lamella.stack import Model, open_model, share

ATTRIBUTE = "lamella_adapter"  # name of the adapter as a child of its linear layer


class SiteAdapter(nn.Module):
    """An adapter of one linear layer; a method defines its own subclasses in ``modules.py``.

    Args:
        inputs: number of input features of the linear layer.
        outputs: number of output features of the linear layer.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output of the linear layer together with its adapter [..., outputs].

        Args:
            x: input of the linear layer [..., inputs].
            y: output of the linear layer alone [..., outputs].
        """
        raise NotImplementedError


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a linear layer, including GPT-2's transposed ``Conv1D``."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def add_adapter(linear: nn.Module, adapter: SiteAdapter) -> None:
    """Add an adapter to a linear layer of a view, as a child of the layer, whose own parameter names do not change.

    Args:
        linear: the linear layer, which is changed in place.
        adapter: the adapter.

    Raises:
        PlanError: if the layer already has an adapter.
    """
    if hasattr(linear, ATTRIBUTE):
        raise PlanError("this linear layer has an adapter already: apply the plan again for a new view")
    setattr(linear, ATTRIBUTE, adapter)
    linear.forward = MethodType(_adapted, linear)


def _adapted(linear: Any, x: Tensor) -> Tensor:
    y: Tensor = linear.lamella_adapter(x, type(linear).forward(linear, x))
    return y


def attach(
    view: Any, names: Sequence[str], make: Callable[[int, int], SiteAdapter], seed: int = 0
) -> dict[str, SiteAdapter]:
    """Add new adapters to linear layers of a view, to be trained.

    Args:
        view: what ``lamella.apply`` returned. Its modules change; the model that it was made from does not.
        names: names of the linear layers, such as :func:`lamella.train.linear_at` returns.
        make: builds the adapter from the number of input and output features of a linear layer.
        seed: random seed of the adapters' initial values.

    Returns:
        The adapters by the names of their linear layers.
    """
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            linear = view.get_submodule(name)
            made[name] = make(*sizes_of(linear)).to(linear.weight.device).train(view.training)
            add_adapter(linear, made[name])
    return made


def keep_adapters(
    plan: Plan,
    adapters: Mapping[str, SiteAdapter],
    folder: Path,
    *,
    name: str,
    params: Mapping[str, Any],
    sites: Sequence[str],
    base: str | None,
) -> Plan:
    """Return the plan with these adapters added; their tensors are written to a side file in ``folder``.

    Args:
        plan: the plan, which is not changed.
        adapters: adapters by the names of their linear layers, in a view of this plan that keeps the order of layers.
        folder: folder of the side file, whose name contains its hash.
        name: slug of the method; see :class:`AdapterReference`.
        params: settings of the adapters; see :class:`AdapterReference`.
        sites: sites of the adapters; see :class:`AdapterReference`.
        base: revision of the weights that they were trained with; see :class:`AdapterReference`.
    """
    tensors = {
        f"{at}.{key}": tensor.detach().cpu().contiguous()
        for at, adapter in adapters.items()
        for key, tensor in adapter.state_dict().items()
    }
    file, digest = sidefile.named(folder, name, tensors)
    reference = AdapterReference(name=name, params=dict(params), sites=list(sites), base=base, file=file, sha256=digest)
    reference._folder = folder
    weights = (
        plan.model.weights if base is None else None
    )  # base identifies the weights, also for copies in other files
    model = plan.model.model_copy(update={"weights": weights})
    return plan.model_copy(update={"model": model, "adapters": [*plan.adapters, reference]})


def open_adapters(model: Model, plan: Plan, reference: AdapterReference) -> dict[str, SiteAdapter]:
    """Return the adapters that a plan names, with their tensors, by the names of their linear layers.

    Args:
        model: the model with the plan's weights and widths applied.
        plan: the plan, which resolves the sites.
        reference: the entry of the plan.

    Raises:
        PlanError: for a method without adapters, an unknown kind or setting, or a side file that does not fit the model
            or contains values that are not finite.
    """
    where = f"adapter '{reference.name}'"
    make = _kind(reference, where)
    layers = _linear_layers(model, plan, reference)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(reference, where).items():
        at = _owner(name, layers)
        if at is None:
            raise PlanError(
                f"{where}: '{name}' of {reference.file} belongs to no linear layer at its sites: it is for another "
                "model"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PlanError(f"{where}: '{name}' of {reference.file} has values that are not finite: train it again")
        tensors.setdefault(at, {})[name.removeprefix(f"{at}.")] = tensor
    if not tensors:
        raise PlanError(f"{where}: {reference.file} is empty: train it again")
    settings: dict[str, Any] | None = None
    opened = {}
    with torch.random.fork_rng(devices=[]):
        for at, given in tensors.items():
            inputs, outputs = sizes_of(layers[at])
            sizes = {"inputs": inputs, "outputs": outputs}
            if settings is None:
                settings = validated_settings(make, sizes, reference, where)
            adapter = make(**sizes, **settings)
            fill(adapter, given, f"{where} at {at}", reference.file)
            opened[at] = adapter.to(layers[at].weight.device).eval()  # type: ignore[arg-type]
    return opened


def with_adapters(model: Model, original: Model, plan: Plan) -> Model:
    """Return the model with a plan's adapters added to its linear layers; the same model if the plan has none.

    Args:
        model: the model with the plan's weights and widths applied; it is not changed.
        original: the model without the plan.
        plan: the plan.

    Raises:
        PlanError: for adapters that were trained with other weights, or that do not fit.
    """
    if not plan.adapters:
        return model
    base = None
    view = open_model(share(model.model), name=model.name)
    for reference in plan.adapters:
        base = base or revision(original.model)
        if reference.base not in (None, base):
            raise PlanError(
                f"adapter '{reference.name}': {original.name} has other weights than the model that it was trained "
                "with: give that revision"
            )
        for name, adapter in open_adapters(view, plan, reference).items():
            add_adapter(view.model.get_submodule(name), adapter)
    return view


def _kind(reference: AdapterReference, where: str) -> type[SiteAdapter]:
    known = {each.__name__: each for each in parts_in(submodule(reference.name, "modules"), SiteAdapter)}
    if not known:
        raise PlanError(f"{where}: {reference.name} is a method without adapters of its own")
    kind = reference.kind or next(iter(known))
    if kind not in known or (reference.kind is None and len(known) > 1):
        raise PlanError(f"{where}: kind is {reference.kind}, but there are: {', '.join(known)}")
    return known[kind]


def _linear_layers(model: Model, plan: Plan, reference: AdapterReference) -> dict[str, nn.Module]:
    """Return the linear layers at an adapter's sites, by their names in the model."""
    prefixes: list[str] = []
    for site in reference.sites:
        stack, inside = plan.model.split(site)
        prefixes += modules_at(model.stacks[stack], [inside])
    return {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.".startswith(tuple(prefixes)) and ATTRIBUTE not in name
    }


def _owner(name: str, layers: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the linear layer that a tensor of a side file belongs to, or None if there is none."""
    parts = name.split(".")
    return next((at for count in range(len(parts) - 1, 0, -1) if (at := ".".join(parts[:count])) in layers), None)
