"""Criteria for image tokens, compared with their definitions."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.measure.image_tokens import (
    CRITERIA,
    CriterionName,
    TokenFeatures,
    above_quartiles,
    best,
    choose,
    clusters,
    matched,
    raters,
)

N, TEXT, WIDTH, HEADS = 12, 5, 6, 3
DRAWN = torch.Generator().manual_seed(0)


def seen(image: Tensor | None = None) -> TokenFeatures:
    attention = torch.rand(HEADS, TEXT + 4, N, generator=DRAWN, dtype=torch.float64)
    image = torch.randn(N, WIDTH, generator=DRAWN, dtype=torch.float64) if image is None else image
    text = torch.randn(TEXT, WIDTH, generator=DRAWN, dtype=torch.float64)
    gradient = torch.randn(N, WIDTH, generator=DRAWN, dtype=torch.float64)
    return TokenFeatures(image, text, attention, attention[:, :TEXT], gradient, torch.Generator().manual_seed(1))


def test_the_type_of_their_names_holds_every_criterion() -> None:
    assert set(get_args(CriterionName)) == set(CRITERIA)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 11, 12])
@pytest.mark.parametrize("criterion", [each for each in CRITERIA if each != "withdraw"])
def test_as_many_are_kept_as_are_wanted_and_none_twice(criterion: str, k: int) -> None:
    found = choose(criterion, seen(), k)
    assert len(set(found.index.tolist())) == len(found.index) == k
    assert found.states is None or found.states.shape == (k, WIDTH)


def test_attention_is_summed_over_queries_and_averaged_over_heads() -> None:
    given = seen()
    scores = [
        sum(float(given.attention[head, query, token]) for head in range(HEADS) for query in range(TEXT + 4)) / HEADS
        for token in range(N)
    ]
    assert choose("fastv", given, 4).index.tolist() == sorted(range(N), key=lambda token: -scores[token])[:4]


def test_of_equal_scores_the_first_are_kept_whatever_their_order() -> None:
    assert best(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]
    assert best(torch.zeros(6), 3).tolist() == [0, 1, 2]


def test_diversity_is_the_greedy_max_min_by_hand() -> None:
    given = seen()
    unit = given.image / given.image.norm(dim=-1, keepdim=True)
    apart = (1 - unit @ unit.T).tolist()
    chosen = [max(range(N), key=lambda a: min(apart[a][b] for b in range(N) if b != a))]
    while len(chosen) < 5:
        rest = [each for each in range(N) if each not in chosen]
        chosen.append(max(rest, key=lambda a: min(apart[a][b] for b in chosen)))
    assert choose("divprune", given, 5).index.tolist() == chosen


def test_raters_are_the_text_more_like_the_image_than_its_mean() -> None:
    image = torch.tensor([[1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    assert raters(image, text).tolist() == [True, False, True, False]
    assert raters(image, text[:1]).tolist() == [True]


def test_what_is_recycled_are_means_of_the_rest() -> None:
    given = seen()
    found = choose("sparsevlm", given, 4)
    kept = found.index[:3]
    assert torch.equal(found.states[:3], given.image[kept])
    rest = [each for each in range(N) if each not in kept.tolist()]
    assert torch.allclose(found.states[3], given.image[rest].mean(dim=0))


def test_clusters_of_two_heaps_are_these() -> None:
    heaps = torch.cat([torch.randn(6, 2, generator=DRAWN) * 0.1, torch.randn(6, 2, generator=DRAWN) * 0.1 + 9])
    centres, member = clusters(heaps, 2)
    assert sorted(int(each) // 6 for each in centres) == [0, 1]
    assert len(set(member[:6].tolist())) == len(set(member[6:].tolist())) == 1
    centres, member = clusters(torch.ones(4, 2), 3)  # all the same point
    assert len(set(centres.tolist())) == 3 and set(member.tolist()) == {0, 1, 2}


def test_merging_keeps_the_sum_and_merges_the_pair_most_alike() -> None:
    states = torch.randn(8, 4, generator=DRAWN, dtype=torch.float64)
    states[4] = 2 * states[3]  # an even and an odd position: cosine 1
    index, merged, sizes = matched(torch.arange(8), states, torch.ones(8, dtype=torch.float64), 1)
    assert index.tolist() == [0, 1, 2, 3, 5, 6, 7] and sizes.tolist() == [1, 1, 1, 2, 1, 1, 1]
    assert torch.allclose(merged[3], 1.5 * states[3])
    given = seen()
    index, merged, sizes = torch.arange(N), given.image, torch.ones(N, dtype=torch.float64)
    for _ in range(2):
        index, merged, sizes = matched(index, merged, sizes, 3)
        assert torch.allclose((merged * sizes[:, None]).sum(dim=0), given.image.sum(dim=0))


def test_likeness_keeps_the_question_and_the_mean_of_the_rest() -> None:
    given = seen()
    found = choose("trim", given, 5)
    question = given.text.mean(dim=0)
    alike = torch.cosine_similarity(given.image, question[None], dim=-1)
    assert found.index.tolist() == alike.argsort(descending=True)[:5].tolist()
    rest = [each for each in range(N) if each not in found.index[:4].tolist()]
    assert torch.allclose(found.states[4], given.image[rest].mean(dim=0))
    assert above_quartiles(torch.tensor([0.0, 0.1, 0.2, 0.1, 5.0])).tolist() == [False] * 4 + [True]


def test_the_signal_is_the_first_order_change_on_removal_of_a_token() -> None:
    weights = torch.randn(WIDTH, generator=DRAWN, dtype=torch.float64)
    image = torch.randn(N, WIDTH, generator=DRAWN, dtype=torch.float64)
    given = TokenFeatures(image, gradient=weights.expand(N, -1))  # of a linear answer the change is exact
    rest = [[*range(at), *range(at + 1, N)] for at in range(N)]
    changes = [abs(float((image @ weights).sum() - (image[each] @ weights).sum())) for each in rest]
    assert choose("signal", given, 3).index.tolist() == sorted(range(N), key=lambda at: -changes[at])[:3]


def test_chance_draws_every_pair() -> None:
    drawn = set()
    for at in range(60):
        given = TokenFeatures(torch.zeros(4, 1), generator=torch.Generator().manual_seed(at))
        drawn.add(tuple(sorted(choose("random", given, 2).index.tolist())))
    assert drawn == set(itertools.combinations(range(4), 2))


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(MethodError, match="choose one of fastv"):
        choose("best", seen(), 1)
