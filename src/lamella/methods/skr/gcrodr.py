"""GCRO-DR, step 2 of the paper: one linear system, with a subspace carried in from the last and out to the next.

Parks et al., "Recycling Krylov subspaces for sequences of linear systems", 2006. In its symbols, for A x = b::

    U  n x k       the recycled basis, in solution space: it keeps its meaning when the preconditioner M changes
    C  n x k       A U = C, with C^T C = I
    V  n x (s+1)   Arnoldi vectors of (I - C C^T) A M^-1;  Z = M^-1 V  n x s
    Vhat = [U D, Z]  n x (k+s),   What = [C, V]  n x (k+s+1),   D = diag(1 / |u_j|)
    G = [[D, B], [0, Hbar]]  (k+s+1) x (k+s),   B = C^T A Z:     A Vhat = What G

k = 0 is GMRES(m). SciPy and NumPy alone; a cycle costs what GMRES does plus 2 n k for each step.
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
RANK = 1e-12  # a column with |R_jj| below this share of the largest is no direction of its own


class Verdict(Protocol):
    """Whether the carried basis does harm, asked after each cycle that uses it."""

    def __call__(self, matvecs: int, residual: float) -> bool: ...


@dataclass(frozen=True)
class Cycle:
    """What one cycle leaves, for those who check it: the symbols of the module's docstring."""

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
        U: the basis for the next system [n, about k]; None where there is none.
        iterations: Arnoldi steps, the paper's count. The k products that start a recycled system are not in it.
        matvecs: every product with A: iterations, the k of a start, and the one of each true residual.
        applications: of the preconditioner.
        residual: |b - A x| / |b|, computed anew and not by recursion.
        converged: whether that is at most the tolerance (1 % of slack for rounding).
        history: |r| / |b| at the start, after the projection if there is one, and after each step, by the recursion.
        work: products with A that were behind each entry of the history.
        dropped: whether the carried basis was found to do harm and was dropped.
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


SLACK = 1.01  # a residual that the recursion has at the tolerance may differ by rounding


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
    harm: Verdict | None = None,
    watch: Callable[[Cycle], None] | None = None,
) -> Solve:
    """Solve A x = b (Algorithm 2 of the paper, in the flexible form whose basis lives in solution space).

    Args:
        A: a real square sparse matrix [n, n]; only ``A @ v`` is used.
        b: the right-hand side [n], not zero.
        M: the preconditioner, z = M^-1 v; it may change from system to system.
        Y: the basis that the last system left [n, at most k + 1]; None starts cold.
        x0: a first guess [n]; the paper's is zero.
        m, k: dimension of the search space, and how much of it is recycled; the paper's 40 and 20. k = 0 is GMRES(m).
        tol: the residual to reach, relative to |b|.
        max_iterations: where it gives up; the paper's 10 000.
        harm: asked after each cycle that builds on ``Y``; where it says yes, ``Y`` is dropped, and x is zero again.
        watch: called with what each cycle leaves.

    Raises:
        NumericsError: when a residual is not finite.
    """
    run = _Run(A, b, M, m, k, tol * float(np.linalg.norm(b)), max_iterations)
    run.begin(x0)
    carried = False
    if Y is not None and k > 0:
        run.project(Y)
        carried = True
    finished = False
    while not finished:
        while run.beta > run.target and run.done.iterations < max_iterations:
            cycle = run.cycle()
            if watch is not None:
                watch(cycle)
            if carried and harm is not None and run.beta > run.target and harm(run.done.matvecs, run.beta / run.scale):
                run.drop()
                carried = False
        finished = run.verified() or run.done.iterations >= max_iterations
    return run.finished()


class _Run:
    """One system on its way: x, r and the spaces."""

    def __init__(self, A: Any, b: Array, M: Apply | None, m: int, k: int, target: float, max_iterations: int) -> None:
        self.A, self.b, self.M, self.m, self.k = A, b, M, m, k
        self.target, self.max_iterations = target, max_iterations
        self.scale = float(np.linalg.norm(b))
        n = len(b)
        self.U = self.C = np.empty((n, 0))
        self.What = np.empty((n, m + 1), order="F")  # columns lie together, so a projection is one BLAS call
        self.Z = np.empty((n, m), order="F") if M is not None else self.What  # without M, Z is V
        self.done = Solve(np.zeros(n), None)

    def begin(self, x0: Array | None) -> None:
        self.r = self.b.copy()
        if x0 is not None:
            self.done.x = x0.copy()
            self.r -= self._times(x0)
        self._measure()
        self._note(self.beta)

    def project(self, Y: Array) -> None:
        """Step A: C R = A Y, U = Y R^-1, and the part of r within C is solved at once."""
        norms = np.linalg.norm(Y, axis=0)
        Y = Y[:, norms > 0] / norms[norms > 0]
        Q, R, kept = _qr(self.A @ Y)
        self.done.matvecs += Y.shape[1]
        self.C, self.U = Q, _right_solve(Y[:, kept], R)
        self._within_c()
        self._note(self.beta)

    def _within_c(self) -> None:
        inside = self.C.T @ self.r  # [k]
        self.done.x += self.U @ inside
        self.r -= self.C @ inside
        self._measure()

    def cycle(self) -> Cycle:
        """Steps B.1 to B.5."""
        k, steps, D, G = self._arnoldi()
        Vhat = np.hstack([self.U * D, self.Z[:, self._z(k) : self._z(k) + steps]])  # [n, k + s]
        What = self.What[:, : k + steps + 1]  # [n, k + s + 1]
        y = np.linalg.lstsq(G, What.T @ self.r, rcond=None)[0]  # [k + s]
        self.done.x += Vhat @ y
        self.r -= What @ (G @ y)
        self._measure()
        if self.k > 0:
            # A cold cycle asks for harmonic Ritz vectors of A M^-1 in span V, as GMRES-DR does; later ones for those
            # of A in span Vhat, since M^-1 has no inverse at hand that would lead from U back to V.
            S = What.T @ Vhat if k > 0 else np.eye(steps + 1, steps)
            self._recycle(What, Vhat, G, S)
        return Cycle(self.U, self.C, Vhat, What, G, self.beta)

    def _arnoldi(self) -> tuple[int, int, Array, Array]:
        """Step B.1: from r / |r|, orthogonal to C; returns k, the steps done, D and G."""
        k, s = self.C.shape[1], self.m - self.C.shape[1]
        W = self.What
        W[:, :k] = self.C
        D = 1 / np.linalg.norm(self.U, axis=0)
        G = np.zeros((self.m + 1, self.m))
        G[range(k), range(k)] = D
        v = self.r - self.C @ (self.C.T @ self.r)  # rounding leaves a little of C in r, which V must not have
        beta = float(np.linalg.norm(v))
        W[:, k] = v / (beta or 1.0)
        givens = _Givens(s, beta)
        steps = 0
        while steps < s and self.done.iterations < self.max_iterations:
            j = k + steps
            z = W[:, j] if self.M is None else self.M(W[:, j])
            if self.M is not None:
                self.Z[:, steps] = z
                self.done.applications += 1
            w = self._times(z)
            h = W[:, : j + 1].T @ w  # [j + 1]
            w -= W[:, : j + 1] @ h
            again = W[:, : j + 1].T @ w  # the second pass, without which C and V drift apart at small tolerances
            w -= W[:, : j + 1] @ again
            h += again
            rest = float(np.linalg.norm(w))
            exhausted = rest <= 1e-14 * math.hypot(rest, float(np.linalg.norm(h)))  # an invariant space: exact
            G[: j + 1, j], G[j + 1, j] = h, 0.0 if exhausted else rest
            W[:, j + 1] = 0.0 if exhausted else w / rest
            steps += 1
            self.done.iterations += 1
            estimate = givens.add(G[k : j + 2, j])
            self._note(estimate)
            if estimate <= self.target or exhausted or not math.isfinite(estimate):
                break
        return k, steps, D, G[: k + steps + 1, : k + steps]

    def _z(self, k: int) -> int:
        """The column where Z begins."""
        return k if self.M is None else 0

    def _recycle(self, What: Array, Vhat: Array, G: Array, S: Array) -> None:
        """Steps B.4 and B.5: the harmonic Ritz vectors of least |theta| become the basis.

        The pencil G^T G z = theta G^T S z is, with G = Q R and w = R z, the eigenproblem (Q^T S R^-1) w = w / theta.
        An ordered Schur form gives an orthonormal basis P of the wanted w: it keeps complex pairs together, and
        C = What Q P, U = Vhat R^-1 P need no eigenvectors, which may be dependent.
        """
        from scipy.linalg import schur

        Q, R, kept = _qr(G)
        T = _right_solve(Q.T @ S[:, kept], R)
        if not np.isfinite(T).all():
            return
        sizes = np.sort(np.abs(np.linalg.eigvals(T)))[::-1]
        count = _without_splitting(sizes, self.k, self.m)
        cut = 0.0 if count >= len(sizes) else math.sqrt(sizes[count - 1] * sizes[count])
        blocks, P, found = schur(T, sort=lambda re, im: math.hypot(re, im) > cut)
        most = min(self.k + 1, self.m - 1)
        if found > most:  # so many are equally large that rounding took them all
            found = most - (blocks[most, most - 1] != 0)
        if found == 0:
            return
        P = P[:, :found]
        self.C = What @ (Q @ P)
        self.U = Vhat[:, kept] @ np.linalg.solve(R, P)

    def drop(self) -> None:
        """Begin again from zero, without a basis; what was done is counted."""
        self.U = self.C = np.empty((len(self.b), 0))
        self.done.dropped = True
        self.done.x = np.zeros_like(self.b)
        self.r = self.b.copy()
        self._measure()

    def verified(self) -> bool:
        """Step C: the true residual. Where it misses the target, r becomes that and the search goes on.

        It ends without success where going on from the true residual did not halve it: rounding allows no more.
        """
        before = self.done.residual
        self.r = self.b - self._times(self.done.x)
        self._measure()
        self.done.residual = self.beta / self.scale
        self.done.converged = self.beta <= SLACK * self.target
        if self.done.converged or self.done.residual > before / 2:
            return True
        if self.C.shape[1]:
            self._within_c()
        return False

    def finished(self) -> Solve:
        self.done.U = self.U if self.U.shape[1] else None
        return self.done

    def _times(self, v: Array) -> Array:
        self.done.matvecs += 1
        return self.A @ v

    def _measure(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            self.beta = float(np.linalg.norm(self.r))
        if not math.isfinite(self.beta):
            raise NumericsError(
                f"the residual is not finite after {self.done.iterations} iterations; "
                "check the matrix for huge entries, or take another preconditioner"
            )

    def _note(self, norm: float) -> None:
        self.done.history.append(norm / self.scale)
        self.done.work.append(self.done.matvecs)


class _Givens:
    """The residual of min |beta e1 - Hbar y|, column by column, by Givens rotations."""

    def __init__(self, steps: int, beta: float) -> None:
        self.rotations: list[tuple[float, float]] = []
        self.rest = beta

    def add(self, column: Array) -> float:
        """Take column j of Hbar [j + 2] and return the residual with it."""
        h = column.copy()
        for i, (c, s) in enumerate(self.rotations):
            h[i], h[i + 1] = c * h[i] + s * h[i + 1], -s * h[i] + c * h[i + 1]
        size = math.hypot(h[-2], h[-1])
        c, s = (h[-2] / size, h[-1] / size) if size else (0.0, 1.0)
        self.rotations.append((c, s))
        self.rest *= abs(s)
        return self.rest


def _qr(columns: Array) -> tuple[Array, Array, NDArray[np.intp]]:
    """Q, R and which columns were kept: those that depend on the ones before them are dropped."""
    kept = np.arange(columns.shape[1])
    while True:
        Q, R = np.linalg.qr(columns[:, kept])
        sizes = np.abs(np.diag(R))
        good = sizes > RANK * sizes.max(initial=0.0)
        if good.all():
            return Q, R, kept
        kept = kept[good]


def _right_solve(X: Array, R: Array) -> Array:
    """X R^-1 for an upper triangular R."""
    from scipy.linalg import solve_triangular

    return np.ascontiguousarray(solve_triangular(R, X.T, trans="T").T)


def _without_splitting(sizes: Array, k: int, m: int) -> int:
    """How many of these moduli, largest first, to take: k, or one more where k would split a complex pair."""
    if k >= len(sizes):
        return len(sizes)
    together = abs(sizes[k - 1] - sizes[k]) <= 1e-10 * sizes[k - 1]
    if not together:
        return k
    # Equal moduli: a pair, unless the one before belongs to it and this is the next pair's first.
    return k + 1 if k + 1 < m else k - 1
