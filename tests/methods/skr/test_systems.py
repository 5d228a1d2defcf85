"""Linear systems come from files, folders, families and iterables, and what does not fit is refused in one line."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.io import mmwrite

from lamella.errors import LamellaError, MethodError, NumericsError
from lamella.methods.skr import LinearSystems, preconditioners, skr
from lamella.methods.skr.equations import GaussianField, fluxes
from lamella.methods.skr.families import FAMILIES, darcy

A = sparse.diags_array([2.0, 3.0, 4.0]).tocsr()
b = np.ones(3)


def same(first: LinearSystems, second: LinearSystems) -> bool:
    pairs = list(zip(first, second, strict=True))
    blocks = all(np.array_equal(*each) for each in zip(first.parameters, second.parameters, strict=True))
    return blocks and all(each.digest == other.digest for each, other in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_drawn_from_its_seed_and_a_larger_one_begins_with_it(name):
    family = FAMILIES[name]
    first, again, other = family(8, 3, seed=1), family(8, 3, seed=1), family(8, 3, seed=2)
    assert len(first) == 3 and first.n == 64
    assert same(first, again) and not same(first, other)
    if name != "clustered-darcy":
        assert family(8, 5, seed=1)[2].digest == first[2].digest


@pytest.mark.parametrize("shape", [(6, 6), (4, 5, 3)])
def test_fluxes_are_conservative_and_symmetric(shape):
    a = np.exp(np.random.default_rng(0).standard_normal(shape))
    matrix = fluxes(a).toarray()
    np.testing.assert_allclose(matrix, matrix.T)
    inside = np.zeros(shape, dtype=bool)
    inside[(slice(1, -1),) * len(shape)] = True
    sums = matrix.sum(axis=1)
    np.testing.assert_allclose(sums[inside.ravel()], 0, atol=1e-9 * np.abs(matrix).max())  # nothing is lost inside
    assert (sums[~inside.ravel()] > 0).all()


def test_the_solution_of_a_smooth_problem_converges_with_the_grid():
    errors = []
    for s in (16, 32):
        x, y = np.meshgrid(*[(np.arange(s) + 0.5) / s] * 2, indexing="ij")
        u = np.sin(np.pi * x) * np.sin(np.pi * y)
        found = sparse.linalg.spsolve(fluxes(np.ones((s, s))), (2 * np.pi**2 * u).ravel())
        errors.append(np.abs(found - u.ravel()).max())
    assert errors[1] < errors[0] / 3.5  # second order


def test_the_gaussian_field_has_the_spectrum_of_the_authors():
    field, s, draws = GaussianField(alpha=2.5, tau=7.0), 16, 400
    random = np.random.default_rng(0)
    power = np.mean([np.abs(np.fft.fft2(field.draw(random, (s, s)))) ** 2 for _ in range(draws)], axis=0)
    for wave in ((1, 0), (2, 3)):
        root = s**2 * np.sqrt(2) * 7.0 ** ((2 * 2.5 - 2) / 2) * (4 * np.pi**2 * sum(w**2 for w in wave) + 49) ** -1.25
        assert power[wave] == pytest.approx(root**2, rel=0.25)  # half of it from each of the pair k, -k
    assert power[0, 0] == pytest.approx(0, abs=1e-12)


def test_three_dimensions():
    family = darcy(5, 2, dimensions=3)
    assert family.n == 125 and family.parameters[0].shape == (2, 5, 5, 5)
    assert FAMILIES["helmholtz"](4, 2, dimensions=3).n == 64


def test_words_name_a_family():
    assert same(LinearSystems.open("darcy:grid=8,count=3,seed=4"), darcy(8, 3, seed=4))


def test_any_iterable_of_systems_will_do():
    systems = LinearSystems.open((A * (i + 1), b, np.full((2, 2), i)) for i in range(3))
    assert len(systems) == 3 and systems.parameters[0].shape == (3, 2, 2)
    assert LinearSystems.open([(A, b, (np.ones(4), 0.5))]).parameters[1].shape == (1,)
    assert LinearSystems.open([(A.toarray(), b)]).parameters == ()
    assert LinearSystems.open(systems) is systems


@pytest.mark.parametrize("ending", ["mtx", "npz"])
def test_a_folder_of_files_is_read_in_the_order_of_its_numbers(tmp_path, ending):
    family = darcy(4, 11)
    for number, system in enumerate(family):
        if ending == "mtx":
            mmwrite(tmp_path / f"A-{number}.mtx", system.A, precision=17)
            mmwrite(tmp_path / f"b-{number}.mtx", system.b[:, None], precision=17)
        else:
            sparse.save_npz(tmp_path / f"A{number}.npz", system.A)
            np.save(tmp_path / f"b{number}.npy", system.b)
        np.save(tmp_path / f"P{number}.npy", family.parameters[0][number])
    assert same(LinearSystems.open(tmp_path), family)


def test_one_matrix_may_serve_many_right_hand_sides(tmp_path):
    sparse.save_npz(tmp_path / "A.npz", A)
    for number in range(3):
        np.save(tmp_path / f"b{number}.npy", b * number)
    np.save(tmp_path / "parameters.npy", np.arange(3))
    systems = LinearSystems.open(tmp_path)
    assert len({each.matrix for each in systems}) == 1 and systems[2].b.tolist() == [2, 2, 2]


def test_a_matrix_market_file_has_its_right_hand_sides_beside_it(tmp_path):
    mmwrite(tmp_path / "plate.mtx", A)
    mmwrite(tmp_path / "plate_b.mtx", np.stack([b, 2 * b], axis=1))
    assert [each.b[0] for each in LinearSystems.open(tmp_path / "plate.mtx")] == [1.0, 2.0]


def test_what_is_written_is_read_back(tmp_path):
    family = FAMILIES["helmholtz"](6, 3)
    family.write(tmp_path / "family.npz")
    assert same(LinearSystems.open(tmp_path / "family.npz"), family)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([], LamellaError, "no linear systems; give at least one"),
    ([A], LamellaError, "system 0 is not (A, b, P) or (A, b) but csr_array"),
    ([(A, b, 1.0), (A, b)], LamellaError, "system 1 and system 0: only one has parameters;"),
    ([(A, b, 1.0), (A, b, np.ones(2))], LamellaError, "the parameters of system 1 have shape"),
    ([(A, b, "soft")], LamellaError, "parameters of type"),
    ([(A, b, np.nan)], NumericsError, "the parameters of system 0 are not finite"),
    ([(A[:2], b)], LamellaError, "system 0: its matrix is 2 x 3; give a square one"),
    ([(A, np.ones(4))], LamellaError, "system 0: b has shape (4,), its matrix 3 rows; give (3,)"),
    ([(A * 1j, b)], LamellaError, "system 0 is complex"),
    ([(A * np.inf, b)], NumericsError, "system 0 has entries that are not finite;"),
    ([(A, b * np.nan)], NumericsError, "system 0 has entries that are not finite;"),
    ("missing.npz", LamellaError, "'missing.npz' is no file, folder or family; families are: darcy"),
    ("darcy:size=3", LamellaError, "unknown setting 'size'; settings are grid,"),
    ("darcy:grid=wide", LamellaError, "grid is 'wide'; give a whole number"),
    ("poisson:clusters=3", LamellaError, "the family 'poisson' does not take all of"),
    ("darcy:grid=1", LamellaError, "give at least one system, two cells per side,"),
]


@pytest.mark.parametrize(("source", "kind", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_systems_are_refused_in_one_line(source, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        LinearSystems.open(source)
    assert "\n" not in str(caught.value)


def test_systems_of_other_sizes_are_refused_when_they_are_reached():
    systems = LinearSystems.of([(A, b), (sparse.eye_array(4).tocsr(), np.ones(4))])
    with pytest.raises(LamellaError, match="system 1 has 4 unknowns, system 0 has 3"):
        skr(systems, order="none")


def test_parameters_of_another_number_of_systems_are_refused(tmp_path):
    sparse.save_npz(tmp_path / "A.npz", A)
    np.save(tmp_path / "b0.npy", b)
    np.save(tmp_path / "parameters.npy", np.arange(3))
    with pytest.raises(LamellaError, match="parameters of 3 systems for 1 systems; give one entry per system"):
        LinearSystems.open(tmp_path)


def test_files_that_are_no_systems_are_refused(tmp_path):
    (tmp_path / "noise.npz").write_bytes(b"not a zip")
    (tmp_path / "alone.mtx").write_text("%%MatrixMarket matrix coordinate real general\n1 1 1\n1 1 2.0\n")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    sparse.save_npz(pickled / "A.npz", A)
    np.save(pickled / "b.npy", np.array([object()] * 3), allow_pickle=True)
    for path, message in (
        (tmp_path / "noise.npz", "not linear systems"),
        (tmp_path / "alone.mtx", "put them into alone_b.mtx"),
        (tmp_path, "0 files A* and 0 files b*"),
        (pickled, "not linear systems"),
    ):
        with pytest.raises(LamellaError, match=re.escape(message)) as caught:
            LinearSystems.open(path)
        assert "\n" not in str(caught.value)


ZERO = sparse.csr_array(np.array([[0.0, 1, 0], [1, 2, 0], [0, 0, 1]]))


@pytest.mark.parametrize("name", ["jacobi", "sor"])
def test_a_singular_preconditioner_is_refused_by_system(name):
    with pytest.raises(NumericsError, match=f"system 1: its preconditioner '{name}' is singular"):
        skr(LinearSystems.of([(A, b), (ZERO, b)]), order="none", preconditioner=name)


def test_an_incomplete_factorisation_of_a_singular_matrix_is_refused():
    singular = sparse.csr_array(np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]))
    with pytest.raises(NumericsError, match="system 0: its preconditioner 'ilu' is singular"):
        skr(LinearSystems.of([(singular, b)]), order="none", preconditioner="ilu")


def test_an_unknown_preconditioner_is_refused():
    with pytest.raises(MethodError, match="unknown preconditioner 'best'; use one of none, jacobi, sor"):
        skr(darcy(4, 1), preconditioner="best")


@pytest.mark.parametrize("kind", ["function", "matrix", "operator"])
def test_a_preconditioner_may_be_made_by_a_function(kind):
    def factory(matrix: Any) -> Any:
        inverse = sparse.diags_array(1 / matrix.diagonal())
        made = {"function": lambda v: inverse @ v, "matrix": inverse}
        return sparse.linalg.aslinearoperator(inverse) if kind == "operator" else made[kind]

    family = darcy(6, 2)
    np.testing.assert_allclose(skr(family, preconditioner=factory).x, skr(family, preconditioner="jacobi").x)


def test_a_preconditioner_that_is_none_is_refused():
    with pytest.raises(
        MethodError, match="the preconditioner returned int for system 0; return a function or an operator"
    ):
        skr(darcy(4, 1), preconditioner=lambda matrix: 3)


def test_sor_solves_with_the_lower_triangle():
    M = preconditioners.sor(darcy(6, 1)[0].A)
    v = np.random.default_rng(0).standard_normal(36)
    np.testing.assert_allclose(np.tril(darcy(6, 1)[0].A.toarray()) @ M(v), v)


def test_additive_schwarz_is_the_sum_over_its_blocks():
    """Restricted: R_own^T R_own (R_i A R_i^T)^-1 R_i, where R_i adds the neighbours to what block i owns."""
    A = FAMILIES["convection"](20, 1)[0].A.toarray()
    n, M = len(A), preconditioners.asm(FAMILIES["convection"](20, 1)[0].A)
    expected = np.zeros((n, n))
    for own in np.array_split(np.arange(n), round(n / preconditioners.BLOCK)):
        around = np.flatnonzero((A[own] != 0).any(axis=0))
        inverse = np.zeros((n, n))
        inverse[np.ix_(around, around)] = np.linalg.inv(A[np.ix_(around, around)])
        expected[own] += inverse[own]
    np.testing.assert_allclose(np.stack([M(e) for e in np.eye(n)], axis=1), expected, atol=1e-12)


def test_additive_schwarz_of_one_block_is_the_solution():
    system = darcy(6, 1)[0]
    np.testing.assert_allclose(system.A @ preconditioners.asm(system.A)(system.b), system.b)


def test_incomplete_cholesky_is_symmetric_and_for_symmetric_matrices():
    M = preconditioners.icc(darcy(6, 1)[0].A)
    dense = np.stack([M(e) for e in np.eye(36)], axis=1)
    np.testing.assert_allclose(dense, dense.T, rtol=1e-9, atol=1e-14)
    assert np.linalg.eigvalsh(dense).min() > 0
    with pytest.raises(MethodError, match="for symmetric matrices"):
        preconditioners.icc(FAMILIES["convection"](6, 1)[0].A)


@pytest.mark.parametrize("name", ["jacobi", "sor", "asm", "ilu", "icc", "amg"])
def test_every_preconditioner_saves_iterations(name):
    family = darcy(24, 2)
    plain, helped = (skr(family, preconditioner=each).mean("iterations") for each in ("none", name))
    assert helped < plain
