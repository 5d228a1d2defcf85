"""The effect of removing sublayers on the output of a model: the measurement of every greedy planner."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from lamella.errors import MethodError, NumericsError
from lamella.measure.distances import DISTANCES
from lamella.measure.hidden_states import Tokens, sequences
from lamella.search import Cost
from lamella.stack import Context, Group, Hidden, Position, Prefixes, Stack, beginnings

CHUNK = 128  # positions whose logits are held at a time: enough for the head's matrix product to run at full speed
SLICE = 8  # positions of a chunk whose distance is computed at a time: few, so that temporaries stay in the cache
REFERENCE_SHARE = 0.25  # fraction of the machine's memory for the original's output
BOUND_SLICE = 64  # positions whose lower bound is computed at a time
LIKELY_TOKENS = 4096  # tokens from which a candidate's distance is bounded before the whole head runs


class OutputDistance:
    """The distance between the outputs of the original and of the same model with sublayers removed.

    The reference is always the original. Four things make it fast, and none changes a result: the hidden states before
    every sublayer are kept for the current removals, so a candidate runs only from its own position on; the tokens that
    are most likely in the original bound a distance from below with a tenth of the head's work; the head and the
    divergence then run over chunks of positions, starting with those that had the largest distances last time; and a
    candidate is abandoned as soon as what is measured, with the lower bounds of the rest, exceeds the bound.

    Args:
        stack: the opened model.
        tokens: calibration tokens [sequences, time], or ``input_ids`` with an ``attention_mask``; padding is ignored.
        distance: a name from :data:`DISTANCES`.
        first: the first layer with a candidate; hidden states before it are not kept.

    Raises:
        MethodError: for an unknown distance.
        NumericsError: if the original's own output is not finite.
    """

    def __init__(self, stack: Stack, tokens: Tokens, distance: str = "jsd", first: int = 0) -> None:
        if distance not in DISTANCES:
            raise MethodError(f"unknown distance '{distance}'; known are {', '.join(DISTANCES)}")
        self.stack = stack
        self.distance = DISTANCES[distance]
        self._rows = [_Row(stack, row, first, index) for index, row in enumerate(sequences(tokens))]
        self._removed: frozenset[Position] = frozenset()
        self._first = first
        self._sorted = False
        self._some: nn.Linear | None = None
        self._keep_references()

    @torch.no_grad()
    def _keep_references(self) -> None:
        """Keep the original's output if memory allows, its final states otherwise."""
        positions = sum(row.length for row in self._rows)
        size = 4 * positions * self.stack.config.vocab_size
        fits = size < REFERENCE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        for row in self._rows:
            row.final = self.stack.normed(row.behind(self._runs(frozenset())))[row.context.real]
            self._check_finite(row)
            if fits:
                row.reference = torch.cat([self._prepared(part) for part in row.final.split(CHUNK)])
        if fits and self.distance.from_some is not None and self.stack.config.vocab_size >= 2 * LIKELY_TOKENS:
            self._keep_likely_tokens()

    def _keep_likely_tokens(self) -> None:
        """Choose the tokens that are most likely in the original, and keep their part of the head and of its output."""
        references = [row.reference for row in self._rows if row.reference is not None]
        mass = sum(part.exp().sum(0) for reference in references for part in reference.split(CHUNK))
        assert isinstance(mass, Tensor)
        tokens = mass.topk(LIKELY_TOKENS).indices.sort().values
        self._some = self.stack.unembedding_of(tokens)
        for row, reference in zip(self._rows, references, strict=True):
            row.some = reference[:, tokens]

    def _check_finite(self, row: _Row) -> None:
        """Raise an error that names the first sublayer of the original whose output is not finite."""
        if torch.isfinite(row.final).all():
            return
        for position, h in self.stack.walk(row.context.h, 0, len(self.stack), row.context):
            self.stack.check_finite(position, h)
        raise NumericsError(f"non-finite activations after the final norm of {self.stack.name}: check the weights")

    def _prepared(self, normed: Tensor) -> Tensor:
        return self.distance.prepare(self.stack.logits(normed).float())

    def of(self, removed: Collection[Position]) -> float:
        """Return the distance with exactly these sublayers removed."""
        return self.within(removed, math.inf).value

    @torch.no_grad()
    def within(self, removed: Collection[Position], bound: float) -> Cost:
        """Return the distance with exactly these sublayers removed, reusing the kept hidden states.

        Args:
            removed: positions of the removed sublayers.
            bound: value above which the exact distance is not needed.

        Returns:
            The distance, or a lower bound above ``bound`` as soon as it is certain to exceed it.
        """
        return self._measure(frozenset(removed), bound)

    @torch.no_grad()
    def cost(self, removed: Iterable[Group], candidate: Group, bound: float) -> Cost:
        """Return the distance with ``candidate`` removed on top of ``removed``, whose hidden states are kept.

        Args:
            removed: groups of positions that are removed already.
            candidate: the group to remove in addition.
            bound: value above which the exact distance is not needed.
        """
        positions = frozenset(Position(*each) for group in removed for each in group)
        self.keep(positions)
        return self._measure(positions | set(candidate), bound)

    @torch.no_grad()
    def keep(self, removed: Collection[Position]) -> None:
        """Keep the hidden states with these sublayers removed, from which similar removals continue."""
        removed = frozenset(removed)
        changed = removed != self._removed
        if changed:
            chain = self._runs(removed)
            for row in self._rows:
                row.prefixes.keep(beginnings(chain))
                row.behind(chain)
            self._removed = removed
        if (changed or not self._sorted) and any(row.distances.any() for row in self._rows):
            for row in self._rows:
                row.sort()
            self._sorted = True

    def _measure(self, removed: frozenset[Position], bound: float) -> Cost:
        start = min(removed ^ self._removed, default=self.stack.end)
        before = self._runs(removed, start)
        sums = torch.zeros(len(self._rows), dtype=torch.float64)
        counts = torch.tensor([row.length for row in self._rows], dtype=torch.float64)
        # The sequence with the largest distance last time comes first, and of each sequence the positions with the
        # largest distances; the others follow in later waves, unless the bound is exceeded. Lower bounds come first.
        order = sorted(self._rows, key=lambda row: -float(row.distances.sum()))
        finals: dict[int, Tensor] = {}
        lower = [torch.zeros(row.length) for row in self._rows]
        values: list[list[Tensor]] = [[] for _ in self._rows]
        first_wave = (
            0 if self._some is None or bound == math.inf else -CHUNK
        )  # without a bound, all is computed exactly
        for wave in range(first_wave, max(row.length for row in order), CHUNK):
            for row in order:
                at = row.index
                if wave >= row.length:
                    continue
                if at not in finals:
                    h = self.stack.run(row.behind(before), start, len(self.stack), row.context, removed)
                    finals[at] = self.stack.normed(h)[row.context.real][row.order]
                if wave < 0:
                    lower[at] = self._lower(row, finals[at])
                    sums[at] = float(lower[at].double().sum())
                else:
                    positions = slice(wave, wave + CHUNK)
                    values[at].append(self._at(row, finals[at], positions))
                    sums[at] += float(values[at][-1].double().sum() - lower[at][positions].double().sum())
                if not torch.isfinite(sums[at]):
                    sites = ", ".join(position.site for position in sorted(removed)) or "nothing"
                    raise NumericsError(
                        f"non-finite output of {self.stack.name} with {sites} removed: try dtype float32"
                    )
                least = float(self.distance.reduce(sums, counts))
                if least > bound:
                    return Cost(least, exact=False)
        for row in self._rows:
            row.distances = torch.cat(values[row.index])
            sums[row.index] = float(row.distances.double().sum())
        return Cost(float(self.distance.reduce(sums, counts)))

    def _lower(self, row: _Row, final: Tensor) -> Tensor:
        """Return a lower bound of the distance at each position, from the most likely tokens only."""
        assert self.distance.from_some is not None and row.some is not None
        logits = self.stack.logits(final, self._some).float()
        slices = zip(logits.split(BOUND_SLICE), row.some.split(BOUND_SLICE), strict=True)
        return torch.cat([self.distance.from_some(*each) for each in slices]).cpu()

    def _at(self, row: _Row, final: Tensor, positions: slice) -> Tensor:
        logits = self.stack.logits(final[positions]).float()
        kept = row.reference
        reference = self._prepared(row.final[positions]) if kept is None else kept[positions]
        slices = zip(logits.split(SLICE), reference.split(SLICE), row.labels[positions].split(SLICE), strict=True)
        return torch.cat([self.distance.at_positions(*each) for each in slices]).cpu()

    def _runs(self, removed: frozenset[Position], stop: Position | None = None) -> tuple[bool, ...]:
        """Return which sublayers run, from the first candidate up to ``stop`` or the end."""
        stop = stop or self.stack.end
        return tuple(at not in removed for at in self.stack.positions if self._first <= at.layer and at < stop)


class _Row:
    """One calibration sequence: its context, and the hidden states after chains of sublayers that run or do not."""

    final: Tensor
    reference: Tensor | None = None
    some: Tensor | None = None  # the most likely tokens

    @torch.no_grad()
    def __init__(self, stack: Stack, inputs: dict[str, Tensor], first: int, index: int) -> None:
        self.context: Context = stack.context(inputs)
        self.length = int(self.context.real.sum())
        real = inputs["input_ids"][0][self.context.real[0]]
        self.labels = torch.cat([real[1:], real.new_tensor([-100])])
        self.index = index
        self.order = torch.arange(self.length)  # order of the positions in everything that is kept
        self.distances = torch.zeros(self.length)  # the distance at each position when it was last measured
        self._stack, self._positions = stack, [each for each in stack.positions if each.layer >= first]
        start = stack.run(self.context.h, 0, first, self.context)
        self.prefixes: Prefixes[bool, Hidden] = Prefixes(start)

    def sort(self) -> None:
        """Move the positions with the largest distances to the front, so that chunks of them are slices."""
        order = torch.argsort(self.distances, descending=True)
        self.order, self.distances = self.order[order], self.distances[order]
        self.labels, self.final = self.labels[order], self.final[order]
        if self.reference is not None:
            self.reference = self.reference[order]
        if self.some is not None:
            self.some = self.some[order]

    def behind(self, chain: tuple[bool, ...]) -> Hidden:
        """Return the hidden states after a chain of sublayers."""
        return self.prefixes.behind(chain, self._take)

    def _take(self, h: Hidden, chain: tuple[bool, ...]) -> Hidden:
        """Return the hidden states after one more sublayer, which runs or does not."""
        last = self._positions[len(chain) - 1]
        skip = () if chain[-1] else (last,)
        return self._stack.run(h, last, self._stack.after(last), self.context, skip)
