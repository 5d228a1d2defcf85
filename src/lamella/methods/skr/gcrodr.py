"""GCRO-DR, step 2 of the paper: one linear system, with a subspace recycled from the last and passed to the next.

Parks et al., "Recycling Krylov subspaces for sequences of linear systems", 2006. In its symbols, for A x = b::

    U  n x k       the recycled basis, in solution space: it stays valid when the preconditioner M changes
    C  n x k       A U = C, with C^T C = I
    V  n x (s+1)   Arnoldi vectors of (I - C C^T) A M^-1;  Z = M^-1 V  n x s
    Vhat = [U D, Z]  n x (k+s),   What = [C, V]  n x (k+s+1),   D = diag(1 / |u_j|)
    G = [[D, B], [0, Hbar]]  (k+s+1) x (k+s),   B = C^T A Z:     A Vhat = What G

k = 0 is GMRES(m). It only needs SciPy and NumPy; a cycle costs as much as one of GMRES plus 2 n k per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lamella.errors import NumericsError

Array = NDArray[np.float64]
Apply = Callable[[Array], Array]  # z = M^-1 v
RANK = 1e-12  # columns with |R_jj| below this fraction of the largest are dependent


class HarmTest(Protocol):
    """Decides after each cycle with the recycled basis whether that basis does harm."""

    def __call__(self, matvecs: int, residual: float) -> bool:
        """Return whether to drop the basis."""
        ...


@dataclass(frozen=True)
class Cycle:
    """The state after a cycle, for checks: the symbols of the module's docstring.

    Attributes:
        U: the new basis.
        C: A U, orthonormal.
        Vhat: the search space.
        What: the orthonormal basis of the image of the search space.
        G: A Vhat = What G.
        residual: the norm of the residual.
    """

    U: Array
    C: Array
    Vhat: Array
    What: Array
    G: Array
    residual: float


@dataclass
class Solve:
    """How one system was solved.

    Attributes:
        x: the solution [n].
        U: the basis for the next system [n, about k]; None if there is none.
        iterations: Arnoldi steps, the paper's count. The k products that start a recycled system are not included.
        matvecs: all products with A: iterations, the k of a start, and one per true residual.
        applications: applications of the preconditioner.
        residual: |b - A x| / |b|, computed explicitly and not by recursion.
        converged: whether the residual is at most the tolerance (with 1 % slack for rounding).
        history: |r| / |b| at the start, after the projection if there is one, and after each step, by the recursion.
        work: the products with A up to each entry of the history.
        dropped: whether the recycled basis was found to be harmful and was dropped.
    """

    x: Array
    U: Array | None
    iterations: int = 0
    matvecs: int = 0
    applications: int = 0
    residual: float = math.inf
    converged: bool = False
    history: list[float] = field(default_factory=list)
    work: list[int] = field(default_factory=list)
    dropped: bool = False


SLACK = 1.01  # the true residual may differ from the recursion by rounding


def gcrodr(
    A: Any,
    b: Array,
    *,
    M: Apply | None = None,
    Y: Array | None = None,
    x0: Array | None = None,
    m: int = 40,
    k: int = 20,
    tol: float = 1e-8,
    max_iterations: int = 10_000,
    harm: HarmTest | None = None,
    on_cycle: Callable[[Cycle], None] | None = None,
) -> Solve:
    """Solve A x = b (Algorithm 2 of the paper, in the flexible form whose basis is in solution space).

    Args:
        A: a real square sparse matrix [n, n]; only ``A @ v`` is used.
        b: the right-hand side [n], not zero.
        M: the preconditioner, z = M^-1 v; it may change from system to system.
        Y: the basis of the previous system [n, at most k + 1]; None for a cold start.
        x0: an initial guess [n]; the paper uses zero.
        m: dimension of the search space; the paper uses 40.
        k: dimension of the recycled subspace; the paper uses 20. k = 0 is GMRES(m).
        tol: the residual to reach, relative to |b|.
        max_iterations: maximum number of iterations; the paper uses 10 000.
        harm: called after each cycle with ``Y``; if it returns True, ``Y`` is dropped, and x is reset to zero.
        on_cycle: called with the state after each cycle.

    Raises:
        NumericsError: if a residual is not finite.
    """
    run = _Run(A, b, M, m, k, tol * float(np.linalg.norm(b)), max_iterations)
    run.start(x0)
    carried = False
    if Y is not None and k > 0:
        run.project(Y)
        carried = True
    stop = False
    while not stop:
        while run.beta > run.target and run.result.iterations < max_iterations:
            cycle = run.cycle()
            if on_cycle is not None:
                on_cycle(cycle)
            if (
                carried
                and harm is not None
                and run.beta > run.target
                and harm(run.result.matvecs, run.beta / run.scale)
            ):
                run.drop_basis()
                carried = False
        stop = run.verify() or run.result.iterations >= max_iterations
    return run.finish()


class _Run:
    """The state of one system: x, r and the spaces."""

    def __init__(self, A: Any, b: Array, M: Apply | None, m: int, k: int, target: float, max_iterations: int) -> None:
        self.A, self.b, self.M, self.m, self.k = A, b, M, m, k
        self.target, self.max_iterations = target, max_iterations
        self.scale = float(np.linalg.norm(b))
        n = len(b)
        self.U = self.C = np.empty((n, 0))
        self.What = np.empty((n, m + 1), order="F")  # columns are contiguous, so a projection is one BLAS call
        self.Z = np.empty((n, m), order="F") if M is not None else self.What  # without M, Z is V
        self.result = Solve(np.zeros(n), None)

    def start(self, x0: Array | None) -> None:
        """Set the initial guess and its residual."""
        self.r = self.b.copy()
        if x0 is not None:
            self.result.x = x0.copy()
            self.r -= self._multiply(x0)
        self._measure()
        self._record(self.beta)

    def project(self, Y: Array) -> None:
        """Run step A: C R = A Y, U = Y R^-1, and solve for the component of r within C."""
        norms = np.linalg.norm(Y, axis=0)
        Y = Y[:, norms > 0] / norms[norms > 0]
        Q, R, columns_kept = _qr(self.A @ Y)
        self.result.matvecs += Y.shape[1]
        self.C, self.U = Q, _right_solve(Y[:, columns_kept], R)
        self._within_c()
        self._record(self.beta)

    def _within_c(self) -> None:
        inside = self.C.T @ self.r  # [k]
        self.result.x += self.U @ inside
        self.r -= self.C @ inside
        self._measure()

    def cycle(self) -> Cycle:
        """Run steps B.1 to B.5."""
        k, steps, D, G = self._arnoldi()
        Vhat = np.hstack([self.U * D, self.Z[:, self._z(k) : self._z(k) + steps]])  # [n, k + s]
        What = self.What[:, : k + steps + 1]  # [n, k + s + 1]
        y = np.linalg.lstsq(G, What.T @ self.r, rcond=None)[0]  # [k + s]
        self.result.x += Vhat @ y
        self.r -= What @ (G @ y)
        self._measure()
        if self.k > 0:
            # A cold cycle uses harmonic Ritz vectors of A M^-1 in span V, as GMRES-DR does; later ones use those
            # of A in span Vhat, since M^-1 cannot be inverted to map U back to V.
            S = What.T @ Vhat if k > 0 else np.eye(steps + 1, steps)
            self._recycle(What, Vhat, G, S)
        return Cycle(self.U, self.C, Vhat, What, G, self.beta)

    def _arnoldi(self) -> tuple[int, int, Array, Array]:
        """Run step B.1 from r / |r|, orthogonal to C; return k, the number of steps, D and G."""
        k, s = self.C.shape[1], self.m - self.C.shape[1]
        W = self.What
        W[:, :k] = self.C
        D = 1 / np.linalg.norm(self.U, axis=0)
        G = np.zeros((self.m + 1, self.m))
        G[range(k), range(k)] = D
        v = self.r - self.C @ (self.C.T @ self.r)  # remove the component in C that is due to rounding
        beta = float(np.linalg.norm(v))
        W[:, k] = v / (beta or 1.0)
        givens = _Givens(s, beta)
        steps = 0
        while steps < s and self.result.iterations < self.max_iterations:
            j = k + steps
            z = W[:, j] if self.M is None else self.M(W[:, j])
            if self.M is not None:
                self.Z[:, steps] = z
                self.result.applications += 1
            w = self._multiply(z)
            h = W[:, : j + 1].T @ w  # [j + 1]
            w -= W[:, : j + 1] @ h
            correction = W[:, : j + 1].T @ w  # second pass, needed for orthogonality at small tolerances
            w -= W[:, : j + 1] @ correction
            h += correction
            remainder = float(np.linalg.norm(w))
            exhausted = remainder <= 1e-14 * math.hypot(
                remainder, float(np.linalg.norm(h))
            )  # an invariant space: exact
            G[: j + 1, j], G[j + 1, j] = h, 0.0 if exhausted else remainder
            W[:, j + 1] = 0.0 if exhausted else w / remainder
            steps += 1
            self.result.iterations += 1
            estimate = givens.add(G[k : j + 2, j])
            self._record(estimate)
            if estimate <= self.target or exhausted or not math.isfinite(estimate):
                break
        return k, steps, D, G[: k + steps + 1, : k + steps]

    def _z(self, k: int) -> int:
        """Return the first column of Z."""
        return k if self.M is None else 0

    def _recycle(self, What: Array, Vhat: Array, G: Array, S: Array) -> None:
        """Run steps B.4 and B.5: the harmonic Ritz vectors of smallest |theta| become the basis.

        The pencil G^T G z = theta G^T S z is, with G = Q R and w = R z, the eigenproblem (Q^T S R^-1) w = w / theta.
        An ordered Schur form gives an orthonormal basis P of the required w: it keeps complex pairs together, and
        C = What Q P, U = Vhat R^-1 P need no eigenvectors, which may be dependent.
        """
        from scipy.linalg import schur

        Q, R, columns_kept = _qr(G)
        T = _right_solve(Q.T @ S[:, columns_kept], R)
        if not np.isfinite(T).all():
            return
        sizes = np.sort(np.abs(np.linalg.eigvals(T)))[::-1]
        count = _keep_pairs(sizes, self.k, self.m)
        cut = 0.0 if count >= len(sizes) else math.sqrt(sizes[count - 1] * sizes[count])
        blocks, P, found = schur(T, sort=lambda re, im: math.hypot(re, im) > cut)
        most = min(self.k + 1, self.m - 1)
        if found > most:  # rounding selected all of several equal moduli
            found = most - (blocks[most, most - 1] != 0)
        if found == 0:
            return
        P = P[:, :found]
        self.C = What @ (Q @ P)
        self.U = Vhat[:, columns_kept] @ np.linalg.solve(R, P)

    def drop_basis(self) -> None:
        """Restart from zero without a basis; the work so far is counted."""
        self.U = self.C = np.empty((len(self.b), 0))
        self.result.dropped = True
        self.result.x = np.zeros_like(self.b)
        self.r = self.b.copy()
        self._measure()

    def verify(self) -> bool:
        """Run step C: the true residual. If it misses the target, r is set to it and the iteration continues.

        It ends without success if continuing from the true residual did not halve it: rounding allows no more.
        """
        before = self.result.residual
        self.r = self.b - self._multiply(self.result.x)
        self._measure()
        self.result.residual = self.beta / self.scale
        self.result.converged = self.beta <= SLACK * self.target
        if self.result.converged or self.result.residual > before / 2:
            return True
        if self.C.shape[1]:
            self._within_c()
        return False

    def finish(self) -> Solve:
        """Return the result with its basis."""
        self.result.U = self.U if self.U.shape[1] else None
        return self.result

    def _multiply(self, v: Array) -> Array:
        self.result.matvecs += 1
        return self.A @ v

    def _measure(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            self.beta = float(np.linalg.norm(self.r))
        if not math.isfinite(self.beta):
            raise NumericsError(
                f"the residual is not finite after {self.result.iterations} iterations; "
                "check the matrix for huge entries, or take another preconditioner"
            )

    def _record(self, norm: float) -> None:
        self.result.history.append(norm / self.scale)
        self.result.work.append(self.result.matvecs)


class _Givens:
    """The residual of min |beta e1 - Hbar y|, column by column, by Givens rotations."""

    def __init__(self, steps: int, beta: float) -> None:
        self.rotations: list[tuple[float, float]] = []
        self.remainder = beta

    def add(self, column: Array) -> float:
        """Append column j of Hbar [j + 2] and return the residual."""
        h = column.copy()
        for i, (c, s) in enumerate(self.rotations):
            h[i], h[i + 1] = c * h[i] + s * h[i + 1], -s * h[i] + c * h[i + 1]
        size = math.hypot(h[-2], h[-1])
        c, s = (h[-2] / size, h[-1] / size) if size else (0.0, 1.0)
        self.rotations.append((c, s))
        self.remainder *= abs(s)
        return self.remainder


def _qr(columns: Array) -> tuple[Array, Array, NDArray[np.intp]]:
    """Return Q, R and the indices of the linearly independent columns."""
    columns_kept = np.arange(columns.shape[1])
    while True:
        Q, R = np.linalg.qr(columns[:, columns_kept])
        sizes = np.abs(np.diag(R))
        good = sizes > RANK * sizes.max(initial=0.0)
        if good.all():
            return Q, R, columns_kept
        columns_kept = columns_kept[good]


def _right_solve(X: Array, R: Array) -> Array:
    """Return X R^-1 for an upper triangular R."""
    from scipy.linalg import solve_triangular

    return np.ascontiguousarray(solve_triangular(R, X.T, trans="T").T)


def _keep_pairs(sizes: Array, k: int, m: int) -> int:
    """Return how many of these moduli, largest first, to use: k, or k +- 1 if k would split a complex pair."""
    if k >= len(sizes):
        return len(sizes)
    together = abs(sizes[k - 1] - sizes[k]) <= 1e-10 * sizes[k - 1]
    if not together:
        return k
    # Equal moduli are a pair, unless the previous one belongs to it and this is the first of the next pair.
    return k + 1 if k + 1 < m else k - 1
