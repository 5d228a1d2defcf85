"""Linear layers with N frozen adapters, each with trained coefficients.

    y = W x + B_cat (c * (A_cat x))        A_cat [sum r_i, in], B_cat [out, sum r_i], c [sum r_i]

c repeats f(w_i) over the ranks of adapter i; s_i is part of B_cat. With f(w) = 0 everywhere the model is bitwise
unchanged. The coefficients are kept in float32 for any dtype of the model.
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
    "leaky_relu": lambda w: leaky_relu(w, 0.01),  # its slope at 0 is 0.01, which does not slow the scale-invariant Adam
    "identity": lambda w: w,
    "square": torch.square,
    "softmax": lambda w: torch.softmax(w, dim=0),
    "sigmoid": torch.sigmoid,
}


class MixedLinear(nn.Module):
    """One linear layer with its adapters.

    Attributes:
        base: the linear layer.
        mixing: w: of N adapters, or of each of their ranks; shared by all tied layers.
        owner: index in w of each rank [sum r_i].
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
        """Compute c [sum r_i]."""
        return FUNCTIONS[self.activation](self.mixing)[self.owner]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its adapters."""
        inside = self.coefficients() * linear(x, self.factor_a).float()
        y: Tensor = self.base(x)
        return y + linear(inside.to(y.dtype), self.factor_b)


@dataclass
class AdapterMixture:
    """A model with adapters on its linear layers.

    Attributes:
        model: the model with the adapters.
        modules: names of the adapted layers.
        tensors: w by tied group: 1, L, 2 L or 7 L groups in a Llama of L layers.
        transposed, base: properties of the adapters.
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
        """Whether a parameter is a coefficient or belongs to an adapter."""
        return name.endswith((".mixing", ".factor_a", ".factor_b"))

    @torch.no_grad()
    def coefficients(self) -> dict[str, Tensor]:
        """f(w) of each adapted layer: of N adapters, or of each rank."""
        maps = {name: self.model.get_submodule(name) for name in self.modules}
        return {name: FUNCTIONS[each.activation](each.mixing).detach().clone() for name, each in maps.items()}

    @torch.no_grad()
    def adapter(self) -> Adapter:
        """Combine everything into one plain adapter: A' = c * A_cat, B' = B_cat, alpha = r."""
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
) -> AdapterMixture:
    """Add adapters to the linear layers of a model, in place; its other tensors are unchanged.

    Args:
        model: a view, or a separate module.
        adapters: adapters that fit the model; the target's own first, if used.
        group: function from the name of a module to its group of tied coefficients; see :func:`groups`.
        granularity: ``rank`` gives each rank its own coefficient, everything else each adapter.
        activation: f; ``softmax`` is over the adapters.
        init: initial w: ``zero``, ``equal`` (1/sqrt(N)), ``uniform`` (0 to 1), ``normal`` (0, 0.5), or ``target``: 1
            for the first and 0 for the others.
        seed: random seed.

    Returns:
        The model with its adapters.

    Raises:
        MethodError: for softmax with a coefficient per rank.
    """
    if granularity == "rank" and activation == "softmax":
        raise MethodError("softmax is over adapters, which granularity 'rank' does not have: use another activation")
    generator = torch.Generator().manual_seed(seed)
    joined = concatenate(adapters)
    tensors: dict[Hashable, nn.Parameter] = {}
    for name, (a, b) in joined.pairs.items():
        owner = [index for index, each in enumerate(adapters) if name in each.pairs for _ in each.pairs[name][0]]
        base = model.get_submodule(name)
        if granularity == "rank":
            first, owner = [index == 0 for index in owner], list(range(len(owner)))
        else:
            first = [index == 0 for index in range(len(adapters))]
        tied = group(name)
        if tied not in tensors:
            start = _start(init, torch.tensor(first), len(adapters), generator)
            tensors[tied] = nn.Parameter(start.to(base.weight.device), requires_grad=False)
        model.set_submodule(name, MixedLinear(base, a, b, torch.tensor(owner), tensors[tied], activation))
    return AdapterMixture(model, tuple(joined.pairs), tensors, joined.transposed, joined.base)


def _start(init: Init, first: Tensor, adapters: int, generator: torch.Generator) -> Tensor:
    """Initial w; ``first`` marks those of the first adapter."""
    if init == "uniform":
        return torch.rand(len(first), generator=generator)
    if init == "normal":
        return 0.5 * torch.randn(len(first), generator=generator)
    if init == "target":
        return first.float()
    return torch.full((len(first),), 1 / math.sqrt(adapters) if init == "equal" else 0.0)


def groups(stack: Stack, granularity: Granularity) -> Callable[[str], Hashable]:
    """Create the function that maps a module to its group of tied coefficients.

    Args:
        stack: the model.
        granularity: level of tying.
    """
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
