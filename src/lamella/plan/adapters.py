"""Adapters: small networks that a plan puts beside the linear maps of some sites, where no LoRA can say what they do.

    y = a(x, W x + c)          W stays as it is, under its own name and at its own place

A plan brings names and tensors only: the code is that of a method, found by its slug. An adapter belongs to a map and
not to a place in the order of layers, so it goes with the map wherever a plan moves, repeats or routes around it; it is
made for the map as the plan's weights and widths leave it, and refused beside one of another size. What can be merged
into weights needs none of this: it is a plain adapter (:mod:`lamella.train.adapters`) or a change of weights.
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
from lamella.plan.parts import defined, fill, settled, tensors_of
from lamella.plan.schema import Plan
from lamella.plan.selection import modules_at
from lamella.registry import submodule
from lamella.stack import Model, open_model, share

ATTRIBUTE = "lamella_adapter"  # of a linear map: what stands beside it


class SiteAdapter(nn.Module):
    """What stands beside one linear map; a method defines its own in ``modules.py``.

    Args:
        inputs, outputs: sizes of the map.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the map and its adapter give together [..., outputs].

        Args:
            x: what the map is given [..., inputs].
            y: what it makes of that by itself [..., outputs].
        """
        raise NotImplementedError


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map, GPT-2's transposed ones too."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def stand(linear: nn.Module, adapter: SiteAdapter) -> None:
    """Put an adapter beside a linear map of a view; it is a child of the map, whose own names stay.

    Raises:
        PlanError: when another one stands there.
    """
    if hasattr(linear, ATTRIBUTE):
        raise PlanError("an adapter stands beside this map already: take a fresh view")
    setattr(linear, ATTRIBUTE, adapter)
    linear.forward = MethodType(_adapted, linear)


def _adapted(linear: Any, x: Tensor) -> Tensor:
    y: Tensor = linear.lamella_adapter(x, type(linear).forward(linear, x))
    return y


def attach(
    view: Any, names: Sequence[str], make: Callable[[int, int], SiteAdapter], seed: int = 0
) -> dict[str, SiteAdapter]:
    """Put fresh adapters beside linear maps of a view, to be trained.

    Args:
        view: what ``lamella.apply`` returned; its modules change, and nothing of the model that it was made of.
        names: of the maps, such as :func:`lamella.train.linear_at` gives.
        make: from inputs and outputs of a map to its adapter.
        seed: of what the adapters draw.

    Returns:
        The adapters by the names of their maps.
    """
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            linear = view.get_submodule(name)
            made[name] = make(*sizes_of(linear)).to(linear.weight.device).train(view.training)
            stand(linear, made[name])
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
    """The plan with these adapters, whose tensors are in a side file of ``folder`` that is named by its contents.

    Args:
        adapters: by the names of their maps, in a view of this plan that keeps layers in their order.
        folder: where the side file is written.
        name, params, sites, base: see :class:`AdapterReference`.
    """
    tensors = {
        f"{at}.{key}": tensor.detach().cpu().contiguous()
        for at, adapter in adapters.items()
        for key, tensor in adapter.state_dict().items()
    }
    file, digest = sidefile.named(folder, name, tensors)
    reference = AdapterReference(name=name, params=dict(params), sites=list(sites), base=base, file=file, sha256=digest)
    reference._folder = folder
    weights = plan.model.weights if base is None else None  # base says it, and of copies in other files too
    model = plan.model.model_copy(update={"weights": weights})
    return plan.model_copy(update={"model": model, "adapters": [*plan.adapters, reference]})


def open_adapters(model: Model, plan: Plan, reference: AdapterReference) -> dict[str, SiteAdapter]:
    """The adapters that a plan names, with their tensors, by the names of their maps.

    Args:
        model: with the plan's weights and widths carried out.

    Raises:
        PlanError: for a method without adapters, an unknown kind or setting, or a side file that does not fit the model
            or holds what is not finite.
    """
    where = f"adapter '{reference.name}'"
    make = _kind(reference, where)
    maps = _maps(model, plan, reference)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(reference, where).items():
        at = _owner(name, maps)
        if at is None:
            raise PlanError(
                f"{where}: '{name}' of {reference.file} is beside no linear map at its sites: it is for another model"
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
            inputs, outputs = sizes_of(maps[at])
            sizes = {"inputs": inputs, "outputs": outputs}
            if settings is None:
                settings = settled(make, sizes, reference, where)
            adapter = make(**sizes, **settings)
            fill(adapter, given, f"{where} at {at}", reference.file)
            opened[at] = adapter.to(maps[at].weight.device).eval()  # type: ignore[arg-type]
    return opened


def adapted(model: Model, original: Model, plan: Plan) -> Model:
    """The model with a plan's adapters beside its linear maps; the same one where there are none.

    Args:
        model: with the plan's weights and widths carried out; it is not changed.
        original: without.

    Raises:
        PlanError: for adapters that were trained beside other weights, or do not fit.
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
                "beside: give that revision"
            )
        for name, adapter in open_adapters(view, plan, reference).items():
            stand(view.model.get_submodule(name), adapter)
    return view


def _kind(reference: AdapterReference, where: str) -> type[SiteAdapter]:
    known = {each.__name__: each for each in defined(submodule(reference.name, "modules"), SiteAdapter)}
    if not known:
        raise PlanError(f"{where}: {reference.name} is a method without adapters of its own")
    kind = reference.kind or next(iter(known))
    if kind not in known or (reference.kind is None and len(known) > 1):
        raise PlanError(f"{where}: kind is {reference.kind}, but there are: {', '.join(known)}")
    return known[kind]


def _maps(model: Model, plan: Plan, reference: AdapterReference) -> dict[str, nn.Module]:
    """The linear maps at an adapter's sites, by their names in the model."""
    prefixes: list[str] = []
    for site in reference.sites:
        stack, inside = plan.model.split(site)
        prefixes += modules_at(model.stacks[stack], [inside])
    return {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.".startswith(tuple(prefixes)) and ATTRIBUTE not in name
    }


def _owner(name: str, maps: Mapping[str, nn.Module]) -> str | None:
    """The map that a tensor of a side file belongs to; None where there is no such map."""
    parts = name.split(".")
    return next((at for count in range(len(parts) - 1, 0, -1) if (at := ".".join(parts[:count])) in maps), None)
