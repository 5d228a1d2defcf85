"""Many chains of steps: what two have in common at their beginning is computed once.

    chain a   0 1 2 3 4 5 6 7        the state behind 0 1 2 3 is shared; chain b takes only 3 of its 7 steps
    chain b   0 1 2 3 3 4 6

What a step is, the client says: a sublayer that runs or does not, a layer of one model or another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Step = TypeVar("Step")
State = TypeVar("State")


class Prefixes(Generic[Step, State]):
    """The states behind beginnings of chains.

    Args:
        start: the state before any step.

    Attributes:
        states: what is kept, by its chain, in the order in which it was computed. A client with a budget may take from
            it: what is missing is computed again when it is asked for.
    """

    def __init__(self, start: State) -> None:
        self._start = start
        self.states: OrderedDict[tuple[Step, ...], State] = OrderedDict()

    def behind(
        self, chain: tuple[Step, ...], take: Callable[[State, tuple[Step, ...]], State], way: bool = True
    ) -> State:
        """The state behind a chain, which is kept.

        Args:
            chain: the steps.
            take: takes the last step of a chain: the state behind it, given the one behind all before; never in place.
            way: keep the states on the way to it, too.
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
        """Forget all but the states behind these chains."""
        wanted = set(chains)
        for chain in [chain for chain in self.states if chain not in wanted]:
            del self.states[chain]


def beginnings(chain: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """What a chain begins with, the shortest first, and the chain itself."""
    return (chain[:length] for length in range(1, len(chain) + 1))
