"""dLLM-Skip against its definition: cosines and losses from hidden states of the model itself, and Algorithm 1."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lamella
from lamella.errors import MethodError
from lamella.measure import draws, nats_per_token
from lamella.methods.dllm_skip import (
    curve_distance,
    dllm_skip,
    losses_without,
    plateau,
    rises,
    select,
    similarity,
    study,
)
from lamella.methods.dllm_skip.baselines import cheapest, every, neighbours, spaced
from lamella.plan import ModelReference, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo.nano import NANO_DIFFUSION, nano

IDS = torch.randint(3, 127, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
NAMES = [*NANO_DIFFUSION, "llama"]
DEEP = {"llada": "n_layers", "dream": "num_hidden_layers", "llama": "num_hidden_layers"}


def opened(name: str, layers: int = 4) -> Stack:
    return Stack(nano(name, **{DEEP[name]: layers}))


def states(stack: Stack, given: dict[str, Tensor]) -> list[Tensor]:
    """Record the residual stream before every layer and after the last [time, hidden] by hooks."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, known: seen.append((args[0] if args else known["hidden_states"])[0].double()),
            with_kwargs=True,
        )
        for layer in stack.layers
    ]
    hooks.append(stack.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out[0].double())))
    with torch.no_grad():
        stack.model(**given)
    for hook in hooks:
        hook.remove()
    return seen


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", NAMES)
def test_similarity_is_the_mean_cosine_of_a_layer_s_input_and_output_by_noise_and_kind(name: str) -> None:
    stack = opened(name)
    noised = draws(stack, {"input_ids": IDS, "attention_mask": MASK}, (0.3, 0.8))
    found = similarity(stack, noised, lags=6)
    known: dict[tuple[int, float, int], list[float]] = {}
    every: list[list[float]] = [[] for _ in range(4)]
    points = np.zeros((5, 5, 0))
    for draw in noised:
        h = states(stack, draw.inputs)
        first = int(draw.inputs["attention_mask"][0].argmax()) + 1  # the first token does not count
        for at in range(first, 20):
            kind = 0 if draw.ratio and bool(draw.scored[0, at]) else 1
            for layer, (before, after) in enumerate(pairwise(h)):
                known.setdefault((layer, draw.ratio, kind), []).append(cosine(before[at], after[at]))
                every[layer].append(cosine(before[at], after[at]))
            each = np.array([[cosine(a[at], b[at]) for b in h] for a in h])
            points = np.concatenate([points, each[:, :, None]], axis=2)
    for (layer, ratio, kind), values in known.items():
        measured = found.table.values[layer, found.ratios.index(ratio), kind]
        assert measured == pytest.approx(np.mean(values), abs=1e-5)
    assert np.isnan(found.table.values).sum() == 4 * 2 * len(found.ratios) - len(known)
    means = [np.mean([np.mean(values) for place, values in known.items() if place[0] == layer]) for layer in range(4)]
    np.testing.assert_allclose(found.by_layer, means, atol=1e-5)
    np.testing.assert_allclose(found.spread.values, [np.std(values) for values in every], atol=1e-3)
    np.testing.assert_allclose(found.points.values, points.mean(axis=2), atol=1e-5)


def test_a_token_is_compared_with_earlier_ones_of_its_sequence() -> None:
    stack = opened("llada")
    noised = draws(stack, IDS[:1], (0.5,))
    found = similarity(stack, noised, lags=4)
    h = states(stack, noised[0].inputs)
    for lag in (1, 2, 3, 4):
        expected = [np.mean([cosine(each[at], each[at - lag]) for at in range(1 + lag, 20)]) for each in h]
        np.testing.assert_allclose(found.recency.values[:, lag - 1], expected, atol=1e-5)
    far = found.recency.values[:, 1:].mean(axis=1)
    np.testing.assert_allclose(found.recency_index, found.recency.values[:, 0] - far, atol=1e-6)


def test_the_order_of_sequences_does_not_matter() -> None:
    stack = opened("dream")
    noised = draws(stack, IDS, (0.3, 0.8))
    ours, theirs = (similarity(stack, each) for each in (noised, noised[::-1]))
    np.testing.assert_allclose(ours.by_layer, theirs.by_layer, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_losses_without_layers_are_those_of_views(name: str) -> None:
    stack = opened(name)
    noised = draws(stack, IDS, (0.3, 0.8))
    choices = [(), (1,), (0, 3), (2, 3)]
    found = losses_without(stack, noised, choices)
    for row, layers in zip(found, choices, strict=True):
        plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in layers])
        torch.testing.assert_close(row, nats_per_token(Stack(apply(stack, plan)), noised), rtol=1e-5, atol=1e-6)
    assert rises(stack, noised, [()]) == [0.0]


def silent(name: str, layer: int) -> Stack:
    """Return a model one layer of which adds nothing to the residual stream."""
    stack = opened(name, layers=6)
    for sublayer in stack.architecture.sublayers:
        out = stack.layers[layer].get_submodule(sublayer.out)
        nn.init.zeros_(out.weight)
    return stack


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_writes_nothing_is_chosen_first(name: str) -> None:
    stack = silent(name, 3)
    series = dllm_skip(stack, IDS, ratios=(0.5,))
    assert series.points[1].drop == ["layers.3"] and series.points[1].scores["similarity"] == pytest.approx(1, abs=1e-6)
    given = {"input_ids": IDS}
    with torch.no_grad():
        torch.testing.assert_close(
            apply(stack, series[1])(**given).logits, stack.model(**given).logits, rtol=0, atol=1e-6
        )


SIM = [0.99, 0.97, 0.98, 0.96, 0.97, 0.93, 0.96, 0.99]


def test_the_algorithm_takes_the_most_alike_first_and_no_neighbours() -> None:
    inner = range(1, 7)
    assert select(SIM, 0.95, 6, inner) == [2, 4, 6]
    assert select(SIM, 0.95, 2, inner) == [2, 4]
    assert select(SIM, 0.95, 6, inner, non_adjacent=False) == [2, 1, 4, 3, 6]
    assert select(SIM, 0.975, 6, inner) == [2] and select(SIM, 0.99, 6, range(8)) == []
    assert select([0.5, 0.97, 0.96, 0.97, 0.98, 0.5], 0.95, 3, range(1, 5)) == [4, 1]  # 3 has a neighbour chosen before


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_sorted_not_adjacent_within_the_candidates_and_always_the_same(name: str) -> None:
    stack = opened(name, layers=8)
    series = dllm_skip(stack, IDS, theta=-1.0, ratios=(0.3, 0.7))
    assert dllm_skip(stack, IDS, theta=-1.0, ratios=(0.3, 0.7)).points == series.points
    sim = similarity(stack, draws(stack, IDS, (0.3, 0.7))).by_layer
    for count, point in enumerate(series.points):
        layers = [int(site.removeprefix("layers.")) for site in point.drop]
        assert len(layers) == count and layers == sorted(layers) and set(layers) <= set(range(1, 7))
        assert all(b - a > 1 for a, b in pairwise(layers))
    assert series.points[1].drop == [f"layers.{1 + int(np.argmax(sim[1:7]))}"]
    adjacent = dllm_skip(stack, IDS, theta=-1.0, non_adjacent=False, ratios=(0.3, 0.7))
    assert len(adjacent.points[-1].drop) == 6


def test_nothing_skipped_is_the_model_to_the_bit() -> None:
    stack = opened("llada")
    plan = dllm_skip(stack, IDS, theta=0.9999)[0]
    with torch.no_grad():
        assert torch.equal(apply(stack, plan)(input_ids=IDS).logits, stack.model(input_ids=IDS).logits)


def test_fewer_layers_than_asked_for_are_said_and_theta_stays() -> None:
    stack = silent("llada", 3)
    with pytest.warns(UserWarning, match=r"only 1 layers are above theta 0.9999.*fewer than k 2"):
        series = dllm_skip(stack, IDS, theta=0.9999, k=2, ratios=(0.5,))
    assert [point.drop for point in series.points] == [[], ["layers.3"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, "k 9"),
        ({"protect": 2}, "protect 2"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as error:
        dllm_skip(opened("llada"), IDS, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_decoder_of_an_encoder_decoder_is_refused_in_one_line(name: str) -> None:
    decoder = lamella.open(nano(name)).stacks["decoder"]
    for command in (dllm_skip, study):
        with pytest.raises(MethodError, match=r"dllm-skip works on text-only models; .* cross-attention") as error:
            command(decoder, IDS)
        assert "\n" not in str(error.value)


def test_a_study_compares_two_models_layer_by_layer() -> None:
    ours, theirs = opened("llada"), opened("llama")
    found = study(ours, IDS, theirs, ratios=(0.5,), lags=4)
    rise = rises(ours, draws(ours, IDS, (0.5,)), [(layer,) for layer in range(4)])
    assert found["model"]["rise"] == pytest.approx(rise) and found["model"]["objective"] == "masked tokens"
    assert found["compare"]["masked"] == [None] * 4
    assert found["curve_distance"] == pytest.approx(
        curve_distance(found["model"]["by_layer"], found["compare"]["by_layer"])
    )
    start, end = found["model"]["plateau"]
    assert (start, end) == plateau(found["model"]["by_layer"], 0.95)


def test_plateaus_and_distances_of_curves() -> None:
    assert plateau([0.99, 0.5, 0.96, 0.97, 0.98, 0.2, 0.96], 0.95) == (2, 5)
    assert plateau([0.1, 0.2], 0.95) == (0, 0)
    assert curve_distance([0.0, 1.0], [0.0, 0.5, 1.0]) == pytest.approx(0)
    assert curve_distance([0.0, 0.0, 0.0], [0.3, 0.3]) == pytest.approx(0.3)


def test_baselines_choose_what_they_say() -> None:
    allowed = range(1, 9)
    assert spaced(allowed, 2) == (3, 7) and spaced(allowed, 4) == (2, 4, 6, 8)
    assert cheapest([9, 3, 1, 2, 0, 5, 5, 5, 5, 5], allowed, 2) == (2, 4)
    sim = [0.9] * 10
    sim[4:7] = [0.99] * 3
    assert neighbours(sim, allowed, 3) == (4, 5, 6)
    sets = every(allowed, 3)
    assert all(b - a > 1 for each in sets for a, b in pairwise(each)) and len(set(sets)) == len(sets) == 20  # C(6, 3)
    assert every(range(1, 7), 4) == []
