"""Scored positions by objective, compared with the loss computed token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.measure import RATIOS, draws, masked, nats_per_token, predicting
from lamella.stack import Stack
from lamella.zoo.nano import NANO_DIFFUSION, nano

IDS = torch.randint(3, 127, (3, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def log_p(stack: Stack, ids: Tensor, at: int, token: int) -> float:
    """The log probability of a token of one row, by the model alone."""
    logits = stack.model(input_ids=ids[None]).logits[0].double()
    return float(logits[at - int(stack.architecture.name != "llada")].log_softmax(-1)[token])


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_masked_tokens_weigh_one_over_their_share(name: str) -> None:
    stack = Stack(nano(name))
    asked = draws(stack, IDS, (0.3, 0.8), seed=3)
    expected = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for draw in asked:
            noisy = draw.inputs["input_ids"][0]
            for at in draw.scored[0].nonzero().flatten().tolist():
                assert noisy[at] == 127
                loss = -log_p(stack, noisy, at, int(IDS[draw.sequence, at]))
                expected[draw.sequence] += loss / draw.ratio / 15 / 2
            assert torch.equal(noisy[~draw.scored[0]], IDS[draw.sequence][~draw.scored[0]])
    torch.testing.assert_close(nats_per_token(stack, asked), expected, rtol=1e-5, atol=0)


def test_a_decoder_is_scored_on_every_token_but_the_first() -> None:
    stack = Stack(nano("llama"))
    asked = draws(stack, {"input_ids": IDS, "attention_mask": MASK}, RATIOS)
    assert [draw.eligible for draw in asked] == [10, 15, 15] and {draw.ratio for draw in asked} == {0.0}
    with torch.no_grad():
        expected = -sum(log_p(stack, IDS[1], at, int(IDS[1, at])) for at in range(1, 16)) / 15
    assert nats_per_token(stack, asked)[1] == pytest.approx(expected, rel=1e-5)


def test_the_same_seed_masks_the_same_tokens_for_another_model() -> None:
    ours, theirs, others = (
        draws(Stack(nano(name)), IDS, seed=seed) for name, seed in (("llada", 0), ("dream", 0), ("llada", 1))
    )
    assert all(torch.equal(a.scored, b.scored) for a, b in zip(ours, theirs, strict=True))
    assert not all(torch.equal(a.scored, b.scored) for a, b in zip(ours, others, strict=True))


def test_only_eligible_tokens_are_masked_at_the_requested_rate() -> None:
    eligible = torch.rand(4, 20_000, generator=torch.Generator().manual_seed(0)) < 0.5
    ratios = torch.tensor([0.1, 0.5, 0.9, 1.0])
    chosen = masked(eligible, ratios, torch.Generator().manual_seed(1))
    assert not (chosen & ~eligible).any() and torch.equal(chosen[3], eligible[3])
    torch.testing.assert_close(chosen.sum(1) / eligible.sum(1), ratios, rtol=0, atol=0.02)
    assert masked(eligible[:, :3], torch.full((4,), 1e-9)).any(1).eq(eligible[:, :3].any(1)).all()


@pytest.mark.parametrize("name", [*NANO_DIFFUSION, "llama"])
def test_what_predicts_a_token_is_where_the_architecture_says(name: str) -> None:
    scored = torch.zeros(1, 5, dtype=torch.bool)
    scored[0, [2, 4]] = True
    at = predicting(Stack(nano(name)), torch.arange(5)[None], scored)
    assert at.tolist() == ([2, 4] if name == "llada" else [1, 3])


@pytest.mark.parametrize("ratios", [(), (0.0,), (0.5, 1.5)])
def test_shares_that_are_none_are_refused(ratios: tuple[float, ...]) -> None:
    with pytest.raises(CalibrationError, match="mask ratios") as error:
        draws(Stack(nano("llada")), IDS, ratios)
    assert "\n" not in str(error.value)


def test_a_text_that_is_all_front_is_refused() -> None:
    with pytest.raises(CalibrationError, match="give more text"):
        draws(Stack(nano("llada")), IDS, front=16)
