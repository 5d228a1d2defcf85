"""One node of a pipeline: it serves microbatches in the order of its schedule, forward and back.

    origin   h = embed(x);  h = stage 0 (h);  send
    node     receive h;  y = my stage (h);  send
    origin   receive y;  loss = CE(head(norm(y)));  send dL/dy back the way that it came
    node     receive g;  y.backward(g);  send dL/dh back

and when all have come back, with V the microbatches that have visited a stage,

    gradient of a stage = 1 / V  sum over its nodes and their visits             so that no stage learns slower
    all gradients are clipped to one norm

The order in which a node serves is that of the schedule, not of arrival, so that a run can be repeated to the bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamella.methods.skippipe.meeting import Meeting, Message
from lamella.methods.skippipe.schedule import Schedule, visits
from lamella.methods.skippipe.simulate import SHARES, Phase, Stop
from lamella.methods.skippipe.stages import Span, loss_at_home, run
from lamella.stack import Stack
from lamella.train.task import Batch


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into so many, row after row."""
    parts = {name: each.chunk(count) for name, each in batch.items()}
    return [{name: each[number] for name, each in parts.items()} for number in range(count)]


def stage_of_parameter(stack: Stack, spans: Sequence[Span]) -> Callable[[str], int]:
    """Which stage a parameter belongs to: embedding, final norm and head belong to stage 0, as its layers do."""
    prefix = stack.architecture.prefix

    def stage(name: str) -> int:
        if not name.startswith(prefix):
            return 0
        layer = int(name.removeprefix(prefix).split(".", 1)[0])
        return next(number for number, (start, stop) in enumerate(spans) if start <= layer < stop)

    return stage


@dataclass
class InOneProcess:
    """The same without other processes: all paths one after the other, and the same gradients.

    Attributes:
        stack: what trains.
        spans: layers of each stage.
        trained: parameters by name.
        orders: of the stages, for each microbatch of the step.
    """

    stack: Stack
    spans: Sequence[Span]
    trained: Mapping[str, nn.Parameter]
    orders: Sequence[tuple[int, ...]] = ()

    def __call__(self, batch: Batch) -> Tensor:
        """Add up the gradients of a batch, and return its mean loss."""
        losses = []
        for part, order in zip(microbatches(batch, len(self.orders)), self.orders, strict=True):
            context = self.stack.context(_inputs(part))
            h: Any = context.h
            for stage in order:
                h = run(self.stack, h, self.spans[stage], context)
            loss = loss_at_home(self.stack, h, part["labels"])
            loss.backward()
            losses.append(loss.detach())
        visited, stage_of = visits(self.orders), stage_of_parameter(self.stack, self.spans)
        for name, each in self.trained.items():
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            each.grad /= max(1, visited[stage_of(name)])
        return torch.stack(losses).mean()


@dataclass
class Node:
    """What one process does in an iteration.

    Attributes:
        stack: what trains; of it this node's stage is used, and at origins embedding, norm and head.
        spans: layers of each stage.
        trained: this stage's parameters by name.
        meeting: the other nodes.
        clip: the largest norm of all gradients together.
        pace: how long a second of the schedule lasts; above 0, what it says of links and nodes is waited for.
    """

    stack: Stack
    spans: Sequence[Span]
    trained: Mapping[str, nn.Parameter]
    meeting: Meeting
    clip: float
    pace: float = 0.0
    _held: dict[tuple[int, Phase], Tensor] = field(default_factory=dict)
    _open: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # what went in and what came out

    @property
    def schedule(self) -> Schedule:
        return self.meeting.schedule

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add up the gradients of this node's stage over all of its nodes.

        Returns:
            The mean loss of all microbatches, and the seconds that the slowest node took.
        """
        parts = microbatches(batch, self.schedule.microbatches)
        turns = self.schedule.turns(self.meeting.node)
        begin = time.monotonic()
        self._expect(turns, parts[0])
        losses = [self._serve(stop, parts[stop.microbatch]) for stop in turns]
        loss = sum((each for each in losses if each is not None), torch.zeros((), device=self.meeting.device))
        taken = time.monotonic() - begin
        self._add_up()
        settled = self._settled(loss, taken)
        self.meeting.all_is_sent()  # since all have come here
        return settled

    def _expect(self, turns: Sequence[Stop], part: Batch) -> None:
        """Let everything come in that others will send."""
        senders = Counter(self._sender(stop) for stop in turns)
        shape = (*part["input_ids"].shape, self.stack.architecture.sizes_of(self.stack.config).hidden)
        for node, count in senders.items():
            if node is not None and node != self.meeting.node:
                self.meeting.expect(node, count, shape)

    def _sender(self, stop: Stop) -> int | None:
        """Who hands on what is needed here; nobody for what begins."""
        path = self.schedule.path(stop.microbatch)
        if stop.phase == "forward":
            return path[stop.place - 1] if stop.place else None
        if stop.phase == "loss":
            return path[-1]
        return path[(stop.place + 1) % len(path)]

    def _serve(self, stop: Stop, part: Batch) -> Tensor | None:
        """One turn; of a loss what it is."""
        given = None if self._sender(stop) is None else self._arrived(stop)
        begin = time.monotonic()
        loss, made = None, None
        if stop.phase == "forward":
            made = self._forward(stop, given, part)
        elif stop.phase == "loss":
            assert given is not None
            h = given.requires_grad_()
            loss = loss_at_home(self.stack, h, part["labels"])
            loss.backward()
            made = h.grad
        else:
            inside, out = self._open.pop(stop.microbatch)
            torch.autograd.backward(out, given)
            made = inside.grad if inside.is_leaf else None  # at the origin it goes on into the embedding
        self._keep_pace(begin, stop.phase)
        path = self.schedule.path(stop.microbatch)
        following = stop.then(len(path))
        if following is not None and made is not None:
            there = path[following.place]
            delay = self.pace * self.schedule.network.way(self.meeting.node, there)
            self.meeting.send(there, Message(stop.microbatch, following.phase, made), delay)
        return None if loss is None else loss.detach()

    def _forward(self, stop: Stop, given: Tensor | None, part: Batch) -> Tensor:
        with torch.set_grad_enabled(given is None):  # elsewhere it only says what layers are called with
            context = self.stack.context(_inputs(part))
        h = context.h if given is None else given.to(context.h.dtype).requires_grad_()
        out = run(self.stack, h, self.spans[self.meeting.stage], context)
        self._open[stop.microbatch] = h, out
        return out

    def _arrived(self, stop: Stop) -> Tensor:
        """What another node has made for this turn; what comes before its turn is held."""
        wanted = (stop.microbatch, stop.phase)
        while wanted not in self._held:
            message = self.meeting.next_message()
            self._held[message.microbatch, message.phase] = message.content
        return self._held.pop(wanted)

    def _keep_pace(self, begin: float, phase: Phase) -> None:
        work = float(self.schedule.network.work[self.meeting.node])
        time.sleep(max(0.0, begin + self.pace * SHARES[phase] * work - time.monotonic()) if self.pace else 0.0)

    def _add_up(self) -> None:
        """The mean gradient over all visits of this stage, the same on all of its nodes."""
        visited = max(1, visits(self.schedule.orders)[self.meeting.stage])
        for each in self.trained.values():
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        own = list(self.trained.values())
        flat = torch.cat([_grad(each).flatten() for each in own])
        self.meeting.add_up(flat, self.meeting.stage)
        for each, part in zip(own, (flat / visited).split([each.numel() for each in own]), strict=True):
            each.grad = part.view_as(each)

    def _settled(self, loss: Tensor, taken: float) -> tuple[Tensor, Tensor]:
        """Clip what all nodes have together; loss and time are the same on all."""
        stages, nodes = len(self.spans), len(self.schedule.nodes)
        alike = len(self.schedule.assignment.stages[self.meeting.stage])
        told = torch.zeros(1 + stages + nodes, dtype=torch.float64, device=self.meeting.device)
        told[0] = loss
        norms = torch.stack([_grad(each).double().square().sum() for each in self.trained.values()])
        told[1 + self.meeting.stage] = norms.sum() / alike
        told[1 + stages + self.schedule.nodes.index(self.meeting.node)] = taken
        self.meeting.add_up(told)
        norm = told[1 : 1 + stages].sum().sqrt()
        share = (self.clip / (norm + 1e-6)).clamp(max=1.0)  # as torch clips
        for each in self.trained.values():
            _grad(each).mul_(share.to(each.dtype))
        return (told[0] / self.schedule.microbatches).float(), told[1 + stages :].max().float()


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _inputs(part: Batch) -> dict[str, Tensor]:
    """What the front of a model reads of a microbatch."""
    return {name: part[name] for name in ("input_ids", "attention_mask") if name in part}
