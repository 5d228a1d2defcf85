"""Mixtures: the order of items in which each source has its share of the tokens that are seen.

    real       r r . r . r . .      the source that is furthest behind its share comes next; each source goes through
    rephrased  . . s . s . s s      its own items in epochs, shuffled again for each

Shares are of tokens and not of documents: a rephrase is shorter than its source, and an answer shorter still.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from lamella.data.documents import seed_of
from lamella.data.lazy import Lazy, mapped
from lamella.data.writer import Writer
from lamella.errors import MethodError
from lamella.zoo import open_tokenizer

SUM = 1e-9  # tolerance of the sum of shares


class Pick(NamedTuple):
    """One item of the mixture.

    Attributes:
        source: name of its source.
        number: index of the item in its source.
    """

    source: str
    number: int


@dataclass(frozen=True)
class Mixture:
    """A mixture of several sources.

    Attributes:
        sizes: the number of tokens of each item, by source.
        shares: the fraction of all tokens that are seen, by source; they add up to 1.
        epochs: maximum number of passes over one source.
        seed: random seed of the order in each source.

    Raises:
        MethodError: if the shares do not fit the sources, or a source with a share has no tokens.
    """

    sizes: Mapping[str, Sequence[int]]
    shares: Mapping[str, float]
    epochs: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        shares = ", ".join(f"{name} {share:g}" for name, share in self.shares.items())
        if set(self.shares) != set(self.sizes) or any(share < 0 for share in self.shares.values()):
            raise MethodError(f"shares of {shares} for {', '.join(self.sizes)}: give each source a share of at least 0")
        if not math.isclose(sum(self.shares.values()), 1, abs_tol=SUM):
            raise MethodError(
                f"the shares {shares} add up to {sum(self.shares.values()):g}: give shares that add up to 1"
            )
        if not self.epochs > 0:
            raise MethodError(f"epochs {self.epochs:g}: give the maximum number of passes over a source, above 0")
        empty = [name for name in self.used if not sum(self.sizes[name])]
        if empty:
            raise MethodError(
                f"{empty[0]} has a share of {self.shares[empty[0]]:g} and no tokens: give it a share of 0"
            )

    @property
    def used(self) -> list[str]:
        """The sources with a share above 0."""
        return [name for name, share in self.shares.items() if share > 0]

    def most(self) -> int:
        """Return how many tokens can be seen before a source reaches its maximum number of epochs."""
        return int(min(self.epochs * sum(self.sizes[name]) / self.shares[name] for name in self.used))

    def once(self) -> int:
        """Return how many tokens show every source once, or fewer if another source would exceed its epochs."""
        needed = max(sum(self.sizes[name]) / self.shares[name] for name in self.used)
        return min(math.ceil(needed), self.most())

    def picks(self, tokens: int) -> Lazy[Pick]:
        """Return the items in their order, until ``tokens`` tokens are seen.

        Items are not split: the last one may exceed the number of tokens, or is left out if its source would exceed its
        epochs.

        Args:
            tokens: the number of tokens.

        Raises:
            MethodError: if the sources have too few tokens.
        """
        if tokens > self.most():
            need = {name: tokens * self.shares[name] / sum(self.sizes[name]) for name in self.used}
            name = max(need, key=lambda each: need[each])
            raise MethodError(
                f"{tokens} tokens take {need[name]:.1f} epochs of {name}, above {self.epochs:g}: ask for {self.most()} "
                "tokens or fewer, or allow more epochs"
            )
        left = {name: self._items(name) for name in self.used}
        ahead = {name: next(left[name], None) for name in self.used}
        seen = dict.fromkeys(self.used, 0)
        sources, numbers = array("H"), array("I")
        while sum(seen.values()) < tokens:
            name = min(self.used, key=lambda each: (seen[each] / self.shares[each], self.used.index(each)))
            number = ahead[name]
            if number is None:  # the rest of its last epoch is shorter than an item
                break
            sources.append(self.used.index(name))
            numbers.append(number)
            seen[name] += self.sizes[name][number]
            ahead[name] = next(left[name], None)
        names = self.used
        return Lazy(range(len(numbers)), lambda n: Pick(names[sources[n]], numbers[n]))

    def _items(self, name: str) -> Iterator[int]:
        """Yield the items of a source epoch by epoch; a single source is not shuffled."""
        drawn = random.Random(seed_of(name, self.seed))
        order = array("I", range(len(self.sizes[name])))
        left = self.epochs * sum(self.sizes[name])
        for _ in range(math.ceil(self.epochs)):
            if len(self.used) > 1:
                drawn.shuffle(order)
            for number in order:
                left -= self.sizes[name][number]
                if left < 0:
                    return
                yield number

    def account(self, picks: Sequence[Pick]) -> dict[str, dict[str, Any]]:
        """Return for each source how many tokens were seen, their share, the epochs and the number of items.

        Args:
            picks: the items that were seen.
        """
        seen = dict.fromkeys(self.sizes, 0)
        for source, number in picks:
            seen[source] += self.sizes[source][number]
        total = max(sum(seen.values()), 1)
        return {
            name: {
                "share": count / total,
                "target": self.shares[name],
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
    count: Callable[[Mapping[str, Any]], int],
    *,
    epochs: float,
    tokens: int | None,
    seed: int,
) -> tuple[Sequence[dict[str, Any]], dict[str, Any]]:
    """Return rows of text in the order in which they are seen, and statistics of the mixture.

    Args:
        sources: rows with ``id`` and ``text``, by name.
        shares: the fraction of the tokens of each source among all tokens that are seen.
        count: returns the number of tokens of a row.
        epochs: maximum number of passes over one source.
        tokens: number of tokens that are seen; if None, each source is seen once, as far as ``epochs`` allows.
        seed: random seed of the order.

    Raises:
        MethodError: if the sources cannot provide these shares or this number of tokens.
    """
    sizes = {name: array("I", map(count, rows)) for name, rows in sources.items()}
    mixture = Mixture(sizes, shares, epochs, seed)
    picks = mixture.picks(mixture.once() if tokens is None else tokens)

    def row(pick: Pick) -> dict[str, Any]:
        name, place = pick
        found = sources[name][place]
        return {"text": found["text"], "id": found["id"], "source": name}

    return mapped(picks, row), {"by": "tokens", "maximum epochs": epochs, "sources": mixture.account(picks)}


@dataclass(frozen=True)
class Blend:
    """How real text and text that a model has generated from it are mixed for training.

    Attributes:
        synthetic: fraction of generated tokens among the tokens that are seen; half in the papers.
        epochs: maximum number of passes over one source; 4 in the papers.
        tokens: number of tokens that are seen; if omitted, each source is seen once, as far as ``epochs`` allows.
        held_out: fraction of the documents that are neither rephrased nor trained on, for testing.
        student: the model that will be trained: its tokenizer counts the tokens, its size gives the cost; the writer if
            omitted.
        parquet: write data.parquet in addition to data.jsonl.
    """

    synthetic: Annotated[float, Ge(0), Le(1)] = 0.5
    epochs: Annotated[float, Gt(0)] = 4.0
    tokens: Annotated[int, Ge(1)] | None = None
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.05
    student: str | None = None
    parquet: bool = False

    def mix(
        self, sources: Mapping[str, Sequence[Mapping[str, Any]]], writer: Writer, seed: int
    ) -> tuple[Sequence[dict[str, Any]], dict[str, Any]]:
        """Return rows of text in the order in which they are seen, and statistics of the mixture; see :func:`mix`.

        Args:
            sources: see :meth:`mix_counted`.
            writer: its tokenizer counts the tokens if there is no student.
            seed: random seed of the order.
        """
        tokenizer = open_tokenizer(self.student) if self.student else writer.tokenizer

        def count(row: Mapping[str, Any]) -> int:
            return len(tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"])

        return self.mix_counted(sources, count, seed)

    def mix_counted(
        self,
        sources: Mapping[str, Sequence[Mapping[str, Any]]],
        count: Callable[[Mapping[str, Any]], int],
        seed: int,
    ) -> tuple[Sequence[dict[str, Any]], dict[str, Any]]:
        """Return the same with any count of tokens.

        Args:
            sources: rows with ``id`` and ``text``, by name. The first source is real text; the others, which are
                generated, share their fraction evenly, except for those without rows.
            count: returns the number of tokens of a row.
            seed: random seed of the order.
        """
        real, *generated = sources
        present = [name for name in generated if sources[name]]
        share = self.synthetic if present else 0.0
        shares = {real: 1 - share} | {name: share / len(present) for name in present}
        used = {name: sources[name] for name in shares}
        return mix(used, shares, count, epochs=self.epochs, tokens=self.tokens, seed=seed)
