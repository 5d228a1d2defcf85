"""The processes of a run as nodes of a schedule: messages from one to another, sums over some, and who has died.

``torchrun``, a Ray cluster, or whatever sets ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR``, starts one process for each
node. Messages are found by what they say of themselves, never by when they come. Nobody waits for a node that has died:
whoever sees a connection break says so at the meeting place, where all look while they wait, and those who do not
answer are dead.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lamella.errors import LamellaError, TrainingError
from lamella.extras import require
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import Schedule
from lamella.methods.skippipe.simulate import Phase

PHASES: tuple[Phase, ...] = ("forward", "loss", "backward")
HEADER = 2  # numbers in front of a message: which microbatch, and for what phase
LOOK, ANSWER = 0.2, 5.0  # seconds: how often those who wait look around, and how long they wait for an answer
PATIENCE = timedelta(hours=12)  # with a node that is alive
Made = TypeVar("Made")


class Message(NamedTuple):
    """An activation on its way to the next node, or its gradient on its way back [batch, time, hidden]."""

    microbatch: int
    phase: Phase
    content: Tensor


class Meeting:
    """The processes of a run.

    Args:
        schedule: whose nodes they are.
        device: of this process.
        lost: nodes that are not there any more. The first process plans the paths of the others anew.
        limit: of that search.

    Attributes:
        schedule: that all follow.
        node: which of its nodes this process is.
        stage: of this node.
        inbox: what has come; None where a connection broke.

    Raises:
        TrainingError: when there are not as many processes as nodes.
    """

    def __init__(
        self, schedule: Schedule, device: torch.device, lost: Sequence[int] = (), limit: Limit | None = None
    ) -> None:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        self._store = dist.PrefixStore("lamella-meeting", store)
        if lost and rank == 0:
            self._store.set("schedule", schedule.without(lost, limit).dump())
        if lost:
            schedule = Schedule.parse(self._store.get("schedule").decode())
        self.schedule, self.device = schedule, device
        if world != len(schedule.nodes):
            raise TrainingError(
                f"the schedule has {len(schedule.nodes)} nodes, and {world} processes run: start one for each, with "
                f"torchrun --nproc-per-node {len(schedule.nodes)}, or leave nodes out with --without"
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("lamella", store), rank=rank, world_size=world, timeout=PATIENCE
        )
        self._rank_of = {node: number for number, node in enumerate(schedule.nodes)}
        self.node = schedule.nodes[rank]
        self.inbox: SimpleQueue[Message | None] = SimpleQueue()
        self.groups = [dist.new_group([self._rank_of[node] for node in stage]) for stage in schedule.assignment.stages]
        self.stage = schedule.assignment.stage_of[self.node]
        self._sent: list[tuple[Any, Tensor]] = []  # which must stay while it is on its way
        self._sending = threading.Lock()
        self._looked = 0.0
        self._dead: list[int] = []
        self._known = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._answer, daemon=True).start()

    # Messages

    def send(self, node: int, message: Message, delay: float = 0.0) -> None:
        """Send a message, after so many seconds; this returns at once."""
        content = message.content.detach()
        if node == self.node:
            self.inbox.put(message._replace(content=content))
            return
        header = torch.tensor([message.microbatch, PHASES.index(message.phase)], device=self.device)
        flat = torch.cat([header.float(), content.float().flatten()])
        if delay:
            later = threading.Timer(delay, self._send, [node, flat])
            later.daemon = True
            later.start()
        else:
            self._send(node, flat)

    def _send(self, node: int, flat: Tensor) -> None:
        try:
            with self._sending:
                self._sent.append((dist.isend(flat, self._rank_of[node]), flat))
        except RuntimeError:
            self.inbox.put(None)

    def all_is_sent(self) -> None:
        """Let go of what was sent, when all have received it."""
        try:
            for work, _ in self._sent:
                work.wait()
        except RuntimeError:
            raise self._lost() from None
        self._sent.clear()

    def expect(self, node: int, count: int, shape: Sequence[int]) -> None:
        """Let so many messages of this shape come in from a node, in the background."""
        threading.Thread(target=self._receive, args=(node, count, tuple(shape)), daemon=True).start()

    def _receive(self, node: int, count: int, shape: tuple[int, ...]) -> None:
        for _ in range(count):
            flat = torch.empty(HEADER + torch.Size(shape).numel(), device=self.device)
            try:
                dist.recv(flat, self._rank_of[node])
            except RuntimeError:
                self.inbox.put(None)
                return
            microbatch, phase = map(int, flat[:HEADER].tolist())
            self.inbox.put(Message(microbatch, PHASES[phase], flat[HEADER:].view(shape)))

    def next_message(self) -> Message:
        """What comes next.

        Raises:
            TrainingError: when a node has died.
        """
        while True:
            try:
                message = self.inbox.get(timeout=LOOK)
            except Empty:
                self._look()
                continue
            if message is None:
                raise self._lost()
            return message

    # What all do together

    def add_up(self, tensor: Tensor, stage: int | None = None) -> None:
        """The sum over the nodes of this process's stage, or over all, in place."""
        self._together(dist.all_reduce, tensor, group=None if stage is None else self.groups[stage])

    def broadcast(self, tensor: Tensor, node: int) -> None:
        """A node's tensor for all, in place."""
        self._together(dist.broadcast, tensor, src=self._rank_of[node])

    def told(self, numbers: Sequence[int]) -> list[list[int]]:
        """What numbers each node says, by number of the process; once in a run. Nothing is unpickled."""
        self._store.set(f"told {self.node}", json.dumps(list(numbers)))
        self.wait_for_all()
        return [[int(each) for each in json.loads(self._store.get(f"told {node}"))] for node in self.schedule.nodes]

    def wait_for_all(self) -> None:
        """Go on when all have come here."""
        self.add_up(torch.zeros(1, device=self.device))

    def _together(self, operation: Any, tensor: Tensor, **options: Any) -> None:
        try:
            work = operation(tensor, async_op=True, **options)
            while work is not None and not work.is_completed():
                self._look(pause=0.001)
            if work is not None:
                work.wait()
        except RuntimeError:
            raise self._lost() from None

    def leave(self) -> None:
        """End the connections."""
        self._ended.set()
        dist.destroy_process_group()

    # Who has died

    def _look(self, pause: float = 0.0) -> None:
        time.sleep(pause)
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            if self._is_broken():
                raise self._lost()

    def _is_broken(self) -> bool:
        try:
            return bool(self._store.check(["broken"]))
        except RuntimeError:  # whoever keeps the meeting place has died
            return True

    def _answer(self) -> None:
        """Say that this node is alive, whatever else it does, when somebody asks, and note who does not."""
        while not self._ended.wait(LOOK):
            if self._is_broken():
                try:
                    self._store.set(f"alive {self.node}", "")
                    time.sleep(ANSWER)
                    self._dead = [node for node in self.schedule.nodes if not self._store.check([f"alive {node}"])]
                except RuntimeError:
                    self._dead = self.schedule.nodes[:1]  # the first process keeps the meeting place
                self._known.set()
                return

    def _lost(self) -> TrainingError:
        """What to say of the nodes that do not answer."""
        with suppress(RuntimeError):  # whoever keeps the meeting place has died, which all see
            self._store.set("broken", "")
        self._known.wait()
        dead = self._dead
        if self.node == self.schedule.nodes[0]:
            time.sleep(ANSWER)  # so that all have looked before the meeting place goes
        if not dead:
            return TrainingError("a connection between nodes broke: start again, it goes on from the last checkpoint")
        names = ", ".join(self.schedule.name(node) for node in dead)
        without = f"--without {','.join(map(str, dead))}"
        return TrainingError(
            f"{names} died: start again with as many processes, or with {len(self.schedule.nodes) - len(dead)} and "
            f"{without}, which plans its paths anew; it goes on from the last checkpoint"
        )


# On a Ray cluster


def on_ray(regions: Sequence[str], do: Callable[[], Made], accelerated: bool = False) -> Made:
    """Let a Ray cluster do something in one process for each node of a schedule, as ``torchrun`` would.

    Args:
        regions: of the nodes. A process runs where Ray was started with a resource of the name of its node's region.
        do: what all of them do.
        accelerated: whether each takes an accelerator.

    Returns:
        What the first process has made.

    Raises:
        LamellaError: without ray.
        TrainingError: when the cluster has too few machines of a region, or a node dies.
    """
    ray = require("ray", "cluster", "training on a Ray cluster")
    if not ray.is_initialized():
        ray.init()
    there = ray.cluster_resources()
    for region, nodes in Counter(regions).items():
        if there.get(region, 0) < nodes:
            raise TrainingError(
                f"the Ray cluster has room for {there.get(region, 0):g} of {nodes} nodes in {region}: start Ray on its "
                f"machines with ray start --resources='{{\"{region}\": {nodes}}}'"
            )
    process = ray.remote(num_gpus=int(accelerated))(_Process)
    started = [process.options(resources={region: 1}).remote() for region in regions]
    try:
        host, port = ray.get(started[0].place.remote())
        said = {"WORLD_SIZE": str(len(regions)), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        left = [each.run.remote(said | {"RANK": str(rank)}, do) for rank, each in enumerate(started)]
        first, made = left[0], None
        while left:
            (done,), left = ray.wait(left)
            with suppress(ray.exceptions.RayActorError):  # the others say who has died
                ended = ray.get(done)
                if isinstance(ended, LamellaError):
                    raise ended
                made = ended if done == first else made
    finally:
        for each in started:
            ray.kill(each)
    if made is None:
        raise TrainingError("the first node died: start again, it goes on from the last checkpoint")
    return made


class _Process:
    """A process that a Ray cluster has started."""

    def place(self) -> tuple[str, int]:
        """Where others find it: its address and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return require(
                "ray.util", "cluster", "training on a Ray cluster"
            ).get_node_ip_address(), free.getsockname()[1]

    def run(self, said: dict[str, str], do: Callable[[], Made]) -> Made | LamellaError | None:
        """What it makes, if it is the first one, or the error that ended it, in one line."""
        os.environ |= said
        try:
            made = do()
        except LamellaError as error:
            return error
        return made if said["RANK"] == "0" else None
