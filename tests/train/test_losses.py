"""Losses equal those of whole logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from lamella.errors import ArchitectureError, TrainingError
from lamella.plan import ModelReference, PhasedPath, Plan, materialise
from lamella.runtime import apply, parallel
from lamella.stack import Stack
from lamella.train import (
    blocks,
    collate,
    diffusion_loss,
    distillation_loss,
    distilled_loss,
    forward_kl,
    own,
    pairs,
    projection,
    response_loss,
)
from lamella.train import losses as losses_module
from lamella.zoo.nano import NANO_DIFFUSION, nano

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


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_response_loss_of_an_encoder_decoder_is_that_of_its_own_forward(name: str) -> None:
    model = nano(name).eval()
    rows = [{"input_ids": row[: 5 + cut], "labels": row[cut:]} for row, cut in zip(TOKENS, (9, 6, 8, 3), strict=True)]
    batch = collate(rows)
    assert batch["input_ids"].shape == (4, 14) and batch["labels"].shape == (4, 12)
    with torch.no_grad():
        ours = response_loss(model, batch)
        theirs = model(**{each: batch[each] for each in ("input_ids", "attention_mask", "labels")}).loss
        alone = sum(
            model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss * len(row["labels"])
            for row in rows
        ) / sum(len(row["labels"]) for row in rows)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, alone)


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


def smaller(stack: Stack, hidden: int = 24) -> Any:
    """Return a model of half the depth and a smaller hidden size, with its own parameters."""
    width: Any = {"hidden.channels": list(range(hidden))}
    model = materialise(stack, Plan(model=ModelReference.of(stack), drop=["layers.1", "layers.2"], width=width)).model
    own(model)
    return model


def test_distillation_loss_is_the_forward_divergence_per_token_of_whole_logits() -> None:
    stack = Stack(nano("llama"))
    student = smaller(stack)
    (ours, _), (theirs, _) = logits_of(student), logits_of(stack.model)
    for temperature in (1.0, 2.0):
        loss = distillation_loss(student, BATCH, teacher=stack.model, temperature=temperature)
        p, q = ((logits.double() / temperature).softmax(-1) for logits in (theirs, ours))
        expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    assert loss > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_with_a_frozen_head_the_gradient_is_that_of_whole_logits(name: str) -> None:
    stack = Stack(nano(name))
    student = materialise(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"])).model
    own(student)
    for module in Stack(student).vocabulary:
        module.requires_grad_(False)
    trained = [each for each in student.parameters() if each.requires_grad]
    (3 * distillation_loss(student, BATCH, teacher=stack.model)).backward()  # what is upstream counts
    gradients = [each.grad for each in trained]
    student.zero_grad()
    (ours, _), (theirs, _) = logits_of(student), logits_of(stack.model)
    p = theirs.detach().double().softmax(-1)
    (3 * (p * (p.log() - ours.double().log_softmax(-1))).sum(-1).mean()).backward()
    for ours_, each in zip(gradients, trained, strict=True):
        torch.testing.assert_close(ours_, each.grad, atol=2e-5, rtol=1e-3)
    with torch.no_grad():
        distillation_loss(student, BATCH, teacher=stack.model)  # and where nothing trains, none is taken


def test_a_divergence_of_half_logits_is_computed_in_float32_at_any_temperature() -> None:
    ours, theirs = (10 * torch.randn(5, 40, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (0, 1))
    for temperature in (1.0, 3.0):
        p, q = ((logits.double() / temperature).log_softmax(-1) for logits in (theirs, ours))
        expected = float((p.exp() * (p - q)).sum()) * temperature**2
        assert forward_kl(ours, theirs, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_differ_from_itself_and_gets_no_gradient() -> None:
    stack = Stack(nano("llama"))
    loss = distillation_loss(stack.model, BATCH, teacher=copy.deepcopy(stack.model))
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad.abs().max() <= 1e-6 for parameter in stack.model.parameters())


def test_only_the_model_that_trains_gets_a_gradient() -> None:
    stack = Stack(nano("llama"))
    student = smaller(stack)
    projection(student, stack.model)
    loss, _ = distillation_loss(student, BATCH, teacher=stack.model, pairs=[(0, 0), (1, 3)])
    loss.backward()
    assert all(parameter.grad is None for parameter in stack.model.parameters())
    trained = dict(student.named_parameters())
    assert all(parameter.grad is not None for parameter in trained.values())
    assert trained["lamella_projection.weight"].shape == (32, 24)
    assert sum("projection" in name for name in trained) == 1  # one, shared by all pairs
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stack.model.modules())


def test_states_inside_are_compared_after_norms_and_weigh_as_much_as_the_divergence() -> None:
    stack = Stack(nano("llama"))
    student = smaller(stack, hidden=32)
    projection(student, stack.model)
    assert not hasattr(student, "lamella_projection")  # streams of equal width need none
    loss, parts = distillation_loss(student, BATCH, teacher=stack.model, pairs=[(1, 3)])
    kl = distillation_loss(student, BATCH, teacher=stack.model)
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(loss, 2 * kl)
    assert not parts["alpha"].requires_grad
    gradient = torch.autograd.grad(loss, student.lm_head.weight, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(kl, student.lm_head.weight)[0])  # alpha is no path

    with torch.no_grad():  # the same states, from the streams that the models give away themselves
        distances = []
        for ours, theirs in ((0, 0), (1, 3)):
            rows = []
            for model, layer in ((student, ours), (stack.model, theirs)):
                inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
                h = model(**inputs, output_hidden_states=True).hidden_states[layer]
                h = h if layer == 0 else Stack(model).layers[layer].input_layernorm(h)
                rows.append(h[:, :-1][BATCH["labels"][:, 1:] != -100])
            distances.append(1 - torch.nn.functional.cosine_similarity(*rows).mean())
    torch.testing.assert_close(parts["states"], torch.stack(distances).mean(), atol=1e-5, rtol=0)


def test_states_inside_a_family_that_is_not_known_are_refused() -> None:
    stack = Stack(nano("opt"))
    with pytest.raises(TrainingError, match="intermediate states of opt models are unknown"):
        distillation_loss(stack.model, BATCH, teacher=stack.model, pairs=[(0, 0)])


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_the_masked_diffusion_loss_is_what_its_definition_says_and_has_its_gradient(name: str) -> None:
    model = nano(name)
    torch.manual_seed(5)
    loss = diffusion_loss(model, BATCH)
    torch.manual_seed(5)
    share = (1 - 1e-3) * torch.rand(4) + 1e-3  # p, drawn first
    drawn = torch.rand(BATCH["labels"].shape)
    labels = BATCH["labels"] != -100
    total = torch.zeros(())
    for row in range(4):
        chosen = labels[row] & (drawn[row] < share[row])
        if not chosen.any():  # one at least
            chosen = torch.arange(len(drawn[row])) == drawn[row].masked_fill(~labels[row], 2).argmin()
        noisy = torch.where(chosen, 127, BATCH["input_ids"][row])
        real = BATCH["attention_mask"][row].bool()
        logits = model(input_ids=noisy[real][None]).logits[0]
        for at in chosen.nonzero().flatten().tolist():
            predicted = logits[at - int(name == "dream")].log_softmax(-1)
            total = total - predicted[BATCH["input_ids"][row, at]] / share[row]
    expected = total / labels.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    weight = next(model.parameters())
    ours, theirs = (torch.autograd.grad(each, weight)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_masks_by_count_have_the_mean_loss_over_all_counts(name: str) -> None:
    model = nano(name)
    row = {key: values[:1, BATCH["attention_mask"][0].bool()] for key, values in BATCH.items() if values.ndim == 2}
    row["labels"] = row["labels"].masked_fill(torch.arange(row["labels"].shape[1]) < row["labels"].shape[1] - 3, -100)
    ids, end = row["input_ids"], row["labels"].shape[1]
    expected = 0.0  # counts are equally likely, and so are the sets of each count
    sets = [[place for place in range(3) if chosen >> place & 1] for chosen in range(1, 8)]
    for some in sets:
        noisy = ids.clone()
        noisy[0, [end - 3 + place for place in some]] = 127
        log_probs = model(input_ids=noisy).logits[0].log_softmax(-1)
        total = sum(
            -float(log_probs[end - 3 + place - int(name == "dream"), ids[0, end - 3 + place]].detach())
            for place in some
        )
        expected += total / len(some) / sum(len(each) == len(some) for each in sets) / 3
    torch.manual_seed(5)
    found = [float(diffusion_loss(model, row, by_count=True)) for _ in range(600)]
    assert sum(found) / 600 == pytest.approx(expected, rel=0.02)


def test_a_decoder_has_no_masked_diffusion_loss() -> None:
    with pytest.raises(ArchitectureError, match="predicts next token, not masked tokens"):
        diffusion_loss(nano("llama"), BATCH)
