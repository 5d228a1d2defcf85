"""Training of a model whose microbatches take different paths through its stages, in one process or in one per node."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from lamella import processes
from lamella.data import Passages
from lamella.errors import MethodError, TrainingError
from lamella.files import Work
from lamella.methods.skippipe.communicator import Communicator, on_ray
from lamella.methods.skippipe.executor import NodeExecutor, SingleProcess
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import PipelineSchedule
from lamella.methods.skippipe.stages import Order, Span, left_out, spans, stage_of_parameter, with_stage
from lamella.plan import ModelReference, Plan
from lamella.registry import command
from lamella.results import Trained
from lamella.signature import Named
from lamella.stack import Stack, share
from lamella.train import Hook, Task, TrainConfig, TrainingLog, TrainingRun, fit, own, response_loss, with_weights_of
from lamella.train.runs import LOG
from lamella.zoo import default_device, open_stack

TRAINING = TrainConfig(lr=3e-4, schedule="constant", batch=2)  # the authors' rate; their microbatch has 8 sequences
UNCLIPPED = 1e30  # the trainer sees the gradients of one stage only; the executor clips by the global norm
Orders = Callable[[int], Sequence[Order]]  # from the step to the stages of each of its microbatches


@command("skippipe", "train", brief={"pipeline": None, "batch": 1}, unloaded=True)
def train(
    stack: Stack,
    train: Passages,
    pipeline: PipelineSchedule | None = None,
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
    """Train a model whose microbatches skip stages, so that it tolerates missing stages afterwards.

    Under ``torchrun``, and on a Ray cluster, every process is one node of the schedule. Under ``torchrun`` it loads the
    weights of its stage only, and the first process gathers all of them in the end. In one process the paths of a
    schedule are run one after the other, with the same gradients; without a schedule the stages that the microbatches
    of a step skip are drawn at random, every stage equally often.

    Args:
        stack: a decoder; it is not changed.
        train: text, in blocks, all tokens of which have loss.
        pipeline: the output of ``skippipe plan``.
        stages: without a schedule, the number of stages; the authors' 6 if omitted. A schedule defines its own.
        skip: without a schedule, the fraction of stages that a microbatch skips; the authors use a third.
        microbatches: without a schedule, microbatches per step; if omitted, the number of stages minus one.
        lost: nodes that have died: the paths of the others are re-planned, and the run resumes from the last
            checkpoint.
        pace: seconds of waiting per second of the schedule: above 0, links and nodes are slowed down to the times of
            the schedule.
        ray: start one process per node of the schedule on a Ray cluster, on a machine of the node's region, on which
            Ray was started with a resource of that name: ``ray start --resources='{"oslo": 2}'`` for two nodes.
        limit: the limits of the search for paths if nodes were lost.
        config: settings of the training: ``batch`` is the number of sequences per microbatch; the schedule defines the
            number of microbatches. With ``bf16`` messages between nodes are in bfloat16, too.
        work: the directory from which an interrupted run resumes, bit-exact.

    Returns:
        The model with its trained weights.

    Raises:
        MethodError: for stages or paths that do not fit the model, or unknown nodes.
        TrainingError: if the processes do not fit the schedule, a node dies, or training cannot start or diverges.
    """
    _check(config, pipeline, lost, ray)
    if pipeline is not None and processes.count() == 1 and lost:
        pipeline = pipeline.without(lost, limit)
    parts = spans(stack, stages if pipeline is None else len(pipeline.assignment))
    orders = (
        random_orders(len(parts), skip, microbatches, config.seed) if pipeline is None else _constant(pipeline.orders)
    )
    size = len(orders(0))
    config = replace(config, batch=config.batch * size).with_steps(len(train))
    trainer = _PathTrainer(stack, parts, orders, config, pace)
    if pipeline is not None and ray:
        log, weights = trainer.over_cluster(train, work.directory(), pipeline)
    elif pipeline is None or processes.count() == 1:
        log, weights = trainer.in_one_process(train, work.directory() / "run")
    else:
        log, weights, pipeline = trainer.over_nodes(train, work.directory(), pipeline, lost, limit)
        orders = _constant(pipeline.orders)
    assert config.steps is not None
    omitted = {left_out(len(parts), order) for step in range(config.steps) for order in orders(step)}
    findings: dict[str, Any] = {
        "stages": [list(part) for part in parts],
        "microbatches": size,
        "omitted in training": [list(each) for each in sorted(omitted)],
    }
    if pipeline is not None:
        findings |= {"predicted seconds": pipeline.seconds, "nodes": len(pipeline.nodes)}
    whole, reference, plan = stack, None, Plan(model=ModelReference.of(stack))
    if weights and stack.device.type == "meta":  # the first of several processes, which writes the result
        whole = reference = open_stack(stack.path, stack=stack.stack)
    trained = _with_weights(whole, weights)
    return Trained(stack=trained, plan=plan, log=log, findings=findings, reference=reference)


def _with_weights(stack: Stack, weights: Mapping[str, Tensor]) -> Stack:
    """Return the model with trained weights, of which a process that does not write the result has none."""
    named = stack.model.named_parameters()
    return with_weights_of(
        stack, share(stack.model, {id(each): nn.Parameter(weights[name]) for name, each in named if name in weights})
    )


def _check(config: TrainConfig, schedule: PipelineSchedule | None, lost: Sequence[int], ray: bool) -> None:
    if config.accumulate > 1 or config.shard:
        raise MethodError("the schedule defines the number of microbatches and of processes: omit accumulate and shard")
    if processes.count() > 1 and schedule is None:
        raise MethodError("several processes need a schedule with one node each: make one with skippipe plan")
    if lost and schedule is None:
        raise MethodError("--without names nodes of a schedule: give --pipeline, or omit --without")
    if ray and (schedule is None or processes.count() > 1):
        raise MethodError("Ray starts one process per node of a schedule: give --pipeline, and omit torchrun")


def random_orders(stages: int, skip: float, microbatches: int | None, seed: int) -> Orders:
    """Return orders that skip random stages, every one but the first equally often per step.

    Args:
        stages: the number of stages.
        skip: the fraction of stages to skip.
        microbatches: microbatches per step; the number of stages minus one if None.
        seed: random seed.

    Raises:
        MethodError: for a number of microbatches with which stages cannot be skipped equally often.
    """
    skipped, others = min(round(skip * stages), stages - 1), stages - 1
    count = microbatches or others
    if count * skipped % others:
        raise MethodError(
            f"microbatches {count}: {skipped} of {others} stages are skipped equally often with multiples of {others}"
        )

    def orders(step: int) -> list[Order]:
        shuffled = list(range(1, stages))
        random.Random(f"{seed} {step}").shuffle(shuffled)
        omitted = [
            {shuffled[(number * skipped + offset) % others] for offset in range(skipped)} for number in range(count)
        ]
        return [tuple(stage for stage in range(stages) if stage not in each) for each in omitted]

    return orders


def _constant(orders: Sequence[Order]) -> Orders:
    return lambda step: orders


class _PathTrainer:
    """Trains a copy of a model along paths."""

    def __init__(self, stack: Stack, parts: Sequence[Span], orders: Orders, config: TrainConfig, pace: float) -> None:
        self.stack, self.parts, self.orders, self.config, self.pace = stack, parts, orders, config, pace
        self.device = torch.device(default_device()) if stack.device.type == "meta" else stack.device
        self.stage_of = stage_of_parameter(stack, parts)

    def in_one_process(self, samples: Passages, out: Path) -> tuple[TrainingLog, dict[str, Tensor]]:
        """Run all paths one after the other; return the log and all weights."""
        view = _owned(self.stack)
        parameters = dict(view.named_parameters())
        runner = SingleProcess(Stack(view), self.parts, parameters, self.orders(0), self.config.bf16)

        def passes(forward: Any, batch: Any, backward: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
            return runner(batch), {}

        hook = _OrdersHook(runner, self.orders)
        log = self._fit(view, samples, out, passes, lambda name: True, self.config, [hook])
        return log, {name: each.data for name, each in parameters.items()}

    def over_nodes(
        self, samples: Passages, out: Path, schedule: PipelineSchedule, lost: Sequence[int], limit: Limit
    ) -> tuple[TrainingLog, dict[str, Tensor], PipelineSchedule]:
        """Train as one node of the schedule; return the log, all weights, and the schedule that was followed.

        If the model was opened without weights, only the first process has all of them in the end.
        """
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        communicator = Communicator(schedule, self.device, lost, limit, dtype)
        schedule = communicator.schedule
        staged = with_stage(self.stack, self.parts, communicator.stage, self.device)
        view = _owned(self.stack) if staged is self.stack else staged.model  # loaded weights belong to nobody else
        is_own: Callable[[str], bool] = lambda name: self.stage_of(name) == communicator.stage  # noqa: E731
        parameters = {name: each for name, each in view.named_parameters() if is_own(name)}
        node = NodeExecutor(
            Stack(view), self.parts, parameters, communicator, self.config.clip, self.pace, self.config.bf16
        )

        def passes(forward: Any, batch: Any, backward: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, elapsed = node(batch)
            return loss, {"seconds": elapsed}

        directory = out / f"node-{communicator.node}"
        _align_checkpoints(directory, communicator)
        with processes.alone():
            config = replace(self.config, clip=UNCLIPPED)
            log = self._fit(view, samples, directory, passes, is_own, config, [_CheckpointBarrier(communicator)])
        weights = self._gather(parameters, communicator)
        communicator.wait_for_all()
        communicator.leave()
        return log, weights, schedule

    def _gather(self, parameters: Mapping[str, nn.Parameter], communicator: Communicator) -> dict[str, Tensor]:
        """Return the weights of all stages, or none if another process gathers them."""
        found, nodes = {}, communicator.schedule.nodes
        for name, each in self.stack.model.named_parameters():
            own = parameters.get(name)
            tensor = torch.empty(each.shape, dtype=each.dtype, device=self.device) if own is None else own.data
            communicator.broadcast(tensor, communicator.schedule.assignment.stages[self.stage_of(name)][0])
            if not each.is_meta or communicator.node == nodes[0]:
                found[name] = tensor
        return found

    def over_cluster(
        self, samples: Passages, out: Path, schedule: PipelineSchedule
    ) -> tuple[TrainingLog, dict[str, Tensor]]:
        """Train in processes that Ray starts; return the log and all weights."""
        regions = [schedule.network.nodes[node].region for node in schedule.nodes]
        return on_ray(regions, partial(self._of_cluster, samples, out, schedule), self.device.type == "cuda")

    def _of_cluster(
        self, samples: Passages, out: Path, schedule: PipelineSchedule
    ) -> tuple[TrainingLog, dict[str, Tensor]]:
        log, weights, _ = self.over_nodes(samples, out, schedule, (), Limit())
        return log, weights

    def _fit(
        self, view: Any, samples: Any, out: Path, passes: Any, trains: Any, config: TrainConfig, hooks: Sequence[Hook]
    ) -> TrainingLog:
        return fit(
            view,
            samples,
            Task(response_loss, passes=passes, dropout=False),
            config,
            out=out,
            trainable=trains,
            hooks=hooks,
            settings={"stages": [list(part) for part in self.parts], "clipped": self.config.clip},
        )


def _owned(stack: Stack) -> Any:
    """Return a view of a model with its own weights."""
    view = share(stack.model)
    own(view, lambda name: True)
    return view


class _OrdersHook(Hook):
    """Sets the orders of every step."""

    def __init__(self, runner: SingleProcess, orders: Orders) -> None:
        self.runner, self.orders = runner, orders

    def before_step(self, run: TrainingRun) -> None:
        self.runner.orders = self.orders(run.step)


class _CheckpointBarrier(Hook):
    """Keeps the older checkpoints of all nodes until all have saved the newer one."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def saved(self, folder: Path) -> None:
        self.communicator.wait_for_all()


def _align_checkpoints(out: Path, communicator: Communicator) -> None:
    """Resume every node from the newest checkpoint that all have; newer ones are removed.

    Raises:
        TrainingError: if a node lacks the checkpoints that the others have.
    """
    steps = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*") if (path / LOG).exists()}
    available = dict(zip(communicator.schedule.nodes, map(set, communicator.gather_values(sorted(steps))), strict=True))
    newest = max(set.intersection(*available.values()), default=0)
    if not newest and any(available.values()):
        missing = min(available, key=lambda node: len(available[node]))
        raise TrainingError(
            f"{communicator.schedule.name(missing)} has no checkpoint that the others have: copy {out.parent}/node-N "
            "of "
            f"another node of its stage to node-{missing}, or remove all of them to start from scratch"
        )
    for step, path in steps.items():
        if step > newest:
            shutil.rmtree(path)
