"""A schedule: the stage of each node, the path of every microbatch, and the order in which nodes process them."""

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
from lamella.methods.skippipe.network import Machine, PipelineNetwork
from lamella.methods.skippipe.paths import Assignment, Limits, Path, capacities, check
from lamella.methods.skippipe.planner import Avoids, Limit, PlanResult, agents_of, plan_paths
from lamella.methods.skippipe.simulate import BusyInterval, Stop, iteration, simulate
from lamella.reading import parse_json, read_text
from lamella.results import Result

FILE = "schedule.json"


class _Document(BaseModel):
    """A schedule as JSON."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: Literal["lamella.schedule/1"] = Field("lamella.schedule/1", alias="schema")
    nodes: list[Machine]
    edge: list[list[float]]
    work: list[float]
    stages: list[list[int]]
    paths: list[list[int]]
    microbatches: int = Field(ge=1)
    limits: Limits


@dataclass(kw_only=True)
class PipelineSchedule(Result):
    """The plan of an iteration.

    Attributes:
        network: nodes with the costs of nodes and links.
        assignment: the nodes of each stage.
        paths: the paths of a wave; microbatch m takes path m modulo their number.
        microbatches: microbatches per iteration.
        limits: the constraints on paths.
    """

    network: PipelineNetwork
    assignment: Assignment
    paths: tuple[Path, ...]
    microbatches: int
    limits: Limits

    kind: ClassVar[str] = "schedule"

    def path(self, microbatch: int) -> Path:
        """Return the nodes of a microbatch's path."""
        return self.paths[microbatch % len(self.paths)]

    @property
    def nodes(self) -> list[int]:
        """All nodes that take part, sorted; the processes of a run have this order."""
        return sorted(self.assignment.stage_of)

    @property
    def orders(self) -> list[tuple[int, ...]]:
        """The stages of each microbatch of an iteration, in the order in which it visits them."""
        stage_of = self.assignment.stage_of
        return [tuple(stage_of[node] for node in self.path(each)) for each in range(self.microbatches)]

    @cached_property
    def timeline(self) -> list[BusyInterval]:
        """The busy intervals of a simulated iteration."""
        return simulate(self.network, self.paths, self.microbatches)

    @property
    def seconds(self) -> float:
        """The simulated seconds per iteration."""
        return iteration(self.timeline)

    def turns(self, node: int) -> list[Stop]:
        """Return the stops of a node in an iteration, in order."""
        found = []
        for each in self.timeline:
            if each.node == node:
                position = 0 if each.phase == "loss" else self.path(each.microbatch).index(node)
                found.append(Stop(each.microbatch, position, each.phase))
        return found

    def name(self, node: int) -> str:
        """Return the name of a node for messages."""
        return f"node {node} ({self.network.nodes[node].region})"

    def without(self, lost: Collection[int], limit: Limit | None = None) -> PipelineSchedule:
        """Remove nodes and re-plan the paths of the others, with the same number of microbatches.

        Args:
            lost: the nodes to remove.
            limit: the limits of the search for paths.

        Raises:
            MethodError: for an unknown node, or a stage without remaining nodes.
        """
        unknown = sorted(set(lost) - set(self.nodes))
        if unknown:
            raise MethodError(f"node {unknown[0]} is not in the schedule: it has {', '.join(map(str, self.nodes))}")
        stages = tuple(tuple(node for node in stage if node not in lost) for stage in self.assignment.stages)
        for number, (stage, before) in enumerate(zip(stages, self.assignment.stages, strict=True)):
            if not stage:
                raise MethodError(
                    f"stage {number} has no node left without {', '.join(map(str, before))}, and its weights are lost "
                    "with them: start again with a replacement node"
                )
        return make_schedule(self.network, Assignment(stages), self.microbatches, self.limits, limit=limit)[0]

    def dump(self) -> str:
        """Return the schedule as JSON."""
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
        """Read a schedule from JSON.

        Args:
            text: the JSON document.
            source: its name for messages.

        Raises:
            MethodError: for an invalid schedule, in one line.
        """
        try:
            document = _Document.model_validate(parse_json(text))
            network = _network(document)
            assignment = Assignment(tuple(map(tuple, document.stages)))
            if not set(assignment.stage_of) <= set(range(len(network))):
                raise MethodError(f"stages contain unknown nodes: the nodes are 0 to {len(network) - 1}")
            paths = tuple(map(tuple, document.paths))
            check(network, assignment, paths, document.limits)
        except ValidationError as error:
            first = error.errors()[0]
            raise MethodError(
                f"{source}: invalid schedule: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None
        except (ValueError, MethodError) as error:
            raise MethodError(f"{source}: invalid schedule: {error}") from None
        return cls(
            network=network,
            assignment=assignment,
            paths=paths,
            microbatches=document.microbatches,
            limits=document.limits,
        )

    def write(self, folder: File) -> None:
        """Write the schedule into a folder of results."""
        write(folder / FILE, self.dump())

    @classmethod
    def read(cls, path: File) -> Self:
        """Read the schedule from a folder of results, or from its file."""
        file = path / FILE if path.is_dir() else path
        return cls.parse(read_text(file, "give the output of skippipe plan"), str(file))


def _network(document: _Document) -> PipelineNetwork:
    count = len(document.nodes)
    if len(document.work) != count or [len(row) for row in document.edge] != [count] * count:
        raise ValueError(f"edge and work do not have {count} nodes")
    edge, work = np.array(document.edge), np.array(document.work)
    if not (np.isfinite(edge).all() and np.isfinite(work).all() and edge.min() >= 0 and work.min() > 0):
        raise ValueError("edge and work must be times above 0")
    if min(node.memory for node in document.nodes) < 1:
        raise ValueError("a node has no memory")
    return PipelineNetwork(tuple(document.nodes), edge, work, FILE)


def make_schedule(
    network: PipelineNetwork,
    assignment: Assignment,
    microbatches: int,
    limits: Limits | None = None,
    *,
    avoids: Avoids = "collisions",
    limit: Limit | None = None,
    costs: PipelineNetwork | None = None,
) -> tuple[PipelineSchedule, PlanResult]:
    """Plan the paths of an iteration, with as many microbatches in flight as the memory of the nodes allows.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        microbatches: microbatches per iteration.
        limits: the constraints on paths.
        avoids: see :func:`~lamella.methods.skippipe.planner.plan_paths`.
        limit: the limits of the search for paths.
        costs: the costs that the planner uses instead of the network's.

    Raises:
        MethodError: if there are no valid paths.
    """
    limits = limits or Limits()
    each = in_flight(network, assignment, microbatches, limits.length)
    agents = agents_of(network, assignment, each)[:microbatches]
    result = plan_paths(
        costs or network, assignment, agents, limits, avoids=avoids, limit=limit, microbatches=microbatches
    )
    schedule = PipelineSchedule(
        network=network, assignment=assignment, paths=result.paths, microbatches=microbatches, limits=limits
    )
    return schedule, result


def in_flight(network: PipelineNetwork, assignment: Assignment, microbatches: int, length: int) -> int:
    """Return the maximum number of microbatches in flight per node of stage 0.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        microbatches: microbatches per iteration.
        length: stages per path.

    Raises:
        MethodError: if there is not enough memory for one.
    """
    origins = assignment.stages[0]
    most = min(min(int(network.memory[node]) for node in origins), -(-microbatches // len(origins)))
    for each in range(most, 1, -1):
        try:
            capacities(network, assignment, min(each * len(origins), microbatches), length)
        except MethodError:
            continue
        return each
    capacities(network, assignment, min(len(origins), microbatches), length)
    return 1


def visits(orders: Sequence[Sequence[int]]) -> Counter[int]:
    """Return the number of microbatches that visit each stage."""
    return Counter(stage for order in orders for stage in order)
