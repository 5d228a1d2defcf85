"""The directions that old inputs do not excite, and the factors of a weight on them (steps 2 to 4).

    C   = U S U^T,  U_n = the r columns of the smallest eigenvalues     [n, r]
    W_P = W U_n U_n^T = U_w S_w V_w^T                                   rank r at most
    A0  = S_w^(1/2) V_w^T  [r, n],   B0 = U_w S_w^(1/2)  [m, r]

The rows of A0 lie in the span of U_n, so A0 C A0^T is next to 0: whatever B becomes, B A0 does not answer to what the
old inputs excite. "Null space" means the r smallest; nothing checks that they are null, so the energy that is left on
them is told.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamella.errors import MethodError


class Factors(NamedTuple):
    """What a linear map is split by.

    Attributes:
        a: A0 [r, n].
        b: B0 [m, r].
        energy: tr(U_n^T C U_n) / tr(C), the share of what old inputs excite that lies on the r directions.
    """

    a: Tensor
    b: Tensor
    energy: float


def null_basis(c: Tensor, r: int) -> tuple[Tensor, float]:
    """U_n [n, r], in float64, and the energy on it.

    Raises:
        MethodError: for a rank above n.
    """
    n = len(c)
    if not 0 <= r <= n:
        raise MethodError(f"r={r}: a linear map that reads {n} numbers has at most {n} directions; give a rank to that")
    values, vectors = torch.linalg.eigh(c.double())  # ascending
    values = values.clamp(min=0)
    total = float(values.sum())
    return vectors[:, :r], float(values[:r].sum()) / total if total else 0.0


def factors(weight: Tensor, c: Tensor, r: int) -> Factors:
    """A0 and B0 of a weight [m, n], in float32."""
    basis, energy = null_basis(c, r)
    return on_basis(weight, basis, energy)


def on_basis(weight: Tensor, basis: Tensor, energy: float) -> Factors:
    """The same for a basis [n, r] that is known; an SVD of [m, r] in place of one of [m, n]."""
    m, r = len(weight), basis.shape[1]
    u, s, v = torch.linalg.svd(weight.double() @ basis, full_matrices=False)  # W U_n = u s v
    root = s.sqrt()
    a, b = basis.new_zeros(r, len(basis)), basis.new_zeros(m, r)  # where m < r, the last directions stay empty
    a[: len(s)] = root[:, None] * (v @ basis.T)
    b[:, : len(s)] = u * root
    return Factors(a.float(), b.float(), energy)
