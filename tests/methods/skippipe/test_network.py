"""Networks: what they cost, the published one, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.errors import MethodError
from lamella.methods.skippipe import NetworkProfile, profile
from lamella.methods.skippipe.network import EXAMPLE, Load, Machine, PipelineNetwork, published
from lamella.stack import Stack
from lamella.zoo.nano import nano

OSLO = '[[nodes]]\nregion = "oslo"\n'
LINK = '[[links]]\nbetween = ["oslo", "paris"]\nmilliseconds = 14.0\ngigabytes = 0.12\n'


def test_an_edge_is_latency_bytes_over_bandwidth_and_copies_and_a_node_its_layers() -> None:
    load = Load(microbatch=8, tokens=1024, hidden=1024, layers=4, copies=0.35)
    network = PipelineNetwork.of(
        [Machine("a", 0.055), Machine("b", 0.1), Machine("a")], {("a", "b"): (50.0, 0.125)}, load
    )
    assert network.edge[0, 1] == network.edge[1, 0] == pytest.approx(0.05 + 0.03125 / 0.125 + 0.35)  # 2^25 bytes
    assert network.edge[0, 2] == pytest.approx(0.001 + 0.03125 / 2 + 0.35)  # within a region
    assert network.edge[0, 0] == network.message_seconds(1, 1) == 0
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
    network = PipelineNetwork.open(str(file), layers=1, copies=0.0)
    assert [node.region for node in network.nodes] == ["oslo", "oslo", "paris", "paris"]
    assert network.memory.tolist() == [2, 2, 3, 3]
    assert network.edge[0, 2] == network.edge[3, 1] == pytest.approx(0.014 + 0.03125 / 0.12)


def test_the_load_of_a_file_counts_unless_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "network.toml"
    file.write_text(
        "[load]\nmicrobatch = 2\ntokens = 128\nhidden = 64\nlayers = 3\ncopies = 0\nbf16 = true\n" + EXAMPLE
    )
    for source in (file, tmp_path):  # the file, or its folder
        network = PipelineNetwork.open(str(source))
        assert network.edge[0, 2] == pytest.approx(0.014 + 2 * 2 * 128 * 64 / 1024**3 / 0.12)
        assert network.work.tolist() == pytest.approx([0.02 * 6, 0.02 * 6, 0.055 * 6, 0.055 * 6])
    assert PipelineNetwork.open(str(file), bf16=False, copies=0.5).edge[0, 2] == pytest.approx(
        0.014 + 4 * 2 * 128 * 64 / 1024**3 / 0.12 + 0.5
    )


def test_one_process_measures_its_own_speed(tmp_path: Path) -> None:
    made = profile(Stack(nano("llama")), region="oslo", stages=2, microbatch=2, tokens=16, rounds=3)
    assert made.load == Load(2, 16, 32, 2, 0.0) and not made.links and [each.region for each in made.nodes] == ["oslo"]
    node = made.findings["nodes"][0]
    assert node["backward over forward seconds"] > 0
    assert node["fastest seconds"] <= made.nodes[0].seconds * 2 * 2 <= node["slowest seconds"]
    made.write(tmp_path)
    again = NetworkProfile.read(tmp_path)
    assert (again.nodes, again.links, again.load) == (made.nodes, made.links, made.load)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OSLO + OSLO.replace("oslo", "paris"), r"no link between oslo and paris: add \[\[links\]\] with between"),
        (OSLO + "memory = 0\n", r"node 0 \(oslo\) has memory for 0 microbatches"),
        (OSLO + "seconds = 0.0\n", "takes 0 s per layer:"),
        (OSLO + 'memory = "much"\n', "node 0 has memory = much"),
        (OSLO + "memory = true\n", "node 0 has memory = True"),
        (OSLO + "cores = 4\n", "node 0 has cores = 4"),
        (OSLO + "count = 0\n", "has count 0: give a count"),
        ("[[nodes]]\nmemory = 3\n", "node 0 has no region"),
        ("nodes = 3\n", "nodes is not an array of tables:"),
        (LINK, "has no nodes:"),
        (
            OSLO + LINK.replace("0.12", "0.0") + OSLO.replace("oslo", "paris"),
            "0 GB/s: give a latency of at least 0 and a bandwidth above 0",
        ),
        (OSLO + LINK.replace('["oslo", "paris"]', '["oslo"]'), "is not"),
        (OSLO + LINK.replace("gigabytes", "gigabits"), "link 0 has no gigabytes"),
        (OSLO + "[edges]\n", "unknown entry 'edges'"),
        ("load = 3\n" + OSLO, "load is not a table"),
        (OSLO + "[load]\ntokens = true\n", "load has tokens = True"),
        ("nodes = [", "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_names_it(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "net.toml"
    file.write_text(text)
    with pytest.raises(MethodError, match=message) as error:
        PipelineNetwork.open(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
