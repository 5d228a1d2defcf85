"""Networks that a plan inserts at a site, in place of the sublayers there or in addition to them.

A plan contains names and tensors only; the code comes from a method, which is found by its slug when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lamella.errors import PlanError
from lamella.plan import sidefile
from lamella.plan.entries import ModuleReference
from lamella.plan.parts import open_part, parts_in
from lamella.registry import submodule
from lamella.stack import Architecture, Hidden, Position, Stack, hold, join

if TYPE_CHECKING:
    from lamella.plan.schema import Plan

ATTRIBUTE = "lamella_modules"  # name of a layer's child that holds its networks by the names of their sublayers


class SiteModule(nn.Module):
    """A network at a site; a method defines its own subclasses in ``modules.py``.

    Args:
        stack: the stack of the site.
        positions: the sublayers that the site covers.
    """

    def __init__(self, stack: Stack, positions: Sequence[Position]) -> None:
        super().__init__()

    def forward(self, h: Tensor, out: Tensor | None, call: dict[str, Any]) -> Tensor:
        """Return the residual stream after the site [batch, time, hidden].

        Args:
            h: residual stream before the site [batch, time, hidden].
            out: residual stream after the site's own sublayers if they are kept, else None.
            call: the keyword arguments that the model passes to the layer.
        """
        raise NotImplementedError


def open_module(stack: Stack, positions: Sequence[Position], reference: ModuleReference) -> SiteModule:
    """Build the network that a plan names, with the parameters of its side file.

    Args:
        stack: the stack of the site.
        positions: the sublayers that the site covers.
        reference: the entry of the plan.

    Raises:
        PlanError: for a method without networks, an unknown kind or setting, or a side file that does not fit.
    """
    where = f"module '{reference.name}'"
    known = {each.__name__: each for each in parts_in(submodule(reference.name, "modules"), SiteModule)}
    if not known:
        raise PlanError(f"{where}: {reference.name} is a method without networks of its own")
    kind = reference.kind or next(iter(known))
    if kind not in known or (reference.kind is None and len(known) > 1):
        raise PlanError(f"{where}: kind is {reference.kind}, but there are: {', '.join(known)}")
    given = {"stack": stack, "positions": positions}
    return open_part(known[kind], given, reference, where, stack.device).to(stack.device)


def modules_of(view: Any, stack: Stack) -> dict[str, SiteModule]:
    """Return the networks in one stack of a view, by the sites that its plan names.

    Args:
        view: what ``lamella.apply`` returned; its networks are its own, so they can be trained.
        stack: the stack of the model that the view was made from.
    """
    plan: Plan = view.lamella_plan
    layers: Any = view.get_submodule(stack.architecture.prefix.removesuffix("."))
    found = {}
    for site in plan.modules:
        name, group = plan.model.at(site)
        if name == stack.stack:
            networks = getattr(layers[group[0].layer], ATTRIBUTE)
            found[site] = networks["_".join(position.sublayer for position in group)]
    return found


def keep_modules(plan: Plan, networks: Mapping[str, SiteModule], folder: Path) -> Plan:
    """Return the plan with the parameters of these networks, each in a side file whose name contains its hash.

    Args:
        plan: the plan, which is not changed.
        networks: networks by their sites in the plan.
        folder: folder of the side files.
    """
    kept = dict(plan.modules)
    for site, network in networks.items():
        tensors = {name: each.detach().cpu().contiguous() for name, each in network.state_dict().items()}
        file, digest = sidefile.named(folder, kept[site].name, tensors)
        kept[site] = kept[site].model_copy(update={"file": file, "sha256": digest})
        kept[site]._folder = folder
    return plan.model_copy(update={"modules": kept})


@dataclass(frozen=True)
class ModularLayer:
    """The forward of a layer that contains inserted networks.

    Attributes:
        architecture: entry of its stack.
        runs: the sublayers that run under the plan, regardless of networks.
        networks: for each network, by the names of the sublayers at its site, whether these run as well.
        slot: cache slot of the layer.
    """

    architecture: Architecture
    runs: tuple[str, ...]
    networks: Mapping[tuple[str, ...], bool]
    slot: int

    def __call__(self, layer: Any, h: Tensor, call: dict[str, Any]) -> Any:
        """Run the layer with its networks."""
        complete_call, result = self.architecture.complete_call, self.architecture.result
        call = call if complete_call is None else complete_call(layer, h, call)
        cache = call.get(self.architecture.cache)
        if cache is not None and not self.attends:
            hold(cache, self.slot, tokens=h.shape[1])
        hidden: Hidden = h
        pending = dict(self.networks)
        for name in self.architecture.names:
            at = next((names for names in self.networks if name in names), None)
            if at is None:
                hidden = self._run((name,), layer, hidden, call)
            elif at in pending:
                before, kept = join(hidden), pending.pop(at)
                out = join(self._run(at, layer, before, call)) if kept else None
                hidden = getattr(layer, ATTRIBUTE)["_".join(at)](before, out, call)
        return join(hidden) if result is None else result(join(hidden), call)

    @property
    def attends(self) -> bool:
        """Whether the layer's own attention runs."""
        replaced = [names for names, kept in self.networks.items() if not kept]
        return "attn" in self.runs and not any("attn" in names for names in replaced)

    def _run(self, names: tuple[str, ...], layer: Any, h: Hidden, call: dict[str, Any]) -> Hidden:
        for name in names:
            if name in self.runs:
                h = self.architecture[name].run(layer, h, call)
        return h


def insert_modules(
    stack: Stack, layer: Any, index: int, runs: tuple[str, ...], modules: Mapping[tuple[Position, ...], ModuleReference]
) -> ModularLayer | None:
    """Insert the networks of one layer, and return its new forward, or None if the plan has none for this layer.

    Args:
        stack: the stack.
        layer: the layer of a view, which is changed.
        index: index of the layer.
        runs: the sublayers that run under the plan.
        modules: entries of the plan for the whole stack.
    """
    here = {group: reference for group, reference in modules.items() if group[0].layer == index}
    if not here:
        return None
    names = {group: tuple(position.sublayer for position in group) for group in here}
    networks = {"_".join(names[group]): open_module(stack, group, reference) for group, reference in here.items()}
    setattr(layer, ATTRIBUTE, nn.ModuleDict(networks))
    kept = {names[group]: reference.keep_sublayers for group, reference in here.items()}
    return ModularLayer(stack.architecture, runs, kept, index)
