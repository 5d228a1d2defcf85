"""Sites: the stable addresses of what a decision can be about.

Halves are counted along the stack: half ``2 * l`` is the attention of layer ``l``, half ``2 * l + 1`` its MLP. The same
number names the *point* of the stream just before that half, so a stack of L layers has the points 0 to 2L.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

from lamella.errors import MethodError, PlanError

KINDS = ("attn", "mlp")
Group = tuple[int, ...]  # halves that go together
Level = Literal["sublayer", "attn", "mlp", "block"]
_SITE = re.compile(r"layers\.(\d+)(?:\.(attn|mlp))?")


def half_site(half: int) -> str:
    """The site of a half.

    >>> half_site(15)
    'layers.7.mlp'
    """
    return f"layers.{half // 2}.{KINDS[half % 2]}"


def halves_of(site: str, layers: int) -> tuple[int, ...]:
    """The halves that a site covers: one for ``layers.7.mlp``, both for ``layers.7``.

    Raises:
        PlanError: for a site that is not one, or a layer that the stack does not have.
    """
    match = _SITE.fullmatch(site)
    if match is None:
        raise PlanError(f"'{site}' is not a site; write layers.7, layers.7.attn or layers.7.mlp")
    layer = int(match[1])
    if layer >= layers:
        raise PlanError(f"site '{site}' is out of range: the stack has the layers 0 to {layers - 1}")
    both = (2 * layer, 2 * layer + 1)
    return both if match[2] is None else (both[KINDS.index(match[2])],)


def sites_of(halves: Iterable[int]) -> list[str]:
    """The shortest list of sites that covers these halves, in the order of the stack.

    >>> sites_of({4, 5, 9})
    ['layers.2', 'layers.4.mlp']
    """
    chosen = set(halves)
    whole = {half // 2 for half in chosen if {half, half ^ 1} <= chosen}
    sites = [(2 * layer, f"layers.{layer}") for layer in whole]
    sites += [(half, half_site(half)) for half in chosen if half // 2 not in whole]
    return [site for _, site in sorted(sites)]


def groups_at(level: Level, layers: int) -> list[Group]:
    """What can be removed at one level: every half (``sublayer``), only ``attn``, only ``mlp``, or whole layers.

    >>> groups_at("block", 2)
    [(0, 1), (2, 3)]

    Raises:
        MethodError: for an unknown level.
    """
    if level not in get_args(Level):
        raise MethodError(f"unknown level '{level}'; known are {', '.join(get_args(Level))}")
    if level == "block":
        return [(2 * layer, 2 * layer + 1) for layer in range(layers)]
    return [(half,) for half in range(2 * layers) if level == "sublayer" or level == KINDS[half % 2]]
