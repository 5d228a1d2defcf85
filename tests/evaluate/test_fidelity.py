"""Fidelity, compared with a float64 brute-force computation that uses only transformers."""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import LongTensor, Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lamella.data import Prompts, load_text, windows
from lamella.data.prompts import ANSWER, ContinuedPrompt
from lamella.errors import CalibrationError, NumericsError
from lamella.evaluate import Estimate, Fidelity, FidelityTest, Interval
from lamella.evaluate import fidelity as module
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo.nano import NANO_DIFFUSION, nano

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
PROMPT = 20
KEPT = [0, 2, 5]


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def tokens() -> LongTensor:
    return windows(AutoTokenizer.from_pretrained(NANO_LLAMA), load_text("pydoc", "test"), 4, 100)


def static_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Attention of layer 1 and the MLP of layer 4 masked by hooks, float64."""
    layers: Any = model.model.layers
    parts = (layers[1].self_attn.o_proj, layers[4].mlp.down_proj)
    hooks = [part.register_forward_hook(lambda _, __, out: torch.zeros_like(out)) for part in parts]
    logits = model(tokens, use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    return logits


def phased_logits(model: Any, tokens: Tensor) -> Tensor:
    """The prompt through the whole model, the rest one by one through the kept layers and their part of the cache."""
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, :PROMPT], cache=cache, use_cache=True).logits]
    cache.layers = [cache.layers[layer] for layer in KEPT]
    thin = copy.deepcopy(model)
    thin.model.layers = nn.ModuleList(thin.model.layers[layer] for layer in KEPT)
    for slot, layer in enumerate(thin.model.layers):
        layer.self_attn.layer_idx = slot
    thin.config.num_hidden_layers = thin.model.config.num_hidden_layers = len(KEPT)
    for column in range(PROMPT, tokens.shape[1]):
        parts.append(thin(tokens[:, column : column + 1], cache=cache, use_cache=True).logits)
    return torch.cat(parts, 1).double()


def brute_force(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> dict[str, list[float]]:
    """Every quantity, one mean per sequence, over the positions that predict the continuation."""
    labels = tokens[:, PROMPT:]
    log_p = p_logits[:, PROMPT - 1 : -1].log_softmax(-1)
    log_q = q_logits[:, PROMPT - 1 : -1].log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.log((p + q) / 2)
    values = {
        "kl": (p * (log_p - log_q)).sum(-1),
        "jsd": ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
        "top1": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        "loss": -log_q.gather(-1, labels[..., None])[..., 0],
        "base_loss": -log_p.gather(-1, labels[..., None])[..., 0],
    }
    return {name: each.mean(-1).tolist() for name, each in values.items()}


def assert_matches(found: Fidelity, expected: dict[str, list[float]]) -> None:
    for name in ("kl", "jsd", "top1"):
        estimate, values = getattr(found, name), expected[name]
        assert estimate.mean == pytest.approx(statistics.mean(values), rel=1e-4)
        assert estimate.error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), rel=1e-3)
    for name, loss in (("perplexity", "loss"), ("base_perplexity", "base_loss")):
        estimate, mean = getattr(found, name), math.exp(statistics.mean(expected[loss]))
        assert estimate.mean == pytest.approx(mean, rel=1e-5)
        error = statistics.stdev(expected[loss]) / math.sqrt(len(expected[loss]))
        assert estimate.error == pytest.approx(mean * error, rel=1e-4)


@torch.no_grad()
def test_a_static_plan_has_the_fidelity_of_the_brute_force(stack: Stack, tokens: LongTensor) -> None:
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.attn", "layers.4.mlp"]))
    base = stack.model(tokens, use_cache=False).logits.double()
    expected = brute_force(base, static_logits(stack.model, tokens), tokens)
    assert_matches(FidelityTest(stack, tokens, prompt=PROMPT).of(view), expected)


@torch.no_grad()
def test_a_phased_plan_has_the_fidelity_of_the_brute_force(stack: Stack, tokens: LongTensor) -> None:
    path = {"text": PhasedPath(prefill=list(range(6)), decode=KEPT)}
    view = apply(stack, Plan(model=ModelReference.of(stack), path=path))
    base = stack.model(tokens, use_cache=False).logits.double()
    thin = phased_logits(stack.model, tokens)
    found = FidelityTest(stack, tokens, prompt=PROMPT).of(view)
    assert_matches(found, brute_force(base, thin, tokens))
    both = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1", "layers.3", "layers.4"]))
    assert found.kl.mean < FidelityTest(stack, tokens, prompt=PROMPT).of(both).kl.mean  # the full-depth prompt matters


def test_the_identity_is_faithful_without_limit(stack: Stack, tokens: LongTensor) -> None:
    found = FidelityTest(stack, tokens).of(apply(stack, Plan(model=ModelReference.of(stack))))
    assert found.kl.mean == pytest.approx(0, abs=1e-7) and found.jsd.mean == pytest.approx(0, abs=1e-7)
    assert (found.top1.mean, found.top1.error) == (1.0, 0.0)
    assert found.perplexity == found.base_perplexity
    assert (found.sequences, found.positions) == (4, 4 * 75)
    assert FidelityTest(stack, tokens).of(stack.model) == found


@torch.no_grad()
def test_the_agreement_of_each_sequence_gives_the_bounds(stack: Stack, tokens: LongTensor) -> None:
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.attn", "layers.4.mlp"]))
    base = stack.model(tokens, use_cache=False).logits.double()
    expected = brute_force(base, static_logits(stack.model, tokens), tokens)["top1"]
    found = FidelityTest(stack, tokens, prompt=PROMPT).of(view)
    assert found.agreements == pytest.approx(expected)
    assert found.agreement(0.9) == Interval.of(expected, 0.9)


def test_a_test_that_ends_early_runs_no_further_sequences(stack: Stack, tokens: LongTensor) -> None:
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.3"]))
    whole = FidelityTest(stack, tokens).of(view)
    runs: list[int] = []
    hook = stack.model.model.register_forward_hook(lambda *_: runs.append(1))
    found = FidelityTest(stack, tokens, keep=False).after_each(view, seed=1)
    first = next(found)
    assert len(runs) == 1 and first.sequences == 1
    *_, last = found
    hook.remove()
    assert last.kl.mean == pytest.approx(whole.kl.mean) and last.top1.error == pytest.approx(whole.top1.error)
    assert sorted(last.agreements) == sorted(whole.agreements)
    orders = [
        [each.agreements[-1] for each in FidelityTest(stack, tokens).after_each(view, seed)] for seed in (1, 1, 5)
    ]
    assert orders[0] == orders[1] == list(last.agreements) and orders[2] != orders[0]


@torch.no_grad()
def test_prompts_of_different_lengths_are_scored_after_each_of_them(stack: Stack, tokens: LongTensor) -> None:
    path = {"text": PhasedPath(prefill=list(range(6)), decode=KEPT)}
    view = apply(stack, Plan(model=ModelReference.of(stack), path=path))
    prompts = Prompts(
        [ContinuedPrompt(tokens[0, :60], 10), ContinuedPrompt(tokens[1, :33], 30), ContinuedPrompt(tokens[2], 70)]
    )
    alone = [FidelityTest(stack, ids[None], prompt=length).of(view) for ids, length in prompts]
    found = FidelityTest(stack, prompts).of(view)
    assert found.agreements == tuple(each.top1.mean for each in alone)
    assert found.kl.mean == pytest.approx(statistics.mean(each.kl.mean for each in alone))
    assert found.positions == 50 + 3 + 30


@torch.no_grad()
def test_a_prompt_without_an_answer_is_answered_by_the_original(stack: Stack, tokens: LongTensor) -> None:
    prompts = Prompts([ContinuedPrompt(tokens[0, :20], 20)])
    answer = stack.model.generate(tokens[:1, :20], max_new_tokens=ANSWER, do_sample=False)
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.3"]))
    found = FidelityTest(stack, prompts).of(view)
    assert found.positions == answer.shape[1] - 20
    same = view(answer).logits[0, 19:-1].argmax(-1) == answer[0, 20:]
    assert found.top1.mean == pytest.approx(float(same.double().mean()))
    assert FidelityTest(stack, prompts).of(stack.model).top1.mean == 1
    masked = Stack(nano(next(iter(NANO_DIFFUSION))))
    with pytest.raises(CalibrationError, match="give an answer with each prompt"):
        FidelityTest(masked, prompts)


def test_chunks_change_no_result(stack: Stack, tokens: LongTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.3"]))
    plain = FidelityTest(stack, tokens).of(view)
    monkeypatch.setattr(module, "CHUNK", 7)
    chunked = FidelityTest(stack, tokens).of(view)
    assert chunked.kl.mean == pytest.approx(plain.kl.mean, rel=1e-5)
    assert chunked.perplexity.mean == pytest.approx(plain.perplexity.mean, rel=1e-6)


def test_an_estimate_is_a_mean_with_its_standard_error() -> None:
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert estimate.mean == 3.0 and estimate.error == pytest.approx(math.sqrt(7 / 3))
    assert estimate.exp().mean == pytest.approx(math.exp(3))
    assert estimate.exp().error == pytest.approx(math.exp(3) * math.sqrt(7 / 3))
    single = Estimate.of(torch.tensor([2.0]))
    assert single.mean == 2.0 and math.isnan(single.error)
    assert str(Estimate(1.23456, 0.0123)) == "1.235 ± 0.012"


def test_a_dictionary_holds_every_estimate(stack: Stack, tokens: LongTensor) -> None:
    record = FidelityTest(stack, tokens).of(stack.model).as_dict()
    assert set(record) == {
        *("kl", "jsd", "top1", "perplexity", "base_perplexity"),
        "sequences",
        "positions",
        "agreement",
    }
    assert record["top1"] == {"mean": 1.0, "error": 0.0}


@pytest.mark.parametrize("prompt", [0, 100, 120])
def test_a_test_with_nothing_to_score_is_refused(prompt: int, stack: Stack, tokens: LongTensor) -> None:
    with pytest.raises(CalibrationError, match="nothing to score") as error:
        FidelityTest(stack, tokens, prompt=prompt)
    assert "\n" not in str(error.value)
    with pytest.raises(CalibrationError, match="nothing to score"):
        FidelityTest(stack, tokens[:0])


def test_a_model_that_is_not_finite_is_named() -> None:
    stack, broken = Stack(nano("llama")), nano("llama")
    broken.lm_head.weight.data[0, 0] = math.nan
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with pytest.raises(NumericsError, match="non-finite logits in test sequence 0"):
        FidelityTest(stack, ids).of(broken)


@pytest.mark.parametrize("name", NANO_DIFFUSION)
@torch.no_grad()
def test_masked_tokens_are_compared_under_the_same_noise(name: str) -> None:
    stack, ids = Stack(nano(name)), torch.randint(3, 127, (3, 24), generator=torch.Generator().manual_seed(2))
    view = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]))
    test = FidelityTest(stack, ids, prompt=6)
    values: dict[str, list[float]] = {}
    for row in range(3):
        asked, _ = test._asked[row]
        assert [draw.ratio for draw in asked] == [0.1, 0.3, 0.5, 0.7, 0.9]
        assert not any(draw.scored[0, :6].any() for draw in asked)
        pairs, losses = [], torch.zeros(2, dtype=torch.float64)
        for draw in asked:
            p, q = (model(**draw.inputs).logits[0].double().log_softmax(-1) for model in (stack.model, view))
            for at in draw.scored[0].nonzero().flatten().tolist():
                place = at - int(name == "dream")
                pairs.append((p[place], q[place]))
                losses -= torch.stack([p[place][ids[row, at]], q[place][ids[row, at]]]) / draw.ratio / 18 / 5
        count = len(pairs)
        mixed = [(a, b, torch.log((a.exp() + b.exp()) / 2)) for a, b in pairs]
        found = {
            "kl": sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / count,
            "jsd": sum(float((a.exp() * (a - m) + b.exp() * (b - m)).sum() / 2) for a, b, m in mixed) / count,
            "top1": sum(float(a.argmax() == b.argmax()) for a, b in pairs) / count,
            "base_loss": float(losses[0]),
            "loss": float(losses[1]),
        }
        for each, value in found.items():
            values.setdefault(each, []).append(value)
    assert_matches(test.of(view), values)
