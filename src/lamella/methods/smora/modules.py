"""R experts of rank one beside a linear map, of which each token runs k.

    z   = sigmoid(W_r x)                      W_r [R/p, in], z [tokens, R/p]
    s   = repeat(z, p) + b                    b [R], moved by the balance and not by gradients
    I   = the k largest of s
    g_i = k s_i / sum_{j in I} s_j            for i in I, else 0: their mean over I is 1
    y   = W x + alpha/k sum_{i in I} g_i B[:, i] (A[i] . x)

The scale has k in it, not R. With blocks of p ranks that are chosen together this is a mixture of R/p LoRAs, with p = R
one LoRA. Two kernels compute the sum, equal but for rounding: ``dense`` multiplies all of A and B and leaves out by
zeros, which saves nothing and is the faster one on a CPU; ``sparse`` reads the chosen rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from lamella.errors import MethodError
from lamella.plan import SiteAdapter

Kernel = Literal["dense", "sparse"]
LEAST = 1e-6  # of a score in a gate: the balance may push one below 0, and the sum of them through it
HELD = 2**22  # numbers of gathered rows that the sparse kernel holds at once


class Route(NamedTuple):
    """Which ranks a token runs, and how much of each.

    Attributes:
        ranks: I [..., k].
        gates: g [..., k].
    """

    ranks: Tensor
    gates: Tensor


def choose(z: Tensor, bias: Tensor, k: int, p: int = 1, bias_in_gate: bool = True) -> Route:
    """The k ranks with the largest scores, as blocks of p, and their gates.

    Args:
        z: the scores of the router [..., R/p].
        bias: b, alike within a block [R].
        k: a multiple of p.
        bias_in_gate: whether b counts in the gates, too, as in the authors' code, or in the choice alone.
    """
    best = (z + bias[::p]).topk(k // p, dim=-1)
    s = best.values if bias_in_gate else z.gather(-1, best.indices)
    s = s.clamp(min=LEAST)
    gates = k // p * s / s.sum(-1, keepdim=True)
    ranks = (best.indices.unsqueeze(-1) * p + torch.arange(p, device=z.device)).flatten(-2)
    return Route(ranks, gates.repeat_interleave(p, dim=-1))


def dense(x: Tensor, a: Tensor, b: Tensor, route: Route) -> Tensor:
    """sum_{i in I} g_i B[:, i] (A[i] . x), with zeros for what is not chosen [..., out]."""
    h = linear(x, a)  # [..., R]
    gates = torch.zeros_like(h).scatter(-1, route.ranks, route.gates)
    return linear(h * gates, b)


def sparse(x: Tensor, a: Tensor, b: Tensor, route: Route) -> Tensor:
    """The same from the chosen rows of A and columns of B alone; no [tokens, out, R] is ever made."""
    ranks, gates = (each.flatten(0, -2) for each in route)
    h = _Products.apply(x.flatten(0, -2), a, ranks)  # [tokens, k]
    y = embedding_bag(ranks, b.T.contiguous(), per_sample_weights=h * gates, mode="sum")
    return y.view(*x.shape[:-1], len(b))


KERNELS: Mapping[Kernel, Callable[[Tensor, Tensor, Tensor, Route], Tensor]] = {"dense": dense, "sparse": sparse}


class _Products(torch.autograd.Function):
    """h[n, j] = A[I[n, j]] . x[n]; A[I] is held for some tokens at a time, and gathered again for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, ranks: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, ranks)
        parts = [torch.einsum("nd,nkd->nk", x[part], a[ranks[part]]) for part in _parts(x, ranks)]
        return torch.cat(parts) if parts else x.new_zeros(ranks.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (x, a, ranks) = grads, ctx.saved_tensors
        into_x = embedding_bag(ranks, a, per_sample_weights=grad, mode="sum")
        into_a = torch.zeros_like(a)
        for part in _parts(x, ranks):
            rows = grad[part].unsqueeze(-1) * x[part].unsqueeze(1)  # [some, k, in]
            into_a.index_add_(0, ranks[part].flatten(), rows.flatten(0, 1))
        return into_x, into_a, None


def _parts(x: Tensor, ranks: Tensor) -> Iterator[slice]:
    size = max(1, HELD // max(1, x.shape[1] * ranks.shape[1]))
    return (slice(start, start + size) for start in range(0, len(x), size))


class RankExperts(SiteAdapter):
    """The experts of one map, with its own router: each token of each map is routed by itself.

    Args:
        inputs, outputs: sizes of the map.
        r: R, experts in all.
        k: of them, how many a token runs.
        p: how many are chosen together.
        alpha: of the scale alpha / k.
        dropout: on what the router and A read, while training.
        bias_in_gate: whether the balance vector counts in gates.

    Attributes:
        kernel: what computes; no part of a plan.
        real: which tokens of the passes to come are no padding [batch, time] bool; None where all count.
        counts: how often the last pass that trains chose each expert [R]; None before there was one.
    """

    lora_biases: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        r: int = 64,
        k: int = 8,
        p: int = 1,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias_in_gate: bool = True,
    ) -> None:
        super().__init__(inputs, outputs)
        check(r, k, p)
        self.r, self.k, self.p, self.alpha, self.bias_in_gate = r, k, p, alpha, bias_in_gate
        self.lora_A = nn.Parameter(torch.empty(r, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))
        self.lora_router = nn.Parameter(torch.empty(r // p, inputs))
        for each in (self.lora_A, self.lora_router):  # as a linear map begins; were W_r 0, the same k would always run
            nn.init.kaiming_uniform_(each, a=math.sqrt(5))
        self.register_buffer("lora_biases", torch.zeros(r))
        self.dropout = nn.Dropout(dropout)
        self.kernel: Kernel = "dense"
        self.real: Tensor | None = None
        self.counts: Tensor | None = None

    def route(self, x: Tensor) -> Route:
        """Where tokens go [..., inputs]."""
        z = torch.sigmoid(linear(x, self.lora_router))
        return choose(z, self.lora_biases, self.k, self.p, self.bias_in_gate)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in its own precision, whatever the model computes in
            x = self.dropout(x).to(self.lora_A.dtype)
            route = self.route(x)
            if self.training and torch.is_grad_enabled():
                self.counts = self.count(route.ranks)
            change = KERNELS[self.kernel](x, self.lora_A, self.lora_B, route)
            return y + (self.alpha / self.k * change).to(y.dtype)

    def count(self, ranks: Tensor) -> Tensor:
        """How often each expert was chosen [R], by tokens that are no padding."""
        if self.real is not None and self.real.shape == ranks.shape[:-1]:
            ranks = ranks[self.real]
        return torch.bincount(ranks.flatten(), minlength=self.r)

    @torch.no_grad()
    def balance(self, counts: Tensor, u: float) -> None:
        """Raise b of what is chosen less than the mean by u, and lower that of the others."""
        counts = counts.float()
        self.lora_biases += u * torch.sign(counts.mean() - counts)


def check(r: int, k: int, p: int) -> None:
    """Check that ranks can be chosen so.

    Raises:
        MethodError: when they cannot.
    """
    if r < 1 or not 1 <= k <= r:
        raise MethodError(f"k {k} of r {r}: give how many of the ranks a token runs, from 1 to r")
    if p < 1 or r % p or k % p:
        raise MethodError(f"p {p}: blocks of ranks that are chosen together must divide r {r} and k {k}")
