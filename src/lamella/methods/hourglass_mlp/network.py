"""The networks: residual MLPs whose skip is wide and whose hidden layer is narrow.

They are plain torch modules; numpy generates the frozen lifts, and of Lamella only the errors are used.

    z_0 = W_in x                                      the lift, once: [d_z, d_x]
    z_i = z_{i-1} + W2_i ReLU(W1_i BN(z_{i-1}))       d_z -> d_h -> d_z, i = 1 .. L
    y   = sigmoid(W_out z_L)                          the read-out: [d_y, d_z]

    hourglass     |######|  ##  |######|  ##  |######|      d_h < d_z
    conventional    |##| ###### |##| ###### |##|            d_h > d_z = d_x

There are no biases, and BN has no affine part. A linear layer is initialised uniformly in +-1/sqrt(d_in) like
``nn.Linear``, so each branch is small and fifty blocks train without further measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lamella.errors import MethodError, listed

Lift = Literal["trained", "frozen", "none"]
GENERATOR = 1  # of frozen lifts: the raw 64 bits of numpy's PCG64, which are fixed across versions


class HourglassBlock(nn.Module):
    """One block, without its skip: W2 ReLU(W1 BN(z)), z [batch, d_latent].

    Args:
        d_latent: width of the skip.
        d_hidden: hidden width.
    """

    def __init__(self, d_latent: int, d_hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(d_latent, eps=1e-5, momentum=0.1, affine=False)
        self.w1 = nn.Linear(d_latent, d_hidden, bias=False)
        self.w2 = nn.Linear(d_hidden, d_latent, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Compute the update of the residual stream z."""
        added: Tensor = self.w2(torch.relu(self.w1(self.norm(z))))
        return added


class FrozenLift(nn.Module):
    """A random fixed W_in [d_latent, d_in]: not a parameter; a checkpoint holds only its seed.

    The weights are the same on every machine and in every version of torch. They follow the initialisation of
    ``nn.Linear``: uniform in +-1/sqrt(d_in).

    Args:
        d_in, d_latent: sizes.
        seed: random seed, 0 or more.
    """

    seed: Tensor
    weight: Tensor

    def __init__(self, d_in: int, d_latent: int, seed: int = 0) -> None:
        super().__init__()
        if seed < 0:
            raise MethodError(f"the seed of the lift is {seed}: give 0 or more")
        self.register_buffer("seed", torch.tensor([GENERATOR, seed]))
        self.register_buffer("weight", uniform_lift(d_in, d_latent, seed), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute W_in x."""
        return nn.functional.linear(x, self.weight)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        generator, seed = self.seed.tolist()
        if generator != GENERATOR:
            raise MethodError(
                f"the lift was made by generator {generator}, but this version has {GENERATOR}: store W_in instead"
            )
        d_latent, d_in = self.weight.shape
        self.weight.copy_(uniform_lift(d_in, d_latent, seed))


def uniform_lift(d_in: int, d_latent: int, seed: int) -> Tensor:
    """Generate a uniform random matrix in +-1/sqrt(d_in), float32 [d_latent, d_in], from 53 bits per value.

    Args:
        d_in: input size.
        d_latent: output size.
        seed: random seed.
    """
    bits = np.random.PCG64(seed).random_raw(d_latent * d_in) >> np.uint64(11)
    uniform = 2.0 * (bits * 2.0**-53) - 1.0
    return torch.from_numpy((uniform / math.sqrt(d_in)).astype(np.float32)).view(d_latent, d_in)


class Size(NamedTuple):
    """Number of parameters of a network. Compute follows the total: about 2 FLOPs per parameter.

    Attributes:
        total: all parameters, frozen ones too.
        trainable: trainable parameters.
    """

    total: int
    trainable: int


def size_of(
    d_in: int, d_out: int, d_latent: int, d_hidden: Sequence[int], lift: Lift = "trained", readout: bool = True
) -> Size:
    """Compute P = d_z d_x + d_z d_y + 2 d_z sum_i d_h,i, without absent layers.

    Args:
        d_in: d_x.
        d_out: d_y.
        d_latent: d_z.
        d_hidden: d_h of each block.
        lift: kind of W_in.
        readout: whether there is a W_out.
    """
    lifted, read = d_latent * d_in * (lift != "none"), d_latent * d_out * readout
    total = lifted + read + 2 * d_latent * sum(d_hidden)
    return Size(total, total - lifted * (lift == "frozen"))


class HourglassMLP(nn.Module):
    """A residual MLP from vectors to vectors in [0, 1]; wide-narrow-wide or narrow-wide-narrow, depending on its sizes.

    Args:
        d_in, d_out: d_x and d_y.
        d_latent: d_z, the width of the skip.
        d_hidden: d_h of each block; empty for no blocks.
        lift: W_in is ``trained``, random and ``frozen``, or ``none``: then d_latent must equal d_in.
        readout: whether there is a W_out; without one d_latent must equal d_out.
        seed: random seed of a frozen lift; everything else uses torch's generator.

    Raises:
        MethodError: for sizes that do not fit.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_latent: int,
        d_hidden: Sequence[int],
        *,
        lift: Lift = "trained",
        readout: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(d_in, d_out, d_latent, d_hidden, lift, readout)
        self.lift = self._lift(d_in, d_latent, lift, seed)
        self.blocks = nn.ModuleList(HourglassBlock(d_latent, each) for each in d_hidden)
        self.readout = nn.Linear(d_latent, d_out, bias=False) if readout else nn.Identity()
        self.size = size_of(d_in, d_out, d_latent, d_hidden, lift, readout)

    @staticmethod
    def _lift(d_in: int, d_latent: int, lift: Lift, seed: int) -> nn.Module:
        if lift == "frozen":
            return FrozenLift(d_in, d_latent, seed)
        return nn.Linear(d_in, d_latent, bias=False) if lift == "trained" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [batch, d_out], in [0, 1], from x [batch, d_in]."""
        z = self.lift(x)
        for block in self.blocks:
            z = z + block(z)
        return torch.sigmoid(self.readout(z))


def _check(d_in: int, d_out: int, d_latent: int, d_hidden: Sequence[int], lift: str, readout: bool) -> None:
    sizes = {"d_in": d_in, "d_out": d_out, "d_latent": d_latent} | {f"d_hidden[{i}]": d for i, d in enumerate(d_hidden)}
    for name, size in sizes.items():
        if size < 1:
            raise MethodError(f"{name} is {size}: give at least 1")
    if lift not in ("trained", "frozen", "none"):
        raise MethodError(f"lift '{lift}': choose one of trained, frozen, none")
    if lift == "none" and d_latent != d_in:
        raise MethodError(f"without a lift d_latent must equal d_in, but they are {d_latent} and {d_in}: add a lift")
    if not readout and d_latent != d_out:
        raise MethodError(
            f"without a read-out d_latent must equal d_out, but they are {d_latent} and {d_out}: add a read-out"
        )


class SubBlock(nn.Module):
    """One narrow feed-forward network, without its skip: SwiGLU(RMSNorm(h)), h [..., width].

    Args:
        width: hidden size of the model.
        inner: inner width.
        eps: epsilon of the norm.
    """

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Compute the update of the residual stream h."""
        h = self.norm(h)
        added: Tensor = self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return added


class HourglassFFN(nn.Module):
    """The feed-forward part of a Transformer as a series of narrow sub-blocks, each with its own norm and skip.

    h <- h + SwiGLU_k(RMSNorm_k(h)), k = 1 .. K (Liao et al., arXiv 2602.06471)

    Args:
        width: hidden size of the model.
        inner: inner width of each sub-block.
        eps: epsilon of the norms.

    Raises:
        MethodError: for sizes below 1, or no sub-block.
    """

    def __init__(self, width: int, inner: Sequence[int], eps: float = 1e-6) -> None:
        super().__init__()
        if not inner or min(width, *inner) < 1:
            raise MethodError(
                f"hidden size {width} with inner widths {listed(inner)}: give at least one width, each at least 1"
            )
        self.blocks = nn.ModuleList(SubBlock(width, each, eps) for each in inner)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def start(self, size: float) -> None:
        """Scale the output projections of untrained sub-blocks before they are fitted.

        Args:
            size: target standard deviation of the output.
        """
        for block in self.blocks:
            assert isinstance(block, SubBlock)
            block.down.weight.mul_(size)

    def forward(self, h: Tensor) -> Tensor:
        """Compute what all sub-blocks together add to the residual stream h [..., width]."""
        added = torch.zeros_like(h)
        for block in self.blocks:
            added = added + block(h + added)
        return added


def ffn_size(width: int, inner: Sequence[int]) -> int:
    """Count the parameters of a :class:`HourglassFFN`, including its norms.

    Args:
        width: hidden size of the model.
        inner: inner width of each sub-block.
    """
    return sum(width + 3 * width * each for each in inner)


def inner_widths(width: int, parameters: int, blocks: int) -> tuple[int, ...]:
    """Compute the widest equal sub-blocks whose linear layers have at most ``parameters`` parameters, without norms.

    Args:
        width: hidden size of the model.
        parameters: maximum number of parameters of all linear layers together.
        blocks: number of sub-blocks.

    >>> inner_widths(576, 3 * 576 * 1536, 4)  # SmolLM2-135M
    (384, 384, 384, 384)

    Raises:
        MethodError: when even an inner width of 1 has more.
    """
    inner = parameters // blocks // (3 * width)
    if inner < 1:
        raise MethodError(
            f"{parameters:,} parameters are fewer than the {3 * width * blocks:,} of the smallest shape, {blocks} "
            f"blocks of inner width 1 at hidden size {width}: allow more parameters or use fewer blocks"
        )
    return (inner,) * blocks
