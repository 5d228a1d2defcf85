"""Healing recipes: what trains, what stays, and that a healed plan serves as it was trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lamella.commands.heal.training import recipe_of
from lamella.files import Work
from lamella.methods.first import first
from lamella.methods.lora_drop import lora_drop
from lamella.methods.rd_prune import rd_prune
from lamella.methods.unified_skip import unified_skip
from lamella.plan import Plan, PlanSeries, masks_of
from lamella.plan.export import export
from lamella.runtime import apply, parallel
from lamella.stack import Stack
from lamella.train import blocks, collate, response_loss
from lamella.zoo import load
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
SAMPLES = blocks(IDS, (4, 10))
HELD = collate(SAMPLES)


def first_plan(stack: Stack, folder: Path) -> Plan:
    series: PlanSeries = first(stack, IDS, steps=4, work=Work(folder / "routers"))
    return series[len(series) // 2]


PLANS: dict[str, Callable[[Stack, Path], Plan]] = {
    "lora-drop": lambda stack, _: lora_drop(stack, share=0.5, keep_first=1)[1],
    "unified-skip": lambda stack, _: unified_skip(stack, speedup=2.0)[1],
    "first": first_plan,
    "rd-prune": lambda stack, folder: rd_prune(stack, IDS, grid=4, work=Work(folder / "masks"))[-1],
}
RATES = {"lora-drop": 3e-2, "unified-skip": 3e-3, "first": 1e-2, "rd-prune": 3e-3}


def healed(slug: str, stack: Stack, folder: Path, steps: int = 30, config: Any = None, **options: Any) -> Any:
    plan = PLANS[slug](stack, folder)
    recipe = recipe_of(slug)
    assert recipe is not None
    config = replace(
        inspect.signature(recipe.call).parameters["config"].default, steps=steps, lr=RATES[slug], **config or {}
    )
    return plan, recipe(stack, plan, SAMPLES, config=config, work=Work(folder / "run"), **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("slug", PLANS)
def test_it_lowers_the_loss_as_served_and_leaves_the_original(slug: str, name: str, tmp_path: Path) -> None:
    stack = Stack(nano(name))
    before = {key: tensor.clone() for key, tensor in stack.model.state_dict().items()}
    plan, result = healed(slug, stack, tmp_path)
    assert all(torch.equal(before[key], tensor) for key, tensor in stack.model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in stack.model.parameters())
    with torch.no_grad():
        old = float(response_loss(apply(stack, plan), HELD))
        new = float(response_loss(apply(result.stack, result.plan), HELD))
    assert new < old - 0.05
    assert result.log.train[-1].step == 30


@pytest.mark.parametrize("slug", PLANS)
def test_a_healed_model_survives_its_export(slug: str, tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    _, result = healed(slug, stack, tmp_path, steps=5)
    export(result.stack, result.plan, tmp_path / "out", form="native")
    opened = load(tmp_path / "out")
    lengths = torch.full((8,), 8)
    with torch.no_grad():
        ours, theirs = (
            parallel(view, IDS, lengths).logits for view in (apply(result.stack, result.plan), opened.model)
        )
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_unified_skip_leaves_the_embedding_and_its_options_change_the_result(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    results = {}
    for name, options in {"plain": {}, "both": {"full_depth_ce": 0.5, "align_cos": 0.5}}.items():
        _, result = healed("unified-skip", stack, tmp_path / name, steps=5, **options)
        embedding = result.stack.model.get_input_embeddings().weight
        assert embedding is stack.model.get_input_embeddings().weight
        results[name] = result
    assert set(results["both"].log.train[0].parts) == {"ce", "full depth ce", "cosine"}
    weights = [r.stack.model.model.layers[0].mlp.up_proj.weight for r in results.values()]
    assert not torch.equal(*weights) and not torch.equal(weights[0], stack.model.model.layers[0].mlp.up_proj.weight)


def test_lora_drop_trains_corrections_alone_with_either_objective(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    for name, options in {
        "mse": {"objective": "ce+logit_mse"},
        "release": {"train_keys": "release"},
    }.items():
        _, result = healed("lora-drop", stack, tmp_path / name, steps=3, **options)
        assert result.stack is stack and result.plan.policy.file is not None
        assert result.plan.policy.located.is_file()


def test_first_keeps_its_routers(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan, result = healed("first", stack, tmp_path, steps=5)
    assert result.plan.policy.sha256 == plan.policy.sha256
    assert not any("lora" in name for name, _ in result.stack.model.named_parameters())


def test_rd_prune_holds_its_masks_and_trains_all_the_rest(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    plan, result = healed("rd-prune", stack, tmp_path, steps=6, config={"weight_decay": 0.1})
    trained = dict(result.stack.model.named_parameters())
    masks = masks_of(plan)
    for name, keep in masks.items():
        assert not trained[name][~keep].any() and (trained[name] != stack.model.get_parameter(name))[keep].all()
    assert all(not torch.equal(weight, stack.model.get_parameter(name)) for name, weight in trained.items())
