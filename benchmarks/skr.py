"""Iterations and seconds of SKR compared with SciPy's solvers, from a thousand to a hundred thousand unknowns.

Darcy systems in two and three dimensions and Helmholtz systems in three, with an incomplete LU. Each system is solved
by all solvers before the next one, in one process with one thread; processor time is measured, including the
construction of preconditioners and factors. The ratios exclude the first system, for which nothing can be recycled.

    python benchmarks/skr.py            # about 15 minutes on 1 idle core; resumes after an interruption
    python benchmarks/skr.py --quick    # two small sizes
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lamella.methods.skr as package
from lamella.methods.skr import LinearSystems, arrange, preconditioners
from lamella.methods.skr.families import darcy, helmholtz
from lamella.methods.skr.gcrodr import Apply, Solve
from lamella.methods.skr.method import Recycling
from lamella.methods.skr.solvers import GMRES, Direct, Outer, Stateless, Symmetric, count_products
from lamella.methods.skr.systems import System
from lamella.results import Record
from lamella.search.journal import Memo
from lamella.zoo.cache import cache_folder

SETTINGS: dict[str, Any] = {"m": 40, "k": 20, "tol": 1e-8, "max_iterations": 10_000}


class SciPyGMRES(Stateless):
    """SciPy's restarted GMRES, which counts cycles and uses left preconditioning."""

    def __call__(self, system: System, M: Apply | None) -> tuple[Solve, str]:
        from scipy.sparse.linalg import gmres

        A, inverse, counted = count_products(system, M)
        cycles = SETTINGS["max_iterations"] // SETTINGS["m"]
        x, _ = gmres(A, system.b, rtol=SETTINGS["tol"], atol=0.0, restart=SETTINGS["m"], maxiter=cycles, M=inverse)
        return counted.solve(x, system, SETTINGS["tol"]), "cold"


SOLVERS: dict[str, tuple[Callable[[], Any], str]] = {
    "SKR": (lambda: Recycling("auto", **SETTINGS), "ilu"),
    "GCRO-DR reset": (lambda: Recycling("never", **SETTINGS), "ilu"),
    "GMRES(40), ours": (lambda: GMRES(**SETTINGS), "ilu"),
    "GMRES(40), SciPy": (SciPyGMRES, "ilu"),
    "gcrotmk cold": (lambda: Outer(False, **SETTINGS), "ilu"),
    "gcrotmk carried": (lambda: Outer(True, **SETTINGS), "ilu"),
    "CG, incomplete Cholesky": (lambda: Symmetric("cg", **SETTINGS), "icc"),
    "GMRES(40), multigrid": (lambda: GMRES(**SETTINGS), "amg"),
    "sparse LU": (lambda: Direct(False, **SETTINGS), "none"),
}
POSITIVE = ("CG, incomplete Cholesky", "GMRES(40), multigrid")  # only for positive definite matrices


def sizes(quick: bool) -> dict[str, LinearSystems]:
    if quick:
        return {"2-D 32x32": darcy(32, 5), "3-D 10x10x10": darcy(10, 5, dimensions=3)}
    return {
        "2-D 32x32": darcy(32, 8),
        "2-D 100x100": darcy(100, 8),
        "3-D 20x20x20": darcy(20, 8, dimensions=3),
        "3-D 40x40x40": darcy(40, 5, dimensions=3),
        "3-D Helmholtz 30x30x30": helmholtz(30, 6, dimensions=3),
        "2-D 316x316": darcy(316, 5),
    }


def measured(systems: LinearSystems, title: str) -> dict[str, dict[str, list[float]]]:
    """Return the measurements of every solver, system by system in the sorted order, rotating the first solver."""
    own = [name for name in SOLVERS if not ("Helmholtz" in title and name in POSITIVE)]
    solvers = {name: SOLVERS[name][0]() for name in own}
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "iterations": [], "products": [], "residual": []} for name in own
    }
    for place, index in enumerate(arrange(systems.parameters, len(systems), "greedy")):
        system, first = systems[int(index)], place % len(own)
        for name in own[first:] + own[:first]:
            begin = time.process_time()
            M = preconditioners.make(SOLVERS[name][1], system.A, f"system {index}")
            solve, _ = solvers[name](system, M)
            seconds = time.process_time() - begin
            for key, value in zip(found[name], (seconds, solve.iterations, solve.matvecs, solve.residual), strict=True):
                found[name][key].append(value)
            print(f"{title}, system {index}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
    return found


def ratio(found: dict[str, dict[str, list[float]]], name: str, other: str) -> tuple[float, float, float]:
    """Return the time ratio of two solvers: median, minimum and maximum over the systems after the first."""
    pairs = zip(found[name]["seconds"][1:], found[other]["seconds"][1:], strict=True)
    values = sorted(ours / theirs for ours, theirs in pairs)
    return statistics.median(values), values[0], values[-1]


def report(record: Record, title: str, n: int, found: dict[str, dict[str, list[float]]]) -> None:
    rows = []
    for name, each in found.items():
        median, low, high = ratio(found, name, "SKR")
        rows.append(
            [name, SOLVERS[name][1], statistics.mean(each["iterations"][1:]), statistics.mean(each["products"][1:]),
             statistics.mean(each["seconds"][1:]), f"{median:.2f} ({low:.2f} to {high:.2f})", max(each["residual"])]
        )  # fmt: skip
    columns = ["solver", "preconditioner", "iterations", "products with A", "seconds", "time / SKR's", "worst residual"]
    record.table(f"{title}, n = {n}, {len(found['SKR']['seconds'])} systems", columns, rows)


def claims(record: Record, title: str, n: int, found: dict[str, dict[str, list[float]]]) -> None:
    """Add the claims, fixed before the first run: on iterations everywhere, and on time where possible."""
    worst = max(found["SKR"]["residual"])
    record.check(f"{title}: SKR's worst true residual", "at most 1.01e-08", worst, worst <= 1.01e-8)
    for other in ("GMRES(40), SciPy", "gcrotmk carried"):
        share = sum(found["SKR"]["iterations"][1:]) / sum(found[other]["iterations"][1:])
        record.check(f"{title}: iterations of SKR / {other}", "below 1", share, share < 1)
    if n >= 10_000:  # below, Python's overhead dominates
        median, low, high = ratio(found, "SKR", "GMRES(40), SciPy")
        message = f"{median:.2f} ({low:.2f} to {high:.2f})"
        record.check(f"{title}: time of SKR / GMRES(40), SciPy", "below 1", message, median < 1)
    if title.startswith("2-D"):
        median, low, high = ratio(found, "sparse LU", "SKR")
        message = f"{median:.2f} ({low:.2f} to {high:.2f})"
        record.check(f"{title}: a direct solve is faster: sparse LU / SKR", "below 1", message, median < 1)
    if title == "3-D 40x40x40":
        median, low, high = ratio(found, "SKR", "sparse LU")
        message = f"{median:.2f} ({low:.2f} to {high:.2f})"
        record.check(f"{title}: SKR is faster: SKR / sparse LU", "below 1", message, median < 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    arguments = parser.parse_args()

    sources = [Path(__file__), *sorted(Path(str(package.__file__)).parent.glob("*.py"))]
    code = hashlib.sha256(b"".join(each.read_bytes() for each in sources if each.stem not in ("page", "petsc")))
    work = cache_folder() / "benchmarks" / f"skr{'-quick' if arguments.quick else ''}"
    done = Memo(work / "sizes.jsonl", {"code": code.hexdigest()})
    record = Record("skr", "Darcy systems, m = 40, k = 20, tolerance 1e-8, one thread, processor time", 0)
    for title, systems in sizes(arguments.quick).items():
        if title not in done:
            done[title] = measured(systems, title)  # type: ignore[assignment]
        found: Any = done[title]
        report(record, title, systems.n, found)
        claims(record, title, systems.n, found)
    file = f"skr{'-quick' if arguments.quick else ''}.json"
    verdict = record.finish(Path(__file__).parent / "results" / file)
    shutil.rmtree(work, ignore_errors=True)  # a finished run is not reused
    return verdict


if __name__ == "__main__":
    raise SystemExit(main())
