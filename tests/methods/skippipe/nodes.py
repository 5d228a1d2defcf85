"""Processes of a pipeline for tests: imported once, then forked for each node of each scenario.

A scenario is one line of JSON on standard input: what each process does, how many there are, and where results go. The
answer is a line with the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lamella.errors import LamellaError
from lamella.files import Work
from lamella.methods.skippipe import communicator, recipe
from lamella.methods.skippipe.executor import NodeExecutor
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.recipe import train
from lamella.methods.skippipe.schedule import PipelineSchedule
from lamella.methods.skippipe.stages import spans, stage_of_parameter
from lamella.stack import Stack
from lamella.train import TrainConfig, blocks, collate, fit
from lamella.zoo import open_stack
from lamella.zoo.nano import nano

profile: Any = import_module("lamella.methods.skippipe.profile")

TOKENS = torch.randint(3, 100, (48, 10), generator=torch.Generator().manual_seed(0))
SAMPLES: Any = blocks(TOKENS, loss_on="all")
CONFIG = TrainConfig(steps=4, lr=1e-3, batch=1, save_every=2, log_every=1, warmup=0)
LIMIT = Limit(seconds=3)
communicator.ANSWER = 2.0


def iterate(schedule: PipelineSchedule, out: Path, pace: float = 0.0, times: int = 1) -> None:
    """One iteration (or some): gradients of this node's stage, the loss, and how long it took."""
    stack = Stack(nano("llama"))
    met = communicator.Communicator(schedule, torch.device("cpu"))
    parts = spans(stack, len(schedule.assignment))
    stage_of = stage_of_parameter(stack, parts)
    mine = {name: each for name, each in stack.model.named_parameters() if stage_of(name) == met.stage}
    node = NodeExecutor(stack, parts, mine, met, clip=1e9, pace=pace)
    seconds = []
    for _ in range(times):
        stack.model.zero_grad()
        loss, taken = node(collate(SAMPLES[: schedule.microbatches]))
        seconds.append(float(taken))
    grads = {name: each.grad for name, each in mine.items()}
    torch.save({"grads": grads, "loss": float(loss), "seconds": seconds}, out / f"{met.node}.pt")
    met.wait_for_all()
    met.leave()


def learn(
    schedule: PipelineSchedule,
    out: Path,
    work: str,
    lost: list[int] | None = None,
    dies: int | None = None,
    at: int = 0,
    model: str | None = None,
    bf16: bool = False,
) -> None:
    """A training, in which one node may die at the beginning of a step; of a folder, weights are loaded by stage."""
    if dies is not None:

        class Mortal(NodeExecutor):
            step = 0

            def __call__(self, batch: Any) -> Any:
                self.step += 1
                if self.communicator.node == dies and self.step == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(batch)

        recipe.NodeExecutor = Mortal  # type: ignore[misc]
    held: list[str] = []

    def counted(view: Any, *given: Any, **options: Any) -> Any:
        held.extend(name for name, _ in view.named_parameters())
        return fit(view, *given, **options)

    recipe.fit = counted  # type: ignore[assignment]
    stack = Stack(nano("llama")) if model is None else open_stack(model, weights=False)
    config = replace(CONFIG, bf16=bf16)
    result = train(stack, SAMPLES, schedule, config=config, work=Work(Path(work)), lost=tuple(lost or ()), limit=LIMIT)
    rank = os.environ["RANK"]
    losses = [point.loss for point in result.log.train]
    torch.save({"state": result.stack.model.state_dict(), "losses": losses, "held": held}, out / f"{rank}.pt")


def measure(schedule: PipelineSchedule, out: Path, delay: float = 0.0) -> None:
    """A profile, in which every message takes some seconds more."""
    send = profile.dist.send

    def slow(*given: Any) -> None:
        time.sleep(delay)
        send(*given)

    profile.dist.send = slow
    region = ("oslo", "paris")[int(os.environ["RANK"])]
    found = profile.profile(Stack(nano("llama")), region=region, microbatch=2, tokens=16, memory=2, rounds=3)
    (out / os.environ["RANK"]).mkdir()
    found.write(out / os.environ["RANK"])


SCENARIOS: dict[str, Callable[..., None]] = {"iterate": iterate, "learn": learn, "measure": measure}


def process(rank: int, port: int, scenario: dict[str, Any]) -> None:
    """One process, to its end."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(scenario["processes"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out = Path(scenario["out"])
    code = 1
    try:
        with torch.enable_grad():
            SCENARIOS[scenario["what"]](PipelineSchedule.read(Path(scenario["schedule"])), out, **scenario["options"])
        code = 0
    except LamellaError as error:
        (out / f"{rank}.txt").write_text(str(error))
        code = 2
    except BaseException:
        (out / f"{rank}.txt").write_text(traceback.format_exc())
    os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        scenario = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(scenario["processes"]):
            child = os.fork()
            if child == 0:
                process(rank, port, scenario)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
