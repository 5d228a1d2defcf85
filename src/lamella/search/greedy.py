"""Greedy removal: which candidate to remove next, given what has been removed.

The searches know nothing of models. They call ``cost(removed, candidate, bound)``, which returns the cost of removing
``candidate`` on top of ``removed``. Costs need be neither monotone nor additive. A cost may stop early: once it is
certain to exceed ``bound``, it returns a lower bound that is above ``bound``, marked as not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from lamella.progress import track

Candidate = TypeVar("Candidate", bound=Hashable)


class Cost(NamedTuple):
    """A measured cost.

    Attributes:
        value: the cost, or a lower bound above the requested bound.
        exact: whether it is the cost.
    """

    value: float
    exact: bool = True


class Removal(NamedTuple, Generic[Candidate]):
    """One step of a search.

    Attributes:
        candidate: what was removed.
        cost: cost of everything removed so far.
        evaluations: number of costs that were measured in this step.
    """

    candidate: Candidate
    cost: float
    evaluations: int


COMPARING = "comparing candidates"
SLACK = 3.0  # factor above the best up to which a first measurement is completed, since it orders later steps
Clock = Callable[[], bool]
CostOf = Callable[[tuple[Candidate, ...], Candidate, float], Cost]


def greedy(
    candidates: Sequence[Candidate],
    cost: CostOf[Candidate],
    done: Sequence[Removal[Candidate]] = (),
    held: Iterable[Candidate] = (),
    release_after: int | None = None,
    guess: Mapping[Candidate, float] | None = None,
    out_of_time: Clock = lambda: False,
) -> Iterator[Removal[Candidate]]:
    """Remove the cheapest candidate repeatedly; among equals the first in ``candidates``.

    Every step measures the cost of every remaining candidate, starting with the last step's cheapest, so that the bound
    is tight from the start and most measurements stop early. The result is that of the naive loop.

    Args:
        candidates: what can be removed.
        cost: cost of a removal on top of others.
        done: steps of an earlier run to continue from.
        held: candidates that become available after ``release_after`` removals.
        release_after: number of removals after which ``held`` becomes available.
        guess: order in which candidates are tried before they have been measured, the smallest first; it does not
            change the result.
        out_of_time: called before each step; once it returns true, each step takes the cheapest candidate of the last
            step after one measurement.
    """
    held = tuple(held)
    rank = {candidate: index for index, candidate in enumerate((*candidates, *held))}
    removed = [step.candidate for step in done]
    left = _left(candidates, held, release_after, removed)
    last: dict[Candidate, float] = dict(guess or {})
    while left:
        best, best_key, evaluations = None, (math.inf, math.inf), 0
        is_late = out_of_time()  # once per step, since costs of different steps cannot be compared
        order = sorted(left, key=lambda c: (last.get(c, -math.inf), rank[c]))
        for candidate in track(order, COMPARING):
            found = cost(tuple(removed), candidate, best_key[0])
            last[candidate] = found.value
            if found.exact and (found.value, rank[candidate]) < best_key:
                best, best_key = candidate, (found.value, rank[candidate])
            evaluations += 1
            if is_late and best is not None:
                break
        assert best is not None
        yield Removal(best, best_key[0], evaluations)
        removed.append(best)
        left = _left(candidates, held, release_after, removed)


def lazy_greedy(
    candidates: Sequence[Candidate],
    cost: CostOf[Candidate],
    done: Sequence[Removal[Candidate]] = (),
    held: Iterable[Candidate] = (),
    release_after: int | None = None,
    guess: Mapping[Candidate, float] | None = None,
    patience: int = 1,
    out_of_time: Clock = lambda: False,
) -> Iterator[Removal[Candidate]]:
    """Remove the cheapest candidate repeatedly, reusing old costs.

    The result is exact if costs only ever increase in step, and an approximation otherwise.

    Each step measures again only the candidates that were cheapest when last measured, until the cheapest new cost is
    below what ``patience`` further candidates in a row could reach, given their old *increase* over the cost at that
    time.

    Args:
        candidates: what can be removed.
        cost: cost of a removal on top of others.
        done: steps of an earlier run to continue from.
        held: candidates that become available after ``release_after`` removals.
        release_after: number of removals after which ``held`` becomes available.
        guess: order in which candidates are tried before they have been measured, the smallest first.
        patience: number of candidates in a row that may fail to improve on the best before a step ends.
        out_of_time: once it returns true, a step takes the candidate that was cheapest when last measured, and measures
            no other.
    """
    held = tuple(held)
    rank = {candidate: index for index, candidate in enumerate((*candidates, *held))}
    removed = [step.candidate for step in done]
    base = done[-1].cost if done else 0.0
    left = _left(candidates, held, release_after, removed)
    first = guess or {}
    increase: dict[Candidate, float] = {}
    while left:
        best, best_key, evaluations, misses = None, (math.inf, math.inf), 0, 0
        known_first = out_of_time()
        order = sorted(
            left, key=lambda c: ((c in increase) != known_first, increase.get(c, first.get(c, 0.0)), rank[c])
        )
        for candidate in track(order, COMPARING):
            unknown = candidate not in increase
            if not unknown and best is not None and base + increase[candidate] >= best_key[0] and misses >= patience:
                break
            found = cost(tuple(removed), candidate, best_key[0] * (SLACK if unknown else 1))
            evaluations += 1
            increase[candidate] = found.value - base
            if found.exact and (found.value, rank[candidate]) < best_key:
                best, best_key, misses = candidate, (found.value, rank[candidate]), 0
            else:
                misses += 1
            if best is not None and out_of_time():
                break
        assert best is not None
        yield Removal(best, best_key[0], evaluations)
        removed.append(best)
        base = best_key[0]
        left = _left(candidates, held, release_after, removed)


def one_shot(
    candidates: Sequence[Candidate], cost: CostOf[Candidate], largest: bool = False
) -> list[tuple[Candidate, float]]:
    """Return every candidate with its cost when it alone is removed, the cheapest first.

    Args:
        candidates: what can be removed.
        cost: cost of a removal on top of others.
        largest: return the most expensive first instead.
    """
    costs = [(candidate, cost((), candidate, math.inf).value) for candidate in candidates]
    return sorted(costs, key=lambda pair: -pair[1] if largest else pair[1])


def swap(
    chosen: Sequence[Candidate], candidates: Sequence[Candidate], cost: CostOf[Candidate], start: float
) -> tuple[list[Candidate], float]:
    """Exchange one chosen candidate for another as long as this lowers the cost.

    Args:
        chosen: the set to improve.
        candidates: what may replace a member.
        cost: cost of a removal on top of others.
        start: cost of ``chosen``.

    Returns:
        The improved set and its cost, which is at most ``start``.
    """
    chosen, best = list(chosen), start
    improved = True
    while improved:
        improved = False
        for out in tuple(chosen):
            rest = tuple(c for c in chosen if c != out)
            for candidate in candidates:
                if candidate in chosen:
                    continue
                found = cost(rest, candidate, best)
                if found.exact and found.value < best:
                    chosen, best, improved = [*rest, candidate], found.value, True
                    break
            if improved:
                break
    return chosen, best


def _left(
    candidates: Sequence[Candidate],
    held: tuple[Candidate, ...],
    release_after: int | None,
    removed: Sequence[Candidate],
) -> list[Candidate]:
    released = held if release_after is not None and len(removed) >= release_after else ()
    excluded = set(removed)
    return [candidate for candidate in (*candidates, *released) if candidate not in excluded]
