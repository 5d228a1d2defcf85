"""The network as it is: the links between processes, and the speed of each machine, measured for ``skippipe plan``.

    node u         forward and backward pass of one stage, median over rounds; seconds per layer and sample
    link u -> v    a small message and one of the size of an activation go there and back, over 2:
                   latency is the time of the small one, bandwidth = bytes / (time of the large one - latency)

Under ``torchrun`` every process is a node, and pairs of nodes take turns. Times include copies between accelerator and
host, so the file says that there are no further ones.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
from annotated_types import Ge
from torch import Tensor

from lamella import processes
from lamella.files import write
from lamella.methods.skippipe.communicator import join_processes
from lamella.methods.skippipe.network import FILE, GB, MEMORY, Link, Load, Machine, read_network
from lamella.methods.skippipe.stages import autocast, run, spans, with_stage
from lamella.registry import command
from lamella.results import Result
from lamella.stack import Stack
from lamella.zoo import default_device

SMALL = 8  # bytes of a message whose time is the latency


@dataclass(kw_only=True)
class NetworkProfile(Result):
    """A measured network, as a file for ``skippipe plan``.

    Attributes:
        nodes: the machines.
        links: latency and bandwidth between two regions.
        load: the size of a microbatch and of a stage for which they were measured.
    """

    nodes: list[Machine]
    links: Mapping[tuple[str, str], Link]
    load: Load

    kind: ClassVar[str] = "network"

    def write(self, folder: Path) -> None:
        """Write the network file."""
        write(folder / FILE, "\n".join(self._lines()) + "\n")

    def _lines(self) -> Iterator[str]:
        yield "[load]"
        yield from (f"{name} = {json.dumps(value)}" for name, value in asdict(self.load).items())
        for node in self.nodes:
            yield "\n[[nodes]]"
            yield from (f"{name} = {json.dumps(value)}" for name, value in asdict(node).items())
        for between, (milliseconds, gigabytes) in self.links.items():
            yield "\n[[links]]"
            yield f"between = {json.dumps(list(between))}"
            yield f"milliseconds = {milliseconds}"
            yield f"gigabytes = {gigabytes}"

    @classmethod
    def read(cls, path: str | Path) -> NetworkProfile:
        """Read the network from a folder of results.

        Raises:
            MethodError: for a file that is missing or malformed.
        """
        nodes, links, load = read_network(path)
        return cls(nodes=nodes, links=links, load=load)


@command("skippipe", "profile", brief={"microbatch": 1, "tokens": 16, "rounds": 1}, unloaded=True)
def profile(
    stack: Stack,
    *,
    region: str | None = None,
    stages: Annotated[int, Ge(2)] | None = None,
    microbatch: Annotated[int, Ge(1)] = Load.microbatch,
    tokens: Annotated[int, Ge(1)] = Load.tokens,
    memory: Annotated[int, Ge(1)] = MEMORY,
    bf16: bool = False,
    rounds: Annotated[int, Ge(1)] = 5,
) -> NetworkProfile:
    """Measure the links between processes and the speed of a stage on each, as the network of ``skippipe plan``.

    Under ``torchrun`` every process is one node; one process alone measures only its own speed.

    Args:
        stack: the model to train, of which every process loads one stage.
        region: name of the region of this machine; its host name if omitted. Links are between regions.
        stages: number of stages of the model; the authors' 6 if omitted.
        microbatch: sequences per microbatch; the authors' 8.
        tokens: tokens per sequence; the authors' 1024.
        memory: microbatches that this machine can hold at once; the authors' 3.
        bf16: compute and send in bfloat16, as a training with ``bf16``.
        rounds: measurements of each time, of which the median counts.

    Returns:
        The nodes and links, as a network file, with the spread of each time.

    Raises:
        MethodError: for a number of stages that does not fit the model.
    """
    parts = spans(stack, stages)
    start, stop = parts[1]
    hidden = stack.architecture.sizes_of(stack.config).hidden
    load = Load(microbatch, tokens, hidden, stop - start, copies=0.0, bf16=bf16)
    device = default_device() if stack.device.type == "meta" else stack.device
    forward, backward = _time_stage(with_stage(stack, parts, 1, device), parts[1], load, rounds)
    speed: dict[str, Any] = {
        "region": region or socket.gethostname(),
        "memory": memory,
        "seconds": median(forward) / (load.layers * microbatch),
        "fastest seconds": min(forward),
        "slowest seconds": max(forward),
        "backward over forward seconds": median(backward) / median(forward),
    }
    nodes: list[dict[str, Any]] = [speed]
    pairs: list[Any] = []
    if processes.count() > 1:
        nodes, pairs = _over_processes(speed, load, rounds, torch.device(device))
    regions = [each["region"] for each in nodes]
    links: dict[tuple[str, str], list[Link]] = {}
    for (u, v), link in pairs:
        first, second = sorted((regions[u], regions[v]))
        links.setdefault((first, second), []).append(link)
    found = {between: (median(each[0] for each in of), median(each[1] for each in of)) for between, of in links.items()}
    findings = {
        "nodes": [{"node": number, **each} for number, each in enumerate(nodes)],
        "links": [
            {"between": list(between), "milliseconds": found[between][0], "gigabytes": found[between][1],
             "pairs": len(of), "lowest": min(each[1] for each in of), "highest": max(each[1] for each in of)}
            for between, of in links.items()
        ],
        "load": asdict(load),
    }  # fmt: skip
    machines = [Machine(each["region"], each["seconds"], each["memory"]) for each in nodes]
    return NetworkProfile(nodes=machines, links=found, load=load, findings=findings)


def _time_stage(stack: Stack, span: tuple[int, int], load: Load, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of forward and backward passes of a microbatch through a stage, after one that warms up."""
    device = next(each.device for each in stack.model.parameters() if not each.is_meta)
    embeds = torch.zeros(load.microbatch, load.tokens, load.hidden, device=device)
    context = stack.context({"inputs_embeds": embeds})
    passes: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        h = torch.randn_like(embeds).requires_grad_()
        with torch.enable_grad(), autocast(device, load.bf16):
            seconds, out = _timed(lambda h=h: run(stack, h, span, context), device)  # type: ignore[misc]
            passes[0].append(seconds)
        passes[1].append(_timed(lambda out=out: out.sum().backward(), device)[0])  # type: ignore[misc]
        stack.model.zero_grad()
    return passes[0][1:], passes[1][1:]


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _wait_for(device)
    started = time.perf_counter()
    output = call()
    _wait_for(device)
    return time.perf_counter() - started, output


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _over_processes(
    speed: dict[str, Any], load: Load, rounds: int, device: torch.device
) -> tuple[list[dict[str, Any]], list[tuple[tuple[int, int], Link]]]:
    """Return the speeds of all nodes, and the link of each pair of them, the same on every process."""
    store, rank, world = join_processes(device)
    measured: dict[str, Link] = {}
    for u, v in combinations(range(world), 2):
        dist.barrier()  # one pair at a time
        if rank in (u, v):
            other = v if rank == u else u
            small, large = (_round_trip(size, rank < other, other, rounds, device) for size in (SMALL, load.bytes))
            measured[f"{u} {v}"] = (1000 * small, load.bytes / GB / max(large - small, 1e-9))
    store.set(f"profile {rank}", json.dumps({"speed": speed, "links": measured}))
    dist.barrier()
    every = [json.loads(store.get(f"profile {each}")) for each in range(world)]
    dist.barrier()  # the first process hosts the store
    dist.destroy_process_group()
    links = [((u, v), tuple(every[u]["links"][f"{u} {v}"])) for u, v in combinations(range(world), 2)]
    return [each["speed"] for each in every], links


def _round_trip(size: int, begins: bool, other: int, rounds: int, device: torch.device) -> float:
    """Return the median seconds of a message of some bytes to a process, half of its way there and back."""
    message: Tensor = torch.zeros(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        if begins:
            dist.send(message, other)
        dist.recv(message, other)
        if not begins:
            dist.send(message, other)
        _wait_for(device)
        seconds.append((time.perf_counter() - started) / 2)
    return median(seconds[1:])  # the first one opens the connection
