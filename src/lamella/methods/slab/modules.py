"""The modules: a norm that becomes a batch norm in training, and attention without a softmax. They need torch only.

RepBN(X)  = BN(X) + eta X                                    is itself a batch norm, and folds into the next layer
PRepBN(X) = gamma Norm(X) + (1 - gamma) RepBN(X)             gamma falls from 1 to 0 over the steps of a training
SLA(X)    = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K)) + DWC(V)       phi = ReLU, DWC a depthwise convolution
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Init = Literal["norm", "vision", "zero"]
EPS = 1e-6  # added to the denominator of linear attention


@dataclass
class TokenMask:
    """Mask of the tokens that enter the statistics, shared by all norms: padding does not.

    Attributes:
        mask: [batch, time] bool; None: all tokens.
    """

    mask: Tensor | None = None


class RepBN(nn.Module):
    """BN(x) + eta x over the last axis, with statistics over all counted tokens; eta is a scalar.

    Args:
        width: C.
        gain: initial weight of the batch norm; defaults to 1.
        shift: initial bias of the batch norm; defaults to 0.
        eta: initial value.
        eps: epsilon of the batch norm.
        momentum: momentum of the batch norm.
        real: the tokens that count; all if None.
    """

    def __init__(
        self,
        width: int,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        eta: float = 1.0,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        real: TokenMask | None = None,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, eps=eps, momentum=momentum)
        self.eta = nn.Parameter(torch.tensor(eta))
        self.real = real or TokenMask()
        with torch.no_grad():
            if gain is not None:
                self.bn.weight.copy_(gain)
            if shift is not None:
                self.bn.bias.copy_(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module to x [..., C]."""
        return self.normed(x) + self.eta.to(x.dtype) * x

    def normed(self, x: Tensor) -> Tensor:
        """Apply the batch norm; in training to all tokens, with the statistics of the counted ones."""
        rows = x.reshape(-1, x.shape[-1]).to(self.bn.weight.dtype)
        mask = self.real.mask
        if mask is None or not self.bn.training:
            out: Tensor = self.bn(rows)
            return out.view_as(x).to(x.dtype)
        counted = rows[mask.reshape(-1)]
        self.bn(counted)  # updates its running statistics
        mean, variance = counted.mean(0), counted.var(0, correction=0)
        out = (rows - mean) * (variance + self.bn.eps).rsqrt() * self.bn.weight + self.bn.bias
        return out.view_as(x).to(x.dtype)

    def closed(self) -> tuple[Tensor, Tensor]:
        """Return A and B [C] with RepBN(x) = A x + B in evaluation mode; float64."""
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        a = scale + self.eta.double()
        return a.detach(), (self.bn.bias.double() - scale * self.bn.running_mean.double()).detach()


class PRepBN(nn.Module):
    """A norm in transition to a RepBN.

    In training both are mixed; in evaluation RepBN is used alone, as at the end, unless ``mixed`` is set. The step is
    that of the optimizer, whatever the number of forward passes in it.

    Args:
        norm: the original norm with its weights.
        rep: the RepBN that replaces it.
        steps: T, the number of steps over which gamma falls.
        warm: number of steps before, in which the norm is used alone and no statistics are taken.
        first: initial gamma.
    """

    step: Tensor
    rep: RepBN

    def __init__(self, norm: nn.Module, rep: RepBN, steps: int, warm: int = 0, first: float = 1.0) -> None:
        super().__init__()
        self.norm, self.rep = norm, rep
        self.steps, self.warm, self.first = steps, warm, first
        self.mixed = False
        self.register_buffer("step", torch.tensor(0))

    @property
    def gamma(self) -> float:
        """The weight of the norm at this step."""
        t = int(self.step) - self.warm
        if t < 0:
            return 1.0
        return self.first * max(0.0, (self.steps - t) / self.steps) if self.steps else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mixture to x [..., C]."""
        gamma = self.gamma if self.training or self.mixed else 0.0
        if self.training and int(self.step) < self.warm:
            gamma = 1.0
        if gamma == 0.0:
            rep: Tensor = self.rep(x)
            return rep
        if gamma == 1.0 and (not self.training or int(self.step) < self.warm):
            norm: Tensor = self.norm(x)
            return norm
        mixed: Tensor = gamma * self.norm(x) + (1 - gamma) * self.rep(x)
        return mixed


def initial_repbn(norm: nn.Module, init: Init, real: TokenMask | None = None) -> RepBN:
    """Return the initial RepBN in place of a norm.

    Args:
        norm: a LayerNorm or an RMSNorm with a ``weight`` [C].
        init: ``norm``: the norm's weight and bias, and eta 0, for trained models, whose residual stream is large in
            deep layers; ``vision``: 1, 0 and eta 1; ``zero``: all 0, which disturbs nothing and learns slowly.
        real: the tokens that count.
    """
    weight: Tensor = norm.weight.detach()  # type: ignore[operator]
    width = weight.shape[0]
    if init == "vision":
        return RepBN(width, real=real).to(weight.device)
    bias = getattr(norm, "bias", None)
    zero = torch.zeros(width)
    initial = (zero, zero) if init == "zero" else (weight.float(), zero if bias is None else bias.detach().float())
    return RepBN(width, *initial, eta=0.0, real=real).to(weight.device)


class LinearAttention(nn.Module):
    """Simplified linear attention (SLA) over a square of tokens, with the interface of timm's attention.

    Args:
        dim: C.
        heads: number of heads of width c = C / heads.
        tokens: N, a square number, for the position embedding of the keys.
        kernel: kernel size of the convolution on V; 0: none.
        qkv_bias: whether the projection to Q, K and V has a bias.
    """

    def __init__(self, dim: int, heads: int, tokens: int, kernel: int = 5, qkv_bias: bool = True) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        if side * side != tokens or dim % heads:
            raise ValueError(
                f"{tokens} tokens of width {dim} in {heads} heads: give a square number of tokens, and a multiple of "
                "the heads"
            )
        self.heads, self.side = heads, side
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        width = dim // heads
        self.local = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) if kernel else None

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Apply the attention to x [batch, N, C]; every token attends to every other.

        Args:
            x: hidden states `[batch, N, C]`.
            options: masks and causal order of timm's interfaces, which must be None or false.

        Raises:
            ValueError: for a mask, which linear attention does not support.
        """
        if any(each is not None and each is not False for each in options.values()):
            raise ValueError("simplified linear attention supports neither masks nor causal order: omit them")
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = k + self.position
        q, k, v = (each.view(batch, tokens, self.heads, -1).transpose(1, 2) for each in (q.relu(), k.relu(), v))
        out = linear_attention(q, k, v)
        if self.local is not None:
            maps = v.transpose(2, 3).reshape(batch * self.heads, -1, self.side, self.side)
            out = out + self.local(maps).view(batch, self.heads, -1, tokens).transpose(2, 3)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
        return projected


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K) + 1e-6), in float32, by the cheaper order of products.

    Args:
        q: phi(Q) [batch, heads, N, c].
        k: phi(K) [batch, heads, N, c].
        v: [batch, heads, N, c].
    """
    kind = v.dtype
    with torch.autocast(v.device.type, enabled=False):
        q, k, v = (each if each.dtype == torch.float64 else each.float() for each in (q, k, v))
        out = q @ (k.transpose(-2, -1) @ v) if q.shape[-2] > q.shape[-1] else (q @ k.transpose(-2, -1)) @ v
        total = q @ k.sum(dim=-2, keepdim=True).transpose(-2, -1)
        return (out / (total + EPS)).to(kind)
