"""The pipeline over processes: gradients of one process, the simulator's times, checkpoints, and nodes that die."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.errors import TrainingError
from lamella.files import Work
from lamella.methods.skippipe import NetworkProfile, train
from lamella.methods.skippipe.communicator import on_ray
from lamella.methods.skippipe.network import Machine, PipelineNetwork
from lamella.methods.skippipe.paths import Assignment, Limits
from lamella.methods.skippipe.schedule import PipelineSchedule
from lamella.stack import Stack
from lamella.zoo.nano import nano

from .nodes import CONFIG, SAMPLES

pytestmark = pytest.mark.slow
Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def processes() -> Iterator[Run]:
    """Run a scenario in processes of its own, and return their exit codes."""
    module = Path(__file__).with_name("nodes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(module)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def run(
            what: str, schedule: PipelineSchedule, out: Path, count: int | None = None, **options: Any
        ) -> list[int]:
            out.mkdir(parents=True, exist_ok=True)
            schedule.write(out)
            number = len(schedule.nodes) if count is None else count
            message = {"what": what, "schedule": str(out), "out": str(out), "processes": number, "options": options}
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(message) + "\n")
            server.stdin.flush()
            codes: list[int] = json.loads(server.stdout.readline())
            return codes

        yield run
        server.stdin.close()


def schedule(stages: list[list[int]], paths: list[tuple[int, ...]], count: int, **limits: int) -> PipelineSchedule:
    """By hand, over links of half a second and nodes of a fifth."""
    nodes = tuple(Machine("here") for stage in stages for _ in stage)
    edge = 0.5 * (1 - np.eye(len(nodes)))
    network = PipelineNetwork(nodes, edge, np.full(len(nodes), 0.2))
    return PipelineSchedule(
        network=network,
        assignment=Assignment(tuple(map(tuple, stages))),
        paths=tuple(paths),
        microbatches=count,
        limits=Limits(length=len(paths[0]), **limits),
    )


FULL = schedule([[0], [1], [2], [3]], [(0, 1, 2, 3)], 3)
SKIPS = schedule([[0, 1], [2, 3], [4], [5]], [(0, 2, 5), (1, 4, 3), (0, 4, 5), (1, 3, 4)], 6)  # and one swaps


def by_hand(orders: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """The gradients of one model whose list of layers is changed for each microbatch, by transformers' own forward."""
    model: Any = nano("llama")
    layers, visits = model.model.layers, [0] * len(model.model.layers)
    with torch.enable_grad():
        for row, order in enumerate(orders):
            model.model.layers = torch.nn.ModuleList(layers[stage] for stage in order)
            model.model.config = copy.copy(model.config)
            model.model.config.num_hidden_layers = len(order)
            ids = SAMPLES[row]["input_ids"][None]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for stage in order:
                visits[stage] += 1
    model.model.layers = layers
    grads = {}
    for name, each in model.named_parameters():
        stage = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        grads[name] = each.grad / visits[stage]
    return grads


@pytest.mark.parametrize(
    "made", [pytest.param(FULL, marks=pytest.mark.exhaustive), SKIPS], ids=["full", "skips and a swap"]
)
def test_gradients_over_processes_are_those_of_one_model_that_runs_each_order(
    made: PipelineSchedule, processes: Run, tmp_path: Path
) -> None:
    assert processes("iterate", made, tmp_path) == [0] * len(made.nodes)
    found = [torch.load(tmp_path / f"{node}.pt") for node in made.nodes]
    wanted = by_hand(made.orders)
    seen = set()
    for node, each in zip(made.nodes, found, strict=True):
        assert each["loss"] == pytest.approx(found[0]["loss"])
        for name, grad in each["grads"].items():
            seen.add(name)
            assert (grad - wanted[name]).abs().max() <= 1e-5 * max(1.0, float(wanted[name].abs().max())), (node, name)
    assert seen == set(wanted)


@pytest.mark.exhaustive
def test_an_iteration_over_slowed_links_takes_what_the_simulator_says(processes: Run, tmp_path: Path) -> None:
    assert processes("iterate", SKIPS, tmp_path, pace=0.5, times=2) == [0] * 6
    taken = min(torch.load(tmp_path / "0.pt")["seconds"])
    assert abs(taken / (0.5 * SKIPS.seconds) - 1) <= 0.15


@pytest.mark.exhaustive
def test_a_node_that_dies_is_named_and_the_run_resumes_bitwise_or_without_it(processes: Run, tmp_path: Path) -> None:
    assert processes("learn", SKIPS, tmp_path / "whole", work=str(tmp_path / "w1")) == [0] * 6
    whole = [torch.load(tmp_path / "whole" / f"{rank}.pt") for rank in range(6)]
    for each in whole:
        assert all(torch.equal(tensor, whole[0]["state"][name]) for name, tensor in each["state"].items())

    work = str(tmp_path / "w2")
    codes = processes("learn", SKIPS, tmp_path / "dead", work=work, dies=3, at=4)
    assert codes == [2, 2, 2, -9, 2, 2]
    for rank in (0, 1, 2, 4, 5):
        message = (tmp_path / "dead" / f"{rank}.txt").read_text()
        assert (
            message.startswith("node 3 (here) died: start again") and "--without 3" in message and "\n" not in message
        )
    subprocess.run(["cp", "-r", work, str(tmp_path / "w3")], check=True)

    assert processes("learn", SKIPS, tmp_path / "again", work=work) == [0] * 6
    again = torch.load(tmp_path / "again" / "0.pt")
    assert all(torch.equal(tensor, whole[0]["state"][name]) for name, tensor in again["state"].items())
    assert again["losses"] == whole[0]["losses"]

    codes = processes("learn", SKIPS, tmp_path / "less", 5, work=str(tmp_path / "w3"), lost=[3])
    assert codes == [0] * 5
    less = torch.load(tmp_path / "less" / "0.pt")
    assert less["losses"][:2] == whole[0]["losses"][:2] and len(less["losses"]) == 4
    assert less["losses"][2:] != whole[0]["losses"][2:]  # by other paths


@pytest.mark.exhaustive
def test_one_process_along_the_same_paths_learns_the_same(processes: Run, tmp_path: Path) -> None:
    assert processes("learn", SKIPS, tmp_path / "many", work=str(tmp_path / "w1")) == [0] * 6
    many = torch.load(tmp_path / "many" / "0.pt")
    with torch.enable_grad():
        one = train(Stack(nano("llama")), SAMPLES, SKIPS, config=CONFIG, work=Work(tmp_path / "w2"))
    for name, each in one.stack.model.state_dict().items():
        assert (each - many["state"][name]).abs().max() <= 1e-5, name
    assert [point.loss for point in one.log.train] == pytest.approx(many["losses"], rel=1e-5)


PAIR = schedule([[0], [1]], [(0, 1)], 2)


def test_a_process_loads_the_weights_of_its_stage_and_the_first_gathers_all(processes: Run, tmp_path: Path) -> None:
    nano("llama").save_pretrained(tmp_path / "model")
    assert processes("learn", PAIR, tmp_path / "whole", work=str(tmp_path / "w1")) == [0, 0]
    parts = {"work": str(tmp_path / "w2"), "model": str(tmp_path / "model")}
    assert processes("learn", PAIR, tmp_path / "parts", **parts) == [0, 0]
    whole = torch.load(tmp_path / "whole" / "0.pt")
    first, second = (torch.load(tmp_path / "parts" / f"{rank}.pt") for rank in range(2))
    layers = [{int(name.split(".")[2]) for name in each["held"] if ".layers." in name} for each in (first, second)]
    assert layers == [{0, 1}, {2, 3}]
    rest = [{name for name in each["held"] if ".layers." not in name} for each in (first, second)]
    assert rest == [{name for name in whole["state"] if ".layers." not in name}, {"model.norm.weight"}]
    assert first["losses"] == second["losses"] == whole["losses"]
    assert first["state"].keys() == whole["state"].keys() and all(each.is_meta for each in second["state"].values())
    for name, each in first["state"].items():
        assert torch.equal(each, whole["state"][name]), name


def test_in_bfloat16_processes_learn_what_one_process_does(processes: Run, tmp_path: Path) -> None:
    assert processes("learn", PAIR, tmp_path / "many", work=str(tmp_path / "w1"), bf16=True) == [0, 0]
    many = torch.load(tmp_path / "many" / "0.pt")
    kinds, linear = set(), torch.nn.Linear.forward

    def noted(self: Any, x: Tensor) -> Tensor:
        out = linear(self, x)
        kinds.add(out.dtype)
        return out

    with torch.enable_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Linear, "forward", noted)
        config = replace(CONFIG, bf16=True)
        one = train(Stack(nano("llama")), SAMPLES, PAIR, config=config, work=Work(tmp_path / "w2"))
    assert kinds == {torch.bfloat16}
    assert [point.loss for point in one.log.train] == pytest.approx(many["losses"], rel=1e-5)
    for name, each in one.stack.model.state_dict().items():
        assert each.dtype == torch.float32 and (each - many["state"][name]).abs().max() <= 1e-5, name


def test_a_profile_measures_the_delay_of_a_link_and_the_planner_takes_it(processes: Run, tmp_path: Path) -> None:
    assert processes("measure", PAIR, tmp_path, delay=0.05) == [0, 0]
    first, second = (NetworkProfile.read(tmp_path / str(rank)) for rank in range(2))
    assert (first.nodes, first.links, first.load) == (second.nodes, second.links, second.load)
    assert [node.region for node in first.nodes] == ["oslo", "paris"] and first.nodes[0].memory == 2
    ((between, (milliseconds, _)),) = first.links.items()
    assert between == ("oslo", "paris") and 50 <= milliseconds < 150
    network = PipelineNetwork.open(str(tmp_path / "0"))
    assert network.edge[0, 1] >= 0.05 and network.work[0] == pytest.approx(first.nodes[0].seconds * 2 * 2 / 2)


def test_a_world_that_does_not_fit_is_refused_in_one_line(processes: Run, tmp_path: Path) -> None:
    assert processes("learn", FULL, tmp_path, 3, work=str(tmp_path / "w")) == [2] * 3
    message = (tmp_path / "0.txt").read_text()
    assert message.startswith("the schedule has 4 nodes, and 3 processes run: start one for each, with torchrun")
    assert "\n" not in message


@pytest.mark.exhaustive
def test_torchrun_trains_from_the_command_line(tmp_path: Path) -> None:
    made = schedule([[0], [1]], [(0, 1)], 2)
    made.write(tmp_path)
    model = Path(__file__).parents[2] / "models" / "nano-llama"
    command = f"run skippipe train {model} --pipeline {tmp_path} --train pydoc --test pydoc -o {tmp_path / 'out'}"
    launch = "torch.distributed.run --standalone --nproc-per-node 2 -m lamella"
    settings = "--sequences 8 --length 16 --steps 2 --batch 1 --save-every 1"
    done = subprocess.run(
        [sys.executable, "-m", *f"{launch} {command} {settings}".split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert evidence["findings"]["nodes"] == 2 and [point["step"] for point in evidence["curve"]][-1] == 2
    assert evidence["settings"]["processes"] == 1  # each trains its stage by itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "schedule.json"]


@pytest.mark.exhaustive
def test_a_ray_cluster_trains_what_one_process_does_along_the_same_paths(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    made = schedule([[0], [1]], [(0, 1)], 2)
    path = {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    cluster = {"num_cpus": 2, "log_to_driver": False, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(**cluster, resources={"here": 2}, runtime_env={"env_vars": path})
    try:
        stack = Stack(nano("llama"))
        with torch.enable_grad():
            many = train(stack, SAMPLES, made, ray=True, config=CONFIG, work=Work(tmp_path / "many"))
        with pytest.raises(TrainingError, match="provides 2 of 3 nodes in here: start Ray on its machines with"):
            train(stack, SAMPLES, schedule([[0, 1], [2]], [(0, 2), (1, 2)], 2), ray=True, config=CONFIG)

        def dies() -> None:
            if os.environ["RANK"] == "0":
                os._exit(1)
            raise TrainingError(f"node 0 of {os.environ['WORLD_SIZE']} died")

        with pytest.raises(TrainingError, match="node 0 of 2 died"):
            on_ray(["here", "here"], dies)
    finally:
        ray.shutdown()
    with torch.enable_grad():
        one = train(stack, SAMPLES, made, config=CONFIG, work=Work(tmp_path / "one"))
    assert [point.loss for point in many.log.train] == pytest.approx([point.loss for point in one.log.train], rel=1e-5)
    for name, each in many.stack.model.state_dict().items():
        assert (each - one.stack.model.state_dict()[name]).abs().max() <= 1e-5, name
        moved = (each - stack.model.state_dict()[name]).abs().max()
        assert moved > 1e-5, name
    assert {each.name for each in (tmp_path / "many").iterdir()} == {"node-0", "node-1"}
