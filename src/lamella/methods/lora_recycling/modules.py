"""Linear maps beside which N frozen adapters stand, each with coefficients that train.

    y = W x + B_cat (c * (A_cat x))        A_cat [sum r_i, in], B_cat [out, sum r_i], c [sum r_i]

c repeats f(w_i) over the ranks of adapter i; s_i is in B_cat. With f(w) = 0 everywhere the model computes what it did,
to the bit. The coefficients are kept in float32 whatever the model is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from lamella.errors import MethodError
from lamella.stack import Stack
from lamella.train import Adapter, concatenate

Granularity = Literal["model", "layer", "sublayer", "module", "rank"]
Activation = Literal["leaky_relu", "identity", "square", "softmax", "sigmoid"]
Init = Literal["zero", "equal", "uniform", "normal", "target"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda w: leaky_relu(
        w, 0.01
    ),  # its slope at 0 is 0.01: Adam, which has no scale, starts all the same
    "identity": lambda w: w,
    "square": torch.square,
    "softmax": lambda w: torch.softmax(w, dim=0),
    "sigmoid": torch.sigmoid,
}


class Mixed(nn.Module):
    """One linear map with its adapters.

    Attributes:
        base: the map itself.
        mixing: w: of N adapters, or of each rank of them; shared by all maps that are tied.
        owner: to which of w each rank belongs [sum r_i].
    """

    def __init__(
        self, base: nn.Module, a: Tensor, b: Tensor, owner: Tensor, mixing: nn.Parameter, activation: str
    ) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.base, self.mixing, self.activation = base, mixing, activation
        self.factor_a = nn.Parameter(a.to(weight), requires_grad=False)
        self.factor_b = nn.Parameter(b.to(weight), requires_grad=False)
        self.register_buffer("owner", owner.to(weight.device), persistent=False)

    def coefficients(self) -> Tensor:
        """c [sum r_i]."""
        return FUNCTIONS[self.activation](self.mixing)[self.owner]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        inside = self.coefficients() * linear(x, self.factor_a).float()
        y: Tensor = self.base(x)
        return y + linear(inside.to(y.dtype), self.factor_b)


@dataclass
class Mixture:
    """A model with adapters beside its linear maps.

    Attributes:
        model: the model that carries them.
        modules: names of the adapted maps.
        tensors: w by what is tied: 1, L, 2 L or 7 L of them in a Llama of L layers.
        transposed, base: of the adapters.
    """

    model: Any
    modules: tuple[str, ...]
    tensors: Mapping[Hashable, nn.Parameter]
    transposed: bool
    base: str | None

    def trains(self, name: str) -> bool:
        """Whether a parameter is a coefficient: the ``trainable`` of :func:`lamella.train.fit`."""
        return name.endswith(".mixing")

    def trains_all(self, name: str) -> bool:
        """Whether it is a coefficient or belongs to an adapter."""
        return name.endswith((".mixing", ".factor_a", ".factor_b"))

    @torch.no_grad()
    def coefficients(self) -> dict[str, Tensor]:
        """f(w) of each adapted map: of N adapters, or of each rank."""
        maps = {name: self.model.get_submodule(name) for name in self.modules}
        return {name: FUNCTIONS[each.activation](each.mixing).detach().clone() for name, each in maps.items()}

    @torch.no_grad()
    def adapter(self) -> Adapter:
        """All of it as one plain adapter: A' = c * A_cat, B' = B_cat, alpha = r."""
        pairs = {}
        for name in self.modules:
            each = self.model.get_submodule(name)
            a = each.coefficients()[:, None] * each.factor_a.float()
            pairs[name] = (a.clone(), each.factor_b.detach().float().clone())
        return Adapter(pairs, dict.fromkeys(pairs, 1.0), self.transposed, self.base)


def attach(
    model: Any,
    adapters: Sequence[Adapter],
    group: Callable[[str], Hashable],
    *,
    granularity: Granularity = "module",
    activation: Activation = "leaky_relu",
    init: Init = "zero",
    seed: int = 0,
) -> Mixture:
    """Put adapters beside the linear maps of a model, in place; its other tensors stay as they are.

    Args:
        model: a view, or a module of its own.
        adapters: that fit it; the target's own first, where it takes part.
        group: from the name of a module to what it shares its coefficients with; see :func:`groups`.
        granularity: ``rank`` gives each rank a coefficient of its own, everything else each adapter.
        activation: f; ``softmax`` is over the adapters.
        init: of w: ``zero``, ``equal`` (1/sqrt(N)), ``uniform`` (0 to 1), ``normal`` (0, 0.5), or ``target``: 1 for the
            first and 0 for the others.
        seed: of random ones.

    Raises:
        MethodError: for softmax over adapters where each rank has a coefficient of its own.
    """
    if granularity == "rank" and activation == "softmax":
        raise MethodError("softmax is over adapters, and granularity 'rank' has none: choose another activation")
    generator = torch.Generator().manual_seed(seed)
    joined = concatenate(adapters)
    tensors: dict[Hashable, nn.Parameter] = {}
    for name, (a, b) in joined.pairs.items():
        owner = [place for place, each in enumerate(adapters) if name in each.pairs for _ in each.pairs[name][0]]
        base = model.get_submodule(name)
        if granularity == "rank":
            first, owner = [place == 0 for place in owner], list(range(len(owner)))
        else:
            first = [place == 0 for place in range(len(adapters))]
        tied = group(name)
        if tied not in tensors:
            start = _start(init, torch.tensor(first), len(adapters), generator)
            tensors[tied] = nn.Parameter(start.to(base.weight.device), requires_grad=False)
        model.set_submodule(name, Mixed(base, a, b, torch.tensor(owner), tensors[tied], activation))
    return Mixture(model, tuple(joined.pairs), tensors, joined.transposed, joined.base)


def _start(init: Init, first: Tensor, adapters: int, generator: torch.Generator) -> Tensor:
    """w before training; ``first`` says which of them belong to the first adapter."""
    if init == "uniform":
        return torch.rand(len(first), generator=generator)
    if init == "normal":
        return 0.5 * torch.randn(len(first), generator=generator)
    if init == "target":
        return first.float()
    return torch.full((len(first),), 1 / math.sqrt(adapters) if init == "equal" else 0.0)


def groups(stack: Stack, granularity: Granularity) -> Callable[[str], Hashable]:
    """What the coefficients of a module are tied to: nothing else, its sublayer, its layer, or all of the model."""
    architecture = stack.architecture
    prefix = architecture.prefix
    sublayers = {child: each.name for each in architecture.sublayers for child in each.modules}

    def group(name: str) -> Hashable:
        if granularity == "model":
            return "model"
        if granularity in ("module", "rank") or not name.startswith(prefix):
            return name
        layer, _, inside = name.removeprefix(prefix).partition(".")
        if granularity == "layer":
            return layer
        child = next((each for each in sublayers if f"{inside}.".startswith(f"{each}.")), inside)
        return layer, sublayers.get(child, child)

    return group
