"""Caching for many chains of steps: the common beginning of two chains is computed once.

    chain a   0 1 2 3 4 5 6 7        the state after 0 1 2 3 is shared; chain b takes only 3 of its 7 steps
    chain b   0 1 2 3 3 4 6

The caller defines what a step is: a sublayer that runs or does not, or a layer of one model or another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Step = TypeVar("Step")
State = TypeVar("State")


class Prefixes(Generic[Step, State]):
    """The states after beginnings of chains.

    Args:
        start: the state before any step.

    Attributes:
        states: the stored states by chain, in the order in which they were computed. A caller with a memory budget may
            remove entries: missing states are computed again when needed.
    """

    def __init__(self, start: State) -> None:
        self._start = start
        self.states: OrderedDict[tuple[Step, ...], State] = OrderedDict()

    def behind(
        self, chain: tuple[Step, ...], take: Callable[[State, tuple[Step, ...]], State], way: bool = True
    ) -> State:
        """Return the state after a chain, which is stored.

        Args:
            chain: the steps.
            take: computes the last step of a chain, from the state before it; never in place.
            way: store the intermediate states as well.
        """
        state, known = self._start, 0
        for length in range(len(chain), 0, -1):
            if chain[:length] in self.states:
                state, known = self.states[chain[:length]], length
                break
        for length in range(known + 1, len(chain) + 1):
            state = take(state, chain[:length])
            if way or length == len(chain):
                self.states[chain[:length]] = state
        return state

    def keep(self, chains: Iterable[tuple[Step, ...]]) -> None:
        """Remove all states except those after these chains."""
        kept = set(chains)
        for chain in [chain for chain in self.states if chain not in kept]:
            del self.states[chain]


def beginnings(chain: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """Return the beginnings of a chain, the shortest first, including the chain itself."""
    return (chain[:length] for length in range(1, len(chain) + 1))
