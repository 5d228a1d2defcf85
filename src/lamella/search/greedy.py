"""Greedy removal: which candidate to remove next, given what is gone.

The searches know nothing of models. They call ``cost(removed, candidate, bound)``, which returns the cost of removing
``candidate`` on top of ``removed``. Costs need be neither monotone nor additive. A cost may stop early: once it is sure
to pass ``bound`` it returns a lower bound that is above it, marked as not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from lamella.progress import track

Candidate = TypeVar("Candidate", bound=Hashable)


class Cost(NamedTuple):
    """A measured cost; where not ``exact``, ``value`` is a lower bound above the bound that was asked for."""

    value: float
    exact: bool = True


class Removal(NamedTuple, Generic[Candidate]):
    """One step: what was removed, the cost of all that is gone by then, and how many costs were asked for."""

    candidate: Candidate
    cost: float
    evaluations: int


COMPARING = "comparing candidates"
SLACK = 3.0  # how far above the best a first measurement is still followed to its end, since it orders later steps
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
    """Remove the cheapest candidate, again and again; among equals the first in ``candidates`` goes.

    Every step asks for the cost of every candidate that is left, the last step's cheapest first, so that the bound is
    tight from the start and most costs stop early. The result is that of the naive loop.

    Args:
        candidates: what can be removed.
        cost: the cost of a removal on top of others.
        done: steps of an earlier run to go on from.
        held: candidates that join only after ``release_after`` removals.
        release_after: the number of removals after which ``held`` joins.
        guess: which candidates to try first where nothing is known yet, the smallest first; it changes no result.
        out_of_time: called before each step; once it returns true, each step takes the cheapest candidate of the last
            step after one measurement.
    """
    held = tuple(held)
    rank = {candidate: index for index, candidate in enumerate((*candidates, *held))}
    removed = [step.candidate for step in done]
    left = _left(candidates, held, release_after, removed)
    last: dict[Candidate, float] = dict(guess or {})
    while left:
        best, best_key, asked = None, (math.inf, math.inf), 0
        is_late = out_of_time()  # once a step: costs of different steps do not compare
        order = sorted(left, key=lambda c: (last.get(c, -math.inf), rank[c]))
        for candidate in track(order, COMPARING):
            found = cost(tuple(removed), candidate, best_key[0])
            last[candidate] = found.value
            if found.exact and (found.value, rank[candidate]) < best_key:
                best, best_key = candidate, (found.value, rank[candidate])
            asked += 1
            if is_late and best is not None:
                break
        assert best is not None
        yield Removal(best, best_key[0], asked)
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
    """Greedy that trusts old costs: exact where costs only ever grow in step, an approximation elsewhere.

    Each step asks again only for the candidates that were cheapest when last asked, until the cheapest fresh one is
    cheaper than ``patience`` further candidates in a row could be by their old *increase* over the cost of their day.

    Args:
        guess: which candidates to try first where nothing is known yet, the smallest first.
        patience: how many candidates in a row may fail to improve on the best before a step ends.
        out_of_time: once it returns true, a step takes the candidate that was cheapest when last measured, and
            measures no other.
    """
    held = tuple(held)
    rank = {candidate: index for index, candidate in enumerate((*candidates, *held))}
    removed = [step.candidate for step in done]
    base = done[-1].cost if done else 0.0
    left = _left(candidates, held, release_after, removed)
    first = guess or {}
    increase: dict[Candidate, float] = {}
    while left:
        best, best_key, asked, misses = None, (math.inf, math.inf), 0, 0
        known_first = out_of_time()
        order = sorted(
            left, key=lambda c: ((c in increase) != known_first, increase.get(c, first.get(c, 0.0)), rank[c])
        )
        for candidate in track(order, COMPARING):
            unknown = candidate not in increase
            if not unknown and best is not None and base + increase[candidate] >= best_key[0] and misses >= patience:
                break
            found = cost(tuple(removed), candidate, best_key[0] * (SLACK if unknown else 1))
            asked += 1
            increase[candidate] = found.value - base
            if found.exact and (found.value, rank[candidate]) < best_key:
                best, best_key, misses = candidate, (found.value, rank[candidate]), 0
            else:
                misses += 1
            if best is not None and out_of_time():
                break
        assert best is not None
        yield Removal(best, best_key[0], asked)
        removed.append(best)
        base = best_key[0]
        left = _left(candidates, held, release_after, removed)


def one_shot(
    candidates: Sequence[Candidate], cost: CostOf[Candidate], largest: bool = False
) -> list[tuple[Candidate, float]]:
    """Every candidate with its cost when removed alone, the cheapest first (or the dearest first)."""
    costs = [(candidate, cost((), candidate, math.inf).value) for candidate in candidates]
    return sorted(costs, key=lambda pair: -pair[1] if largest else pair[1])


def swap(
    chosen: Sequence[Candidate], candidates: Sequence[Candidate], cost: CostOf[Candidate], start: float
) -> tuple[list[Candidate], float]:
    """Exchange one chosen candidate for another as long as that lowers the cost.

    Args:
        chosen: the set to improve.
        candidates: what may take a place in it.
        start: the cost of ``chosen``.

    Returns:
        The improved set and its cost, never above ``start``.
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
    gone = set(removed)
    return [candidate for candidate in (*candidates, *released) if candidate not in gone]
