"""Schedules by layer and step, and their FLOPs, against counts written out."""

from __future__ import annotations

import pytest

from lamella.methods.dmllm_token_redundancy import (
    LayerWidths,
    RequestLengths,
    VisualTokenSchedule,
    count,
    flops,
    recommend,
)
from lamella.methods.dmllm_token_redundancy.schedule import running

WIDTHS, LENGTHS = LayerWidths(8, 8, 4, 16), RequestLengths(image=16, prompt=5, answer=3)


def layer(queries: int, keys: int, tokens: int) -> int:
    """Multiplications and additions of one layer, map by map."""
    maps = queries * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8) + tokens * 3 * 8 * 16
    return 2 * (maps + 2 * queries * keys * 8)


def test_the_tables_are_those_of_the_drawing() -> None:
    late = VisualTokenSchedule.one_shot(layer=1, step=0.5, keep=0.25)
    assert late.table(4, 4) == [[1.0] * 4, [1.0] * 4, [1.0, 1.0, 0.25, 0.25], [0.25] * 4]
    assert VisualTokenSchedule.withdraw(1).table(4, 2) == [[1.0, 1.0, 0.0, 0.0]] * 2
    assert VisualTokenSchedule.withdraw(1, 0.5).table(4, 2) == [[1.0, 1.0, 0.0, 0.0], [0.0] * 4]
    stairs = VisualTokenSchedule.progressive([0.25, 0.5, 0.75], [0.75, 0.5, 0.25])
    assert [row[0] for row in stairs.table(2, 4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_shares_never_rise_over_steps_or_layers(steps: int) -> None:
    for schedule in (
        VisualTokenSchedule.one_shot(2, 0.5, 0.3),
        VisualTokenSchedule.progressive([0.1, 0.4], [0.6, 0.2], 1),
        VisualTokenSchedule.withdraw(3, 0.25),
    ):
        table = schedule.table(6, steps)
        assert all(row == sorted(row, reverse=True) for row in table)
        assert all(list(column) == sorted(column, reverse=True) for column in zip(*table, strict=True))


def test_a_share_is_its_whole_part_but_one_at_least() -> None:
    assert [count(64, 0.25), count(3, 0.1), count(3, 0.0), count(0, 0.5), count(10, 0.99)] == [16, 1, 0, 0, 9]


def test_flops_are_those_of_the_tokens_that_are_there() -> None:
    nothing = VisualTokenSchedule()
    assert flops(nothing, WIDTHS, 3, 2, LENGTHS) == 2 * 3 * layer(24, 24, 24)
    shot = VisualTokenSchedule.one_shot(0, 0.0, 0.25)
    first = layer(24, 24, 12) + 2 * layer(12, 12, 12)
    assert flops(shot, WIDTHS, 3, 2, LENGTHS) == first + 3 * layer(12, 12, 12)
    withdrawn = VisualTokenSchedule.withdraw(0)
    assert flops(withdrawn, WIDTHS, 3, 1, LENGTHS) == layer(24, 24, 8) + 2 * layer(8, 8, 8)


def test_with_a_cache_of_the_prompt_the_keys_alone_are_fewer() -> None:
    late = VisualTokenSchedule.one_shot(-1, 0.5, 0.0)
    whole, half = 3 * (layer(21, 21, 21) + layer(3, 24, 3)), 3 * layer(3, 8, 3)
    assert flops(late, WIDTHS, 3, 2, LENGTHS, cached=True) == whole + half
    saved = [
        1 - flops(late, WIDTHS, 3, 8, LENGTHS, cached) / flops(VisualTokenSchedule(), WIDTHS, 3, 8, LENGTHS, cached)
        for cached in (False, True)
    ]
    assert saved[1] < saved[0] / 3


def test_what_layers_run_is_a_share_of_all_tokens() -> None:
    late = VisualTokenSchedule.one_shot(0, 0.5, 0.25)  # of 24 tokens, 12 are left
    assert running(late, 3, 2, LENGTHS) == [(1.0, 0.75), (0.75, 0.75), (0.75, 0.75)]
    withdrawn = VisualTokenSchedule.withdraw(1)
    assert running(withdrawn, 3, 2, LENGTHS) == [(1.0, 1.0), (1.0, 8 / 24), (8 / 24, 8 / 24)]


def test_what_is_recommended_is_the_papers_rule() -> None:
    assert recommend("scratch", 3, 28) is None and recommend("ar2diff", 3, 28) is None
    withdrawn = recommend("ar2diff", 30, 28)
    assert withdrawn is not None and withdrawn.withdrawn == 16
    late = recommend("scratch", 30, 28)
    assert late is not None and all(drop.step >= 0.5 for drop in late.drops)
