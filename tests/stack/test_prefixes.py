"""States after prefixes of chains: equal to running every step, with no step run twice."""

from __future__ import annotations

import random

import pytest

from lamella.stack import Prefixes, beginnings


class Taker:
    """Steps append to a tuple, and are counted."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, ...]] = []

    def __call__(self, state: str, chain: tuple[int, ...]) -> str:
        self.taken.append(chain)
        return f"{state}{chain[-1]}"


def plain(chain: tuple[int, ...]) -> str:
    return ">" + "".join(map(str, chain))


@pytest.mark.parametrize("way", [True, False])
def test_any_order_of_asking_and_forgetting_gives_what_plain_execution_gives(way: bool) -> None:
    drawn, prefixes, take = random.Random(0), Prefixes(">"), Taker()
    for _ in range(300):
        chain = tuple(drawn.choices(range(3), k=drawn.randrange(7)))
        assert prefixes.behind(chain, take, way) == plain(chain)
        if drawn.random() < 0.1:
            prefixes.states.popitem(last=False)  # as a client with a budget does
        if drawn.random() < 0.05:
            prefixes.keep(beginnings(chain))
            assert set(prefixes.states) <= set(beginnings(chain))


def test_what_two_chains_begin_with_is_taken_once() -> None:
    prefixes, take = Prefixes(">"), Taker()
    chains = [(0, 1, 2, 3), (0, 1, 3), (0, 1, 2, 3), (0, 1), (1, 2, 3)]
    for chain in chains:
        prefixes.behind(chain, take)
    assert take.taken == sorted({each for chain in chains for each in beginnings(chain)}, key=take.taken.index)
    assert len(take.taken) == 4 + 1 + 0 + 0 + 3


def test_the_way_is_kept_only_where_it_is_wanted() -> None:
    prefixes, take = Prefixes(">"), Taker()
    prefixes.behind((0, 1, 2), take, way=False)
    assert list(prefixes.states) == [(0, 1, 2)]
    prefixes.behind((0, 1, 2, 3, 4), take, way=False)
    assert take.taken == list(beginnings((0, 1, 2, 3, 4)))
    prefixes.keep([(0, 1, 2, 3, 4)])
    assert list(prefixes.states) == [(0, 1, 2, 3, 4)]
    prefixes.behind((0, 1), take)
    assert take.taken[-2:] == [(0,), (0, 1)]


def test_no_step_at_all_is_the_start() -> None:
    assert Prefixes(">").behind((), Taker()) == ">"
