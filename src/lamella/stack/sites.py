"""Sites: the stable addresses of what a decision can be about.

A stack has a list of positions, in the order in which they run: for each layer its sublayers, such as ``(0, "attn")``,
``(0, "mlp")``, ``(1, "attn")``. A position names a sublayer, and the point in the residual stream just before it; a
layer's index alone names the point before the layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from lamella.errors import MethodError, PlanError

Level = Literal["sublayer", "attn", "mlp", "block"]
_SITE = re.compile(r"layers\.(\d+)(?:\.([a-z]+))?")


class Position(NamedTuple):
    """A sublayer of a stack. Positions are ordered as they run, since the names of sublayers are: attn, cross, mlp.

    Attributes:
        layer: index of the layer.
        sublayer: name of the sublayer.
    """

    layer: int
    sublayer: str

    @property
    def site(self) -> str:
        """The site of this position.

        >>> Position(7, "mlp").site
        'layers.7.mlp'
        """
        return f"layers.{self.layer}.{self.sublayer}"


Group = tuple[Position, ...]  # positions that go together


def positions_of(layers: int, sublayers: Iterable[str] = ("attn", "mlp")) -> tuple[Position, ...]:
    """Return the positions of a stack whose layers all have the same sublayers.

    Args:
        layers: number of layers.
        sublayers: names of the sublayers, in order.
    """
    names = tuple(sublayers)
    return tuple(Position(layer, name) for layer in range(layers) for name in names)


def positions_at(site: str, positions: Sequence[Position]) -> Group:
    """Return the positions that a site covers: one for ``layers.7.mlp``, all of the layer for ``layers.7``.

    Args:
        site: the site.
        positions: positions of the stack.

    Raises:
        PlanError: for an invalid site, or one that the stack does not have.
    """
    names = list(dict.fromkeys(each.sublayer for each in positions))
    match = _SITE.fullmatch(site)
    if match is None or match[2] not in (None, *names):
        choices = [f"layers.7.{name}" for name in names]
        raise PlanError(f"'{site}' is not a site; write layers.7, {', '.join(choices[:-1])} or {choices[-1]}")
    found = tuple(each for each in positions if each.layer == int(match[1]) and match[2] in (None, each.sublayer))
    if not found:
        raise PlanError(f"site '{site}' is out of range: the stack has the layers 0 to {positions[-1].layer}")
    return found


def sites_of(chosen: Iterable[tuple[int, str]], positions: Sequence[Position]) -> list[str]:
    """Return the shortest list of sites that covers these positions of a stack, in its order.

    >>> sites_of({(2, "attn"), (2, "mlp"), (4, "mlp")}, positions_of(6))
    ['layers.2', 'layers.4.mlp']

    Args:
        chosen: the positions to cover.
        positions: positions of the stack.
    """
    covered, layers = set(chosen), _by_layer(positions)
    sites = []
    for layer, group in layers.items():
        if covered.issuperset(group):
            sites.append(f"layers.{layer}")
        else:
            sites += [position.site for position in group if position in covered]
    return sites


def groups_at(level: Level, positions: Sequence[Position]) -> list[Group]:
    """Return the removable units: every ``sublayer``, only ``attn``, only ``mlp``, or whole layers (``block``).

    >>> groups_at("mlp", positions_of(2))
    [(Position(layer=0, sublayer='mlp'),), (Position(layer=1, sublayer='mlp'),)]

    Args:
        level: size of the units.
        positions: positions of the stack.

    Raises:
        MethodError: for an unknown level.
    """
    if level not in get_args(Level):
        raise MethodError(f"unknown level '{level}'; known are {', '.join(get_args(Level))}")
    if level == "block":
        return list(_by_layer(positions).values())
    return [(position,) for position in positions if level in ("sublayer", position.sublayer)]


def _by_layer(positions: Sequence[Position]) -> dict[int, Group]:
    found: dict[int, list[Position]] = defaultdict(list)
    for position in positions:
        found[position.layer].append(position)
    return {layer: tuple(group) for layer, group in found.items()}
