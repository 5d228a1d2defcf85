"""Which layers are adapted: the first ones and the last ones of a stack."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.errors import MethodError

FIRST, LAST = 0.31, 0.0625  # of all layers: 10 and 2 of the paper's 32, for other depths (ours)


@dataclass(frozen=True)
class Edges:
    """S = {0 .. first - 1} and {layers - last .. layers - 1}.

    Attributes:
        layers: L, of the whole stack.
        first, last: a and b, how many are adapted at each end.

    >>> Edges(8, 3, 1).indices
    (0, 1, 2, 7)

    Raises:
        MethodError: when they are none, or overlap.
    """

    layers: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first + self.last <= self.layers:
            raise MethodError(
                f"first {self.first} and last {self.last} of {self.layers} layers: give two numbers that add up "
                f"to at least 1 and at most {self.layers}"
            )

    @classmethod
    def of(cls, layers: int, first: int | None = None, last: int | None = None) -> Edges:
        """What is not given is scaled to the depth: 10 + 2 of 32 layers, 9 + 2 of 28 and 30, 2 + 1 of 8.

        Args:
            layers: L.
            first, last: a and b; the paper has about 10 and 2 for models of 32 and 28 layers.
        """
        return cls(
            layers,
            round(FIRST * layers) if first is None else first,
            max(1, round(LAST * layers)) if last is None else last,
        )

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of the adapted layers."""
        return (*range(self.first), *range(self.layers - self.last, self.layers))

    @property
    def sites(self) -> tuple[str, ...]:
        """The same as sites."""
        return sites_of_layers(self.indices)


def sites_of_layers(layers: tuple[int, ...] | range) -> tuple[str, ...]:
    """Whole layers as sites."""
    return tuple(f"layers.{layer}" for layer in layers)
