"""Mixtures: whose turn it is, so that each source has its share of the tokens that are seen.

    real       r r . r . r . .      the source that is furthest behind its share comes next; each goes through its own
    rephrased  . . s . s . s s      items in passes, shuffled anew for each

Shares are of tokens and not of documents: a rephrase is shorter than its source, and an answer shorter still.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lamella.data.documents import seed_of
from lamella.data.writer import Writer
from lamella.errors import MethodError
from lamella.zoo import open_tokenizer

SUM = 1e-9  # that shares may be away from 1


class Pick(NamedTuple):
    """One item, when it is its turn.

    Attributes:
        source: its name.
        number: which item of it.
    """

    source: str
    number: int


@dataclass(frozen=True)
class Mixture:
    """What is seen of several sources.

    Attributes:
        sizes: the tokens of each item, by source.
        shares: of all tokens that are seen, by source; they add up to 1.
        epochs: passes over one source at most.
        seed: of the order in each source.

    Raises:
        MethodError: for shares that do not fit the sources, or a source with a share and without a token.
    """

    sizes: Mapping[str, Sequence[int]]
    shares: Mapping[str, float]
    epochs: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        told = ", ".join(f"{name} {share:g}" for name, share in self.shares.items())
        if set(self.shares) != set(self.sizes) or any(share < 0 for share in self.shares.values()):
            raise MethodError(f"shares of {told} for {', '.join(self.sizes)}: give each source one, of 0 or more")
        if not math.isclose(sum(self.shares.values()), 1, abs_tol=SUM):
            raise MethodError(f"the shares {told} add up to {sum(self.shares.values()):g}: let them add up to 1")
        if not self.epochs > 0:
            raise MethodError(f"epochs {self.epochs:g}: give how often a source may be seen, above 0")
        empty = [name for name in self.used if not sum(self.sizes[name])]
        if empty:
            raise MethodError(
                f"{empty[0]} has a share of {self.shares[empty[0]]:g} and no tokens: give it a share of 0"
            )

    @property
    def used(self) -> list[str]:
        """The sources that are seen at all."""
        return [name for name, share in self.shares.items() if share > 0]

    def most(self) -> int:
        """How many tokens can be seen before a source reaches its last epoch."""
        return int(min(self.epochs * sum(self.sizes[name]) / self.shares[name] for name in self.used))

    def once(self) -> int:
        """How many tokens show every source once, or fewer where another one would be seen too often."""
        needed = max(sum(self.sizes[name]) / self.shares[name] for name in self.used)
        return min(math.ceil(needed), self.most())

    def picks(self, tokens: int) -> list[Pick]:
        """The items in their order, until so many tokens are seen.

        An item is whole: the last one goes past the end, or is left out where its source would be seen too often.

        Raises:
            MethodError: for more tokens than the sources give.
        """
        if tokens > self.most():
            need = {name: tokens * self.shares[name] / sum(self.sizes[name]) for name in self.used}
            name = max(need, key=lambda each: need[each])
            raise MethodError(
                f"{tokens} tokens take {need[name]:.1f} epochs of {name}, above {self.epochs:g}: ask for {self.most()} "
                "tokens or fewer, or let it have more epochs"
            )
        left = {name: self._items(name) for name in self.used}
        ahead = {name: next(left[name], None) for name in self.used}
        seen = dict.fromkeys(self.used, 0)
        found = []
        while sum(seen.values()) < tokens:
            name = min(self.used, key=lambda each: (seen[each] / self.shares[each], self.used.index(each)))
            number = ahead[name]
            if number is None:  # what is left of its last epoch is less than an item
                break
            found.append(Pick(name, number))
            seen[name] += self.sizes[name][number]
            ahead[name] = next(left[name], None)
        return found

    def _items(self, name: str) -> Iterator[int]:
        """The items of a source pass by pass, as far as its epochs reach; one source alone comes as it is."""
        drawn = random.Random(seed_of(name, self.seed))
        order, held = list(range(len(self.sizes[name]))), sum(self.sizes[name])
        room = self.epochs * held
        for _ in range(math.ceil(self.epochs)):
            if len(self.used) > 1:
                drawn.shuffle(order)
            for number in order:
                room -= self.sizes[name][number]
                if room < 0:
                    return
                yield number

    def account(self, picks: Sequence[Pick]) -> dict[str, dict[str, Any]]:
        """What was seen of each source: tokens, their share, epochs, and how many items there are."""
        seen = dict.fromkeys(self.sizes, 0)
        for source, number in picks:
            seen[source] += self.sizes[source][number]
        total = max(sum(seen.values()), 1)
        return {
            name: {
                "share": count / total,
                "wanted": self.shares[name],
                "tokens": count,
                "unique": sum(self.sizes[name]),
                "epochs": count / max(sum(self.sizes[name]), 1),
                "items": len(self.sizes[name]),
            }
            for name, count in seen.items()
        }


def mix(
    sources: Mapping[str, Sequence[Mapping[str, Any]]],
    shares: Mapping[str, float],
    count: Callable[[str], int],
    *,
    epochs: float,
    tokens: int | None,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of text in the order in which they are seen, and the account of it.

    Args:
        sources: rows with ``id`` and ``text``, by name.
        shares: of each, among all tokens that are seen.
        count: how many tokens a text has.
        epochs: passes over one source at most.
        tokens: that are seen; None: so many that each source is seen once, as far as epochs allow.

    Raises:
        MethodError: for shares or tokens that cannot be had.
    """
    sizes = {name: [count(row["text"]) for row in rows] for name, rows in sources.items()}
    mixture = Mixture(sizes, shares, epochs, seed)
    picks = mixture.picks(mixture.once() if tokens is None else tokens)
    told = [{"text": sources[name][n]["text"], "id": sources[name][n]["id"], "source": name} for name, n in picks]
    return told, {"by": "tokens", "most epochs": epochs, "sources": mixture.account(picks)}


@dataclass(frozen=True)
class Blend:
    """What is made to train on, of real text and of what a model has written of it.

    Attributes:
        synthetic: share of the tokens that are seen that a model has written; half in the papers.
        epochs: passes over one source at most; the papers' 4.
        tokens: that are seen; left out, so many that each source is seen once, as far as epochs allow.
        held_out: share of the documents of which nothing is written or trained on, to test with.
        student: the model that will be trained: its tokenizer counts the mixture, its size the cost; the writer when
            left out.
        parquet: write data.parquet beside data.jsonl.

    Raises:
        MethodError: for what are no shares.
    """

    synthetic: float = 0.5
    epochs: float = 4.0
    tokens: int | None = None
    held_out: float = 0.05
    student: str | None = None
    parquet: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.synthetic <= 1 or not 0 <= self.held_out < 1:
            raise MethodError(
                f"synthetic {self.synthetic:g}, held_out {self.held_out:g}: give shares from 0 to 1, and hold not all "
                "out"
            )

    def mix(
        self, sources: Mapping[str, Sequence[Mapping[str, Any]]], writer: Writer, seed: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of text in the order in which they are seen, and the account of it; see :func:`mix`.

        Args:
            sources: rows with ``id`` and ``text``, by name. The first one is real text; the others, which a model has
                written, share what is theirs evenly, but for those without a row.
            writer: whose tokenizer counts where there is no student.
        """
        real, *written = sources
        there = [name for name in written if sources[name]]
        share = self.synthetic if there else 0.0
        shares = {real: 1 - share} | {name: share / len(there) for name in there}
        tokenizer = open_tokenizer(self.student) if self.student else writer.tokenizer

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        used = {name: sources[name] for name in shares}
        return mix(used, shares, count, epochs=self.epochs, tokens=self.tokens, seed=seed)
