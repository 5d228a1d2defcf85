"""What trains: a model whose microbatches go their own ways through its stages, in one process or one for each node."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from torch import Tensor

from lamella import processes
from lamella.data import Passages
from lamella.errors import MethodError, TrainingError
from lamella.files import Work
from lamella.methods.skippipe.executor import InOneProcess, Node, stage_of_parameter
from lamella.methods.skippipe.meeting import Meeting, on_ray
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import Schedule
from lamella.methods.skippipe.stages import Order, Span, left_out, spans
from lamella.plan import ModelReference, Plan
from lamella.registry import command
from lamella.results import Trained
from lamella.signature import Named
from lamella.stack import Stack, share
from lamella.train import Hook, Task, TrainConfig, TrainingLog, TrainingRun, fit, own, response_loss, with_weights_of
from lamella.train.runs import LOG

TRAINING = TrainConfig(lr=3e-4, schedule="constant", batch=2)  # the authors' rate; their microbatch has 8 sequences
UNCLIPPED = 1e30  # Trainer sees one stage's gradients alone, and clips none of them
Orders = Callable[[int], Sequence[Order]]  # from the step to the stages of each of its microbatches


@command("skippipe", "train", brief={"pipeline": None, "batch": 1})
def train(
    stack: Stack,
    train: Passages,
    pipeline: Schedule | None = None,
    *,
    stages: Annotated[int, Ge(2)] | None = None,
    skip: Annotated[float, Ge(0), Lt(1)] = 1 / 3,
    microbatches: Annotated[int, Ge(1)] | None = None,
    lost: Annotated[tuple[Annotated[int, Ge(0)], ...], Named("without")] = (),
    pace: Annotated[float, Ge(0)] = 0.0,
    ray: bool = False,
    limit: Limit = Limit(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Trained:
    """Train a model whose microbatches leave out stages, so that it can do without them, too.

    Under ``torchrun``, and on a Ray cluster, every process is one node of the schedule. In one process the paths of a
    schedule are gone one after the other, to the same gradients; without a schedule each step draws which stages its
    microbatches leave out, every stage equally often.

    Args:
        stack: a decoder; it is not changed.
        train: text, in blocks, every token of which carries loss.
        pipeline: what ``skippipe plan`` has written.
        stages: without a schedule, how many; the authors' 6 when left out. A schedule has its own.
        skip: without a schedule, the share of stages that a microbatch leaves out; the authors' third.
        microbatches: without a schedule, of a step; when left out, as many as there are stages behind the first.
        lost: nodes that have died: the paths of the others are planned anew, and it goes on from the last checkpoint.
        pace: seconds that one of the schedule's lasts: above 0, every link and node is slowed down to what the schedule
            says of it.
        ray: start a process for each node of the schedule on a Ray cluster, on a machine of the node's region, which
            was started with a resource of that name: ``ray start --resources='{"oslo": 2}'`` for two nodes.
        limit: of the search for paths, where nodes were lost.
        config: of the training: ``batch`` is the sequences of a microbatch, and the schedule says how many of them.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The model with its trained weights.

    Raises:
        MethodError: for stages or paths that do not fit the model, or nodes that are not there.
        TrainingError: when processes do not fit the schedule, a node dies, or training cannot start or stay finite.
    """
    _check(config, pipeline, lost, ray)
    if pipeline is not None and processes.count() == 1 and lost:
        pipeline = pipeline.without(lost, limit)
    parts = spans(stack, stages if pipeline is None else len(pipeline.assignment))
    orders = drawn(len(parts), skip, microbatches, config.seed) if pipeline is None else _always(pipeline.orders)
    size = len(orders(0))
    config = replace(config, batch=config.batch * size).with_steps(len(train))
    view = share(stack.model)
    own(view, lambda name: True)
    trainer = _Paths(view, parts, orders, config, pace)
    if pipeline is not None and ray:
        log = trainer.over_cluster(train, work.directory(), pipeline)
    elif pipeline is None or processes.count() == 1:
        log = trainer.in_one_process(train, work.directory() / "run")
    else:
        log, pipeline = trainer.over_nodes(train, work.directory(), pipeline, lost, limit)
        orders = _always(pipeline.orders)
    assert config.steps is not None
    seen = {left_out(len(parts), order) for step in range(config.steps) for order in orders(step)}
    findings: dict[str, Any] = {
        "stages": [list(part) for part in parts],
        "microbatches": size,
        "omitted in training": [list(each) for each in sorted(seen)],
    }
    if pipeline is not None:
        findings |= {"predicted seconds": pipeline.seconds, "nodes": len(pipeline.nodes)}
    plan = Plan(model=ModelReference.of(stack))
    return Trained(stack=with_weights_of(stack, view), plan=plan, log=log, findings=findings)


def _check(config: TrainConfig, schedule: Schedule | None, lost: Sequence[int], ray: bool) -> None:
    if config.accumulate > 1 or config.bf16 or config.shard:
        raise MethodError(
            "a schedule says how many microbatches a step has, in float32: leave accumulate, bf16 and shard out"
        )
    if processes.count() > 1 and schedule is None:
        raise MethodError("several processes need a schedule, of which each is a node: make one with skippipe plan")
    if lost and schedule is None:
        raise MethodError("nodes are those of a schedule: give it, or leave --without out")
    if ray and (schedule is None or processes.count() > 1):
        raise MethodError("Ray starts the processes itself, one for each node of a schedule: give it, without torchrun")


def drawn(stages: int, skip: float, microbatches: int | None, seed: int) -> Orders:
    """Orders that leave out stages by chance, every one but the first equally often in a step.

    Raises:
        MethodError: for microbatches by which it cannot be equally often.
    """
    out, behind = min(round(skip * stages), stages - 1), stages - 1
    count = microbatches or behind
    if count * out % behind:
        raise MethodError(
            f"microbatches {count}: {out} of {behind} stages are left out equally often by multiples of {behind}"
        )

    def orders(step: int) -> list[Order]:
        turn = list(range(1, stages))
        random.Random(f"{seed} {step}").shuffle(turn)
        gone = [{turn[(number * out + place) % behind] for place in range(out)} for number in range(count)]
        return [tuple(stage for stage in range(stages) if stage not in each) for each in gone]

    return orders


def _always(orders: Sequence[Order]) -> Orders:
    return lambda step: orders


class _Paths:
    """Trains a view along paths."""

    def __init__(self, view: Any, parts: Sequence[Span], orders: Orders, config: TrainConfig, pace: float) -> None:
        self.view, self.parts, self.orders, self.config, self.pace = view, parts, orders, config, pace
        self.stack = Stack(view)
        self.device = self.stack.device

    def in_one_process(self, samples: Passages, out: Path) -> TrainingLog:
        """All paths, one after the other."""
        runner = InOneProcess(self.stack, self.parts, dict(self.view.named_parameters()))

        def passes(forward: Any, batch: Any, backward: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
            return runner(batch), {}

        return self._fitted(samples, out, passes, lambda name: True, self.config, [_Redrawn(runner, self.orders)])

    def over_nodes(
        self, samples: Passages, out: Path, schedule: Schedule, lost: Sequence[int], limit: Limit
    ) -> tuple[TrainingLog, Schedule]:
        """This process's part, as a node of the schedule; in the end every process has all weights."""
        meeting = Meeting(schedule, self.device, lost, limit)
        schedule = meeting.schedule
        stage_of = stage_of_parameter(self.stack, self.parts)
        mine: Callable[[str], bool] = lambda name: stage_of(name) == meeting.stage  # noqa: E731
        trained = {name: each for name, each in self.view.named_parameters() if mine(name)}
        node = Node(self.stack, self.parts, trained, meeting, self.config.clip, self.pace)

        def passes(forward: Any, batch: Any, backward: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, taken = node(batch)
            return loss, {"seconds": taken}

        place = out / f"node-{meeting.node}"
        _agree(place, meeting)
        with processes.alone():
            config = replace(self.config, clip=UNCLIPPED)
            log = self._fitted(samples, place, passes, mine, config, [_Together(meeting)])
        for name, each in self.view.named_parameters():
            meeting.broadcast(each.data, schedule.assignment.stages[stage_of(name)][0])
        meeting.wait_for_all()
        meeting.leave()
        return log, schedule

    def over_cluster(self, samples: Passages, out: Path, schedule: Schedule) -> TrainingLog:
        """The same by processes that a Ray cluster starts, with all weights in the end."""
        regions = [schedule.network.nodes[node].region for node in schedule.nodes]
        state, log = on_ray(regions, partial(self._of_cluster, samples, out, schedule), self.device.type == "cuda")
        self.view.load_state_dict(state)
        return log

    def _of_cluster(self, samples: Passages, out: Path, schedule: Schedule) -> tuple[dict[str, Tensor], TrainingLog]:
        log, _ = self.over_nodes(samples, out, schedule, (), Limit())
        return self.view.state_dict(), log

    def _fitted(
        self, samples: Any, out: Path, passes: Any, trains: Any, config: TrainConfig, hooks: Sequence[Hook]
    ) -> TrainingLog:
        return fit(
            self.view,
            samples,
            Task(response_loss, passes=passes, dropout=False),
            config,
            out=out,
            trainable=trains,
            hooks=hooks,
            settings={"stages": [list(part) for part in self.parts], "clipped": self.config.clip},
        )


class _Redrawn(Hook):
    """Gives every step its orders."""

    def __init__(self, runner: InOneProcess, orders: Orders) -> None:
        self.runner, self.orders = runner, orders

    def before_step(self, run: TrainingRun) -> None:
        self.runner.orders = self.orders(run.step)


class _Together(Hook):
    """No node lets go of its older checkpoint before all have the newer one."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting

    def saved(self, folder: Path) -> None:
        self.meeting.wait_for_all()


def _agree(out: Path, meeting: Meeting) -> None:
    """Let every node go on from the newest checkpoint that all have; newer ones go.

    Raises:
        TrainingError: when one has none of those that the others have.
    """
    steps = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*") if (path / LOG).exists()}
    kept = dict(zip(meeting.schedule.nodes, map(set, meeting.told(sorted(steps))), strict=True))
    newest = max(set.intersection(*kept.values()), default=0)
    if not newest and any(kept.values()):
        lacking = min(kept, key=lambda node: len(kept[node]))
        raise TrainingError(
            f"{meeting.schedule.name(lacking)} has no checkpoint that the others have: copy {out.parent}/node-N of "
            f"another node of its stage to node-{lacking}, or remove all of them to start afresh"
        )
    for step, path in steps.items():
        if step > newest:
            shutil.rmtree(path)
