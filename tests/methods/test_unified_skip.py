"""Unified layer skipping chooses the layers that the paper's code chooses, and ours evenly."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch

from lamella.data import Samples
from lamella.errors import BudgetError, MethodError
from lamella.methods.unified_skip import balanced, released_rule, tune, unified_skip
from lamella.runtime import apply
from lamella.stack import Stack, open_model
from lamella.zoo.nano import nano

# The table of the released behaviour: L, s, n, kept.
RELEASED = [
    (30, 2, 15, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29]),
    (30, 3, 10, [0, 3, 6, 9, 12, 15, 18, 21, 24, 29]),
    (30, 5, 6, [0, 6, 12, 18, 24, 29]),
    (30, 10, 3, [0, 15, 29]),
    (32, 2, 16, [*range(0, 29, 2), 31]),
    (32, 4, 8, [0, 4, 8, 12, 16, 20, 24, 31]),
    (24, 5, 4, [0, 8, 16, 23]),
]


def opened(layers: int) -> Stack:
    return Stack(nano("llama", num_hidden_layers=layers))


@pytest.mark.parametrize(("layers", "speedup", "count", "kept"), RELEASED)
def test_the_released_rule_keeps_what_the_authors_code_keeps(
    layers: int, speedup: float, count: int, kept: list[int]
) -> None:
    assert len(kept) == count == layers // speedup
    assert released_rule(layers, count) == kept
    series = unified_skip(opened(layers), speedup=speedup, rule="release")
    assert series[-1].path["text"].decode == kept
    assert series[-1].path["text"].prefill == list(range(layers))


def test_below_2_the_released_rule_cuts_the_top_and_warns() -> None:
    with pytest.warns(UserWarning, match=r"keeps layers 0 to 18 and the last one: a contiguous cut.*use rule even"):
        series = unified_skip(opened(30), speedup=1.5, rule="release")
    assert series[-1].path["text"].decode == [*range(19), 29]


@pytest.mark.parametrize(("speedup", "rule"), [(2, "release"), (1, "release"), (1.5, "even"), (None, "even")])
def test_nothing_else_warns(speedup: float | None, rule: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unified_skip(opened(30), speedup=speedup, rule=rule)


@pytest.mark.parametrize("layers", [4, 24, 30, 32])
def test_the_even_rule_keeps_floor_of_l_over_s_layers_once_each_and_both_ends_for_every_target(layers: int) -> None:
    stack = opened(layers)
    for tenth in range(10, 5 * layers + 1, 3):
        speedup = tenth / 10
        kept = unified_skip(stack, speedup=speedup)[-1].path["text"].decode
        assert len(kept) == len(set(kept)) == int(layers / speedup)
        assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == layers - 1
        gaps = [after - before for before, after in pairwise(kept)]
        assert max(gaps) - min(gaps) <= 1 or len(kept) == 2


def test_without_a_target_the_series_holds_every_number_of_layers() -> None:
    series = unified_skip(opened(6))
    assert series[0].path == {} and series[0].drop == []
    assert [len(plan.runs("decode")) for plan in series] == [6, 5, 4, 3, 2]
    assert all(len(plan.runs("prefill")) == 6 for plan in series)
    assert [point.scores.get("kept layers") for point in series.points] == [None, 5, 4, 3, 2]


def test_a_series_of_one_target_begins_with_the_whole_model() -> None:
    series = unified_skip(opened(6), speedup=2)
    assert [len(plan.runs("decode")) for plan in series] == [6, 3]


@pytest.mark.parametrize("speedup", [3.5, 100])
def test_a_target_that_keeps_too_few_layers_is_refused_with_the_range(speedup: float) -> None:
    with pytest.raises(BudgetError, match="6 layers allow 1 to 3"):
        unified_skip(opened(6), speedup=speedup)


def test_the_released_rule_keeps_at_least_2_layers_and_at_most_all() -> None:
    for keep in (1, 7):
        with pytest.raises(BudgetError, match="keep at least 2 and at most 6"):
            released_rule(6, keep)


@torch.no_grad()
def test_a_target_of_1_changes_nothing() -> None:
    stack = opened(6)
    view = apply(stack, unified_skip(stack, speedup=1)[-1])
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(ids).logits, stack.model(ids).logits)


@torch.no_grad()
def test_prompts_are_encoded_at_full_depth_and_the_rest_is_not() -> None:
    stack = opened(6)
    view = apply(stack, unified_skip(stack, speedup=2)[-1])
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    out = view(ids, use_cache=True)
    torch.testing.assert_close(out.logits, stack.model(ids).logits)
    full = stack.model(ids, use_cache=True).cache
    following = out.logits[:, -1:].argmax(-1)
    thin = view(following, cache=out.cache).logits
    assert not torch.allclose(thin, stack.model(following, cache=full).logits, atol=1e-2)


def test_a_decoder_that_reads_an_encoder_is_planned_but_not_tuned_on_texts() -> None:
    decoder = open_model(nano("bart")).stacks["decoder"]
    plan = unified_skip(decoder, speedup=2)[-1]
    with pytest.raises(MethodError, match="attends to an encoder and these samples are texts") as error:
        tune(decoder, plan, Samples([]))
    assert "\n" not in str(error.value)


def test_balanced_fixtures() -> None:
    """Worked out by hand from round(j (L - 1) / (n - 1))."""
    assert balanced(30, 2) == [0, 29]
    assert balanced(30, 6) == [0, 6, 12, 17, 23, 29]  # multiples of 5.8: 5.8, 11.6, 17.4, 23.2
    assert balanced(7, 4) == [0, 2, 4, 6]
    assert balanced(10, 4) == [0, 3, 6, 9]
    assert balanced(24, 4) == [0, 8, 15, 23]  # 7.67, 15.33
    assert balanced(2, 2) == [0, 1]
    assert balanced(30, 30) == list(range(30))


@pytest.mark.parametrize("total", [2, 3, 8, 24, 30, 32, 80])
def test_balanced_keeps_that_many_both_ends_and_even_gaps(total: int) -> None:
    for keep in range(2, total + 1):
        chosen = balanced(total, keep)
        assert len(chosen) == len(set(chosen)) == keep
        assert chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] == total - 1
        gaps = [after - before for before, after in pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1 or keep == 2


@pytest.mark.parametrize(("total", "keep"), [(5, 1), (5, 6), (5, 0), (1, 1)])
def test_a_number_that_cannot_be_kept_is_refused(total: int, keep: int) -> None:
    with pytest.raises(BudgetError, match=f"keep at least 2 and at most {total}"):
        balanced(total, keep)
