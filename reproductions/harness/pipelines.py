"""Pipelines over processes: ours, and GPipe and 1F1B of ``torch.distributed.pipelining``, with fixed stage durations.

    python reproductions/harness/pipelines.py ROUNDS      # prints JSON

Six processes form three stages of two nodes each. A stage sleeps for 0.05 seconds forward and half as much again
backward, so that other load on the machine matters little; links take no time, since torch's schedules do not support
delays. All pipelines run alternately. Nodes are forked, so that libraries are imported once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import LlamaConfig, LlamaForCausalLM

from lamella.methods.skippipe.communicator import Communicator
from lamella.methods.skippipe.executor import NodeExecutor
from lamella.methods.skippipe.network import Machine, PipelineNetwork
from lamella.methods.skippipe.paths import Assignment, Limits
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import PipelineSchedule, make_schedule
from lamella.methods.skippipe.stages import spans, stage_of_parameter
from lamella.stack import Context, Stack

STAGES, WORK, MICROBATCHES, LENGTH = ((0, 1), (2, 3), (4, 5)), 0.05, 12, 16
BACK = 1.5  # of a forward pass
LIMIT = Limit(seconds=600, expansions=2000)  # plans, so that what is found does not depend on the machine


def model() -> Stack:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    return Stack(LlamaForCausalLM(config))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (MICROBATCHES, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def plans(slow: bool = False) -> dict[str, PipelineSchedule]:
    """Return schedules with all stages, and with two of three; if ``slow``, links take as long as a stage."""
    edge = (1 - np.eye(6)) * (2 * WORK if slow else 0.0)
    network = PipelineNetwork(tuple(Machine("here") for _ in range(6)), edge, np.full(6, WORK))
    assignment = Assignment(STAGES)
    lengths = {"full": Limits(length=3, swaps=0), "skip": Limits(length=2)}
    return {
        name: make_schedule(network, assignment, MICROBATCHES, limits, limit=LIMIT)[0]
        for name, limits in lengths.items()
    }


class _TimedIdentity(torch.autograd.Function):
    """The identity with a fixed duration in both directions."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        time.sleep(WORK)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(BACK * WORK)
        return grad


class Part(nn.Module):
    """One stage as a module for torch's pipelines; the last one has norm and head."""

    def __init__(self, stack: Stack, stage: int) -> None:
        super().__init__()
        self.stage, self.parts = stage, spans(stack, len(STAGES))
        self.model = stack.model  # registers the parameters
        self.stack = [stack]
        self.context: Context = stack.context(torch.zeros(1, LENGTH, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        stack = self.stack[0]
        h: Any = x
        if self.stage == 0:
            h = stack.context(x).h
        h = _TimedIdentity.apply(stack.run(h, *self.parts[self.stage], self.context))
        return stack.logits(stack.normed(h)) if self.stage == len(STAGES) - 1 else h


def torch_s(kind: Any, rank: int, groups: list[Any], stage_groups: list[Any]) -> Callable[[], dict[str, Tensor]]:
    """Return an iteration of one of torch's schedules: two parallel pipelines, whose gradients are summed."""
    stage = next(number for number, nodes in enumerate(STAGES) if rank in nodes)
    chain = STAGES[stage].index(rank)
    stack = model()
    part = Part(stack, stage)
    count = MICROBATCHES // 2
    piece = PipelineStage(part, stage, len(STAGES), torch.device("cpu"), group=groups[chain])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    schedule = kind(piece, count, loss_fn=loss)
    rows = {name: each[chain::2] for name, each in batch().items()}
    parameters = _of_stage(stack, stage)

    def once() -> dict[str, Tensor]:
        stack.model.zero_grad()
        if stage == 0:
            schedule.step(rows["input_ids"])
        elif stage == len(STAGES) - 1:
            schedule.step(target=rows["labels"], losses=[])
        else:
            schedule.step()
        for each in parameters.values():
            dist.all_reduce(each.grad, group=stage_groups[stage])
        return {name: each.grad / 2 for name, each in parameters.items()}

    return once


def _of_stage(stack: Stack, stage: int) -> dict[str, nn.Parameter]:
    """Return the parameters of a stage that both kinds of pipelines have: those of its layers."""
    stage_of = stage_of_parameter(stack, spans(stack, len(STAGES)))
    named = stack.model.named_parameters()
    return {name: each for name, each in named if ".layers." in name and stage_of(name) == stage}


def ours(schedule: PipelineSchedule, communicator: Communicator) -> Callable[[], dict[str, Tensor]]:
    """Return an iteration along the paths of a schedule."""
    stack = model()
    stage_of = stage_of_parameter(stack, spans(stack, len(STAGES)))
    parameters = {name: each for name, each in stack.model.named_parameters() if stage_of(name) == communicator.stage}
    communicator.schedule = schedule
    node = NodeExecutor(stack, spans(stack, len(STAGES)), parameters, communicator, clip=1e9, pace=1.0)

    def once() -> dict[str, Tensor]:
        communicator.schedule = schedule
        stack.model.zero_grad()
        node(batch())
        return {name: each.grad for name, each in parameters.items() if each.grad is not None and ".layers." in name}

    return once


def process(
    rank: int, rounds: int, out: Path, schedules: dict[str, PipelineSchedule], slow: dict[str, PipelineSchedule]
) -> None:
    """Run one node, with all pipelines alternately."""
    communicator = Communicator(schedules["full"], torch.device("cpu"))
    groups = [dist.new_group([stage[chain] for stage in STAGES]) for chain in range(2)]
    stage_groups = [dist.new_group(list(stage)) for stage in STAGES]
    arms = {
        "GPipe": torch_s(ScheduleGPipe, rank, groups, stage_groups),
        "1F1B": torch_s(Schedule1F1B, rank, groups, stage_groups),
        "ours, all stages": ours(schedules["full"], communicator),
        "ours, two of three": ours(schedules["skip"], communicator),
        "ours, all stages, slow links": ours(slow["full"], communicator),
        "ours, two of three, slow links": ours(slow["skip"], communicator),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    grads = {}
    for turn in range(rounds + 1):
        for name, once in arms.items():
            communicator.wait_for_all()
            begin = time.monotonic()
            grads[name] = once()
            communicator.wait_for_all()
            if turn:  # the first warms up
                seconds[name].append(time.monotonic() - begin)
    difference = max(
        float((grads[name][each] - grads["ours, all stages"][each]).abs().max())
        for name in ("GPipe", "1F1B")
        for each in grads["ours, all stages"]
    )
    result = {
        "seconds": seconds,
        "apart": difference,
        "simulated": {
            "ours, all stages": schedules["full"].seconds,
            "ours, two of three": schedules["skip"].seconds,
            "ours, all stages, slow links": slow["full"].seconds,
            "ours, two of three, slow links": slow["skip"].seconds,
        },
    }
    (out / f"{rank}.json").write_text(json.dumps(result))
    communicator.leave()


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1])
    schedules, slow = plans(), plans(slow=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(6):
            child = os.fork()
            if child == 0:
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": "6",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                code = 1
                try:
                    process(rank, rounds, Path(folder), schedules, slow)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"processes ended with {codes}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(6)]
    print(json.dumps(found[0] | {"apart": max(each["apart"] for each in found)}))


if __name__ == "__main__":
    main()
