"""The authors' implementation: GCRO-DR of HPDDM inside PETSc. Untested: no PETSc with HPDDM was available.

PETSc must be configured with HPDDM (``--download-hpddm``), which those of Debian and of ``pip install petsc4py`` are
not. HPDDM preconditions from the left by default, so it stops by the preconditioned residual; the reported residual is
the true one, and a system that misses the tolerance by it counts as not converged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lamella.errors import LamellaError, MethodError
from lamella.methods.skr.gcrodr import SLACK, Apply, Solve
from lamella.methods.skr.systems import System

TYPES = {"none": "none", "jacobi": "jacobi", "sor": "sor", "asm": "asm", "ilu": "ilu", "icc": "icc", "amg": "gamg"}
PREFIX = "lamella_skr_"


class HPDDM:
    """One KSP for all systems of a chunk: resetting or replacing it would free the recycled space.

    Args:
        preconditioner: a name; PETSc has its own implementation of each.
        carried: whether the space is carried from system to system.
        m: dimension of the search space.
        k: dimension of the recycled subspace.
        tol: residual to reach, relative to |b|.
        max_iterations: maximum number of iterations per system.

    Raises:
        LamellaError: without petsc4py, or if PETSc lacks HPDDM.
        MethodError: for a preconditioner that is a function.
    """

    def __init__(self, preconditioner: Any, *, carried: bool, m: int, k: int, tol: float, max_iterations: int) -> None:
        if preconditioner not in TYPES:
            raise MethodError(f"backend 'petsc' needs the name of a preconditioner; one of {', '.join(TYPES)}")
        try:
            from petsc4py import PETSc
        except ImportError:
            raise LamellaError("backend 'petsc' needs petsc4py and a PETSc with HPDDM; use backend 'numpy'") from None
        self.petsc, self.carried, self.tol, self.max_iterations = PETSc, carried, tol, max_iterations
        options = PETSc.Options(PREFIX)
        options["ksp_type"], options["ksp_hpddm_type"] = "hpddm", "gcrodr"
        options["ksp_gmres_restart"], options["ksp_hpddm_recycle"] = m, k
        options["pc_type"] = TYPES[preconditioner]
        self.ksp = self._solver()
        self.solved = 0

    def _solver(self) -> Any:
        ksp = self.petsc.KSP().create(self.petsc.COMM_SELF)
        ksp.setOptionsPrefix(PREFIX)
        ksp.setTolerances(rtol=self.tol, atol=0.0, max_it=self.max_iterations)
        try:
            ksp.setFromOptions()
        except self.petsc.Error as error:
            raise LamellaError(
                "this PETSc lacks the solver HPDDM; configure it with --download-hpddm, or use backend 'numpy'"
            ) from error
        return ksp

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        """Solve a system, and return the solution and how it started."""
        number = self.petsc.IntType
        rows = (system.A.indptr.astype(number), system.A.indices.astype(number), system.A.data)
        A = self.petsc.Mat().createAIJ(size=system.A.shape, csr=rows, comm=self.petsc.COMM_SELF)
        b, x = A.createVecLeft(), A.createVecRight()
        b.setArray(system.b)
        if not self.carried and self.solved:
            self.ksp = self._solver()
        start = "recycled" if self.carried and self.solved else "cold"
        self.ksp.setOperators(A)
        self.ksp.solve(b, x)
        self.solved += 1
        iterations, found = int(self.ksp.getIterationNumber()), np.array(x.getArray())
        residual = float(np.linalg.norm(system.b - system.A @ found) / np.linalg.norm(system.b))
        # PETSc does not report its products with A: only the iterations and the true residual are counted.
        solve = Solve(found, None, iterations, iterations + 1, iterations, residual, residual <= SLACK * self.tol)
        return solve, start

    def state(self) -> dict[str, Any]:
        """Return no state; PETSc keeps it internally."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Ignore the state."""
        pass
