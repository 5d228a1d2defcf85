"""Training along paths in one process, what the model loses without stages, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import LamellaError, MethodError, TrainingError
from lamella.files import Work
from lamella.methods.skippipe import Load, Machine, PipelineNetwork, omit, plan, skippipe, stages, train
from lamella.methods.skippipe.executor import SingleProcess
from lamella.methods.skippipe.recipe import random_orders
from lamella.methods.skippipe.stages import losses, spans
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.train import Task, TrainConfig, blocks, collate, fit, mean_loss, own, response_loss
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 100, (32, 10), generator=torch.Generator().manual_seed(0))
SAMPLES: Any = blocks(TOKENS, loss_on="all")
CONFIG = TrainConfig(steps=6, lr=1e-3, batch=1, log_every=1)
WHOLE = (0, 1, 2, 3)


def gradients(orders: list[tuple[int, ...]], rows: list[int]) -> dict[str, Tensor]:
    stack = Stack(nano("llama"))
    names = dict(stack.model.named_parameters())
    with torch.enable_grad():
        SingleProcess(stack, spans(stack), names, orders)(collate([SAMPLES[row] for row in rows]))
    return {name: each.grad for name, each in names.items()}


def test_without_skips_it_is_plain_training_bitwise(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    ours = train(stack, SAMPLES, skip=0.0, microbatches=4, config=CONFIG, work=Work(tmp_path / "ours"))
    view = share(stack.model)
    own(view, lambda name: True)
    log = fit(view, SAMPLES, Task(response_loss), replace(CONFIG, accumulate=4), out=tmp_path / "plain")
    assert ours.log.train == log.train
    for name, each in view.named_parameters():
        assert torch.equal(each, ours.stack.model.get_parameter(name)), name


def test_a_stage_that_is_left_out_has_no_gradient_and_one_that_is_visited_the_mean_over_its_visits() -> None:
    orders = [(0, 1, 3), (0, 3)]
    both = gradients(orders, [0, 1])
    alone = [gradients([order], [row]) for row, order in enumerate(orders)]
    for name, grad in both.items():
        stage = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        visits = [each[name] for each, order in zip(alone, orders, strict=True) if stage in order]
        wanted = torch.stack(visits).mean(0) if visits else torch.zeros_like(grad)
        assert torch.allclose(grad, wanted, atol=1e-7), name
        assert bool((grad == 0).all()) == (stage == 2)


def test_which_microbatch_takes_which_path_does_not_change_the_gradient_on_average() -> None:
    orders = [(0, 1, 2), (0, 2, 3), (0, 3, 1)]
    every = [gradients(orders, list(rows)) for rows in itertools.permutations(range(3))]
    pairs = [gradients([order], [row]) for order in orders for row in range(3)]
    for name in every[0]:
        stage = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        visiting = [each[name] for number, each in enumerate(pairs) if stage in orders[number // 3]]
        mean = torch.stack([each[name] for each in every]).mean(0)
        assert torch.allclose(mean, torch.stack(visiting).mean(0), atol=1e-6), name


@pytest.mark.parametrize(("stages", "skip", "count"), [(6, 1 / 3, None), (4, 0.25, 6), (6, 0.5, 10), (2, 0.5, None)])
def test_orders_at_random_leave_out_every_stage_but_the_first_equally_often(
    stages: int, skip: float, count: int | None
) -> None:
    orders = random_orders(stages, skip, count, seed=0)
    seen = set()
    for step in range(20):
        made = orders(step)
        assert made == orders(step) and all(order[0] == 0 and list(order) == sorted(order) for order in made)
        assert {len(order) for order in made} == {stages - round(skip * stages)}
        visits = Counter(stage for order in made for stage in order)
        assert len({visits[stage] for stage in range(1, stages)}) == 1 and visits[0] == len(made)
        seen |= set(made)
    assert len(seen) == math.comb(stages - 1, round(skip * stages))  # all of them, sooner or later


def test_a_run_that_was_stopped_draws_the_same_orders(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    whole = train(stack, SAMPLES, skip=0.5, config=CONFIG, work=Work(tmp_path / "whole"))
    settings = replace(CONFIG, save_every=3)

    class Stopped(Exception):
        pass

    def stop(self: Any, batch: Any, run: Any = SingleProcess.__call__) -> Tensor:
        stop.calls += 1  # type: ignore[attr-defined]
        if stop.calls == 5:  # type: ignore[attr-defined]
            raise Stopped
        return run(self, batch)

    stop.calls = 0  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(SingleProcess, "__call__", stop)
        train(stack, SAMPLES, skip=0.5, config=settings, work=Work(tmp_path / "parts"))
    parts = train(stack, SAMPLES, skip=0.5, config=settings, work=Work(tmp_path / "parts"))
    for name, each in whole.stack.model.named_parameters():
        assert torch.equal(each, parts.stack.model.get_parameter(name)), name
    assert parts.findings == whole.findings and len(whole.findings["omitted in training"]) == 3


# Omission


def test_the_loss_without_stages_is_that_of_the_model_without_their_layers() -> None:
    stack = Stack(nano("llama"))
    parts = spans(stack)
    found = losses(stack, TOKENS, parts, [WHOLE, (0, 2), (0, 2, 1, 3)])
    assert found[0] == pytest.approx(mean_loss(stack.model, SAMPLES), rel=1e-5)
    series = skippipe(stack, TOKENS)
    assert [plan.removed for plan in series] == [0, 2, 4]
    for made, point in zip(series, series.points, strict=True):
        assert point.scores["loss"] == pytest.approx(mean_loss(apply(stack, made), SAMPLES), rel=1e-5)
    swapped: Any = nano("llama")
    swapped.model.layers = torch.nn.ModuleList(swapped.model.layers[layer] for layer in (0, 2, 1, 3))
    assert found[2] == pytest.approx(mean_loss(swapped, SAMPLES), rel=1e-5)


def test_rows_that_are_measured_together_lose_what_each_loses_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, orders = Stack(nano("llama")), [WHOLE, (0, 2), (0, 2, 1, 3), (1, 2, 3)]
    by_itself = [losses(stack, TOKENS[row : row + 1], spans(stack), orders) for row in range(len(TOKENS))]
    wanted = torch.tensor(by_itself, dtype=torch.float64).mean(0).tolist()
    passes: list[int] = []

    def counted(self: Stack, rows: Any, context: Any = Stack.context) -> Any:
        passes.append(len(rows["input_ids"]))
        return context(self, rows)

    monkeypatch.setattr(Stack, "context", counted)
    assert losses(stack, TOKENS, spans(stack), orders) == pytest.approx(wanted, rel=1e-6)
    monkeypatch.setattr(stages, "TOKENS", 70)  # seven rows of ten tokens, and the last batch is shorter
    assert losses(stack, TOKENS, spans(stack), orders) == pytest.approx(wanted, rel=1e-6)
    assert passes == [32, 7, 7, 7, 7, 4]


def test_the_series_leaves_out_the_best_set_of_every_size() -> None:
    stack = Stack(nano("llama"))
    study = omit(stack, TOKENS)
    for count, point in enumerate(skippipe(stack, TOKENS).points):
        sets = [each for each in study["omitted"] if len(each["without"]) == count]
        if sets:
            best = min(sets, key=lambda each: each["loss"])
            assert point.scores["loss"] == pytest.approx(best["loss"])
            assert point.drop == [f"layers.{stage}" for stage in best["without"]]


def test_the_report_has_every_set_of_stages_swaps_and_the_first_one_and_tells_trained_sets_apart() -> None:
    stack = Stack(nano("llama"))
    made = small_plan(stages=4, sizes=(1, 1, 1, 1), skip=0.25)
    study = omit(stack, TOKENS, made)
    sets = [tuple(each["without"]) for each in study["omitted"]]
    assert sorted(sets) == sorted(each for count in (1, 2, 3) for each in itertools.combinations(range(1, 4), count))
    left = {tuple(set(range(4)) - set(order)) for order in made.orders}
    assert {tuple(each["without"]) for each in study["omitted"] if each["trained"]} == left
    assert [each["stages"] for each in study["swapped"]] == [[1, 2], [2, 3]]
    assert study["without the first"] != study["full"]
    assert {(each["omitted"], each.get("trained")) for each in study["means"]} >= {(1, None), (1, True), (2, False)}


def test_stages_are_as_long_as_one_another_but_for_one_layer() -> None:
    stack = Stack(nano("llama", num_hidden_layers=8))
    assert spans(stack) == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    series = skippipe(stack, TOKENS[:4])
    assert [made.removed for made in series] == sorted({made.removed for made in series})


# What is refused


def small_plan(**options: Any) -> Any:
    nodes = [*[Machine("oslo", 0.02, 2)] * 2, *[Machine("paris")] * 2]
    network = PipelineNetwork.of(nodes, {("oslo", "paris"): (14.0, 0.12)}, Load(layers=1))
    settings = {"stages": 2, "microbatches": 2, "trials": 10, "population": 4, "seconds": 5.0}
    return plan(network, **settings | options)  # type: ignore[arg-type]


def test_a_plan_says_what_it_takes_beside_the_full_pipeline_and_chance() -> None:
    made = small_plan(skip=0.5)
    assert set(made.findings["predicted"]) == {"full", "random", "load alone", "planned"}
    assert made.findings["bound"] <= made.findings["predicted"]["planned"] == made.seconds
    assert made.findings["predicted"]["planned"] <= made.findings["predicted"]["load alone"]
    assert sum(made.findings["visits"]) == made.microbatches and len(made.findings["gantt"]) == 3 * made.microbatches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 9}, "9 stages: 4 nodes can form 1 to 4"),
        ({"sizes": (1, 1)}, "stages of 1, 1 nodes: give sizes of at least 1 that add up to 4"),
        ({"sizes": (2, 1, 1)}, "sizes has 3 entries, but stages is 2: give one size per stage"),
    ],
)
def test_plans_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as error:
        small_plan(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 5}, "stages 5: the 4 layers of .* can form 2 to 4 stages"),
        (
            {"skip": 0.25, "microbatches": 2},
            "microbatches 2: 1 of 3 stages are skipped equally often with multiples of 3",
        ),
        ({"lost": (1,)}, "--without names nodes of a schedule:"),
        ({"ray": True}, "Ray starts one process per node of a schedule: give --pipeline,"),
        ({"config": replace(CONFIG, accumulate=2)}, "omit accumulate and shard"),
    ],
)
def test_trainings_that_cannot_be_are_refused_in_one_line(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LamellaError, match=message) as error:
        train(Stack(nano("llama")), SAMPLES, work=Work(tmp_path), **{"config": CONFIG} | options)
    assert "\n" not in str(error.value)


def test_several_processes_without_a_schedule_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises((MethodError, TrainingError), match="several processes need a schedule"):
        train(Stack(nano("llama")), SAMPLES, config=CONFIG, work=Work(tmp_path))
