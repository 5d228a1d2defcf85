"""Baselines against their papers' definitions, computed here from hidden states and losses of the model itself."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import LongTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.data import load_text, windows
from lamella.errors import BudgetError
from lamella.evaluate import Budget, cost
from lamella.methods.random import random_cut
from lamella.methods.shortgpt import shortgpt
from lamella.methods.sleb import sleb
from lamella.methods.window import angular_window
from lamella.plan import PlanSeries
from lamella.planners import pick
from lamella.registry import get_method
from lamella.stack import Position, Stack, positions_of
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
EVERY = positions_of(6)  # the sublayers of the nano Llama


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def tokens() -> LongTensor:
    return windows(AutoTokenizer.from_pretrained(NANO_LLAMA), load_text("pydoc", "calibration"), 3, 64)


@pytest.fixture(scope="module")
def cosines(stack: Stack, tokens: LongTensor) -> np.ndarray:
    """Between the streams before two layers (the last: after all) [7, 7, sequences, time], float64."""
    found: list = []
    layers = stack.model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0].double().numpy())) for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, out: found.append(out.double().numpy())))
    with torch.no_grad():
        stack.model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    h = np.stack(found)
    h /= np.linalg.norm(h, axis=-1, keepdims=True)
    return np.einsum("astd,bstd->abst", h, h)


def order_of(series: PlanSeries) -> list[tuple[Position, ...]]:
    drops = [plan.dropped for plan in series]
    return [tuple(sorted(after - before)) for before, after in pairwise(drops)]


def test_shortgpt_removes_layers_by_influence_the_least_first(stack: Stack, tokens, cosines: np.ndarray) -> None:
    influence = np.array([1 - np.clip(cosines[layer, layer + 1], 0, 1).mean() for layer in range(6)])
    order = np.argsort(influence)[:5]
    series = shortgpt(stack, tokens)
    assert order_of(series) == [EVERY[2 * layer : 2 * layer + 2] for layer in order]
    scores = [point.scores["block influence"] for point in series.points]
    assert scores == pytest.approx([0, *np.cumsum(influence[order])], abs=1e-5)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_window_removes_the_run_with_the_smallest_angle(stack: Stack, tokens, cosines, positions: str) -> None:
    place = slice(-1, None) if positions == "last" else slice(None)
    series = angular_window(stack, tokens, positions=positions)
    assert len(series) == 6
    for size in range(1, 6):
        angles = [np.arccos(cosines[start, start + size, :, place]).mean() / math.pi for start in range(7 - size)]
        start = int(np.argmin(angles))
        assert series[size].drop == [f"layers.{layer}" for layer in range(start, start + size)]
        assert series.points[size].scores["angle"] == pytest.approx(min(angles), abs=1e-5)


@torch.no_grad()
def test_sleb_is_the_naive_loop_over_layers_by_perplexity(stack: Stack, tokens: LongTensor) -> None:
    def perplexity(gone: set[int]) -> float:
        layers = stack.model.model.layers
        hooks = [layers[layer].register_forward_hook(lambda _, args, out: args[0]) for layer in gone]
        logits = stack.model(tokens, use_cache=False).logits.double().log_softmax(-1)
        for hook in hooks:
            hook.remove()
        nll = -logits[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return float(nll.mean(-1).exp().mean())

    gone: set[int] = set()
    expected, scores = [], [perplexity(gone)]
    for step in range(4):
        candidates = [layer for layer in range(1 if step == 0 else 0, 6) if layer not in gone]
        best = min(candidates, key=lambda layer: perplexity(gone | {layer}))
        gone.add(best)
        expected.append(EVERY[2 * best : 2 * best + 2])
        scores.append(perplexity(gone))
    series = sleb(stack, tokens, share=4 / 6)
    assert order_of(series) == expected
    assert [point.scores["perplexity"] for point in series.points] == pytest.approx(scores, rel=1e-5)
    assert series.provenance["method"] == "sleb"


def test_random_is_seeded_and_protects_the_front(stack: Stack) -> None:
    runs = [order_of(random_cut(stack, seed=seed)) for seed in (0, 0, 1, 2)]
    assert runs[0] == runs[1] and len({str(run) for run in runs}) == 3
    assert sorted(runs[0]) == [(each,) for each in EVERY[6:]]  # int(6 * 0.4) + 1 = 3 layers are protected
    for level, expected in (
        ("attn", [EVERY[6:7], EVERY[8:9], EVERY[10:11]]),
        ("mlp", [EVERY[7:8], EVERY[9:10], EVERY[11:]]),
        ("block", [EVERY[6:8], EVERY[8:10], EVERY[10:]]),
    ):
        assert sorted(order_of(random_cut(stack, level=level))) == expected


def test_random_does_not_touch_the_global_generator(stack: Stack) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_cut(stack)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("slug", ["shortgpt", "finercut", "random"])
def test_a_share_of_the_parameters_picks_the_first_plan_that_has_no_more(slug: str) -> None:

    stack = Stack(nano("llama"))
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    series = get_method(slug)(stack, *([tokens] if get_method(slug).text else []))
    shares = [cost(stack, plan).parameters / cost(stack).parameters for plan in series]
    chosen = pick(series, Budget(parameters=0.9), stack)
    assert shares[chosen] <= 0.9 < shares[chosen - 1]
    with pytest.raises(BudgetError, match=r"parameters 0\.01 cannot be reached"):
        pick(series, Budget(parameters=0.01), stack)
    if slug == "finercut":
        stopped = get_method(slug)(stack, tokens, parameters=0.9)
        assert len(stopped) == chosen + 1


def test_every_goal_picks_the_plan_that_answers_it() -> None:
    stack = Stack(nano("llama"))
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    series = shortgpt(stack, tokens)
    weights = [4 * cost(stack, plan).parameters / 1e6 for plan in series]
    caches = [2048 * cost(stack, plan).kv_bytes_per_token / 1e6 for plan in series]
    memory = [sum(each) for each in zip(weights, caches, strict=True)]
    scores = [next(iter(point.scores.values())) for point in series.points]
    assert len(series) > 3 and all(after < before for before, after in pairwise(memory))
    assert (
        pick(series, Budget(size=weights[2] + 1e-9), stack) == pick(series, Budget(memory=memory[2] + 1e-9), stack) == 2
    )
    assert pick(series, Budget(loss=scores[2]), stack) == 2 and pick(series, Budget(), stack) == len(series) - 1
    for goal in ({"size": 1e-6}, {"memory": 1e-6}, {"sparsity": 0.5}):
        with pytest.raises(BudgetError, match="cannot be reached by shortgpt"):
            pick(series, Budget(**goal), stack)
    with pytest.raises(BudgetError, match="speedup and share both pick a plan"):
        pick(series, Budget(share=0.2, speedup=1.1), stack)


def test_a_search_that_removes_sublayers_stops_at_a_size() -> None:
    stack = Stack(nano("llama"))
    tokens = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = 4 * cost(stack).parameters / 1e6
    series = get_method("finercut")(stack, tokens, size=0.8 * whole)
    sizes = [4 * cost(stack, plan).parameters / 1e6 for plan in series]
    assert sizes[-1] <= 0.8 * whole < sizes[-2]
