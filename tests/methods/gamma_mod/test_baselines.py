"""Image tokens that leave for good: against the model's own layers, run for the tokens that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.methods.gamma_mod.baselines import ImageTokenPruning
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import empty_cache, parallel, with_policy
from lamella.stack import Stack, attend_with_weights
from lamella.zoo.nano import nano

PROMPT, LENGTH, FRONT, IMAGE = 24, 28, 2, 16


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened() -> tuple[Stack, dict[str, Tensor]]:
    model = nano("llava").double()
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, FRONT : FRONT + IMAGE] = model.config.image_token_id
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Stack(model, stack="text"), {"input_ids": ids, "pixel_values": pixels}


def logits_of(stack: Stack, given: dict[str, Tensor], **settings: Any) -> Tensor:
    return parallel(viewed(stack, **settings), given, torch.full((2,), PROMPT)).logits


def viewed(stack: Stack, **settings: Any) -> Any:
    plan = Plan(model=ModelReference.of(stack), policies={"text": PolicyReference(name="pruned")})
    return with_policy(stack, plan, ImageTokenPruning(stack, **settings))


@pytest.mark.parametrize(("criterion", "keep"), [("fastv", 5), ("withdraw", 0)])
def test_later_layers_run_for_the_tokens_that_the_prompt_attends_to_most(criterion: str, keep: int) -> None:
    stack, given = opened()
    found = logits_of(stack, given, layer=1, keep=keep, criterion=criterion)
    context = stack.context(given)
    before = stack.run(context.h, 0, 1, context)
    _, weights = attend_with_weights(stack.architecture["attn"], stack.layers[1], before, context.calls[1], True)
    h = stack.run(before, 1, 2, context)
    for row in range(2):
        received = weights[row, :, :PROMPT, FRONT : FRONT + IMAGE].mean(0).sum(0)
        best = (received.topk(keep).indices + FRONT).sort().values
        places = torch.cat([torch.arange(FRONT), best, torch.arange(FRONT + IMAGE, LENGTH)])
        g, causal = h[row : row + 1, places], torch.full((len(places),) * 2, -1e9, dtype=h.dtype).triu(1)
        for index in (2, 3):
            call = {**context.calls[index], "attention_mask": causal[None, None]}
            call["position_embeddings"] = tuple(each[:, places] for each in call["position_embeddings"])
            g = stack.layers[index](g, **{name: each for name, each in call.items() if name != "position_ids"})
        text = torch.arange(len(places) - (LENGTH - FRONT - IMAGE), len(places))
        torch.testing.assert_close(found[row, FRONT + IMAGE :], stack.head(g)[0, text], rtol=0, atol=5e-6)


def test_where_all_are_kept_nothing_changes_and_steps_equal_whole_sequences() -> None:
    stack, given = opened()
    whole = stack.model(**given).logits
    torch.testing.assert_close(logits_of(stack, given, layer=1, keep=IMAGE), whole, rtol=0, atol=5e-6)
    view = viewed(stack, layer=1, keep=5)
    cache, parts = empty_cache(view, PROMPT), []
    for begin, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, LENGTH)):
        shown = {"pixel_values": given["pixel_values"]} if begin == 0 else {}
        parts.append(view(input_ids=given["input_ids"][:, begin:end], cache=cache, use_cache=True, **shown).logits)
    pruned = logits_of(stack, given, layer=1, keep=5)
    torch.testing.assert_close(torch.cat(parts, dim=1), pruned, rtol=0, atol=5e-6)
