"""The portfolio against loops that run the whole transformers model, with hooks instead of every removed layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import LongTensor, Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.data import InputContext, Text
from lamella.errors import MethodError
from lamella.evaluate import Budget, FidelityTest
from lamella.measure import OutputDistance
from lamella.methods.finercut import finercut
from lamella.methods.portfolio import portfolio
from lamella.methods.shortgpt import shortgpt
from lamella.methods.window import angular_window
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.stack import Stack
from lamella.train import refit
from lamella.zoo import small as zoo

NANO_LLAMA = Path(__file__).parent.parent / "models" / "nano-llama"
LAYERS = range(6)
HALF = 0.5  # of all layers: 3


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA))


@pytest.fixture(scope="module")
def text() -> Text:
    reader = InputContext(partial(AutoTokenizer.from_pretrained, NANO_LLAMA))
    return Text.open("pydoc", reader, sequences=3, length=64)


def cuts(series: PlanSeries) -> list[frozenset[int]]:
    return [frozenset(int(site.removeprefix("layers.")) for site in plan.drop) for plan in series]


def naive_jsd(stack: Stack, tokens: Tensor) -> Callable[[frozenset[int]], float]:
    """The Jensen-Shannon divergence to the original in float64, layers replaced by hooks that return their input."""

    @torch.no_grad()
    def log_probabilities(removed: frozenset[int]) -> Tensor:
        layers = stack.model.model.layers
        hooks = [layers[each].register_forward_hook(lambda _, given, __: given[0]) for each in removed]
        logits = stack.model(tokens, use_cache=False).logits.double()
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1)

    log_p = log_probabilities(frozenset())

    def jsd(removed: frozenset[int]) -> float:
        log_q = log_probabilities(removed)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        both = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
        return float(both.mean() / 2)

    return jsd


def test_on_one_sequence_no_exchange_of_two_layers_lowers_the_distance(stack: Stack, text: Text) -> None:
    tokens = text.tokens[:1]
    series = portfolio(stack, tokens, patience=100, refine=2, share=HALF)
    jsd = naive_jsd(stack, tokens)
    for cut, point in zip(cuts(series)[-2:], series.points[-2:], strict=True):
        assert point.scores == {"jsd": pytest.approx(jsd(cut), abs=1e-6)}
        others = [cut - {back} | {gone} for back in cut for gone in LAYERS if gone not in cut]
        assert min(map(jsd, others)) > jsd(cut)


def test_what_is_chosen_is_as_close_on_further_text_as_every_likely_beginning(stack: Stack, text: Text) -> None:
    series = portfolio(stack, text, refine=3, share=HALF)
    near, far = naive_jsd(stack, text.tokens), naive_jsd(stack, text.more(4).tokens)
    lazy = finercut(stack, text, level="block", strategy="lazy", exclude_front=0.0, share=HALF)
    beginnings = [cuts(each) for each in (lazy, shortgpt(stack, text), angular_window(stack, text, positions="all"))]
    compared = 0
    for size, cut in enumerate(cuts(series)[1:], start=1):
        assert len(cut) == size
        scores = series.points[size].scores
        assert scores["jsd"] == pytest.approx(near(cut), abs=1e-6)
        if "jsd on held-out text" in scores:
            assert scores["jsd on held-out text"] == pytest.approx(far(cut), abs=1e-6)
        close = [each[size] for each in beginnings if near(each[size]) <= near(cut)]
        assert all(far(cut) <= far(each) + 1e-6 for each in close)
        compared += len(close)
    assert compared > 3


def test_without_refinement_it_is_the_lazy_search_over_layers(stack: Stack, text: Text) -> None:
    lazy = finercut(stack, text, level="block", strategy="lazy", exclude_front=0.0, share=HALF)
    assert portfolio(stack, text, refine=0, share=HALF).points == lazy.points


def test_with_a_refit_it_chooses_what_is_closest_after_it(stack: Stack, text: Text) -> None:
    series = portfolio(stack, text, refine=1, refit=True, patience=1, budget=Budget(share=HALF))
    judge = FidelityTest(stack, text.more(4).tokens)

    def after_refit(removed: frozenset[int]) -> float:
        plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in sorted(removed)])
        return judge.of(refit(stack, plan, text).view).kl.mean

    chosen = cuts(series)[-1]
    value = after_refit(chosen)
    assert series.points[-1].scores["kl after a refit"] == pytest.approx(value, rel=1e-5)
    distance = naive_jsd(stack, text.tokens)
    starts = [cuts(each(stack, text))[3] for each in (shortgpt, angular_window)]
    near = [
        start
        for start in starts
        if distance(start) < 1.9 * distance(cuts(portfolio(stack, text, refine=1, budget=Budget(share=HALF)))[-1])
    ]
    assert near and all(value <= after_refit(start) + 1e-9 for start in near)


def test_only_the_largest_cuts_are_refined(stack: Stack, text: Text) -> None:
    series = portfolio(stack, text, refine=1, validation=2, share=HALF)
    lazy = finercut(stack, text, level="block", strategy="lazy", exclude_front=0.0, share=HALF)
    assert series.points[:-1] == lazy.points[:-1]
    assert series.points[-1].scores["jsd"] <= lazy.points[-1].scores["jsd"]


def test_text_with_nothing_further_is_planned_on_alone(stack: Stack, text: Text) -> None:
    everything = portfolio(stack, text, validation=10**6, share=HALF)
    assert everything.points == portfolio(stack, text.tokens, share=HALF).points
    assert all(set(point.scores) == {"jsd"} for point in everything.points)


@pytest.fixture
def small(tmp_path: Path) -> Callable[[int], Text]:
    """Windows of a short text of one's own."""
    file = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    file.write_text(" ".join("".join(rng.choice(list("abcdefgh"), 5)) for _ in range(600)))
    reader = InputContext(partial(AutoTokenizer.from_pretrained, NANO_LLAMA))
    return lambda count: Text.open(str(file), reader, sequences=count, length=16)


def rows(tokens: LongTensor) -> set[tuple[int, ...]]:
    return set(map(tuple, tokens.tolist()))


def test_further_windows_are_those_that_a_longer_draw_would_have_added(small: Callable[[int], Text]) -> None:
    assert rows(small(3).tokens) | rows(small(3).more(4).tokens) == rows(small(7).tokens)
    assert len(rows(small(7).tokens)) == 7


def test_without_time_it_goes_by_influence_and_measures_each_size_once(stack: Stack, text: Text) -> None:
    series = portfolio(stack, text, share=HALF, minutes=0)
    assert cuts(series)[1:] == cuts(shortgpt(stack, text))[1:4]
    distance = naive_jsd(stack, text.tokens)
    for cut, plan in zip(cuts(series), series.points, strict=True):
        assert plan.scores["jsd"] == pytest.approx(distance(cut), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("enough", [1, 9, 17, 21, 25, 37, 49])
def test_once_its_time_is_over_a_search_measures_no_more_than_it_must(
    stack: Stack, text: Text, monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    """After that each step that is left and the two further beginnings of the largest cut are measured once."""
    measured: list[int] = []
    measure = OutputDistance._measure
    monkeypatch.setattr(OutputDistance, "_measure", lambda *given: (measured.append(1), measure(*given))[1])
    monkeypatch.setattr(Budget, "clock", lambda self: lambda: len(measured) >= enough)
    series = portfolio(stack, text, share=HALF, refine=3, patience=100)
    assert len(series) == 4
    assert len(measured) <= enough + 4


def test_with_a_single_sequence_no_refit_decides(stack: Stack, text: Text) -> None:
    one = text.cut(1, 64)
    plain, refitted = (portfolio(stack, one, refine=1, refit=each, budget=Budget(share=HALF)) for each in (False, True))
    assert "kl after a refit" not in refitted.points[-1].scores
    assert cuts(plain)[-1] <= frozenset(LAYERS) and len(cuts(refitted)[-1]) == len(cuts(plain)[-1])


def test_a_model_that_cannot_be_refitted_is_cut_as_without_a_refit() -> None:
    """Gemma 3 has a norm behind each sublayer; its sets are chosen among more that come close."""
    stack = Stack(zoo.small("gemma3_text"))
    tokens = torch.randint(0, stack.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    with pytest.raises(MethodError, match="train instead"):
        refit(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]), tokens)
    plain, refitted = (
        portfolio(stack, tokens, refine=1, refit=each, budget=Budget(share=HALF)) for each in (False, True)
    )
    assert len(cuts(refitted)[-1]) == len(cuts(plain)[-1])
    assert "kl after a refit" not in refitted.points[-1].scores
