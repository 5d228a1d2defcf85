"""The output distance restarts, stores and abandons; the naive way runs the whole model with hooks. Both agree."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import LongTensor, Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.data import load_text, windows
from lamella.errors import CalibrationError, MethodError, NumericsError
from lamella.measure import DISTANCES, OutputDistance
from lamella.measure import output_distance as module
from lamella.stack import Position, Stack, positions_of
from lamella.zoo.nano import NANO, nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
EVERY = positions_of(6)  # the sublayers of the nano Llama
SETS = [set(random.Random(seed).sample(EVERY, seed % 6 + 1)) for seed in range(12)]


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def tokens() -> LongTensor:
    return windows(AutoTokenizer.from_pretrained(NANO_LLAMA), load_text("pydoc", "calibration"), 2, 150)


@torch.no_grad()
def logits_without(model: torch.nn.Module, removed: Iterable[Position], tokens: Tensor) -> np.ndarray:
    """The whole model again, the outputs of removed sublayers zeroed by hooks [sequences, time, vocabulary] float64."""
    hooks = []
    for number, sublayer in removed:
        layer = model.model.layers[number]
        module = {"mlp": layer.mlp, "attn": layer.self_attn.o_proj}[sublayer]
        hooks.append(module.register_forward_hook(lambda _, __, out: torch.zeros_like(out)))
    logits = model(tokens, use_cache=False).logits.double().numpy()
    for hook in hooks:
        hook.remove()
    return logits


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def naive(name: str, z: np.ndarray, z0: np.ndarray, tokens: Tensor) -> float:
    log_q, log_p = log_softmax(z), log_softmax(z0)
    p, q, log_m = np.exp(log_p), np.exp(log_q), np.logaddexp(log_p, log_q) - math.log(2)
    if name == "jsd":
        return float(((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)).mean() / 2)
    if name == "jsd_repo":
        return float((np.exp(log_m) * (log_m - (log_p + log_q) / 2)).mean())
    if name == "kl":
        return float((p * (log_p - log_q)).sum(-1).mean())
    if name == "angular":
        cosine = (z * z0).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(z0, axis=-1)
        return float(np.arccos(np.clip(cosine, 0, 1)).mean())
    if name == "norm":
        return float(np.mean([np.linalg.norm(a - b) for a, b in zip(z, z0, strict=True)]))
    labels = tokens[:, 1:].numpy()[..., None]
    nll = -np.take_along_axis(log_q[:, :-1], labels, -1)[..., 0]
    return float(np.exp(nll.mean(-1)).mean())


@pytest.mark.parametrize("name", list(DISTANCES))
def test_any_set_of_sublayers_has_the_distance_of_a_naive_run(name: str, stack: Stack, tokens: LongTensor) -> None:
    measure = OutputDistance(stack, tokens, name)
    z0 = logits_without(stack.model, (), tokens)
    for removed in SETS:
        expected = naive(name, logits_without(stack.model, removed, tokens), z0, tokens)
        assert measure.of(removed) == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "perplexity"])
def test_nothing_removed_is_at_distance_0(name: str, stack: Stack, tokens: LongTensor) -> None:
    measure = OutputDistance(stack, tokens, name)
    assert 0 <= measure.of(()) <= 1e-7
    measure.of({EVERY[3], EVERY[4]})
    assert 0 <= measure.of(()) <= (1e-7 if name != "norm" else 1e-3)  # and so it is again after a detour


def test_jsd_of_any_set_is_between_0_and_ln_2(stack: Stack, tokens: LongTensor) -> None:
    measure = OutputDistance(stack, tokens)
    for removed in (*SETS, set(EVERY)):
        assert 0 < measure.of(removed) <= math.log(2)


@pytest.mark.parametrize("name", ["jsd", "norm", "perplexity"])
def test_a_cost_on_top_of_removals_is_the_distance_of_the_union(name: str, stack: Stack, tokens: LongTensor) -> None:
    measure, fresh = OutputDistance(stack, tokens, name), OutputDistance(stack, tokens, name)
    for removed in SETS[3:]:
        groups = [(sublayer,) for sublayer in removed]
        for candidate in (EVERY[:1], EVERY[4:6], EVERY[11:]):
            if set(candidate) & removed:
                continue
            found = measure.cost(groups, candidate, math.inf)
            assert found.exact
            assert found.value == pytest.approx(fresh.of(removed | set(candidate)), rel=1e-6, abs=1e-7)


def test_a_distance_does_not_depend_on_the_stored_hidden_states(stack: Stack, tokens: LongTensor) -> None:
    measure, fresh = OutputDistance(stack, tokens), OutputDistance(stack, tokens)
    for kept, removed in zip(SETS, SETS[::-1], strict=True):
        measure.keep(kept)
        found = measure.within(removed, math.inf)
        assert found.exact and found.value == pytest.approx(fresh.of(removed), rel=1e-6, abs=1e-7)


@pytest.fixture(params=[64, 10**6], ids=["bounded by some tokens", "whole vocabulary alone"])
def likely_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies are not worth a bound, so it is asked for."""
    monkeypatch.setattr(module, "LIKELY_TOKENS", request.param)


@pytest.mark.usefixtures("likely_tokens")
@pytest.mark.parametrize("name", list(DISTANCES))
def test_an_abandoned_cost_is_a_lower_bound_above_the_bound(name: str, stack: Stack, tokens: LongTensor) -> None:
    """Whatever was measured before, and so in whatever order the positions come."""
    measure, true = OutputDistance(stack, tokens, name), OutputDistance(stack, tokens, name)
    abandoned = 0
    for sublayer in EVERY:
        value = true.of({sublayer})
        for share in (0.0, 0.3, 0.9, 0.999, 1.001, 2.0):
            bound = share * value
            found = measure.cost((), (sublayer,), bound)
            if found.exact:
                assert found.value == pytest.approx(value, rel=1e-5, abs=1e-7)
            else:
                abandoned += 1
                assert bound < found.value <= value * (1 + 1e-5)
            assert found.exact or share < 1.0005
    assert abandoned >= 12


@pytest.mark.usefixtures("likely_tokens")
def test_the_true_minimum_is_never_pruned(stack: Stack, tokens: LongTensor) -> None:
    measure, true = OutputDistance(stack, tokens), OutputDistance(stack, tokens)
    for removed in ((), (EVERY[10:11],), (EVERY[10:11], EVERY[7:8])):
        left = [sublayer for sublayer in EVERY if (sublayer,) not in removed]
        values = {sublayer: true.cost(removed, (sublayer,), math.inf).value for sublayer in left}
        best = min(values, key=values.__getitem__)
        for seed in range(3):
            bound, found = math.inf, None
            for sublayer in random.Random(seed).sample(left, len(left)):
                cost = measure.cost(removed, (sublayer,), bound)
                if cost.exact and cost.value < bound:
                    bound, found = cost.value, sublayer
            assert found == best and bound == pytest.approx(values[best], rel=1e-6)


def test_some_tokens_spare_most_positions_the_whole_head(
    stack: Stack, tokens: LongTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIKELY_TOKENS", stack.config.vocab_size // 2)
    monkeypatch.setattr(module, "CHUNK", 16)
    asked = []
    for bounded in (True, False):
        measure = OutputDistance(stack, tokens)
        if not bounded:
            measure._some = None
        value = measure.of(EVERY[3:4])
        count = [0]
        measured = measure._at

        def counting(row, final, positions, measured=measured, count=count):
            found = measured(row, final, positions)
            count[0] += len(found)
            return found

        measure._at = counting
        assert not measure.cost((), EVERY[3:4], 0.8 * value).exact
        asked.append(count[0])
    assert asked[0] < 0.5 * asked[1]


def test_chunks_and_the_kept_reference_change_no_result(
    stack: Stack, tokens: LongTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [OutputDistance(stack, tokens).of(removed) for removed in SETS[:4]]
    for name, value in (("CHUNK", 7), ("SLICE", 3), ("REFERENCE_SHARE", 0.0)):
        monkeypatch.setattr(module, name, value)
        measure = OutputDistance(stack, tokens)
        assert [measure.of(removed) for removed in SETS[:4]] == pytest.approx(plain, rel=1e-5)


def test_hidden_states_before_the_first_candidate_are_not_stored(stack: Stack, tokens: LongTensor) -> None:
    measure, whole = OutputDistance(stack, tokens, first=3), OutputDistance(stack, tokens)
    assert all(len(row.prefixes.states) == len(EVERY) - 6 for row in measure._rows)
    assert all(len(row.prefixes.states) == len(EVERY) for row in whole._rows)
    for each in EVERY[6:]:
        together = whole.of({EVERY[8], each})
        assert measure.cost((EVERY[8:9],), (each,), math.inf).value == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in NANO if name != "vit"])
def test_every_family_is_measured_as_its_stack_runs(name: str) -> None:
    stack = Stack(nano(name))
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    measure = OutputDistance(stack, tokens)
    assert measure.of(()) <= 1e-7
    with torch.no_grad():
        context = stack.context(tokens)
        z0 = stack.model(tokens, use_cache=False).logits.double().numpy()
        for removed in (EVERY[:1], EVERY[1:2], EVERY[2:4], (EVERY[0], *EVERY[5:7])):
            z = stack.head(stack.run(context.h, 0, 4, context, removed)).double().numpy()
            assert measure.of(removed) == pytest.approx(naive("jsd", z, z0, tokens), rel=1e-4, abs=1e-6)


def test_the_model_and_the_tokens_are_left_alone(stack: Stack, tokens: LongTensor) -> None:
    before, copied = logits_without(stack.model, (), tokens), tokens.clone()
    OutputDistance(stack, tokens).of(EVERY[1:3])
    assert np.array_equal(logits_without(stack.model, (), tokens), before) and torch.equal(tokens, copied)
    assert all(parameter.grad is None for parameter in stack.model.parameters())


def test_what_cannot_be_measured_is_refused(stack: Stack, tokens: LongTensor) -> None:
    with pytest.raises(MethodError, match="unknown distance 'jds'; known are jsd, "):
        OutputDistance(stack, tokens, "jds")
    for bad in (tokens[:0], tokens[:, :1], tokens[0]):
        with pytest.raises(CalibrationError, match="give more text"):
            OutputDistance(stack, bad)
    broken = Stack(nano("llama"))
    broken.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.inf
    with pytest.raises(NumericsError, match="non-finite"):
        OutputDistance(broken, torch.full((1, 8), 5))


@pytest.mark.parametrize("distance", ["jsd", "kl", "norm", "perplexity"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_positions_of_calibration_sequences_do_not_count(distance: str, side: str) -> None:
    stack = Stack(nano("llama"))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(5))
    pads = torch.zeros(2, 4, dtype=torch.long)
    parts = [pads, ids] if side == "left" else [ids, pads]
    real = [pads, torch.ones_like(ids)] if side == "left" else [torch.ones_like(ids), pads]
    padded = {"input_ids": torch.cat(parts, dim=1), "attention_mask": torch.cat(real, dim=1)}
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    gone = (EVERY[1], EVERY[4])
    plain, with_pads = (OutputDistance(stack, tokens, distance).of(gone) for tokens in (ids, padded))
    assert with_pads == pytest.approx(plain, rel=1e-5, abs=1e-6)
