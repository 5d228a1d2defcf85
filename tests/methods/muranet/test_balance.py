"""Two losses over shared stages: gradients that add up, clips, weights, and stages that part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.muranet import (
    BlockDesign,
    FloorPlans,
    LossBalance,
    PlanNetwork,
    PlanTraining,
    RecogniserShape,
    UNetDecoder,
    branch_point,
    muranet,
)
from lamella.methods.muranet import synthetic_floor_plan as made
from lamella.methods.muranet.balance import BalanceHook, WeightedNetwork, agreement, gradients, shared_stages
from lamella.methods.muranet.frame import PlanRows, collate
from lamella.methods.muranet.recipe import PlanLoss, task_losses, train_network
from lamella.train import TrainConfig, adamw, choose

SMALL = RecogniserShape(encoder="nano", size=64, scales=1, neck=8)
PLANS = FloorPlans.of([made(seed, 64) for seed in range(4)])
CONFIG = TrainConfig(steps=3, lr=1e-3, batch=2, clip=1e6, log_every=1)


def network(shape: RecogniserShape = SMALL) -> PlanNetwork:
    torch.manual_seed(0)
    return shape.build(2)


def batch(size: int = 64) -> dict[str, Tensor]:
    return collate(list(PlanRows(PLANS[:2], size, False)))


def test_the_gradient_on_shared_stages_is_the_sum_of_both_tasks() -> None:
    model = network().double().eval()
    stages = shared_stages(model)
    assert list(stages) == [0, 1, 2, 3, 4]
    losses = task_losses(model, batch(32))
    ours = gradients(10 * losses["walls"] + losses["openings"], stages)
    walls, openings = (gradients(losses[task], stages) for task in ("walls", "openings"))
    for place in stages:
        torch.testing.assert_close(ours[place], 10 * walls[place] + openings[place], rtol=1e-6, atol=1e-9)
    rows = agreement(walls, openings)
    for place, (norm, other, cosine) in enumerate(rows.tolist()):
        assert norm == pytest.approx(float(walls[place].square().sum().sqrt()))
        assert other == pytest.approx(float(openings[place].square().sum().sqrt()))
        assert cosine == pytest.approx(float(torch.cosine_similarity(walls[place], openings[place], dim=0)))


@torch.no_grad()
def test_what_happens_in_one_decoder_does_not_reach_the_other() -> None:
    model = network().eval()
    before = model(batch()["x"])
    for each in model.walls.parameters():  # type: ignore[union-attr]
        each.mul_(1.01)
    after = model(batch()["x"])
    assert torch.equal(before.cells, after.cells) and not torch.equal(before.walls[0], after.walls[0])
    for each in model.openings.parameters():  # type: ignore[union-attr]
        each.mul_(1.01)
    last = model(batch()["x"])
    assert torch.equal(after.walls[0], last.walls[0]) and not torch.equal(after.cells, last.cells)


def test_training_one_task_alone_leaves_the_others_output_when_what_is_shared_stays(tmp_path: Path) -> None:
    model = network()
    shared, other = model.encoder, model.openings
    assert other is not None
    before = model.eval()(batch()["x"])
    model.freeze(shared, other)
    train_network(model.train(), PLANS, CONFIG, PlanTraining(), LossBalance(), frame=(64, False), out=tmp_path / "run")
    after = model.eval()(batch()["x"])
    assert torch.equal(before.cells, after.cells) and not torch.equal(before.walls[0], after.walls[0])


def test_weights_of_deep_supervision_go_with_the_strides_of_its_maps() -> None:
    for strides, expected in (
        ((1, 2, 4, 8, 16), (1.0, 0.4, 0.2)),
        ((2, 4, 8, 16), (1.0, 0.4, 0.2)),
        ((4, 8, 16), (1.0, 0.2)),
    ):
        channels = [8] * len(strides)
        maps = [torch.randn(1, 8, 32 // stride, 32 // stride) for stride in strides]
        decoder = UNetDecoder(channels, strides, BlockDesign(scales=1), deep=True)
        assert decoder.weights == expected and len(decoder(maps, (32, 32))) == len(expected)
        assert UNetDecoder(channels, strides, BlockDesign(scales=1)).weights == (1.0,)


def test_norms_biases_and_what_scales_a_block_or_a_loss_do_not_decay() -> None:
    for encoder in ("nano", "resnet18"):
        model = WeightedNetwork(
            network(replace(SMALL, encoder=encoder, insert=(1,))), LossBalance(weighting="uncertainty")
        )
        decayed = {id(each) for each in adamw(model, choose(model), CONFIG).param_groups[0]["params"]}
        matrices = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Conv2d)}
        assert decayed == matrices and id(model.s) not in decayed


class Run:
    """What hooks see of a run."""

    step = 0

    def __init__(self) -> None:
        self.notes: dict[str, float] = {}

    def weigh(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(0)

    def note(self, name: str, value: Tensor) -> None:
        self.notes[name] = float(value)


def stepped(balance: LossBalance, model: PlanNetwork) -> tuple[WeightedNetwork, BalanceHook, Run, dict[str, Any]]:
    """One step's passes of a balance on a network; its gradients stay in place."""
    balanced = WeightedNetwork(model, balance).eval()
    hook, run, lesson = BalanceHook(balanced, balance), Run(), PlanLoss(PlanTraining())
    hook.before_step(run)  # type: ignore[arg-type]
    _, parts = hook.passes(lambda given: lesson(balanced, given), batch(), lambda loss, **_: loss.backward())
    hook.before_update(run)  # type: ignore[arg-type]
    return balanced, hook, run, parts


def of_tasks(model: PlanNetwork) -> dict[str, list[Tensor]]:
    """The gradient of each task on all parameters."""
    found = {}
    for task in ("walls", "openings"):
        model.zero_grad()
        task_losses(model, batch())[task].backward()
        found[task] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def test_each_task_is_clipped_by_itself_before_they_are_added() -> None:
    model = network().eval()
    each = of_tasks(model)
    weights = {"walls": 10.0, "openings": 1.0}
    stepped(LossBalance(clip_each=0.5), model)
    norms = {task: float(torch.cat([g.flatten() for g in found]).norm()) for task, found in each.items()}
    assert all(weights[task] * norms[task] > 0.5 for task in weights)
    for place, parameter in enumerate(model.parameters()):
        expected = sum(0.5 / norms[task] * each[task][place] for task in weights)
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_uncertainty_is_its_formula_and_learns_its_weights() -> None:
    model = WeightedNetwork(network(), LossBalance(weighting="uncertainty"))
    with torch.no_grad():
        model.s.copy_(torch.tensor([0.3, -0.7]))
    losses = {"walls": torch.tensor(0.9), "openings": torch.tensor(8.0)}
    s = model.s.detach().double()
    expected = sum(torch.exp(-s[n]) * each.double() + torch.log1p(s[n].exp()) for n, each in enumerate(losses.values()))
    assert float(model.total(losses).detach()) == pytest.approx(float(expected), rel=1e-6)
    found = muranet(PLANS, shape=SMALL, balance=LossBalance(weighting="uncertainty"), config=CONFIG)
    points = [point.parts["weight of walls"] for point in found.log.train if "weight of walls" in point.parts]
    assert points[0] == 1.0 and not any(name == "s" for name in found.model.state_dict())


def test_gradnorm_lowers_the_weight_of_the_task_whose_gradient_is_larger() -> None:
    model = network().eval()
    balanced, hook, run, parts = stepped(LossBalance(weighting="gradnorm", wall_weight=1.0, opening_weight=1.0), model)
    norms = [run.notes[f"gradient of {task}, stage 4"] for task in ("walls", "openings")]
    larger = 0 if norms[0] > norms[1] else 1
    before = torch.ones(2)
    moved = before.clone()
    moved[larger] -= 0.025  # the first step of Adam, against the slope
    moved[1 - larger] += 0.025
    torch.testing.assert_close(balanced.weights, moved * 2 / moved.sum(), rtol=1e-4, atol=1e-5)
    assert float(balanced.weights.sum()) == pytest.approx(2.0)
    assert hook.first is not None
    assert hook.first.tolist() == pytest.approx([float(parts[task].detach()) for task in ("walls", "openings")])


def test_gradnorm_resumes_from_what_it_has_kept(tmp_path: Path) -> None:
    balance = LossBalance(weighting="gradnorm")
    balanced, hook, _, _ = stepped(balance, network().eval())
    hook.save(tmp_path)
    again = WeightedNetwork(network(), balance)
    other = BalanceHook(again, balance)
    other.load(tmp_path)
    assert torch.equal(again.weights, balanced.weights) and torch.equal(other.moments, hook.moments)
    assert other.first is not None and hook.first is not None and torch.equal(other.first, hook.first)


def test_gradients_are_logged_for_every_shared_stage() -> None:
    found = muranet(PLANS, shape=replace(SMALL, split=3), config=CONFIG)
    parts = found.log.train[0].parts
    for stage in range(3):
        for name in ("gradient of walls", "gradient of openings", "cosine"):
            assert f"{name}, stage {stage}" in parts
    assert "cosine, stage 3" not in parts and {"walls", "openings", "overlap", "objectness", "classes"} <= set(parts)


@torch.no_grad()
def test_splitting_copies_stages_and_computes_the_same() -> None:
    model = network().eval()
    before = model(batch()["x"])
    count = sum(each.numel() for each in model.parameters())
    model.encoder.split(3)
    after = model.eval()(batch()["x"])
    assert torch.equal(before.cells, after.cells) and torch.equal(before.walls[0], after.walls[0])
    copied = sum(each.numel() for stage in model.encoder.stages[3:] for each in stage.parameters())
    assert sum(each.numel() for each in model.parameters()) == count + copied
    for each in model.encoder.stages[4].parameters():
        each.zero_()
    assert torch.equal(model(batch()["x"]).cells, after.cells)  # openings have their own
    with pytest.raises(MethodError, match="3 stages are shared"):
        model.encoder.split(4)


def test_the_tasks_part_at_the_first_stage_that_is_persistently_negative() -> None:
    cosines = torch.tensor(
        [[0.3, -0.1, 0.2, -0.4], [0.2, 0.1, -0.1, -0.2], [0.1, -0.2, 0.3, -0.1], [0.4, 0.2, 0.1, 0.2]]
    )
    assert (
        branch_point(cosines, 0.75) == 3 and branch_point(cosines, 0.5) == 1 and branch_point(cosines.abs(), 0.1) == 4
    )


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(MethodError, match="share a stage"):
        WeightedNetwork(network(replace(SMALL, split=0)), LossBalance(weighting="gradnorm"))
    with pytest.raises(MethodError, match="5 stages are shared"):
        muranet(PLANS, shape=SMALL, training=PlanTraining(frozen=6), config=CONFIG)
    with pytest.raises(MethodError, match="a multiple of 16"):
        network(replace(SMALL, size=72))
