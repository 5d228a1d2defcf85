"""A schedule: which node is in which stage, the path of every microbatch, and in which order nodes serve them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lamella.errors import MethodError
from lamella.files import write
from lamella.methods.skippipe.network import Network, Node
from lamella.methods.skippipe.paths import Assignment, Limits, Path, check, rooms
from lamella.methods.skippipe.planner import Avoids, Limit, Planned, agents_of, plan_paths
from lamella.methods.skippipe.simulate import Served, Stop, iteration, simulate
from lamella.reading import parse_json, read_text
from lamella.results import Result

FILE = "schedule.json"


class _Document(BaseModel):
    """A schedule as JSON."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["lamella.schedule/1"] = Field("lamella.schedule/1", alias="schema")
    nodes: list[Node]
    edge: list[list[float]]
    work: list[float]
    stages: list[list[int]]
    paths: list[list[int]]
    microbatches: int = Field(ge=1)
    limits: Limits


@dataclass(kw_only=True)
class Schedule(Result):
    """What an iteration is.

    Attributes:
        network: nodes and what they and their links cost.
        assignment: which node is in which stage.
        paths: of a wave; microbatch m takes path m modulo their number.
        microbatches: of an iteration.
        limits: what paths may do.
    """

    network: Network
    assignment: Assignment
    paths: tuple[Path, ...]
    microbatches: int
    limits: Limits

    kind: ClassVar[str] = "schedule"

    def path(self, microbatch: int) -> Path:
        """The nodes of a microbatch's path."""
        return self.paths[microbatch % len(self.paths)]

    @property
    def nodes(self) -> list[int]:
        """All that take part, by number; in this order they are the processes of a run."""
        return sorted(self.assignment.stage_of)

    @property
    def orders(self) -> list[tuple[int, ...]]:
        """The stages of each microbatch of an iteration, in the order in which it visits them."""
        stage_of = self.assignment.stage_of
        return [tuple(stage_of[node] for node in self.path(each)) for each in range(self.microbatches)]

    @cached_property
    def served(self) -> list[Served]:
        """An iteration in time."""
        return simulate(self.network, self.paths, self.microbatches)

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return iteration(self.served)

    def turns(self, node: int) -> list[Stop]:
        """What a node does in an iteration, one after the other."""
        found = []
        for each in self.served:
            if each.node == node:
                place = 0 if each.phase == "loss" else self.path(each.microbatch).index(node)
                found.append(Stop(each.microbatch, place, each.phase))
        return found

    def name(self, node: int) -> str:
        """What messages call a node."""
        return f"node {node} ({self.network.nodes[node].region})"

    def without(self, lost: Collection[int], limit: Limit | None = None) -> Schedule:
        """The same nodes and stages without some nodes, whose paths are planned anew; as many microbatches as before.

        Raises:
            MethodError: for a node that is not there, or a stage that has none left.
        """
        unknown = sorted(set(lost) - set(self.nodes))
        if unknown:
            raise MethodError(f"node {unknown[0]} is not in the schedule: it has {', '.join(map(str, self.nodes))}")
        stages = tuple(tuple(node for node in stage if node not in lost) for stage in self.assignment.stages)
        for number, (stage, before) in enumerate(zip(stages, self.assignment.stages, strict=True)):
            if not stage:
                raise MethodError(
                    f"stage {number} has no node left without {', '.join(map(str, before))}, and its weights are lost "
                    "with them: start again with a node in its place"
                )
        return scheduled(self.network, Assignment(stages), self.microbatches, self.limits, limit=limit)[0]

    def dump(self) -> str:
        """As JSON."""
        document = _Document(
            nodes=list(self.network.nodes),
            edge=self.network.edge.tolist(),
            work=self.network.work.tolist(),
            stages=[list(stage) for stage in self.assignment.stages],
            paths=[list(path) for path in self.paths],
            microbatches=self.microbatches,
            limits=self.limits,
        )
        return document.model_dump_json(by_alias=True) + "\n"

    @classmethod
    def parse(cls, text: str, source: str = "schedule") -> Self:
        """From JSON.

        Raises:
            MethodError: one line, for what is no schedule, or one that cannot run.
        """
        try:
            said = _Document.model_validate(parse_json(text))
            network = _network(said)
            assignment = Assignment(tuple(map(tuple, said.stages)))
            if not set(assignment.stage_of) <= set(range(len(network))):
                raise MethodError(f"stages name nodes that are not there: there are 0 to {len(network) - 1}")
            paths = tuple(map(tuple, said.paths))
            check(network, assignment, paths, said.limits)
        except ValidationError as error:
            first = error.errors()[0]
            raise MethodError(f"{source}: no schedule: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (ValueError, MethodError) as error:
            raise MethodError(f"{source}: no schedule: {error}") from None
        return cls(
            network=network, assignment=assignment, paths=paths, microbatches=said.microbatches, limits=said.limits
        )

    def write(self, folder: File) -> None:
        write(folder / FILE, self.dump())

    @classmethod
    def read(cls, path: File) -> Self:
        """The schedule in a folder of results, or in its file."""
        file = path / FILE if path.is_dir() else path
        return cls.parse(read_text(file, "give what skippipe plan has written"), str(file))


def _network(said: _Document) -> Network:
    count = len(said.nodes)
    if len(said.work) != count or [len(row) for row in said.edge] != [count] * count:
        raise ValueError(f"edge and work are not of {count} nodes")
    edge, work = np.array(said.edge), np.array(said.work)
    if not (np.isfinite(edge).all() and np.isfinite(work).all() and edge.min() >= 0 and work.min() > 0):
        raise ValueError("edge and work are times, above 0")
    if min(node.memory for node in said.nodes) < 1:
        raise ValueError("a node has no memory")
    return Network(tuple(said.nodes), edge, work, FILE)


def scheduled(
    network: Network,
    assignment: Assignment,
    microbatches: int,
    limits: Limits | None = None,
    *,
    avoids: Avoids = "collisions",
    limit: Limit | None = None,
    costs: Network | None = None,
) -> tuple[Schedule, Planned]:
    """Paths for an iteration, with as many microbatches in flight as nodes have memory for.

    Args:
        network: what links and nodes cost.
        assignment: which node is in which stage.
        microbatches: of an iteration.
        limits: what paths may do.
        avoids, limit: see :func:`~lamella.methods.skippipe.planner.plan_paths`.
        costs: what the planner is told that they cost, where that is something else.

    Raises:
        MethodError: when no paths fit.
    """
    limits = limits or Limits()
    each = in_flight(network, assignment, microbatches, limits.length)
    agents = agents_of(network, assignment, each)[:microbatches]
    planned = plan_paths(
        costs or network, assignment, agents, limits, avoids=avoids, limit=limit, microbatches=microbatches
    )
    made = Schedule(
        network=network, assignment=assignment, paths=planned.paths, microbatches=microbatches, limits=limits
    )
    return made, planned


def in_flight(network: Network, assignment: Assignment, microbatches: int, length: int) -> int:
    """The most microbatches of every node of stage 0 that there is room for at once.

    Raises:
        MethodError: when there is not even room for one.
    """
    origins = assignment.stages[0]
    most = min(min(int(network.memory[node]) for node in origins), -(-microbatches // len(origins)))
    for each in range(most, 1, -1):
        try:
            rooms(network, assignment, min(each * len(origins), microbatches), length)
        except MethodError:
            continue
        return each
    rooms(network, assignment, min(len(origins), microbatches), length)
    return 1


def visits(orders: Sequence[Sequence[int]]) -> Counter[int]:
    """How many microbatches visit each stage."""
    return Counter(stage for order in orders for stage in order)
