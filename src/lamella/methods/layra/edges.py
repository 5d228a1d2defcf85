"""The adapted layers: the first and the last ones of a stack."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.errors import MethodError

FIRST, LAST = 10, 2  # the paper's, of 28 as of 32 layers
SHALLOW, DEEP = 28, 32  # depths between which the paper's split holds; others are scaled from the nearer one by Lamella


@dataclass(frozen=True)
class Edges:
    """S = {0 .. first - 1} and {layers - last .. layers - 1}.

    Attributes:
        layers: L, number of layers of the stack.
        first, last: a and b, number of adapted layers at each end.

    >>> Edges(8, 3, 1).indices
    (0, 1, 2, 7)

    Raises:
        MethodError: if there are none, or they overlap.
    """

    layers: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first + self.last <= self.layers:
            raise MethodError(
                f"first {self.first} and last {self.last} of {self.layers} layers: their sum must be "
                f"at least 1 and at most {self.layers}"
            )

    @classmethod
    def of(cls, layers: int, first: int | None = None, last: int | None = None) -> Edges:
        """Scale unspecified values to the depth: 10 + 2 of 28 to 32 layers, 3 + 1 of 8, 20 + 4 of 64.

        Args:
            layers: L.
            first: a; the paper uses about 10 for models of 28 and 32 layers.
            last: b; the paper uses about 2.
        """
        scale = layers / min(max(layers, SHALLOW), DEEP)
        return cls(
            layers,
            round(FIRST * scale) if first is None else first,
            max(1, round(LAST * scale)) if last is None else last,
        )

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of the adapted layers."""
        return (*range(self.first), *range(self.layers - self.last, self.layers))

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the adapted layers."""
        return sites_of_layers(self.indices)


def sites_of_layers(layers: tuple[int, ...] | range) -> tuple[str, ...]:
    """Sites of whole layers."""
    return tuple(f"layers.{layer}" for layer in layers)
