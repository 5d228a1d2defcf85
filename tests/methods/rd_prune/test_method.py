"""RD-Prune: allocations from curves and from rules, masks, rounds, and what it says when it cannot."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lamella
from lamella.errors import BudgetError, LamellaError, MethodError
from lamella.files import Work
from lamella.methods.rd_prune import (
    RULES,
    Amounts,
    Curves,
    MaskHook,
    allocate_by_curves,
    allocate_by_rule,
    joint_distortion,
    layerwise,
    masks_for,
    prune_in_rounds,
    rate_distortion,
    rd_prune,
)
from lamella.plan import apply_masks, masks_of
from lamella.stack import Stack
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
GRID = 10


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def curves() -> Curves:
    return rate_distortion(net(), images(), grid=GRID)


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("reduce", ["mean", "worst"])
def test_the_allocation_is_the_best_on_the_grid_and_keeps_the_budget(curves: Curves, reduce, sparsity: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        amounts = allocate_by_curves(curves, sparsity, reduce=reduce)
    kept = curves.sizes[:, None] - curves.pruned
    loss, cost = np.zeros(1), np.zeros(1, np.int64)
    for d, c in zip(curves.distortion(reduce), kept, strict=True):
        loss, cost = np.add.outer(loss, d).ravel(), np.add.outer(cost, c).ravel()
    budget = (1 - sparsity) * curves.sizes.sum()
    assert amounts.predicted == pytest.approx(loss[cost <= budget].min(), rel=1e-12)
    assert sum(amounts.pruned.values()) >= sparsity * curves.sizes.sum()
    assert amounts.sparsity == sum(amounts.pruned.values()) / curves.sizes.sum()


def test_without_sparsity_nothing_changes_bitwise(curves: Curves) -> None:
    model = net()
    amounts = allocate_by_curves(curves, 0.0)
    assert not any(amounts.pruned.values()) and amounts.predicted == 0 and masks_for(model, amounts) == {}
    with torch.no_grad():
        assert torch.equal(apply_masks(model, {})(images()), model(images()))


def test_multiply_adds_weigh_convolutions_by_their_positions(curves: Curves) -> None:
    uses = np.array([64, 9, 1, 1])
    by_weights, by_flops = (allocate_by_curves(curves, 0.5, cost=cost) for cost in ("weights", "flops"))
    saved = [sum(n * u for n, u in zip(a.pruned.values(), uses, strict=True)) for a in (by_weights, by_flops)]
    assert saved[1] >= 0.5 * (curves.sizes * uses).sum() > saved[0]
    loss, cost = np.zeros(1), np.zeros(1, np.int64)
    kept = (curves.sizes[:, None] - curves.pruned) * uses[:, None]
    for d, c in zip(curves.distortion("worst"), kept, strict=True):
        loss, cost = np.add.outer(loss, d).ravel(), np.add.outer(cost, c).ravel()
    best = loss[cost <= 0.5 * (curves.sizes * uses).sum()].min()
    assert by_flops.predicted == pytest.approx(best, rel=1e-12)


def test_max_amount_holds_for_all_layers_or_by_name(curves: Curves) -> None:
    amounts = allocate_by_curves(curves, 0.55, max_amount=0.6)
    assert amounts.fractions.max() <= 0.6
    name = list(curves.layers)[2]
    free = allocate_by_curves(curves, 0.5)
    held = allocate_by_curves(curves, 0.3, max_amount={name: 0.2})
    assert free.pruned[name] / free.sizes[name] > 0.2 >= held.pruned[name] / held.sizes[name]
    assert held.predicted >= allocate_by_curves(curves, 0.3).predicted


def test_masks_remove_the_smallest_weights_of_each_layer(curves: Curves) -> None:
    model = net()
    amounts = allocate_by_curves(curves, 0.6)
    masks = masks_for(model, amounts)
    for name, count in amounts.pruned.items():
        weight = model.get_parameter(name).detach().abs()
        keep = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert int((~keep).sum()) == count
        assert count in (0, weight.numel()) or weight[~keep].max() <= weight[keep].min()


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_available_for_any_model(rule) -> None:
    model = net()
    weights = [p.detach().numpy() for name, p in model.named_parameters() if p.ndim > 1]
    sizes = [w.size for w in weights]
    expected = {
        "uniform": lambda: layerwise.uniform(sizes, 0.7),
        "uniform+": lambda: layerwise.uniform_plus(sizes, 0.7, 0),
        "erk": lambda: layerwise.erk([w.shape for w in weights], 0.7),
        "global": lambda: layerwise.global_magnitude(weights, 0.7),
        "lamp": lambda: layerwise.lamp(weights, 0.7),
    }[rule]()
    amounts = allocate_by_rule(model, 0.7, rule)
    assert list(amounts.pruned.values()) == expected.tolist() and amounts.predicted is None
    assert abs(amounts.sparsity - 0.7) < 0.01


def test_emptying_a_layer_of_a_chain_is_warned_of_and_max_amount_prevents_it(curves: Curves) -> None:
    with pytest.warns(UserWarning, match="is emptied and no residual path bypasses it") as seen:
        emptied = allocate_by_curves(curves, 0.97)
    assert emptied.fractions.max() == 1 and "\n" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert allocate_by_curves(curves, 0.8, max_amount=0.9).fractions.max() <= 0.9


def test_a_prediction_beyond_an_output_of_zeros_is_warned_of() -> None:
    stack = Stack(nano("llama"))
    measured = rate_distortion(stack, IDS, grid=4)
    with pytest.warns(UserWarning, match="so it is meaningless"):
        amounts = allocate_by_curves(measured, 0.9)
    assert amounts.predicted is not None and amounts.predicted > measured.silent.worst


@pytest.mark.parametrize("kind", ["module", "stack"])
def test_rounds_go_up_with_nested_masks_and_curves_of_their_own(kind: str) -> None:
    model: nn.Module = net() if kind == "module" else nano("llama")
    given = images() if kind == "module" else IDS
    before = copy.deepcopy(model.state_dict())
    seen = []

    def heal(view: nn.Module, masks: dict[str, Tensor]) -> None:
        hold = MaskHook(view, masks).apply
        optimizer = torch.optim.SGD(view.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        out = view(given)
        loss = getattr(out, "logits", out).square().mean()
        loss.backward()
        optimizer.step()
        hold()
        seen.append({name: parameter.detach().clone() for name, parameter in view.named_parameters()})

    measured = model if kind == "module" else Stack(model)
    pruned, history = prune_in_rounds(measured, given, heal, sparsity=0.7, rounds=3, grid=8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    p = 1 - 0.3 ** (1 / 3)
    assert [each.target for each in history] == pytest.approx([1 - (1 - p) ** t for t in (1, 2, 3)])
    for index, each in enumerate(history):
        assert each.amounts.sparsity >= each.target - 1e-9 and each.joint.worst > 0
        for name, keep in each.masks.items():
            assert not seen[index][name][~keep].any()
            earlier = history[index - 1].masks.get(name) if index else None
            assert earlier is None or not (keep & ~earlier).any()  # nothing comes back
        if index:
            assert (each.amounts.fractions >= history[index - 1].amounts.fractions).all()
    assert all(torch.equal(seen[-1][name], value) for name, value in pruned.named_parameters())
    # The second round measured the model as the first one had left it.
    again = copy.deepcopy(model)
    again.load_state_dict(seen[0], strict=False)
    curves = rate_distortion(again if kind == "module" else Stack(again), given, grid=8)
    assert allocate_by_curves(curves, history[1].target).pruned == history[1].amounts.pruned


def test_the_plans_say_what_was_achieved_predicted_and_measured(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    series = rd_prune(stack, IDS, sparsity=0.4, grid=GRID, work=Work(tmp_path), curves=tmp_path / "curves.jsonl")
    measured = Curves.read(tmp_path / "curves.jsonl")
    assert len(series) == 5 and series.points[0].scores == {"sparsity": 0.0, "distortion": 0.0}
    for share, plan, point in zip((0.1, 0.2, 0.3, 0.4), list(series)[1:], series.points[1:], strict=True):
        masks = masks_of(plan)
        amounts = allocate_by_curves(measured, share)
        assert point.scores["predicted distortion"] == amounts.predicted
        assert plan.masked == sum(amounts.pruned.values()) == point.scores["sparsity"] * measured.sizes.sum()
        assert point.scores["sparsity"] >= share
        assert point.scores["distortion"] == joint_distortion(stack, masks, IDS).worst
        view = lamella.apply(stack, plan)
        with torch.no_grad():
            moved = (view(IDS).logits.double() - stack.model(IDS).logits.double()).square().flatten(1).mean(1)
        assert point.scores["distortion"] == pytest.approx(float(moved.max()), rel=1e-4)
    again = rd_prune(stack, IDS, sparsity=0.4, grid=GRID, work=Work(tmp_path), curves=tmp_path / "curves.jsonl")
    assert again == series
    for rule in RULES:
        plain = rd_prune(stack, IDS, sparsity=0.4, allocation=rule, work=Work(tmp_path))
        assert plain.points[-1].scores.keys() == {"sparsity", "distortion"}


def test_bad_input_is_refused_in_one_line(curves: Curves, tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    rate_distortion(Stack(nano("gpt2")), IDS, grid=2, path=tmp_path / "gpt2.jsonl")
    fused = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    hidden = rate_distortion(fused, torch.randn(3, 5, 8), grid=2)
    cases = {
        "sparsity 1: give the share": lambda: allocate_by_curves(curves, 1),
        "sparsity -0.1": lambda: allocate_by_rule(net(), -0.1, "uniform"),
        "max_amount allows at most 0.7991": lambda: allocate_by_curves(curves, 0.9, max_amount=0.8),
        "max_amount 1.5": lambda: allocate_by_curves(curves, 0.5, max_amount=1.5),
        "max_amount names 'x'": lambda: allocate_by_curves(curves, 0.5, max_amount={"x": 0.5}),
        "use cost weights": lambda: allocate_by_curves(hidden, 0.5, cost="flops"),
        "nothing to prune": lambda: allocate_by_rule(nn.LayerNorm(3), 0.5, "uniform"),
        "rounds 0": lambda: prune_in_rounds(net(), images(), lambda model, masks: None, sparsity=0.5, rounds=0),
        "holds the curves of another model": lambda: rd_prune(stack, IDS, curves=tmp_path / "gpt2.jsonl"),
        "omit cost": lambda: rd_prune(stack, IDS, allocation="lamp", cost="flops"),
        "cannot be written": lambda: rd_prune(stack, IDS, work=Work(tmp_path / "gpt2.jsonl" / "x")),
        "cannot write curves there": lambda: rd_prune(stack, IDS, curves=tmp_path / "gpt2.jsonl" / "x"),
    }
    for message, call in cases.items():
        with pytest.raises(LamellaError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value), message
    with pytest.raises(BudgetError):
        allocate_by_curves(curves, 0.9, max_amount=0.8)


def test_it_does_not_race_for_speed() -> None:
    with pytest.raises(MethodError, match="which dense kernels still compute") as error:
        lamella.compress("smollm2", method="rd-prune")
    assert "\n" not in str(error.value)


def test_achieved_is_what_is_removed_not_what_was_asked_for() -> None:
    amounts = Amounts({"a": 3, "b": 0}, {"a": 10, "b": 5})
    assert amounts.sparsity == 0.2 and amounts.fractions.tolist() == [0.3, 0.0]
