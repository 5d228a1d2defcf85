"""R experts of rank one for a linear layer, of which each token runs k.

    z   = sigmoid(W_r x)                      W_r [R/p, in], z [tokens, R/p]
    s   = repeat(z, p) + b                    b [R], updated by load balancing and not by gradients
    I   = the k largest of s
    g_i = k s_i / sum_{j in I} s_j            for i in I, else 0: their mean over I is 1
    y   = W x + alpha/k sum_{i in I} g_i B[:, i] (A[i] . x)

The scale contains k, not R. With blocks of p ranks that are selected together this is a mixture of R/p LoRAs, with p =
R one LoRA. Two kernels compute the sum, equal up to rounding: ``dense`` multiplies all of A and B and masks with zeros,
which saves nothing and is faster on a CPU; ``sparse`` only reads the selected rows.
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
MIN_SCORE = 1e-6  # of a score in a gate: the balance may make scores negative, and their sum 0
GATHERED = 2**22  # values of gathered rows that the sparse kernel holds at a time


class Route(NamedTuple):
    """The ranks that a token runs, and their gates.

    Attributes:
        ranks: I `[..., k]`.
        gates: g `[..., k]`.
    """

    ranks: Tensor
    gates: Tensor


def choose(z: Tensor, bias: Tensor, k: int, p: int = 1, bias_in_gate: bool = True) -> Route:
    """Select the k ranks with the highest scores, as blocks of p, and compute their gates.

    Args:
        z: the scores of the router `[..., R/p]`.
        bias: b, equal within a block `[R]`.
        k: number of ranks, a multiple of p.
        p: size of a block.
        bias_in_gate: whether b is included in the gates, as in the authors' code, or only in the selection.
    """
    best = (z + bias[::p]).topk(k // p, dim=-1)
    s = best.values if bias_in_gate else z.gather(-1, best.indices)
    s = s.clamp(min=MIN_SCORE)
    gates = k // p * s / s.sum(-1, keepdim=True)
    ranks = (best.indices.unsqueeze(-1) * p + torch.arange(p, device=z.device)).flatten(-2)
    return Route(ranks, gates.repeat_interleave(p, dim=-1))


def dense(x: Tensor, a: Tensor, b: Tensor, route: Route) -> Tensor:
    """Compute sum_{i in I} g_i B[:, i] (A[i] . x), with zeros for the other ranks `[..., out]`.

    Args:
        x: the inputs `[..., in]`.
        a: A `[R, in]`.
        b: B `[out, R]`.
        route: the selected ranks and their gates.
    """
    h = linear(x, a)  # [..., R]
    gates = torch.zeros_like(h).scatter(-1, route.ranks, route.gates)
    return linear(h * gates, b)


def sparse(x: Tensor, a: Tensor, b: Tensor, route: Route) -> Tensor:
    """Compute the same from the selected rows of A and columns of B; no `[tokens, out, R]` tensor is created.

    Args:
        x: the inputs `[..., in]`.
        a: A `[R, in]`.
        b: B `[out, R]`.
        route: the selected ranks and their gates.
    """
    ranks, gates = (each.flatten(0, -2) for each in route)
    h = _Products.apply(x.flatten(0, -2), a, ranks)  # [tokens, k]
    y = embedding_bag(ranks, b.T.contiguous(), per_sample_weights=h * gates, mode="sum")
    return y.view(*x.shape[:-1], len(b))


KERNELS: Mapping[Kernel, Callable[[Tensor, Tensor, Tensor, Route], Tensor]] = {"dense": dense, "sparse": sparse}


class _Products(torch.autograd.Function):
    """h[n, j] = A[I[n, j]] . x[n]; A[I] is gathered for some tokens at a time, and again for the gradients."""

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
    size = max(1, GATHERED // max(1, x.shape[1] * ranks.shape[1]))
    return (slice(start, start + size) for start in range(0, len(x), size))


class RankExperts(SiteAdapter):
    """The experts of one linear layer, with its own router: routing is independent for each token and layer.

    Args:
        inputs, outputs: sizes of the linear layer.
        r: R, number of experts.
        k: number of experts per token.
        p: number of experts that are selected together.
        alpha: of the scale alpha / k.
        dropout: dropout on the inputs of the router and A.
        bias_in_gate: whether the balance vector is included in the gates.

    Attributes:
        kernel: the implementation; not part of a plan.
        token_mask: mask of non-padding tokens in the next passes `[batch, time]`, bool; None if there is no padding.
        counts: how often the last training pass selected each expert `[R]`; None before the first one.
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
        for each in (self.lora_A, self.lora_router):  # as in a linear layer; with W_r = 0, the same k would always run
            nn.init.kaiming_uniform_(each, a=math.sqrt(5))
        self.register_buffer("lora_biases", torch.zeros(r))
        self.dropout = nn.Dropout(dropout)
        self.kernel: Kernel = "dense"
        self.token_mask: Tensor | None = None
        self.counts: Tensor | None = None

    def route(self, x: Tensor) -> Route:
        """Return the selected ranks and gates of all tokens `[..., inputs]`."""
        z = torch.sigmoid(linear(x, self.lora_router))
        return choose(z, self.lora_biases, self.k, self.p, self.bias_in_gate)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the output of the selected experts to that of the linear layer.

        Args:
            x: input of the linear layer `[..., inputs]`.
            y: its output `[..., outputs]`.
        """
        with torch.autocast(x.device.type, enabled=False):  # in its own precision, regardless of the model's
            x = self.dropout(x).to(self.lora_A.dtype)
            route = self.route(x)
            if self.training and torch.is_grad_enabled():
                self.counts = self.count(route.ranks)
            change = KERNELS[self.kernel](x, self.lora_A, self.lora_B, route)
            return y + (self.alpha / self.k * change).to(y.dtype)

    def count(self, ranks: Tensor) -> Tensor:
        """Return how often each expert was selected `[R]`, without padding."""
        if self.token_mask is not None and self.token_mask.shape == ranks.shape[:-1]:
            ranks = ranks[self.token_mask]
        return torch.bincount(ranks.flatten(), minlength=self.r)

    @torch.no_grad()
    def balance(self, counts: Tensor, u: float) -> None:
        """Raise b of experts that are selected less than the mean by u, and lower that of the others.

        Args:
            counts: how often each expert was selected `[R]`.
            u: the step size.
        """
        counts = counts.float()
        self.lora_biases += u * torch.sign(counts.mean() - counts)


def check(r: int, k: int, p: int) -> None:
    """Check the combination of ranks.

    Args:
        r: number of experts.
        k: number of experts per token.
        p: number of experts that are selected together.

    Raises:
        MethodError: if it is invalid.
    """
    if r < 1 or not 1 <= k <= r:
        raise MethodError(f"k {k} of r {r}: give the number of ranks per token, from 1 to r")
    if p < 1 or r % p or k % p:
        raise MethodError(f"p {p}: the size of blocks of ranks must divide r {r} and k {k}")
