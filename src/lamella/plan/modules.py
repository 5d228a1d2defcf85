"""Networks that a plan puts at a site, in place of what is there or beside it.

A plan brings names and tensors only: the code is that of a method, found by its slug when it is needed.
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
from lamella.plan.parts import defined, opened
from lamella.registry import submodule
from lamella.stack import Architecture, Hidden, Position, Stack, hold, join

if TYPE_CHECKING:
    from lamella.plan.schema import Plan

ATTRIBUTE = "lamella_modules"  # of a layer: its networks, by the names of the sublayers that they stand at


class SiteModule(nn.Module):
    """A network at a site; a method defines its own in ``modules.py``.

    Args:
        stack: the stack that the site lies in.
        positions: the sublayers that the site covers.
    """

    def __init__(self, stack: Stack, positions: Sequence[Position]) -> None:
        super().__init__()

    def forward(self, h: Tensor, out: Tensor | None, call: dict[str, Any]) -> Tensor:
        """The stream behind the site [batch, time, hidden].

        Args:
            h: the stream before it.
            out: what is there makes of it, where the network stands beside that; else None.
            call: the keyword arguments that the model passes to the layer.
        """
        raise NotImplementedError


def open_module(stack: Stack, positions: Sequence[Position], reference: ModuleReference) -> SiteModule:
    """Make the network that a plan names, with the parameters of its side file.

    Raises:
        PlanError: for a method without networks, an unknown kind or setting, or a side file that does not fit.
    """
    where = f"module '{reference.name}'"
    known = {each.__name__: each for each in defined(submodule(reference.name, "modules"), SiteModule)}
    if not known:
        raise PlanError(f"{where}: {reference.name} is a method without networks of its own")
    kind = reference.kind or next(iter(known))
    if kind not in known or (reference.kind is None and len(known) > 1):
        raise PlanError(f"{where}: kind is {reference.kind}, but there are: {', '.join(known)}")
    given = {"stack": stack, "positions": positions}
    return opened(known[kind], given, reference, where, stack.device).to(stack.device)


def modules_of(view: Any, stack: Stack) -> dict[str, SiteModule]:
    """The networks that stand in one stack of a view, by the sites that its plan names.

    Args:
        view: what ``lamella.apply`` returned; its networks are its own, so they can be trained.
        stack: the stack of the model that the view was made of.
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
    """The plan with the parameters of these networks, each in a side file of ``folder`` that is named by its contents.

    Args:
        networks: by sites at which the plan puts networks of their kind.
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
    """The forward of a layer in which networks stand.

    Attributes:
        architecture: of its stack.
        runs: the sublayers that run under the plan, networks aside.
        networks: by the names of the sublayers that each stands at, whether those run, too.
        slot: the cache slot of the layer.
    """

    architecture: Architecture
    runs: tuple[str, ...]
    networks: Mapping[tuple[str, ...], bool]
    slot: int

    def __call__(self, layer: Any, h: Tensor, call: dict[str, Any]) -> Any:
        complete_call, result = self.architecture.complete_call, self.architecture.result
        call = call if complete_call is None else complete_call(layer, h, call)
        cache = call.get(self.architecture.cache)
        if cache is not None and not self.attends:
            hold(cache, self.slot, tokens=h.shape[1])
        stream: Hidden = h
        waiting = dict(self.networks)
        for name in self.architecture.names:
            at = next((names for names in self.networks if name in names), None)
            if at is None:
                stream = self._run((name,), layer, stream, call)
            elif at in waiting:
                before, beside = join(stream), waiting.pop(at)
                out = join(self._run(at, layer, before, call)) if beside else None
                stream = getattr(layer, ATTRIBUTE)["_".join(at)](before, out, call)
        return join(stream) if result is None else result(join(stream), call)

    @property
    def attends(self) -> bool:
        """Whether the layer's own attention runs."""
        replaced = [names for names, beside in self.networks.items() if not beside]
        return "attn" in self.runs and not any("attn" in names for names in replaced)

    def _run(self, names: tuple[str, ...], layer: Any, h: Hidden, call: dict[str, Any]) -> Hidden:
        for name in names:
            if name in self.runs:
                h = self.architecture[name].run(layer, h, call)
        return h


def insert_modules(
    stack: Stack, layer: Any, index: int, runs: tuple[str, ...], modules: Mapping[tuple[Position, ...], ModuleReference]
) -> ModularLayer | None:
    """Put the networks of one layer into it, and give its forward; None where the plan puts none there.

    Args:
        layer: of a view, which is changed.
        runs: the sublayers that run under the plan.
        modules: of the whole stack.
    """
    here = {group: reference for group, reference in modules.items() if group[0].layer == index}
    if not here:
        return None
    names = {group: tuple(position.sublayer for position in group) for group in here}
    networks = {"_".join(names[group]): open_module(stack, group, reference) for group, reference in here.items()}
    setattr(layer, ATTRIBUTE, nn.ModuleDict(networks))
    beside = {names[group]: reference.keep_sublayers for group, reference in here.items()}
    return ModularLayer(stack.architecture, runs, beside, index)
