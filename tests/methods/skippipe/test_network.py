"""Networks: what they cost, the published one, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.errors import MethodError
from lamella.methods.skippipe.network import EXAMPLE, Load, Network, Node, published

OSLO = '[[nodes]]\nregion = "oslo"\n'
LINK = '[[links]]\nbetween = ["oslo", "paris"]\nmilliseconds = 14.0\ngigabytes = 0.12\n'


def test_an_edge_is_latency_bytes_over_bandwidth_and_copies_and_a_node_its_layers() -> None:
    load = Load(microbatch=8, tokens=1024, hidden=1024, layers=4, copies=0.35)
    network = Network.of([Node("a", 0.055), Node("b", 0.1), Node("a")], {("a", "b"): (50.0, 0.125)}, load)
    assert network.edge[0, 1] == network.edge[1, 0] == pytest.approx(0.05 + 0.03125 / 0.125 + 0.35)  # 2^25 bytes
    assert network.edge[0, 2] == pytest.approx(0.001 + 0.03125 / 2 + 0.35)  # within a region
    assert network.edge[0, 0] == network.way(1, 1) == 0
    assert network.work.tolist() == pytest.approx([0.055 * 32, 0.1 * 32, 0.055 * 32])
    assert network.memory.tolist() == [3, 3, 3]


def test_the_published_network_has_twenty_nodes_in_twelve_regions_and_no_link_a_thousand_times_too_slow() -> None:
    network = published()
    assert len(network) == 20 and len({node.region for node in network.nodes}) == 12
    assert network.edge.max() == pytest.approx(0.1095 + 0.03125 / 0.0089599609 + 0.35, rel=0.2)  # theirs has 132 s
    assert (network.edge == network.edge.T).all()


def test_a_file_is_read_with_its_links_both_ways(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text(EXAMPLE)
    network = Network.open(str(file), layers=1, copies=0.0)
    assert [node.region for node in network.nodes] == ["oslo", "oslo", "paris", "paris"]
    assert network.memory.tolist() == [2, 2, 3, 3]
    assert network.edge[0, 2] == network.edge[3, 1] == pytest.approx(0.014 + 0.03125 / 0.12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OSLO + OSLO.replace("oslo", "paris"), r"no link between oslo and paris: add \[\[links\]\] with between"),
        (OSLO + "memory = 0\n", r"node 0 \(oslo\) holds 0 microbatches"),
        (OSLO + "seconds = 0.0\n", "takes 0 s a layer"),
        (OSLO + 'memory = "much"\n', "node 0 has memory = much"),
        (OSLO + "memory = true\n", "node 0 has memory = True"),
        (OSLO + "cores = 4\n", "node 0 has cores = 4"),
        (OSLO + "count = 0\n", "is there 0 times"),
        ("[[nodes]]\nmemory = 3\n", "node 0 has no region"),
        ("nodes = 3\n", "nodes are no tables"),
        (LINK, "names no nodes"),
        (OSLO + LINK.replace("0.12", "0.0") + OSLO.replace("oslo", "paris"), "0 GB/s: give more"),
        (OSLO + LINK.replace('["oslo", "paris"]', '["oslo"]'), "is not"),
        (OSLO + LINK.replace("gigabytes", "gigabits"), "link 0 has no gigabytes"),
        (OSLO + "[edges]\n", "has 'edges'"),
        ("nodes = [", "is no TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_names_it(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text(text)
    with pytest.raises(MethodError, match=said) as error:
        Network.open(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
