"""Sites are addresses: they identify sublayers, and nothing that the stack does not have."""

from __future__ import annotations

import pytest

from lamella.errors import PlanError
from lamella.stack import ARCHITECTURES, Position, positions_at, positions_of, sites_of

THREE = ("attn", "cross", "mlp")


def test_positions_are_listed_along_the_stack() -> None:
    names = ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    positions = positions_of(2)
    assert [position.site for position in positions] == names
    assert [positions_at(name, positions) for name in names] == [(position,) for position in positions]
    assert positions_at("layers.1", positions) == ((1, "attn"), (1, "mlp"))
    assert positions_at("layers.1", positions_of(2, THREE)) == ((1, "attn"), (1, "cross"), (1, "mlp"))


def test_positions_are_ordered_as_they_run() -> None:
    assert sorted(positions_of(11, THREE)[::-1]) == list(positions_of(11, THREE))
    for architecture in ARCHITECTURES.values():
        assert list(architecture.names) == sorted(architecture.names), architecture.name


def test_sites_of_names_whole_layers_as_such_in_the_order_of_the_stack() -> None:
    chosen = [(4, "mlp"), (2, "attn"), (2, "mlp"), (0, "attn")]
    assert sites_of(chosen, positions_of(6)) == ["layers.0.attn", "layers.2", "layers.4.mlp"]
    assert sites_of(chosen, positions_of(6, THREE)) == [
        "layers.0.attn",
        "layers.2.attn",
        "layers.2.mlp",
        "layers.4.mlp",
    ]
    assert sites_of([], positions_of(6)) == []


@pytest.mark.parametrize(("layers", "names"), [(1, THREE[::2]), (3, THREE[::2]), (1, THREE), (2, THREE)])
def test_sites_and_positions_are_inverse(layers: int, names: tuple[str, ...]) -> None:
    positions = positions_of(layers, names)
    for chosen in range(2 ** len(positions)):
        some = {position for place, position in enumerate(positions) if chosen >> place & 1}
        assert {each for site in sites_of(some, positions) for each in positions_at(site, positions)} == some


@pytest.mark.parametrize(
    "site", ["layer.1", "layers.1.ffn", "layers.x", "layers.1.", "layers.-1", "", "layers.1\n", "layers.1.cross"]
)
def test_what_is_no_site_is_refused(site: str) -> None:
    with pytest.raises(PlanError, match=r"is not a site; write layers\.7, layers\.7\.attn or layers\.7\.mlp"):
        positions_at(site, positions_of(4))


def test_a_layer_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(PlanError, match=r"'layers\.4\.mlp' is out of range: the stack has the layers 0 to 3"):
        positions_at("layers.4.mlp", positions_of(4))


def test_a_position_is_a_pair() -> None:
    assert Position(7, "mlp") == (7, "mlp") and Position(7, "mlp").site == "layers.7.mlp"
