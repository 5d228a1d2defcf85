"""One node of a pipeline: it processes microbatches in the order of its schedule, forward and backward.

    origin   h = embed(x);  h = stage 0 (h);  send
    node     receive h;  y = own stage (h);  send
    origin   receive y;  loss = CE(head(norm(y)));  send dL/dy back along the path
    node     receive g;  y.backward(g);  send dL/dh back

After all microbatches of a step, with V the number of microbatches that visited a stage,

    gradient of a stage = 1 / V  sum over its nodes and their visits             so that all stages learn equally fast
    all gradients are clipped to one global norm

A node follows the order of the schedule, not the order of arrival, so that a run is reproducible bit for bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamella.methods.skippipe.communicator import Communicator, Message
from lamella.methods.skippipe.schedule import PipelineSchedule, visits
from lamella.methods.skippipe.simulate import PHASE_COSTS, Phase, Stop
from lamella.methods.skippipe.stages import Span, autocast, is_loaded, origin_loss, run, stage_of_parameter
from lamella.stack import Stack
from lamella.train.task import Batch


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into `count` microbatches of consecutive rows.

    Args:
        batch: the batch.
        count: the number of microbatches.
    """
    parts = {name: each.chunk(count) for name, each in batch.items()}
    return [{name: each[number] for name, each in parts.items()} for number in range(count)]


@dataclass
class SingleProcess:
    """Run all paths one after the other in a single process, with the same gradients.

    Attributes:
        stack: the model to train.
        spans: the layers of each stage.
        parameters: the parameters by name.
        orders: the stages that each microbatch of the step visits.
        bf16: whether to compute in bfloat16, and to round the hidden states between stages as messages in it do.
    """

    stack: Stack
    spans: Sequence[Span]
    parameters: Mapping[str, nn.Parameter]
    orders: Sequence[tuple[int, ...]] = ()
    bf16: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        """Accumulate the gradients of a batch, and return its mean loss."""
        losses = []
        for part, order in zip(microbatches(batch, len(self.orders)), self.orders, strict=True):
            with autocast(self.stack.device, self.bf16):
                context = self.stack.context(_inputs(part))
                h: Any = context.h
                for stage in order:
                    h = run(self.stack, h, self.spans[stage], context)
                    h = h.bfloat16().to(context.h.dtype) if self.bf16 else h
                loss = origin_loss(self.stack, h, part["labels"])
            loss.backward()
            losses.append(loss.detach())
        visited, stage_of = visits(self.orders), stage_of_parameter(self.stack, self.spans)
        for name, each in self.parameters.items():
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            each.grad /= max(1, visited[stage_of(name)])
        return torch.stack(losses).mean()


@dataclass
class NodeExecutor:
    """The work of one process in an iteration.

    Attributes:
        stack: the model, of which this node's stage is used, and at origins also embedding, norm and head.
        spans: the layers of each stage.
        parameters: the parameters of this node's stage by name.
        communicator: the connection to the other nodes.
        clip: the maximum global gradient norm.
        pace: seconds of waiting per second of the schedule; above 0, the times of links and nodes are simulated.
        bf16: whether to compute in bfloat16.
    """

    stack: Stack
    spans: Sequence[Span]
    parameters: Mapping[str, nn.Parameter]
    communicator: Communicator
    clip: float
    pace: float = 0.0
    bf16: bool = False
    _pending: dict[tuple[int, Phase], Tensor] = field(default_factory=dict)
    _graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # input and output of the stage

    @property
    def schedule(self) -> PipelineSchedule:
        """The schedule that all nodes follow."""
        return self.communicator.schedule

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run an iteration, and accumulate the gradients of this stage over all of its nodes.

        Args:
            batch: the samples of all microbatches.

        Returns:
            The mean loss of all microbatches, and the seconds that the slowest node took.
        """
        parts = microbatches(batch, self.schedule.microbatches)
        turns = self.schedule.turns(self.communicator.node)
        started = time.monotonic()
        self._start_receiving(turns, parts[0])
        losses = [self._serve(stop, parts[stop.microbatch]) for stop in turns]
        loss = sum((each for each in losses if each is not None), torch.zeros((), device=self.communicator.device))
        elapsed = time.monotonic() - started
        self._reduce_gradients()
        result = self._clip_gradients(loss, elapsed)
        self.communicator.wait_for_sends()  # all nodes have reached this point
        return result

    def _start_receiving(self, turns: Sequence[Stop], part: Batch) -> None:
        """Start to receive all messages of the iteration."""
        senders = Counter(self._sender(stop) for stop in turns)
        shape = (*part["input_ids"].shape, self.stack.architecture.sizes_of(self.stack.config).hidden)
        for node, count in senders.items():
            if node is not None and node != self.communicator.node:
                self.communicator.receive_from(node, count, shape)

    def _sender(self, stop: Stop) -> int | None:
        """Return the node that sends the input of a stop, or None at the start of a path."""
        path = self.schedule.path(stop.microbatch)
        if stop.phase == "forward":
            return path[stop.position - 1] if stop.position else None
        if stop.phase == "loss":
            return path[-1]
        return path[(stop.position + 1) % len(path)]

    def _serve(self, stop: Stop, part: Batch) -> Tensor | None:
        """Execute one stop, and return the loss if it is one."""
        received = None if self._sender(stop) is None else self._wait_for(stop)
        started = time.monotonic()
        loss, output = None, None
        if stop.phase == "forward":
            output = self._forward(stop, received, part)
        elif stop.phase == "loss":
            assert received is not None
            h = received.requires_grad_()
            with autocast(h.device, self.bf16):
                loss = origin_loss(self.stack, h, part["labels"])
            loss.backward()
            output = h.grad
        else:
            inside, out = self._graphs.pop(stop.microbatch)
            torch.autograd.backward(out, received)
            output = inside.grad if inside.is_leaf else None  # at the origin the gradient flows into the embedding
        self._keep_pace(started, stop.phase)
        path = self.schedule.path(stop.microbatch)
        following = stop.next_stop(len(path))
        if following is not None and output is not None:
            there = path[following.position]
            delay = self.pace * self.schedule.network.message_seconds(self.communicator.node, there)
            self.communicator.send(there, Message(stop.microbatch, following.phase, output), delay)
        return None if loss is None else loss.detach()

    def _forward(self, stop: Stop, received: Tensor | None, part: Batch) -> Tensor:
        inputs = _inputs(part)
        if received is not None and not is_loaded(self.stack.vocabulary[0]):
            weight = next(iter(self.parameters.values()))
            inputs["inputs_embeds"] = received.to(weight.dtype)  # in place of the embedding of the tokens
            del inputs["input_ids"]
        with autocast(self.communicator.device, self.bf16):
            with torch.set_grad_enabled(received is None):  # on other nodes only the layers' other arguments are needed
                context = self.stack.context(inputs)
            h = context.h if received is None else received.to(context.h.dtype).requires_grad_()
            out = run(self.stack, h, self.spans[self.communicator.stage], context)
        self._graphs[stop.microbatch] = h, out
        return out

    def _wait_for(self, stop: Stop) -> Tensor:
        """Wait for the input of a stop; messages for later stops are kept."""
        wanted = (stop.microbatch, stop.phase)
        while wanted not in self._pending:
            message = self.communicator.next_message()
            self._pending[message.microbatch, message.phase] = message.content
        return self._pending.pop(wanted)

    def _keep_pace(self, started: float, phase: Phase) -> None:
        work = float(self.schedule.network.work[self.communicator.node])
        time.sleep(max(0.0, started + self.pace * PHASE_COSTS[phase] * work - time.monotonic()) if self.pace else 0.0)

    def _reduce_gradients(self) -> None:
        """Compute the mean gradient over all visits of this stage, identical on all of its nodes."""
        visited = max(1, visits(self.schedule.orders)[self.communicator.stage])
        for each in self.parameters.values():
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        own = list(self.parameters.values())
        flat = torch.cat([_grad(each).flatten() for each in own])
        self.communicator.all_reduce(flat, self.communicator.stage)
        for each, part in zip(own, (flat / visited).split([each.numel() for each in own]), strict=True):
            each.grad = part.view_as(each)

    def _clip_gradients(self, loss: Tensor, elapsed: float) -> tuple[Tensor, Tensor]:
        """Clip by the global norm; loss and time are identical on all nodes."""
        stages, nodes = len(self.spans), len(self.schedule.nodes)
        replicas = len(self.schedule.assignment.stages[self.communicator.stage])
        sums = torch.zeros(1 + stages + nodes, dtype=torch.float64, device=self.communicator.device)
        sums[0] = loss
        norms = torch.stack([_grad(each).double().square().sum() for each in self.parameters.values()])
        sums[1 + self.communicator.stage] = norms.sum() / replicas
        sums[1 + stages + self.schedule.nodes.index(self.communicator.node)] = elapsed
        self.communicator.all_reduce(sums)
        norm = sums[1 : 1 + stages].sum().sqrt()
        share = (self.clip / (norm + 1e-6)).clamp(max=1.0)  # the same formula as in torch
        for each in self.parameters.values():
            _grad(each).mul_(share.to(each.dtype))
        return (sums[0] / self.schedule.microbatches).float(), sums[1 + stages :].max().float()


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _inputs(part: Batch) -> dict[str, Tensor]:
    """Return the model inputs of a microbatch."""
    return {name: part[name] for name in ("input_ids", "attention_mask") if name in part}
