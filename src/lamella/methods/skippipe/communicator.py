"""The processes of a run as nodes of a schedule: point-to-point messages, collectives, and failure detection.

``torchrun``, a Ray cluster, or anything that sets ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR``, starts one process per
node. Messages are identified by their header, not by their order of arrival. No node waits for one that has died: a
node that sees a broken connection sets a flag in the distributed store, which all nodes poll while they wait. Nodes
that do not respond to it are reported as dead.
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
from lamella.methods.skippipe.schedule import PipelineSchedule
from lamella.methods.skippipe.simulate import Phase

PHASES: tuple[Phase, ...] = ("forward", "loss", "backward")
HEADER = 2  # 32-bit integers in front of a message: the microbatch and the phase
POLL, ANSWER = 0.2, 5.0  # seconds between checks of the store, and seconds that a node has to respond
PATIENCE = timedelta(hours=12)  # timeout for nodes that are alive
Output = TypeVar("Output")


class Message(NamedTuple):
    """An activation for the next node, or a gradient for the previous one `[batch, time, hidden]`."""

    microbatch: int
    phase: Phase
    content: Tensor


class Communicator:
    """The connection between the processes of a run.

    Args:
        schedule: the schedule whose nodes the processes are.
        device: the device of this process.
        lost: nodes that are no longer available. The first process re-plans the paths of the others.
        limit: the limit of that search.
        dtype: of the content of messages.

    Attributes:
        schedule: the schedule that all nodes follow.
        node: the node that this process is.
        stage: the stage of this node.
        inbox: received messages; None marks a broken connection.

    Raises:
        TrainingError: if the number of processes is not the number of nodes.
    """

    def __init__(
        self,
        schedule: PipelineSchedule,
        device: torch.device,
        lost: Sequence[int] = (),
        limit: Limit | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        self._store = dist.PrefixStore("lamella-communicator", store)
        if lost and rank == 0:
            self._store.set("schedule", schedule.without(lost, limit).dump())
        if lost:
            schedule = PipelineSchedule.parse(self._store.get("schedule").decode())
        self.schedule, self.device, self.dtype = schedule, device, dtype
        if world != len(schedule.nodes):
            raise TrainingError(
                f"the schedule has {len(schedule.nodes)} nodes, and {world} processes run: start one for each, with "
                f"torchrun --nproc-per-node {len(schedule.nodes)}, or exclude nodes with --without"
            )
        _join(store, rank, world, device)
        self._rank_of = {node: number for number, node in enumerate(schedule.nodes)}
        self.node = schedule.nodes[rank]
        self.inbox: SimpleQueue[Message | None] = SimpleQueue()
        self.groups = [dist.new_group([self._rank_of[node] for node in stage]) for stage in schedule.assignment.stages]
        self.stage = schedule.assignment.stage_of[self.node]
        self._sent: list[tuple[Any, Tensor]] = []  # buffers must stay alive until they are sent
        self._sending = threading.Lock()
        self._checked = 0.0
        self._dead: list[int] = []
        self._known = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._report_alive, daemon=True).start()

    # Messages

    def send(self, node: int, message: Message, delay: float = 0.0) -> None:
        """Send a message after `delay` seconds, without blocking.

        Args:
            node: the receiver.
            message: the message.
            delay: seconds to wait before sending.
        """
        content = message.content.detach().to(self.dtype)
        if node == self.node:
            self.inbox.put(message._replace(content=content.float()))
            return
        header = torch.tensor([message.microbatch, PHASES.index(message.phase)], dtype=torch.int32, device=self.device)
        flat = torch.cat([header.view(self.dtype), content.flatten()])
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

    def wait_for_sends(self) -> None:
        """Wait for all sends to complete, and release their buffers."""
        try:
            for work, _ in self._sent:
                work.wait()
        except RuntimeError:
            raise self._connection_error() from None
        self._sent.clear()

    def receive_from(self, node: int, count: int, shape: Sequence[int]) -> None:
        """Receive `count` messages from a node in the background.

        Args:
            node: the sender.
            count: the number of messages.
            shape: the shape of each message's content.
        """
        threading.Thread(target=self._receive, args=(node, count, tuple(shape)), daemon=True).start()

    def _receive(self, node: int, count: int, shape: tuple[int, ...]) -> None:
        start = HEADER * torch.int32.itemsize // self.dtype.itemsize
        for _ in range(count):
            flat = torch.empty(start + torch.Size(shape).numel(), dtype=self.dtype, device=self.device)
            try:
                dist.recv(flat, self._rank_of[node])
            except RuntimeError:
                self.inbox.put(None)
                return
            microbatch, phase = flat[:start].view(torch.int32).tolist()
            self.inbox.put(Message(microbatch, PHASES[phase], flat[start:].view(shape).float()))

    def next_message(self) -> Message:
        """Wait for the next message.

        Raises:
            TrainingError: if a node has died.
        """
        while True:
            try:
                message = self.inbox.get(timeout=POLL)
            except Empty:
                self._check_failures()
                continue
            if message is None:
                raise self._connection_error()
            return message

    # Collectives

    def all_reduce(self, tensor: Tensor, stage: int | None = None) -> None:
        """Sum a tensor over the nodes of this process's stage, or over all nodes, in place.

        Args:
            tensor: the tensor.
            stage: this process's stage; all nodes if None.
        """
        self._run_collective(dist.all_reduce, tensor, group=None if stage is None else self.groups[stage])

    def broadcast(self, tensor: Tensor, node: int) -> None:
        """Send a node's tensor to all nodes, in place.

        Args:
            tensor: the tensor to send or to overwrite.
            node: the sender.
        """
        self._run_collective(dist.broadcast, tensor, src=self._rank_of[node])

    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        """Gather integers from all nodes, by rank; once per run, and without unpickling."""
        self._store.set(f"values {self.node}", json.dumps(list(values)))
        self.wait_for_all()
        return [[int(each) for each in json.loads(self._store.get(f"values {node}"))] for node in self.schedule.nodes]

    def wait_for_all(self) -> None:
        """Wait until all nodes have reached this point."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def _run_collective(self, operation: Any, tensor: Tensor, **options: Any) -> None:
        try:
            work = operation(tensor, async_op=True, **options)
            while work is not None and not work.is_completed():
                self._check_failures(pause=0.001)
            if work is not None:
                work.wait()
        except RuntimeError:
            raise self._connection_error() from None

    def leave(self) -> None:
        """Close the connections."""
        self._ended.set()
        dist.destroy_process_group()

    # Failure detection

    def _check_failures(self, pause: float = 0.0) -> None:
        time.sleep(pause)
        if time.monotonic() - self._checked > POLL:
            self._checked = time.monotonic()
            if self._is_broken():
                raise self._connection_error()

    def _is_broken(self) -> bool:
        try:
            return bool(self._store.check(["broken"]))
        except RuntimeError:  # the process that hosts the store has died
            return True

    def _report_alive(self) -> None:
        """Report that this node is alive when a failure is flagged, and record the nodes that do not."""
        while not self._ended.wait(POLL):
            if self._is_broken():
                try:
                    self._store.set(f"alive {self.node}", "")
                    time.sleep(ANSWER)
                    self._dead = [node for node in self.schedule.nodes if not self._store.check([f"alive {node}"])]
                except RuntimeError:
                    self._dead = self.schedule.nodes[:1]  # the first process hosts the store
                self._known.set()
                return

    def _connection_error(self) -> TrainingError:
        """Return the error that names the nodes that do not respond."""
        with suppress(RuntimeError):  # the process that hosts the store has died, which all nodes notice
            self._store.set("broken", "")
        self._known.wait()
        dead = self._dead
        if self.node == self.schedule.nodes[0]:
            time.sleep(ANSWER)  # all nodes read the store before its process exits
        if not dead:
            return TrainingError("a connection between nodes broke: start again to resume from the last checkpoint")
        names = ", ".join(self.schedule.name(node) for node in dead)
        option = f"--without {','.join(map(str, dead))}"
        return TrainingError(
            f"{names} died: start again with as many processes, or with {len(self.schedule.nodes) - len(dead)} and "
            f"{option}, which re-plans the paths; the run resumes from the last checkpoint"
        )


def join_processes(device: torch.device) -> tuple[dist.Store, int, int]:
    """Connect all processes, and return their store, the rank of this one and their number.

    Args:
        device: the device of this process.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    _join(store, rank, world, device)
    return dist.PrefixStore("lamella-values", store), rank, world


def _join(store: dist.Store, rank: int, world: int, device: torch.device) -> None:
    backend, own = "nccl" if device.type == "cuda" else "gloo", dist.PrefixStore("lamella", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=PATIENCE)


# On a Ray cluster


def on_ray(regions: Sequence[str], task: Callable[[], Output], accelerated: bool = False) -> Output:
    """Run a task on a Ray cluster in one process per node of a schedule, as ``torchrun`` would.

    Args:
        regions: the region of each node. A process runs where Ray was started with a resource of its region's name.
        task: the task of every process.
        accelerated: whether each process needs an accelerator.

    Returns:
        The output of the first process.

    Raises:
        LamellaError: if Ray is not installed.
        TrainingError: if the cluster has too few machines of a region, or a node dies.
    """
    ray = require("ray", "cluster", "training on a Ray cluster")
    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    for region, nodes in Counter(regions).items():
        if resources.get(region, 0) < nodes:
            raise TrainingError(
                f"the Ray cluster provides {resources.get(region, 0):g} of {nodes} nodes in {region}: start Ray on its "
                f"machines with ray start --resources='{{\"{region}\": {nodes}}}'"
            )
    process = ray.remote(num_gpus=int(accelerated))(_Process)
    started = [process.options(resources={region: 1}).remote() for region in regions]
    try:
        host, port = ray.get(started[0].address.remote())
        environment = {"WORLD_SIZE": str(len(regions)), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        running = [each.run.remote(environment | {"RANK": str(rank)}, task) for rank, each in enumerate(started)]
        first, output = running[0], None
        while running:
            (done,), running = ray.wait(running)
            with suppress(ray.exceptions.RayActorError):  # the other processes report which node has died
                ended = ray.get(done)
                if isinstance(ended, LamellaError):
                    raise ended
                output = ended if done == first else output
    finally:
        for each in started:
            ray.kill(each)
    if output is None:
        raise TrainingError("the first node died: start again to resume from the last checkpoint")
    return output


class _Process:
    """A process started by Ray."""

    def address(self) -> tuple[str, int]:
        """Return the address of this machine and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return require(
                "ray.util", "cluster", "training on a Ray cluster"
            ).get_node_ip_address(), free.getsockname()[1]

    def run(self, environment: dict[str, str], task: Callable[[], Output]) -> Output | LamellaError | None:
        """Return the output of the first process, or the error of any."""
        os.environ |= environment
        try:
            output = task()
        except LamellaError as error:
            return error
        return output if environment["RANK"] == "0" else None
