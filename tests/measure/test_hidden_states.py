"""Block influence and angular distance, compared with loops over the hidden states that the model itself returns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lamella.errors import CalibrationError, NumericsError
from lamella.measure import (
    Scores,
    angular_distance,
    block_influence,
    describe,
    hidden_norms,
    sequences,
    sublayer_influence,
)
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
TOKENS = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def points(model: torch.nn.Module) -> np.ndarray:
    """Return the hidden states before every layer and after the last [layers + 1, sequences, time, hidden], float64.

    They are recorded by hooks on the layers, since the model's last hidden state is already normed.
    """
    found: list[Tensor] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0].clone())) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, out: found.append(out.clone())))
    model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("name", CAUSAL)
def test_block_influence_is_1_minus_the_mean_clamped_cosine(name: str) -> None:
    model = nano(name)
    h = points(model)
    expected = [1 - np.clip(cosine(h[layer], h[layer + 1]), 0, 1).mean() for layer in range(4)]
    scores = block_influence(Stack(model), TOKENS)
    assert scores.dims == ("layer",)
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_angular_distance_is_the_mean_angle_over_pi(name: str) -> None:
    model = nano(name)
    h = points(model)
    for positions, place in (("all", slice(None)), ("last", slice(-1, None))):
        scores = angular_distance(Stack(model), TOKENS, positions)
        assert scores.dims == ("start", "length")
        for start in range(5):
            for length in range(5):
                value = scores.values[start, length]
                if start + length > 4:
                    assert math.isnan(value)
                    continue
                angles = np.arccos(np.clip(cosine(h[start][:, place], h[start + length][:, place]), -1, 1)) / np.pi
                assert value == pytest.approx(angles.mean(), abs=2e-4)


def test_sublayer_influence_uses_the_hidden_states_between_sublayers() -> None:
    model = nano("llama")
    middle: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: middle.append(args[0].clone()))
    h = points(model)
    between = torch.stack(middle).double().numpy()
    expected = []
    for layer in range(4):
        for before, after in ((h[layer], between[layer]), (between[layer], h[layer + 1])):
            expected.append(1 - np.clip(cosine(before, after), 0, 1).mean())
    np.testing.assert_allclose(sublayer_influence(Stack(nano("llama")), TOKENS).values, expected, atol=1e-6)


def test_hidden_norms_leave_the_first_position_out() -> None:
    model = nano("gpt2")
    expected = np.linalg.norm(points(model)[:, :, 1:], axis=-1).mean((1, 2))
    np.testing.assert_allclose(hidden_norms(Stack(model), TOKENS).values, expected, rtol=1e-5)


@pytest.mark.parametrize("front", [0, 1, 3])
def test_the_front_of_each_sequence_does_not_count(front: int) -> None:
    model = nano("llama")
    h = points(model)[:, :, front:]
    stack = Stack(model)
    expected = [1 - np.clip(cosine(h[layer], h[layer + 1]), 0, 1).mean() for layer in range(4)]
    np.testing.assert_allclose(block_influence(stack, TOKENS, front=front).values, expected, atol=1e-6)
    halves = sublayer_influence(stack, TOKENS, front=front).values
    assert (halves == pytest.approx(sublayer_influence(stack, TOKENS).values, abs=1e-9)) == (front == 0)
    norms = np.linalg.norm(h, axis=-1).mean((1, 2))
    np.testing.assert_allclose(hidden_norms(stack, TOKENS, front=front).values, norms, rtol=1e-5)
    angles = np.arccos(np.clip(cosine(h[1], h[3]), -1, 1)) / np.pi
    assert angular_distance(stack, TOKENS, front=front).values[1, 2] == pytest.approx(angles.mean(), abs=2e-4)
    with pytest.raises(CalibrationError, match="front 10 leaves no token of a sequence of 10 tokens"):
        block_influence(stack, TOKENS, front=10)


def test_the_front_begins_behind_the_padding() -> None:
    stack, mask = Stack(nano("llama")), torch.ones(1, 14, dtype=torch.long)
    mask[0, :4] = 0
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), TOKENS[:1]], dim=1)
    given = {"input_ids": padded, "attention_mask": mask}
    for measure in (block_influence, hidden_norms):
        alone = measure(stack, TOKENS[:1], front=2).values
        np.testing.assert_allclose(measure(stack, given, front=2).values, alone, atol=1e-5)


def test_a_layer_that_does_nothing_has_no_influence_and_no_angle() -> None:
    model = nano("llama")
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    assert block_influence(Stack(model), TOKENS).values[2] == pytest.approx(0, abs=1e-6)
    assert angular_distance(Stack(model), TOKENS).values[2, 1] == pytest.approx(0, abs=5e-4)
    assert block_influence(Stack(model), TOKENS).values.argmin() == 2


def test_padded_positions_are_not_among_the_real_ones() -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    context = Stack(nano("llama")).context({"input_ids": TOKENS, "attention_mask": mask})
    assert torch.equal(context.real, mask.bool()) and int(context.real.sum()) == TOKENS.numel() - 4


def test_activations_that_are_not_finite_are_named() -> None:
    model = nano("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    for measure in (block_influence, angular_distance, sublayer_influence):
        with pytest.raises(NumericsError, match=r"layers\.1\.mlp"):
            measure(Stack(model), TOKENS)


def test_tokens_that_are_too_few_are_refused() -> None:
    for bad in (TOKENS[:0], TOKENS[:, :1], TOKENS[0]):
        with pytest.raises(CalibrationError, match="give more text"):
            sequences(bad)
    assert [row["input_ids"].shape for row in sequences(TOKENS)] == [(1, 10)] * 3


def test_provenance_knows_the_very_tokens() -> None:
    other = TOKENS.clone()
    other[0, 0] += 1
    assert describe(TOKENS)["shape"] == [3, 10]
    assert describe(TOKENS) == describe(TOKENS.clone()) != describe(other)


def test_scores_name_every_axis_and_go_to_json() -> None:
    with pytest.raises(ValueError, match="1 axes but 2 names"):
        Scores("x", ("a", "b"), np.zeros(3))
    assert Scores("x", ("a",), np.array([1.0, np.nan])).as_dict()["values"] == [1.0, None]
