"""Sites are addresses: they say which halves are meant, and nothing that the stack does not have."""

from __future__ import annotations

import pytest

from lamella.errors import PlanError
from lamella.stack import half_site, halves_of, sites_of


def test_halves_are_counted_along_the_stack() -> None:
    names = ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    assert [half_site(half) for half in range(4)] == names
    assert [halves_of(name, 2) for name in names] == [(0,), (1,), (2,), (3,)]
    assert halves_of("layers.1", 2) == (2, 3)


def test_sites_of_names_whole_layers_as_such_in_the_order_of_the_stack() -> None:
    assert sites_of([9, 4, 5, 0]) == ["layers.0.attn", "layers.2", "layers.4.mlp"]
    assert sites_of([]) == []


@pytest.mark.parametrize("layers", [1, 3])
def test_sites_and_halves_are_inverse(layers: int) -> None:
    for chosen in range(2 ** (2 * layers)):
        halves = {half for half in range(2 * layers) if chosen >> half & 1}
        assert {half for site in sites_of(halves) for half in halves_of(site, layers)} == halves


@pytest.mark.parametrize("site", ["layer.1", "layers.1.ffn", "layers.x", "layers.1.", "layers.-1", "", "layers.1\n"])
def test_what_is_no_site_is_refused(site: str) -> None:
    with pytest.raises(PlanError, match="is not a site; write"):
        halves_of(site, 4)


def test_a_layer_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(PlanError, match=r"'layers\.4\.mlp' is out of range: the stack has the layers 0 to 3"):
        halves_of("layers.4.mlp", 4)
