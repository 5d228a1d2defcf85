"""The network that a pipeline runs over: machines, links, and the cost of a microbatch on each.

    link u -> v    c(u, v) = latency + bytes / bandwidth + copies            an activation has 4 d T samples bytes, in
                                                                             bfloat16 half as many
    node u         w(u) = seconds per layer and sample * layers of a stage * samples
                   the backward pass takes 1.5 w, head and loss take 0.25 w

Links connect regions, and every node is in one region. Nodes of the same region are 1 ms and 2 GB/s apart unless a link
from the region to itself is given.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lamella.errors import MethodError
from lamella.signature import Fixture

FILE = "network.toml"

BACKWARD, HEAD = 1.5, 0.25  # as fractions of a node's forward pass
COPIES = 0.13 + 0.20 + 0.02  # seconds for copies between GPU and CPU, as measured by the authors
NEAR = (1.0, 2.0)  # milliseconds and GB/s within a region
SECONDS, MEMORY = 0.055, 3  # of a node of the published network
GB = 1024**3
PUBLISHED = "published"
REGIONS = ("Belgium", "Canada", "Germany", "Iowa", "Japan", "LA", "NL", "Oregon", "Singapore", "Taiwan", "London",
           "Australia")  # fmt: skip

Link = tuple[float, float]  # milliseconds one way, and GB/s
Links = Mapping[tuple[str, str], Link]

EXAMPLE = """
[[links]]                     # in both directions
between = ["oslo", "paris"]
milliseconds = 14.0           # one way
gigabytes = 0.12              # per second

[[nodes]]
region = "oslo"
count = 2
seconds = 0.02                # per layer and sample, forward
memory = 2                    # microbatches in flight

[[nodes]]
region = "paris"
count = 2
"""


@dataclass(frozen=True)
class Machine:
    """One machine of the network.

    Attributes:
        region: the region in which it is.
        seconds: seconds per layer and sample of a forward pass.
        memory: the number of microbatches whose activations it can hold at once.
    """

    region: str
    seconds: float = SECONDS
    memory: int = MEMORY


@dataclass(frozen=True)
class Load:
    """The size of a microbatch and of a stage; the defaults are the authors'.

    Attributes:
        microbatch: sequences per microbatch.
        tokens: tokens per sequence.
        hidden: the hidden size of the model.
        layers: layers per stage.
        copies: seconds per message in addition to latency and transfer.
        bf16: whether messages are in bfloat16.
    """

    microbatch: int = 8
    tokens: int = 1024
    hidden: int = 1024
    layers: int = 4
    copies: float = COPIES
    bf16: bool = False

    @property
    def bytes(self) -> int:
        """The size of an activation."""
        return (2 if self.bf16 else 4) * self.microbatch * self.tokens * self.hidden


@dataclass(frozen=True, eq=False)
class PipelineNetwork:
    """Machines with the cost of their links and of a forward pass for one microbatch.

    Attributes:
        nodes: the machines.
        edge: seconds per message from node to node `[nodes, nodes]`.
        work: seconds of a forward pass through a stage `[nodes]`.
        source: the file, or ``published``.
    """

    nodes: tuple[Machine, ...]
    edge: npt.NDArray[np.float64]
    work: npt.NDArray[np.float64]
    source: str = field(default="memory")

    default: ClassVar[str] = PUBLISHED
    metavar: ClassVar[str] = "NETWORK"
    source_help: ClassVar[str] = (
        "published, the authors' 20 nodes in 12 regions; or a TOML file of nodes and links, as skippipe profile writes"
    )
    example: ClassVar[Fixture] = Fixture("network.toml", EXAMPLE, {"layers": 1, "copies": 0.0})

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def memory(self) -> npt.NDArray[np.int64]:
        """The number of microbatches that each node can hold `[nodes]`."""
        return np.array([node.memory for node in self.nodes])

    def describe(self) -> dict[str, Any]:
        """Return the metadata for provenance."""
        content = self.edge.tobytes() + self.work.tobytes() + self.memory.tobytes()
        return {"network": self.source, "nodes": len(self), "sha256": hashlib.sha256(content).hexdigest()}

    @classmethod
    def open(
        cls,
        name: str,
        *,
        microbatch: int | None = None,
        tokens: int | None = None,
        hidden: int | None = None,
        layers: int | None = None,
        copies: float | None = None,
        bf16: bool | None = None,
    ) -> PipelineNetwork:
        """Open the network of a file, or the published one, for microbatches of a given size.

        What is omitted is that of the file, which ``skippipe profile`` writes there, or else the authors'.

        Args:
            name: ``published``, or a TOML file with ``[[nodes]]``, ``[[links]]`` and maybe ``[load]``, or its folder.
            microbatch: sequences per microbatch; the authors' 8.
            tokens: tokens per sequence; the authors' 1024.
            hidden: hidden size of the model; the authors' 1024.
            layers: layers per stage; the authors' 4.
            copies: seconds per message for copies between GPU and CPU; the authors measured 0.35.
            bf16: whether messages are in bfloat16, as in a training with ``bf16``.

        Raises:
            MethodError: for a file that is missing or malformed.
        """
        sizes = {"microbatch": microbatch, "tokens": tokens, "hidden": hidden, "layers": layers, "copies": copies}
        given: dict[str, Any] = {each: value for each, value in {**sizes, "bf16": bf16}.items() if value is not None}
        if name == PUBLISHED:
            return published(load=Load(**given))
        nodes, links, load = read_network(name)
        try:
            return cls.of(nodes, links, replace(load, **given), str(name))
        except MethodError as error:
            raise MethodError(f"{name}: {error}") from None

    @classmethod
    def of(
        cls, nodes: Sequence[Machine], links: Links, load: Load | None = None, source: str = "memory"
    ) -> PipelineNetwork:
        """Build a network from its nodes and the links between their regions.

        Args:
            nodes: the machines.
            links: latency and bandwidth between two regions, in either order.
            load: the size of a microbatch; the authors' if None.
            source: the name for provenance.

        Raises:
            MethodError: for a missing or invalid link, or a node without memory or with an invalid time.
        """
        load = load or Load()
        if not nodes:
            raise MethodError("has no nodes: add [[nodes]] with a region for each")
        for number, node in enumerate(nodes):
            if node.memory < 1 or not node.seconds > 0:
                raise MethodError(
                    f"node {number} ({node.region}) has memory for {node.memory} microbatches and takes "
                    f"{node.seconds:g} s per layer: give a memory of at least 1 and a time above 0"
                )
        known = {**{(b, a): link for (a, b), link in links.items()}, **links}
        edge = np.zeros((len(nodes), len(nodes)))
        for u, one in enumerate(nodes):
            for v, other in enumerate(nodes):
                if u != v:
                    edge[u, v] = _link_seconds(one.region, other.region, known, load)
        work = np.array([node.seconds * load.layers * load.microbatch for node in nodes])
        return cls(tuple(nodes), edge, work, source)

    def message_seconds(self, here: int, there: int) -> float:
        """Return the time of a message in seconds; 0 from a node to itself.

        Args:
            here: index of the sender.
            there: index of the receiver.
        """
        return 0.0 if here == there else float(self.edge[here, there])


def _link_seconds(here: str, there: str, links: Links, load: Load) -> float:
    """Return c(u, v) between two regions."""
    link = links.get((here, there), NEAR if here == there else None)
    if link is None:
        raise MethodError(f'no link between {here} and {there}: add [[links]] with between = ["{here}", "{there}"]')
    latency, bandwidth = link
    if not latency >= 0 or not bandwidth > 0:
        raise MethodError(
            f"the link between {here} and {there} has {latency:g} ms and {bandwidth:g} GB/s: give a latency of at "
            "least "
            "0 and a bandwidth above 0"
        )
    return latency / 1000 + load.bytes / (bandwidth * GB) + load.copies


def read_network(name: str | Path) -> tuple[list[Machine], dict[tuple[str, str], Link], Load]:
    """Return the nodes, links and load of a network file.

    Args:
        name: the file, or the folder of ``skippipe profile``.

    Raises:
        MethodError: for a file that is missing or malformed.
    """
    file = Path(name).expanduser()
    file = file / FILE if file.is_dir() else file
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MethodError(f"{name}: cannot be read ({error.strerror}): give a network file, or published") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MethodError(f"{name}: is not valid TOML ({error})") from None
    try:
        unknown = sorted(set(document) - {"nodes", "links", "load"})
        if unknown:
            raise MethodError(f"unknown entry '{unknown[0]}': a network has [[nodes]], [[links]] and [load]")
        kinds = {each.name: type(each.default) for each in fields(Load)}
        load = document.get("load", {})
        if not isinstance(load, dict):
            raise MethodError("load is not a table: write [load] above its entries")
        return _nodes(document), _links(document), Load(**_check_entries(load, "load", {}, kinds))
    except MethodError as error:
        raise MethodError(f"{name}: {error}") from None


def _nodes(document: Mapping[str, Any]) -> list[Machine]:
    found: list[Machine] = []
    for number, each in enumerate(_tables(document, "nodes")):
        settings = _check_entries(
            each, f"node {number}", {"region": str}, {"seconds": float, "memory": int, "count": int}
        )
        count = settings.pop("count", 1)
        if not 1 <= count <= 10_000:
            raise MethodError(f"node {number} has count {count}: give a count from 1 to 10000")
        found += [Machine(**settings)] * count
    return found


def _links(document: Mapping[str, Any]) -> dict[tuple[str, str], Link]:
    found: dict[tuple[str, str], Link] = {}
    for number, each in enumerate(_tables(document, "links")):
        link = _check_entries(each, f"link {number}", {"between": list, "milliseconds": float, "gigabytes": float}, {})
        regions = link["between"]
        if len(regions) != 2 or not all(isinstance(region, str) for region in regions):
            raise MethodError(f'link {number}: between = {regions} is not ["one", "other"]')
        found[regions[0], regions[1]] = (link["milliseconds"], link["gigabytes"])
    return found


def _tables(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return all tables of one name."""
    tables = document.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise MethodError(f"{name} is not an array of tables: write [[{name}]] above each entry")
    return tables


def _check_entries(
    each: Mapping[str, Any], what: str, wanted: Mapping[str, type], free: Mapping[str, type]
) -> dict[str, Any]:
    """Return the entries of a table after a check of their types."""
    missing = [name for name in wanted if name not in each]
    if missing:
        raise MethodError(f"{what} has no {missing[0]}: it needs {', '.join(wanted)}")
    found = {}
    for name, value in each.items():
        kind = {**wanted, **free}.get(name)
        fits = (
            kind is not None
            and isinstance(value, bool) == (kind is bool)
            and isinstance(value, (int, float) if kind is float else kind)
        )
        if kind is None or not fits:
            known = ", ".join([*wanted, *free])
            raise MethodError(
                f"{what} has {name} = {value}: its entries are {known}, with numbers and strings unquoted"
            )
        found[name] = float(value) if kind is float else value
    return found


def published(nodes: int = 20, load: Load | None = None) -> PipelineNetwork:
    """Return the authors' network: nodes distributed in turn over 12 regions, with the links that they measured.

    In their table one link is a thousand times too slow (NL to London); here it has the bandwidth of its neighbours.

    Args:
        nodes: the number of nodes.
        load: the size of a microbatch; the authors' if None.
    """
    machines = [Machine(REGIONS[number % len(REGIONS)]) for number in range(nodes)]
    return PipelineNetwork.of(machines, LINKS, load, PUBLISHED)


# Latency in milliseconds (one way) and GB/s, from the authors' repository (gensyn-ai/skippipe, MIT licence).
LINKS: dict[tuple[str, str], Link] = {
    ("Australia", "Belgium"): (129, 0.0098266602),
    ("Australia", "Canada"): (98, 0.013183594),
    ("Australia", "Germany"): (125.5, 0.010461426),
    ("Australia", "Iowa"): (84, 0.011230469),
    ("Australia", "Japan"): (58, 0.013793945),
    ("Australia", "LA"): (69, 0.014648438),
    ("Australia", "NL"): (128, 0.0095214844),
    ("Australia", "Oregon"): (68, 0.014648438),
    ("Australia", "Singapore"): (48, 0.029785156),
    ("Australia", "Taiwan"): (67, 0.020996094),
    ("Australia", "London"): (132, 0.0093994141),
    ("Belgium", "Canada"): (41, 0.019897461),
    ("Belgium", "Germany"): (4, 0.2425),
    ("Belgium", "Iowa"): (49, 0.028320312),
    ("Belgium", "Japan"): (112, 0.01171875),
    ("Belgium", "LA"): (70, 0.01940918),
    ("Belgium", "NL"): (3, 0.2425),
    ("Belgium", "Oregon"): (66, 0.020874023),
    ("Belgium", "Singapore"): (83, 0.016113281),
    ("Belgium", "Taiwan"): (105, 0.012451172),
    ("Belgium", "London"): (3.5, 0.2425),
    ("Canada", "Germany"): (44, 0.031860352),
    ("Canada", "Iowa"): (14, 0.075683594),
    ("Canada", "Japan"): (74, 0.018066406),
    ("Canada", "LA"): (35, 0.030517578),
    ("Canada", "NL"): (42, 0.025024414),
    ("Canada", "Oregon"): (30.5, 0.047119141),
    ("Canada", "Singapore"): (107, 0.01193847),
    ("Canada", "Taiwan"): (89, 0.014709473),
    ("Canada", "London"): (38.5, 0.036376953),
    ("Germany", "Iowa"): (53.5, 0.026611328),
    ("Germany", "Japan"): (112, 0.011083984),
    ("Germany", "LA"): (73, 0.018249512),
    ("Germany", "NL"): (3.5, 0.2425),
    ("Germany", "Oregon"): (68, 0.014916992),
    ("Germany", "Singapore"): (80, 0.0125),
    ("Germany", "Taiwan"): (102, 0.012573242),
    ("Germany", "London"): (6.6, 0.18875),
    ("Iowa", "Japan"): (72.5, 0.013977051),
    ("Iowa", "LA"): (23.4, 0.061462402),
    ("Iowa", "NL"): (51, 0.027404785),
    ("Iowa", "Oregon"): (19.3, 0.090332031),
    ("Iowa", "Taiwan"): (88, 0.0128),
    ("Iowa", "Singapore"): (101.5, 0.012634277),
    ("Iowa", "London"): (48.1, 0.021850586),
    ("Japan", "LA"): (50, 0.027770996),
    ("Japan", "NL"): (108.5, 0.011376953),
    ("Japan", "Oregon"): (46.2, 0.030456543),
    ("Japan", "Singapore"): (35.6, 0.039001465),
    ("Japan", "Taiwan"): (19.2, 0.076721191),
    ("Japan", "London"): (107, 0.0088867187),
    ("LA", "NL"): (71.5, 0.014251709),
    ("LA", "Oregon"): (12.4, 0.11853027),
    ("LA", "Singapore"): (79.5, 0.016845703),
    ("LA", "Taiwan"): (64, 0.016192627),
    ("LA", "London"): (68, 0.014916992),
    ("NL", "Oregon"): (67, 0.020385742),
    ("NL", "Singapore"): (81.5, 0.016357422),
    ("NL", "Taiwan"): (105.5, 0.011962891),
    ("NL", "London"): (4.8, 0.2425),
    ("Oregon", "Singapore"): (78.5, 0.016784668),
    ("Oregon", "Taiwan"): (59.5, 0.02331543),
    ("Oregon", "London"): (64, 0.021240234),
    ("Singapore", "Taiwan"): (23.2, 0.061889648),
    ("Singapore", "London"): (85, 0.015686035),
    ("Taiwan", "London"): (109.5, 0.0089599609),
}
