"""SKR at small scale: families of two-dimensional systems, iterations against the paper's baseline and the missing one.

Checks that recycling in sorted order needs fewer iterations than GMRES(40) and than GCRO-DR that restarts from scratch
for each system; that sorting helps if parameters come in clusters; that a harmful basis is detected; and that a small
Fourier neural operator learns as well from these solutions as from those of a direct solver. Iterations and products
are counted instead of seconds: at this size a direct solver is faster than all of them, as the last column shows.

    python reproductions/skr.py            # about 25 minutes on 1 core; an interrupted run resumes
    python reproductions/skr.py --quick    # the same claims on less work
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from torch import Tensor, nn

from lamella.files import Work
from lamella.methods.skr import LinearSystems, baseline, skr
from lamella.methods.skr.families import clustered_darcy, convection, darcy, helmholtz, poisson
from lamella.report.figures import Lines
from lamella.results import Record

TOL = 1e-8
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
        "Darcy 96x96, Jacobi": (lambda: darcy(96, 16, seed=seed), "jacobi", (*cold, "cg", "amg")),
        "Darcy 40x40, 4 clusters, Jacobi": (lambda: clustered_darcy(40, 24, seed=seed), "jacobi", cold),
        "one matrix 40x40, Jacobi": (lambda: poisson(40, 24, seed=seed), "jacobi", (*cold, "one-lu")),
        "Helmholtz 48x48, 6 to 10": (lambda: helmholtz(48, 20, seed=seed), "none", cold),
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


def acceptance(record: Record, found: dict[str, dict[str, Any]]) -> None:
    """Check criteria A, B and C; C for recycling that is never dropped, and for ``auto``."""

    def ratio(title: str, arm: str, other: str, figure: str = "iterations") -> float:
        return found[title][arm][figure] / found[title][other][figure]

    for title in found:
        if title.startswith("Darcy") and "clusters" not in title:
            for other, limit in (("gmres", 0.35), ("gcrodr-reset", 0.6)):
                value = ratio(title, "skr", other)
                record.main(f"A, {title}: SKR / {NAMES[other]}", f"at most {limit}", value, value <= limit)
            worst = found[title]["skr"]["residual"]
            record.exact(f"A, {title}: worst true residual", f"at most {1.01 * TOL:.3g}", worst, worst <= 1.01 * TOL)
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


class SpectralNet(nn.Module):
    """A Fourier neural operator of two layers: a [batch, s, s] to u [batch, s, s]."""

    def __init__(self, width: int = 24, modes: int = 10) -> None:
        super().__init__()
        self.modes = modes
        self.lift = nn.Conv2d(3, width, 1)
        shape = (2, width, width, modes, modes)
        self.weights = nn.ParameterList(torch.randn(2, *shape) / width for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.project = nn.Sequential(nn.Conv2d(width, 64, 1), nn.GELU(), nn.Conv2d(64, 1, 1))

    def forward(self, a: Tensor) -> Tensor:
        side = torch.linspace(0, 1, a.shape[-1])
        grid = torch.stack(torch.meshgrid(side, side, indexing="ij")).expand(len(a), -1, -1, -1)
        h = self.lift(torch.cat([a[:, None], grid], 1))  # [batch, width, s, s]
        for place, (weight, local) in enumerate(zip(self.weights, self.local, strict=True)):
            h = self._spectral(h, torch.complex(weight[0], weight[1])) + local(h)
            h = torch.nn.functional.gelu(h) if place == 0 else h
        return self.project(h)[:, 0]

    def _spectral(self, h: Tensor, weight: Tensor) -> Tensor:
        m, waves = self.modes, torch.fft.rfft2(h)
        out = torch.zeros_like(waves)
        out[..., :m, :m] = torch.einsum("bixy,ioxy->boxy", waves[..., :m, :m], weight[0])
        out[..., -m:, :m] = torch.einsum("bixy,ioxy->boxy", waves[..., -m:, :m], weight[1])
        return torch.fft.irfft2(out, s=h.shape[-2:])


def operator() -> tuple[str, nn.Module]:
    """Return neuraloperator's FNO if it is installed, else the small one above."""
    try:
        from neuralop.models import FNO
    except ImportError:
        return "own spectral net", SpectralNet()

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = FNO(n_modes=(10, 10), in_channels=1, out_channels=1, hidden_channels=24, n_layers=2)

        def forward(self, a: Tensor) -> Tensor:
            return self.net(a[:, None])[:, 0]

    return "neuraloperator's FNO", Known()


def trained(a: Tensor, u: Tensor, truth: Tensor, train: int, epochs: int, seed: int) -> tuple[str, float]:
    """Return the relative L2 error against direct solutions, on the systems after the first ``train``."""
    torch.manual_seed(seed)
    name, net = operator()
    scale = u[:train].std()
    a = (a - a[:train].mean()) / a[:train].std()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(train).split(20):
            optimizer.zero_grad()
            _relative(net(a[rows]), u[rows] / scale).mean().backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return name, float(_relative(net(a[train:]) * scale, truth[train:]).mean())


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


def data_set(run: Run) -> None:
    """Compare SKR's solutions as training data with those of a direct solver."""
    grid, count, epochs, seeds = (32, 60, 8, 1) if run.quick else (32, 200, 100, 3)
    train = count * 4 // 5
    systems = darcy(grid, count, seed=run.seed + 1)
    ours, direct = skr(systems, tol=TOL, work=Work(run.work / "data")), baseline("splu", systems)
    apart = float((np.linalg.norm(ours.x - direct.x, axis=1) / np.linalg.norm(direct.x, axis=1)).max())
    run.exact(f"{count} Darcy systems {grid}x{grid}: max |x - x_LU| / |x|", "at most 1e-6", apart, apart <= 1e-6)
    a = torch.tensor(ours.parameters[0], dtype=torch.float32)
    both = {
        name: torch.tensor(each.x, dtype=torch.float32).reshape(a.shape) for name, each in
        (("SKR", ours), ("sparse LU", direct))
    }  # fmt: skip
    rows: list[list[Any]] = []
    errors = {}
    for name, u in both.items():
        given = a, u, both["sparse LU"], train, epochs
        nets = [run.arm(f"FNO on {name}, {draw}", trained, *given, draw) for draw in range(seeds)]
        errors[name] = [error for _, error in nets]
        by_seed = " ".join(f"{error:.4f}" for error in errors[name])
        rows.append([name, nets[0][0], train, statistics.mean(errors[name]), by_seed])
    columns = ["solutions of", "network", "trained on", "test relative L2", "by seed"]
    run.table("A neural operator trained on the solutions", columns, rows)
    ratio = Measured.over_seeds([ours / theirs for ours, theirs in zip(*errors.values(), strict=True)])
    run.further("test error, trained on SKR / on LU data", "between 0.9 and 1.1", ratio, ratio.within(0.9, 1.1))


def experiment(run: Run) -> None:
    run.data = f"systems drawn with seed {run.seed}, m = 40, k = 20, tolerance {TOL}"
    acceptance(run, compare(run))
    data_set(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="small families, one short training, under 50 seconds"))
