"""Solutions are written and read back, baselines solve the same systems, and a page is drawn from evidence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lamella.errors import ExportError, LamellaError, MethodError
from lamella.methods.skr import BASELINES, Solutions, baseline, compare, skr
from lamella.methods.skr.families import FAMILIES, darcy, helmholtz
from lamella.methods.skr.page import figures, summary
from lamella.results import Evidence
from lamella.results.page import render

FAMILY = darcy(10, 5, seed=2)
SOLUTIONS = skr(FAMILY)


@pytest.mark.parametrize("ending", [".npz", ".h5", ".zarr"])
def test_a_data_set_survives_writing_and_reading(tmp_path, ending):
    solutions = skr(helmholtz(8, 4, wavenumber=(1.0, 2.0)))  # two blocks of parameters
    path = solutions.write(tmp_path / f"data{ending}")
    read = Solutions.read(path)
    for name in ("x", "sequence"):
        np.testing.assert_array_equal(getattr(read, name), getattr(solutions, name))
    for name in ("parameters", "bases"):
        for ours, theirs in zip(getattr(read, name), getattr(solutions, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert read.findings == json.loads(json.dumps(solutions.findings))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing half-written is left


def test_a_trainer_reads_inputs_and_solutions_by_name(tmp_path):
    SOLUTIONS.write(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as file:
        np.testing.assert_array_equal(file["parameters_0"], FAMILY.parameters[0])
        np.testing.assert_array_equal(file["x"], SOLUTIONS.x)
        assert file["converged"].all() and (file["residual"] <= 1.01e-8).all()


@pytest.mark.parametrize("ending", [".npz", ".zarr"])
def test_a_data_set_is_replaced_only_when_asked(tmp_path, ending):
    path = SOLUTIONS.write(tmp_path / f"data{ending}")
    with pytest.raises(ExportError, match="exists; choose another name, or overwrite it"):
        SOLUTIONS.write(path)
    assert Solutions.read(SOLUTIONS.write(path, overwrite=True)).x.shape == SOLUTIONS.x.shape


def test_data_sets_that_cannot_be_written_or_read_are_refused_in_one_line(tmp_path):
    with pytest.raises(ExportError, match="unknown suffix of a dataset; use one of"):
        SOLUTIONS.write(tmp_path / "data.csv")
    with pytest.raises(ExportError, match="cannot be written"):
        SOLUTIONS.write(tmp_path / "nowhere" / "data.npz")
    (tmp_path / "noise.npz").write_bytes(b"noise")
    np.savez(tmp_path / "other.npz", y=np.ones(3))
    for name in ("noise.npz", "other.npz", "missing.npz"):
        with pytest.raises(LamellaError, match="written by skr") as caught:
            Solutions.read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_means_are_given_with_and_without_the_first_system():
    evidence = SOLUTIONS.findings
    counts = [each["iterations"] for each in evidence["solved"]]
    assert evidence["mean"]["iterations"] == pytest.approx(sum(counts) / 5)
    assert evidence["mean_without_first"]["iterations"] == pytest.approx(sum(counts[1:]) / 4)
    assert json.loads(json.dumps(evidence)) == evidence


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_solves_the_systems(name):
    solutions = baseline(name, FAMILY, tol=1e-9, seed=3)
    direct = baseline("splu", FAMILY)
    assert solutions.converged.all() or name == "minres"  # which stops by its own estimate of the residual
    np.testing.assert_allclose(solutions.x, direct.x, rtol=1e-5)
    assert all(each.matvecs > each.iterations for each in solutions.solved)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_solvers_for_symmetric_matrices_refuse_others(name):
    with pytest.raises(MethodError, match="requires symmetric matrices; use 'gmres'"):
        baseline(name, FAMILIES["convection"](6, 1))


def test_a_preconditioner_that_is_not_symmetric_is_refused_for_them():
    with pytest.raises(MethodError, match="'cg' needs a symmetric preconditioner; take 'none', 'jacobi', 'icc'"):
        baseline("cg", FAMILY, preconditioner="ilu")


def test_gcrotmk_does_not_keep_more_than_k_vectors_nor_stale_products():
    from lamella.methods.skr.solvers import Outer

    outer = Outer(True, m=12, k=5, tol=1e-9, max_iterations=1000)
    for system in FAMILY:
        solve, _ = outer(system, None)
        assert solve.converged
        assert len(outer.vectors) <= 5 and all(c is None for c, _ in outer.vectors)


def test_a_warm_start_is_the_solution_before():
    solutions = baseline("gmres-warm", FAMILY)
    assert [each.start for each in solutions.solved] == ["cold"] + 4 * ["warm"]


def evidence_of(found):
    result = found
    provenance = {"method": "skr", "version": "0", "options": {}, "inputs": {}}
    where = {"machine": "here", "threads": 1, "versions": {}, "date": "2026-01-01"}
    return Evidence(
        kind="dataset", provenance=provenance, environment=where, findings=result.findings, notes=result.notes
    )


def test_the_page_shows_ours_and_the_baselines():
    evidence = evidence_of(compare(FAMILY, against=("gmres", "gcrodr-reset", "splu")))
    (drawn,) = figures(evidence)
    assert list(drawn.series) == ["SKR", "gmres", "gcrodr-reset"]  # a direct solver has no iterations to draw
    assert drawn.series["SKR"] == [each["iterations"] for each in evidence.findings["solved"]]
    assert (drawn.x, drawn.y) == ("system, in solved order", "iterations")
    assert [row[0] for row in summary(evidence).tables[0].rows] == ["SKR", "gmres", "gcrodr-reset", "splu"]


def test_the_page_of_solutions_alone_says_what_was_found():
    evidence = evidence_of(skr(FAMILY, max_iterations=3))
    page = render(evidence, summary(evidence), figures(evidence))
    assert "5 of 5 systems did not reach the tolerance" in page
