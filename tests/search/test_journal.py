"""A journal resumes an interrupted search where it stopped, and never uses another search's results."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from lamella.search import Cost, Removal, Removals, greedy

SEARCH = {"method": "x", "seed": 0}
STEPS = [Removal((7,), 0.1 + 0.2, 9), Removal((2, 3), 1e-17, 8), Removal((0,), 2.0, 7)]


def written(path: Path, search: dict = SEARCH) -> None:
    journal = Removals(path, search)
    for step in STEPS[len(journal.done) :]:
        journal.add(step)


def test_removals_are_read_back_to_the_last_digit(tmp_path: Path) -> None:
    written(tmp_path / "a" / "journal")
    assert Removals(tmp_path / "a" / "journal", SEARCH).done == STEPS


def test_a_journal_cut_at_any_byte_gives_a_prefix_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        done = Removals(path, SEARCH).done
        assert done == STEPS[: len(done)]
        if cut == len(whole):
            assert done == STEPS
        written(path)
        assert Removals(path, SEARCH).done == STEPS


def test_a_journal_that_cannot_be_written_again_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    written(path)
    whole = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Removals(path, SEARCH)
    assert path.read_bytes() == whole


def test_another_search_s_journal_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    assert Removals(path, SEARCH | {"seed": 1}).done == []
    assert Removals(path, SEARCH).done == []  # the file was started afresh


def test_what_is_no_journal_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("something else\n[[1], 0.5, 1]\n")
    assert Removals(path, SEARCH).done == []


def test_without_a_path_nothing_is_kept() -> None:
    journal = Removals(None, SEARCH)
    journal.add(STEPS[0])
    assert journal.done == []


@pytest.mark.parametrize("killed_after", range(6))
def test_a_search_killed_in_mid_line_ends_as_one_that_was_not(tmp_path: Path, killed_after: int) -> None:
    candidates = [(index,) for index in range(6)]

    def cost(removed: tuple, candidate: tuple[int, ...], bound: float) -> Cost:
        return Cost(sum((7 * each[0] + 3) % 5 / 7 for each in (*removed, candidate)))

    whole = list(greedy(candidates, cost))
    path = tmp_path / "journal"
    journal = Removals(path, SEARCH)
    for step in islice(greedy(candidates, cost), killed_after):
        journal.add(step)
    path.write_bytes(path.read_bytes()[:-3])  # the last line was not written whole
    again = Removals(path, SEARCH)
    rest = []
    for step in greedy(candidates, cost, done=again.done):
        again.add(step)
        rest.append(step)
    assert [*again.done, *rest] == whole
    assert Removals(path, SEARCH).done == whole
