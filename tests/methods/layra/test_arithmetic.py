"""Model arithmetic: exact at its ends, linear between them, and refused where it means nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import LamellaError, MethodError
from lamella.methods.layra import Language, arithmetic, equip, measure
from lamella.methods.layra.arithmetic import SCAN, check_siblings
from lamella.stack import Stack, share
from lamella.train import Adapter, add_lora, blocks, merge
from lamella.zoo.nano import nano

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def opened(**options: Any) -> Stack:
    return Stack(nano("llama", **options))


def sibling(**options: Any) -> Stack:
    """The base after a little training of everything, norms, embeddings and head among it."""
    stack, drawn = opened(**options), torch.Generator().manual_seed(7)
    for each in stack.model.parameters():
        each += 0.02 * torch.randn(each.shape, generator=drawn)
    return Stack(stack.model, name="instruct")


def language_adapter(stack: Stack) -> Adapter:
    lora = add_lora(share(stack.model), sites=["layers.0", "layers.3"], seed=1)
    for name, each in lora.view.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(each, std=0.05)
    return lora.adapter()


def logits(stack: Stack) -> Tensor:
    return stack.model(IDS, use_cache=False).logits


def text(seed: int) -> Language:
    rows = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(seed))
    return Language([], blocks(rows, loss_on="all"), 60)


def test_its_ends_are_the_models_themselves_to_the_bit() -> None:
    base, instruct = opened(), sibling()
    delta = language_adapter(base)
    for made, expected in (
        (arithmetic(base, [(delta, 0.0)], [(instruct, 0.0)]), base),
        (arithmetic(base, siblings=[(instruct, 1.0)]), instruct),
        (arithmetic(base, [(delta, 1.0)]), merge(base, delta)),
    ):
        theirs = dict(expected.model.named_parameters())
        assert all(torch.equal(each, theirs[name]) for name, each in made.model.named_parameters())
        assert torch.equal(logits(made), logits(expected))


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_the_sum_in_float64(tied: bool) -> None:
    base, instruct = opened(tie_word_embeddings=tied), sibling(tie_word_embeddings=tied)
    delta, lam, other = language_adapter(base), 0.7, 0.6
    made = arithmetic(base, [(delta, lam)], [(instruct, other)])
    theirs = dict(instruct.model.named_parameters())
    for name, each in base.model.named_parameters():
        expected = each.double() + other * (theirs[name].double() - each.double())
        module = name.removesuffix(".weight")
        if module in delta.pairs:
            a, b = (half.double() for half in delta.pairs[module])
            expected += lam * 2.0 * (b @ a)
        torch.testing.assert_close(made.model.get_parameter(name).double(), expected, atol=1e-6, rtol=1e-6)
    shared = made.model.lm_head.weight is made.model.model.embed_tokens.weight
    assert shared == tied


def test_it_is_linear_in_the_weight_of_the_sibling() -> None:
    base, instruct = opened(), sibling()
    delta = language_adapter(base)
    low, middle, high = (
        dict(arithmetic(base, [(delta, 1.0)], [(instruct, value)]).model.named_parameters())
        for value in (0.0, 0.5, 1.0)
    )
    for name, each in middle.items():
        torch.testing.assert_close(each, (low[name] + high[name]) / 2, atol=1e-6, rtol=1e-5)


def test_a_weight_of_1_adds_the_language_to_the_sibling() -> None:
    base, instruct = opened(), sibling()
    delta = language_adapter(base)
    made = dict(equip(base, instruct, delta).stack.model.named_parameters())
    for name, each in instruct.model.named_parameters():
        module = name.removesuffix(".weight")
        added = delta.delta(module) if module in delta.pairs else 0.0
        torch.testing.assert_close(made[name], each + added, atol=1e-6, rtol=1e-6)


def test_the_scan_takes_the_weight_that_is_best_for_the_text_given() -> None:
    base, instruct = opened(), sibling()
    delta, judged = language_adapter(base), {"a": text(1), "b": text(2)}
    found = equip(base, instruct, delta, judged)
    assert list(found.scan) == list(SCAN)
    by_hand = {value: sum(measure(arithmetic(base, [(delta, 1.0)], [(instruct, value)]).model, judged).values())
               for value in SCAN}  # fmt: skip
    assert found.instruct_weight == min(by_hand, key=lambda value: by_hand[value])
    assert any("lambda' =" in each for each in found.notes) and found.findings["scan"][0]["instruct_weight"] == 0
    assert equip(base, instruct, delta, judged, instruct_weight=0.3).instruct_weight == 0.3


def test_the_callers_models_stay_as_they_are() -> None:
    base, instruct = opened(), sibling()
    before = [logits(base), logits(instruct)]
    equip(base, instruct, language_adapter(base), {"a": text(1)})
    assert torch.equal(logits(base), before[0]) and torch.equal(logits(instruct), before[1])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: opened(seed=1), "as for unrelated models"),
        (lambda: opened(vocab_size=130), r"model.embed_tokens.weight is \[128, 32\] .* and \[130, 32\]"),
        (lambda: opened(num_hidden_layers=5), r"model.layers.4.* is None"),
    ],
)
def test_models_that_are_no_siblings_are_refused_in_one_line(other: Any, said: str) -> None:
    base = opened()
    with pytest.raises(MethodError, match=said) as error:
        equip(base, other(), language_adapter(base))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_revision_of_the_base_is_refused() -> None:
    with pytest.raises(LamellaError, match="give that revision"):
        equip(opened(), sibling(), language_adapter(opened(seed=1)))


def test_the_distance_is_relative_to_the_base() -> None:
    base = opened()
    other = Stack(share(base.model))
    for module in other.model.modules():
        for name, each in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(1.25 * each))
    assert check_siblings(base, other) == pytest.approx(0.25, rel=1e-5)
