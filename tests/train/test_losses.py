"""Losses equal what whole logits give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply, parallel
from lamella.stack import Stack
from lamella.train import blocks, collate, distilled_loss, pairs, response_loss
from lamella.train import losses as losses_module
from lamella.zoo.nano import nano

TOKENS = torch.randint(3, 128, (4, 15), generator=torch.Generator().manual_seed(0))
BATCH = collate(pairs([(row[:cut], row[cut : cut + 6]) for row, cut in zip(TOKENS, (3, 9, 1, 5), strict=True)]))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "CHUNK", 7)  # 24 positions carry loss


def phased(stack: Stack) -> Any:
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}
    return apply(stack, Plan(model=ModelReference.of(stack), path=path))


def logits_of(model: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels at the positions that carry loss, from a plain forward of each row alone."""
    logits, labels = [], []
    for ids, real, label, prompt in zip(*(BATCH[name] for name in ORDER), strict=True):
        length = int(real.sum())
        out = parallel(model, ids[None, :length], prompt[None]).logits[0]
        logits.append(out[prompt - 1 : -1])
        labels.append(label[prompt:length])
    return torch.cat(logits), torch.cat(labels)


ORDER = ("input_ids", "attention_mask", "labels", "prompt_lengths")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("view", [False, True])
def test_response_loss_is_the_cross_entropy_of_each_row_alone_as_it_is_served(name: str, view: bool) -> None:
    stack = Stack(nano(name))
    model = phased(stack) if view else stack.model
    loss = response_loss(model, BATCH)
    torch.testing.assert_close(loss, cross_entropy(*logits_of(model)), atol=2e-5, rtol=0)
    loss.backward()
    chunked = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    cross_entropy(*logits_of(model)).backward()
    for ours, parameter in zip(chunked, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=2e-5, rtol=1e-3)


def test_distilled_loss_adds_the_weighted_squared_error_of_the_logits() -> None:
    stack = Stack(nano("llama"))
    view = phased(stack)
    loss, parts = distilled_loss(view, BATCH, teacher=stack.model, weight=0.5)
    (ours, labels), (theirs, _) = logits_of(view), logits_of(stack.model)
    torch.testing.assert_close(parts["ce"], cross_entropy(ours, labels), atol=2e-5, rtol=0)
    torch.testing.assert_close(parts["mse"], mse_loss(ours, theirs), atol=2e-5, rtol=1e-5)
    assert parts["mse"] > 1e-3
    torch.testing.assert_close(loss, parts["ce"] + 0.5 * parts["mse"])


def test_the_logits_of_a_long_batch_are_never_whole() -> None:
    stack = Stack(nano("llama"))
    largest = 0

    def note(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.shape[0])

    stack.unembedding.register_forward_hook(note)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: _refuse_logits(x, 24), lambda x: x):
        response_loss(stack.model, collate(blocks(TOKENS, 8))).backward()
    assert largest == 7


def _refuse_logits(saved: Tensor, positions: int) -> Tensor:
    assert saved.shape[-1] != 128 or saved.shape[:-1].numel() < positions, f"kept {list(saved.shape)} for the backward"
    return saved
