"""The directions that old inputs do not excite, and the factors of a weight on them (steps 2 to 4).

    C   = U S U^T,  U_n = the r columns of the smallest eigenvalues     [n, r]
    W_P = W U_n U_n^T = U_w S_w V_w^T                                   rank r at most
    A0  = S_w^(1/2) V_w^T  [r, n],   B0 = U_w S_w^(1/2)  [m, r]

The rows of A0 lie in the span of U_n, so A0 C A0^T is close to 0: whatever B becomes, B A0 does not respond to what the
old inputs excite. "Null space" means the r smallest eigenvalues; whether they are null is not enforced, so the
remaining energy on them is reported, and the largest r with almost no energy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamella.errors import MethodError

WEAK = 0.01  # fraction of the energy of old inputs above which the directions are not considered a null space


class Basis(NamedTuple):
    """The directions that old inputs excite least.

    Attributes:
        vectors: U_n [n, r], in float64.
        energy: tr(U_n^T C U_n) / tr(C), the fraction of the energy of old inputs on them.
        allows: the largest r with at most 1 % of the energy.
    """

    vectors: Tensor
    energy: float
    allows: int


class LowRankFactors(NamedTuple):
    """The factors of a linear layer.

    Attributes:
        a: A0 [r, n].
        b: B0 [m, r].
        energy, allows: of its input; see :class:`Basis`.
    """

    a: Tensor
    b: Tensor
    energy: float
    allows: int


def null_basis(c: Tensor, r: int) -> Basis:
    """Compute U_n of C.

    Args:
        c: C [n, n].
        r: number of directions.

    Raises:
        MethodError: for a rank above n.
    """
    n = len(c)
    if not 0 <= r <= n:
        raise MethodError(f"r {r}: a linear layer with {n} inputs has at most {n} directions: give a smaller rank")
    values, vectors = torch.linalg.eigh(c.double())  # ascending
    shares = values.clamp(min=0).cumsum(0)
    shares = shares / shares[-1].clamp(min=torch.finfo(shares.dtype).tiny)
    return Basis(vectors[:, :r].clone(), float(shares[r - 1]) if r else 0.0, int((shares <= WEAK).sum()))


def factors(weight: Tensor, c: Tensor, r: int) -> LowRankFactors:
    """Compute A0 and B0 of a weight, in float32.

    Args:
        weight: [m, n].
        c: C [n, n].
        r: number of directions.
    """
    return on_basis(weight, null_basis(c, r))


def on_basis(weight: Tensor, basis: Basis) -> LowRankFactors:
    """Compute A0 and B0 for a known basis; an SVD of [m, r] instead of one of [m, n].

    Args:
        weight: [m, n].
        basis: the basis.
    """
    vectors = basis.vectors
    m, r = len(weight), vectors.shape[1]
    u, s, v = torch.linalg.svd(weight.double() @ vectors, full_matrices=False)  # W U_n = u s v
    root = s.sqrt()
    a, b = vectors.new_zeros(r, len(vectors)), vectors.new_zeros(m, r)  # if m < r, the last directions stay empty
    a[: len(s)] = root[:, None] * (v @ vectors.T)
    b[:, : len(s)] = u * root
    return LowRankFactors(a.float(), b.float(), basis.energy, basis.allows)
