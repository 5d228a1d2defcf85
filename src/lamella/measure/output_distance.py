"""What removing sublayers does to the output of a model: the measurement behind every greedy planner here."""

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

CHUNK = 128  # positions whose logits are held at once: enough for the head's matrix product to run at full speed
SLICE = 8  # of those, positions whose distance is computed at once: few, so that temporaries stay in the cache
REFERENCE_SHARE = 0.25  # of the machine's memory, for the original's output
BOUND_SLICE = 64  # the same for bounds
TELLING = 4096  # tokens of the vocabulary from which a candidate's distance is bounded before the head runs in full


class OutputDistance:
    """The distance between the outputs of the original and of the same model with sublayers removed.

    The reference is always the original. Four things make it fast, and none changes a result: the stream before every
    sublayer is kept for the present removals, so a candidate runs from itself on only; the tokens that the original
    finds most likely bound a distance from below at a tenth of the head's work; the head and the divergence then run
    over chunks of positions, those that told most last time first; and a candidate is abandoned as soon as what is
    measured, with the lower bounds of the rest, passes the bound.

    Args:
        stack: the opened model.
        tokens: calibration tokens [sequences, time], or ``input_ids`` with an ``attention_mask``; padding is left out.
        distance: a name from :data:`DISTANCES`.
        first: the first layer of which anything will ever be a candidate; streams before it are not kept.

    Raises:
        MethodError: for an unknown distance.
        NumericsError: when the original's own output is not finite.
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
        """Keep the original's output where memory allows, its final states otherwise."""
        positions = sum(row.length for row in self._rows)
        size = 4 * positions * self.stack.config.vocab_size
        fits = size < REFERENCE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        for row in self._rows:
            row.final = self.stack.normed(row.behind(self._runs(frozenset())))[row.context.real]
            self._check_finite(row)
            if fits:
                row.reference = torch.cat([self._prepared(part) for part in row.final.split(CHUNK)])
        if fits and self.distance.from_some is not None and self.stack.config.vocab_size >= 2 * TELLING:
            self._keep_telling_tokens()

    def _keep_telling_tokens(self) -> None:
        """Choose the tokens that are likeliest in the original, and keep their part of the head and of its output."""
        references = [row.reference for row in self._rows if row.reference is not None]
        likely = sum(part.exp().sum(0) for reference in references for part in reference.split(CHUNK))
        assert isinstance(likely, Tensor)
        tokens = likely.topk(TELLING).indices.sort().values
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
        """The distance with exactly these sublayers removed."""
        return self.within(removed, math.inf).value

    @torch.no_grad()
    def within(self, removed: Collection[Position], bound: float) -> Cost:
        """The distance with exactly these sublayers removed, computed from the first on that differs from what is kept.

        Returns:
            The distance, or a lower bound above ``bound`` as soon as it is sure to pass it.
        """
        return self._measure(frozenset(removed), bound)

    @torch.no_grad()
    def cost(self, removed: Iterable[Group], candidate: Group, bound: float) -> Cost:
        """The same with ``candidate`` removed on top of ``removed``, whose streams are kept, for the searches."""
        gone = frozenset(Position(*each) for group in removed for each in group)
        self.keep(gone)
        return self._measure(gone | set(candidate), bound)

    @torch.no_grad()
    def keep(self, removed: Collection[Position]) -> None:
        """Keep the streams with these sublayers removed, from which others that differ little go on."""
        removed = frozenset(removed)
        changed = removed != self._removed
        if changed:
            chain = self._runs(removed)
            for row in self._rows:
                row.prefixes.keep(beginnings(chain))
                row.behind(chain)
            self._removed = removed
        if (changed or not self._sorted) and any(row.told.any() for row in self._rows):
            for row in self._rows:
                row.sort()
            self._sorted = True

    def _measure(self, removed: frozenset[Position], bound: float) -> Cost:
        start = min(removed ^ self._removed, default=self.stack.end)
        before = self._runs(removed, start)
        sums = torch.zeros(len(self._rows), dtype=torch.float64)
        counts = torch.tensor([row.length for row in self._rows], dtype=torch.float64)
        # The sequence that told most last time comes first, and of each sequence the positions that told most; the
        # others follow in later waves, if the bound has not been passed by then. What bounds all comes before all.
        order = sorted(self._rows, key=lambda row: -float(row.told.sum()))
        finals: dict[int, Tensor] = {}
        lower = [torch.zeros(row.length) for row in self._rows]
        values: list[list[Tensor]] = [[] for _ in self._rows]
        first_wave = 0 if self._some is None or bound == math.inf else -CHUNK  # where nothing can be abandoned, exact
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
            row.told = torch.cat(values[row.index])
            sums[row.index] = float(row.told.double().sum())
        return Cost(float(self.distance.reduce(sums, counts)))

    def _lower(self, row: _Row, final: Tensor) -> Tensor:
        """What the distance at each position cannot be below, from the telling tokens alone."""
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
        """Which sublayers run, from the first candidate on up to ``stop`` or the end."""
        stop = stop or self.stack.end
        return tuple(at not in removed for at in self.stack.positions if self._first <= at.layer and at < stop)


class _Row:
    """One calibration sequence: its context, and the streams behind which sublayers run and which do not."""

    final: Tensor
    reference: Tensor | None = None
    some: Tensor | None = None  # of the telling tokens

    @torch.no_grad()
    def __init__(self, stack: Stack, inputs: dict[str, Tensor], first: int, index: int) -> None:
        self.context: Context = stack.context(inputs)
        self.length = int(self.context.real.sum())
        real = inputs["input_ids"][0][self.context.real[0]]
        self.labels = torch.cat([real[1:], real.new_tensor([-100])])
        self.index = index
        self.order = torch.arange(self.length)  # of the positions, in everything that is kept of them
        self.told = torch.zeros(self.length)  # the distance at each position when it was last measured
        self._stack, self._positions = stack, [each for each in stack.positions if each.layer >= first]
        start = stack.run(self.context.h, 0, first, self.context)
        self.prefixes: Prefixes[bool, Hidden] = Prefixes(start)

    def sort(self) -> None:
        """Bring the positions that told most to the front, so that chunks of them are slices and need no gathering."""
        told_most = torch.argsort(self.told, descending=True)
        self.order, self.told = self.order[told_most], self.told[told_most]
        self.labels, self.final = self.labels[told_most], self.final[told_most]
        if self.reference is not None:
            self.reference = self.reference[told_most]
        if self.some is not None:
            self.some = self.some[told_most]

    def behind(self, chain: tuple[bool, ...]) -> Hidden:
        return self.prefixes.behind(chain, self._take)

    def _take(self, h: Hidden, chain: tuple[bool, ...]) -> Hidden:
        """The stream behind one more sublayer, which runs or does not."""
        last = self._positions[len(chain) - 1]
        skip = () if chain[-1] else (last,)
        return self._stack.run(h, last, self._stack.after(last), self.context, skip)
