"""Sharing what chains of layers have in common changes no result, and spares what it says it spares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lamella.errors import MethodError
from lamella.methods.cola import PrefixTree
from lamella.plan import ModelReference, PhasedPath, Plan, apply_static
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
IDS = torch.randint(3, 128, (1, 14), generator=torch.Generator().manual_seed(0))  # longer than Gemma's window of 8
CHAINS = [(0, 1, 2, 3), (0, 1, 1, 2, 3), (0, 1, 2, 1, 2, 3), (1, 0, 3, 2), (0, 3), (0, 1, 2, 3, 0, 1, 2, 3)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, **overrides: Any) -> Stack:
    stack = Stack(nano(name, **overrides))
    stack.model.generation_config.eos_token_id = None
    return stack


def view(stack: Stack, chain: tuple[int, ...]) -> Any:
    path = {"text": PhasedPath(prefill=list(chain), decode=list(chain))}
    return apply_static(stack, Plan(model=ModelReference.of(stack), path=path))


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_plain_execution(name: str) -> None:
    stack = opened(name)
    tree = PrefixTree(stack, IDS)
    for chain in CHAINS:
        expected = view(stack, chain)(IDS, use_cache=False).logits[0, -1]
        torch.testing.assert_close(tree.logits(chain), expected, rtol=1e-5, atol=1e-5)
    assert tree.executed < tree.unshared == sum(map(len, CHAINS))


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_answers_are_those_of_generate_on_the_same_chain(name: str) -> None:
    stack = opened(name)
    tree = PrefixTree(stack, IDS)
    for chain in CHAINS:
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert tree.greedy(chain, 8) == view(stack, chain).generate(IDS, **options)[0, 14:].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("budget", [0, 20_000, 100_000])
def test_a_small_budget_changes_nothing_but_the_work(name: str, budget: int) -> None:
    stack = opened(name)
    free, tight = PrefixTree(stack, IDS), PrefixTree(stack, IDS, budget)
    for chain in CHAINS * 2:
        assert torch.equal(tight.logits(chain), free.logits(chain))
        assert tight.held <= budget
        assert tight.greedy(chain, 5) == free.greedy(chain, 5)
        assert tight.held <= budget
    assert tight.unshared == free.unshared
    assert free.executed < tight.executed <= tight.unshared
    assert budget or tight.executed == tight.unshared


def test_a_common_prefix_is_run_once() -> None:
    tree = PrefixTree(opened("llama"), IDS)
    tree.logits((0, 1, 2, 3))
    assert tree.executed == 4
    tree.logits((0, 1, 3))  # shares 0 1
    assert tree.executed == 5
    tree.logits((0, 1, 2, 3))
    tree.logits((0, 1))
    assert tree.executed == 5
    tree.logits((1, 2, 3))  # shares nothing: the order is what counts
    assert tree.executed == 8
    assert tree.unshared == 4 + 3 + 4 + 2 + 3


def test_chains_that_wrote_the_same_tokens_share_their_streams_too() -> None:
    tree = PrefixTree(opened("llama"), IDS)
    first = tree.greedy((0, 1, 2, 3), 3)
    assert tree.executed == tree.unshared == 12
    assert tree.greedy((0, 1, 2, 3), 3) == first and tree.executed == 12
    longer = tree.greedy((0, 1, 2, 3), 4)
    assert longer[:3] == first and tree.executed == 16


def test_an_answer_ends_with_the_token_that_stops_it() -> None:
    tree = PrefixTree(opened("llama"), IDS)
    answer = tree.greedy((0, 1, 2, 3), 8)
    end = answer[2]
    assert tree.greedy((0, 1, 2, 3), 8, lambda token: token == end) == answer[: answer.index(end) + 1]
    assert tree.greedy((0, 1, 2, 3), 0) == []


def test_the_model_is_left_as_it_was() -> None:
    stack = opened("llama")
    before = stack.model(IDS).logits
    tree = PrefixTree(stack, IDS)
    tree.greedy((0, 1, 1, 2, 3), 4)
    tree.logits((3, 2))
    assert torch.equal(stack.model(IDS).logits, before)


@pytest.mark.parametrize("prompt", [IDS.repeat(2, 1), IDS[:, :0], IDS[0]])
def test_anything_but_one_prompt_is_refused_in_one_line(prompt: torch.Tensor) -> None:
    with pytest.raises(MethodError, match=r"takes one prompt of token ids \[1, time\], not \[") as error:
        PrefixTree(opened("llama"), prompt)
    assert "\n" not in str(error.value)


def test_an_empty_chain_is_refused() -> None:
    with pytest.raises(MethodError, match="at least one layer"):
        PrefixTree(opened("llama"), IDS).logits(())
