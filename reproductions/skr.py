"""SKR at small scale: families of two-dimensional systems, iterations against the paper's baseline and the missing one.

Checks over five to thirty families of each kind that recycling in sorted order needs fewer iterations than GMRES(40)
and than GCRO-DR that restarts from scratch for each system; that sorting helps if parameters come in clusters; and that
a harmful basis is detected. Iterations and products with A are counted instead of seconds: at this size a direct solver
is faster than all of them, as the last column shows.

    python reproductions/skr.py            # about 45 minutes on 1 core; an interrupted run resumes
    python reproductions/skr.py --quick    # the same claims on less work
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Run, main
from harness.measured import Measured

from lamella.files import Work
from lamella.methods.skr import LinearSystems, baseline, skr
from lamella.methods.skr.families import clustered_darcy, convection, darcy, helmholtz, poisson
from lamella.report.figures import Lines
from lamella.results import Record

TOL = 1e-8
PILOT = 5  # families by whose variance the number of the others was chosen; their seeds are not used again
FAMILIES = {  # and how many of each are compared
    "Darcy 48x48, Jacobi": 30,
    "Darcy 48x48, ILU": 30,
    "Darcy 48x48, additive Schwarz": 30,
    "Darcy 96x96, Jacobi": 5,
    "Helmholtz 48x48, 6 to 10, additive Schwarz": 30,
}
SOLVERS = ("gmres", "gcrodr-reset", "skr")
ARMS = ("gmres", "gcrodr-reset", "gcrodr-unsorted", "gcrodr-sorted", "skr", "gcrotmk", "gcrotmk-carried", "splu")
NAMES = {
    "gmres": "GMRES(40)",
    "gcrodr-reset": "GCRO-DR reset",
    "gcrodr-unsorted": "recycled, random order",
    "gcrodr-sorted": "recycled, sorted",
    "skr": "SKR (auto)",
    "gcrotmk": "gcrotmk cold",
    "gcrotmk-carried": "gcrotmk carried",
    "splu": "sparse LU",
}


def problems(quick: bool, seed: int) -> dict[str, tuple[Callable[[], LinearSystems], str, tuple[str, ...]]]:
    """Return families, preconditioners and the arms to run, by row name."""
    cold, some = ARMS, ("gcrodr-reset", "gcrodr-unsorted", "gcrodr-sorted", "skr", "splu")
    if quick:
        few = ("gmres", "gcrodr-reset", "skr", "splu")
        return {
            "Darcy 48x48, Jacobi": (lambda: darcy(48, 20, seed=seed), "jacobi", few),
            "Darcy 32x32, 4 clusters, Jacobi": (lambda: clustered_darcy(32, 16, seed=seed), "jacobi", some),
            "convection 32x32, Jacobi": (lambda: convection(32, 16, seed=seed), "jacobi", some),
        }
    indefinite = lambda: helmholtz(40, 24, wavenumber=(4.0, 28.0), medium=None, seed=seed)  # noqa: E731
    return {
        "Darcy 48x48, Jacobi": (lambda: darcy(48, 20, seed=seed), "jacobi", (*cold, "cg", "amg")),
        "Darcy 48x48, ILU": (lambda: darcy(48, 20, seed=seed), "ilu", cold),
        "Darcy 48x48, additive Schwarz": (lambda: darcy(48, 20, seed=seed), "asm", cold),
        "Darcy 96x96, Jacobi": (lambda: darcy(96, 16, seed=seed), "jacobi", (*cold, "cg", "amg")),
        "Darcy 40x40, 4 clusters, Jacobi": (lambda: clustered_darcy(40, 24, seed=seed), "jacobi", cold),
        "one matrix 40x40, Jacobi": (lambda: poisson(40, 24, seed=seed), "jacobi", (*cold, "one-lu")),
        "Helmholtz 48x48, 6 to 10": (lambda: helmholtz(48, 20, seed=seed), "none", cold),
        "Helmholtz 48x48, 6 to 10, additive Schwarz": (lambda: helmholtz(48, 20, seed=seed), "asm", cold),
        "stencil not conservative 98x98, Jacobi": (lambda: not_conservative(98, 16, seed), "jacobi", cold),
        "convection 40x40, Jacobi": (lambda: convection(40, 24, seed=seed), "jacobi", cold),
        "Helmholtz 40x40, 4 to 28": (indefinite, "none", cold),
    }


def not_conservative(grid: int, count: int, seed: int) -> LinearSystems:
    """Return the stencil described for the authors' Darcy data: 4 a on the diagonal, minus the neighbour's own a."""
    import scipy.sparse as sparse

    def assemble(a: np.ndarray) -> tuple[Any, np.ndarray]:
        one, number = a.ravel(), np.arange(a.size).reshape(a.shape)
        parts = [(number.ravel(), number.ravel(), 4 * one)]
        for here, there in ((number[:, :-1], number[:, 1:]), (number[:-1], number[1:])):
            parts += [(i.ravel(), j.ravel(), -one[j.ravel()]) for i, j in ((here, there), (there, here))]
        rows, columns, values = (np.concatenate(each) for each in zip(*parts, strict=True))
        return sparse.coo_array((values, (rows, columns)), shape=(a.size, a.size)).tocsr(), np.full(a.size, grid**-2.0)

    return LinearSystems.of_parameters(darcy(grid, count, seed=seed).parameters, assemble, {"equation": "stencil"})


def solved(
    title: str, arm: str, family: Callable[[], LinearSystems], preconditioner: str, work: Path
) -> dict[str, Any]:
    """Solve one problem with one arm; return counts, residuals, and the distance to the direct solution."""
    systems = family()
    folder = work / hashlib.sha256(f"{title}: {arm}".encode()).hexdigest()[:12]
    options: dict[str, Any] = {"preconditioner": preconditioner, "tol": TOL, "seed": 0}
    if arm == "skr":
        solutions = skr(systems, work=Work(folder), **options)
    else:
        solutions = baseline(arm, systems, work=folder, **options)
    direct = baseline("splu", systems).x
    sizes = np.linalg.norm(direct, axis=1)
    return {
        **{name: solutions.mean(name) for name in ("iterations", "matvecs", "seconds")},
        "later": solutions.mean("iterations", first=False),
        "residual": float(solutions.residuals.max()),
        "failed": int((~solutions.converged).sum()),
        "apart": float((np.linalg.norm(solutions.x - direct, axis=1) / sizes).max()),
        "starts": dict(Counter(each.start for each in solutions.solved)),
        "per system": [each.iterations for each in solutions.solved],
    }


def compare(run: Run) -> dict[str, dict[str, Any]]:
    """Run every arm on every problem, by the names of both."""
    found: dict[str, dict[str, Any]] = {}
    rows, more = [], []
    for title, (family, preconditioner, arms) in problems(run.quick, run.seed).items():
        known = found[title] = {
            arm: run.arm(f"{title}: {arm}", solved, title, arm, family, preconditioner, run.work) for arm in arms
        }
        rows.append([title, *(_count(known.get(arm)) for arm in ARMS[:-1])])
        for arm, each in known.items():
            starts = ", ".join(f"{number} {word}" for word, number in each["starts"].items())
            more.append(
                [title, NAMES.get(arm, arm), each["iterations"], each["later"], each["matvecs"], each["residual"],
                 each["apart"], each["failed"], starts, each["seconds"]]
            )  # fmt: skip
    if not run.quick:
        draw(run, found)
    run.table("Iterations of one system, mean", ["family", *(NAMES[arm] for arm in ARMS[:-1])], rows)
    columns = [
        "family", "solver", "iterations", "without the first", "products with A", "worst residual", "difference to LU",
        "not converged", "starts", "seconds",
    ]  # fmt: skip
    run.table("All figures, means of one system; seconds in NumPy, with the preconditioner", columns, more)
    return found


def draw(run: Run, found: dict[str, dict[str, Any]]) -> None:
    """Draw the figures of the page: where recycling helps, and where it does harm."""
    for name, title in (("helps", "Darcy 48x48, Jacobi"), ("harms", "convection 40x40, Jacobi")):
        arms = ("gmres", "gcrodr-reset", "gcrodr-sorted", "skr")
        lines = {NAMES[arm]: found[title][arm]["per system"] for arm in arms}
        run.figure(f"skr-{name}", Lines("system, in solved order", "iterations", lines))


def _count(figures: dict[str, Any] | None) -> Any:
    if figures is None:
        return ""
    return f"{figures['iterations']:.1f}" + (f" ({figures['failed']} failed)" if figures["failed"] else "")


def over_families(run: Run) -> None:
    """Check criterion A over families of other seeds, whose systems share nothing with those of the tables."""
    count = 1 if run.quick else max(FAMILIES.values())
    seeds = range(run.seed + PILOT, run.seed + PILOT + count)
    run.freeze("mean over families of the ratio of mean iterations", seeds, families=FAMILIES, tolerance=TOL)
    known: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for number, seed in enumerate(seeds):
        for title, (family, preconditioner, _) in problems(run.quick, seed).items():
            if number < FAMILIES.get(title, 0):
                one = f"{title}, seed {seed}"
                given = family, preconditioner, run.work
                each = {arm: run.arm(f"{one}: {arm}", solved, one, arm, *given) for arm in SOLVERS}
                known.setdefault(title, []).append(each)
    rows = []
    for title, families in known.items():

        def ratio(other: str, figure: str, families: list[dict[str, dict[str, Any]]] = families) -> Measured:
            return Measured.over_seeds([each["skr"][figure] / each[other][figure] for each in families])

        others = SOLVERS[:2]
        rows.append(
            [
                title,
                len(families),
                *(str(ratio(other, figure)) for figure in ("iterations", "matvecs") for other in others),
            ]
        )
        if title.startswith("Darcy"):
            for other, limit in zip(others, (0.35, 0.6), strict=True):
                value = ratio(other, "iterations")
                claim = run.further if "Schwarz" in title else run.main
                name = f"A, {title}: iterations of SKR / {NAMES[other]}"
                claim(name, f"at most {limit}", str(value), value.at_most(limit))
        for figure, limit in (("residual", 1.01 * TOL), ("apart", 1e-6)):
            worst = max(each["skr"][figure] for each in families)
            name = {"residual": "worst true residual", "apart": "max |x - x_LU| / |x|"}[figure]
            run.exact(f"A, {title}: {name}", f"at most {limit:.3g}", worst, worst <= limit)
    columns = [f"{figure}, SKR / {NAMES[other]}" for figure in ("iterations", "products") for other in SOLVERS[:2]]
    run.table("Ratios of means", ["family", "families", *columns], rows)


def acceptance(record: Record, found: dict[str, dict[str, Any]]) -> None:
    """Check criteria B and C; C for recycling that is never dropped, and for ``auto``."""

    def ratio(title: str, arm: str, other: str, figure: str = "iterations") -> float:
        return found[title][arm][figure] / found[title][other][figure]

    for title in found:
        if "clusters" in title:
            value = ratio(title, "gcrodr-sorted", "gcrodr-unsorted")
            record.further(f"B, {title}: sorted / random order", "at most 0.92", value, value <= 0.92)
        if title.startswith("convection") or "4 to 28" in title:
            harm, dropped = (
                ratio(title, "gcrodr-sorted", "gcrodr-reset"),
                found[title]["skr"]["starts"].get("dropped", 0),
            )
            message = f"{harm:.2f} times reset, {dropped} dropped"
            record.further(
                f"C, {title}: recycling does harm, and SKR detects it", "yes", message, harm > 1 and dropped > 0
            )
            for figure, word in (("iterations", "iterations"), ("matvecs", "products with A")):
                value = ratio(title, "skr", "gcrodr-reset", figure)
                record.further(f"C, {title}: SKR / reset, {word}", "at most 1.1", value, value <= 1.1)


def experiment(run: Run) -> None:
    run.data = f"systems drawn with seed {run.seed}, m = 40, k = 20, tolerance {TOL}"
    found = compare(run)
    over_families(run)
    acceptance(run, found)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="small families, one of each kind, under 50 seconds"))
