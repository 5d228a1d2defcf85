"""Batched decoding from which rows leave: what it says is what each row says alone, and what ``generate`` says."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from lamella.data.decoding import (
    Batch,
    Lookup,
    ModelProposals,
    PreallocatedSlot,
    Prompt,
    Running,
    Sampling,
    _choose,
    batches,
    decode,
)
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import apply
from lamella.runtime.drafting import ENOUGH, PROBE
from lamella.zoo import open_stack, open_tokenizer
from lamella.zoo.nano import nano

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
GREEDY = Sampling(temperature=0)
PHASED = PhasedPath(prefill=[0, 1, 2, 3, 4, 5], decode=[0, 1, 4, 5])  # a plan that decides while the model runs
TEXTS = ("The", "A function that returns the value of", "Return", "class", "If the file does not exist, then")


def prompts(most: int | list[int] = 20) -> list[Prompt]:
    tokenizer = open_tokenizer(NANO_LLAMA)
    limits = most if isinstance(most, list) else [most] * len(TEXTS)
    pairs = zip(TEXTS, limits, strict=True)
    return [Prompt(tokenizer(text)["input_ids"], limit, seed) for seed, (text, limit) in enumerate(pairs)]


def views() -> dict[str, Any]:
    stack = open_stack(NANO_LLAMA)
    return {
        "whole": stack.model,
        "cut": apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.0.attn", "layers.3"])),
        "phased": apply(stack, Plan(model=ModelReference.of(stack), path={"text": PHASED})),
    }


@pytest.mark.parametrize("name", ["whole", "cut", "phased"])
def test_greedy_rows_are_those_of_generate_though_they_leave_at_different_times(name: str) -> None:
    model = views()[name]
    asked = prompts([3, 11, 1, 20, 7])
    end = 13  # any token will do: some rows meet it
    for row, prompt in zip(decode(model, asked, GREEDY, {end}), asked, strict=True):
        ids = torch.tensor([prompt.ids])
        out = model.generate(ids, max_new_tokens=prompt.max_tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
        expected = out[0, ids.shape[1] :].tolist()
        assert row.finished == (end in expected)
        assert row.ids == (expected[: expected.index(end)] if end in expected else expected)


@pytest.mark.parametrize("name", ["whole", "cut"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_texts_with_a_draft_are_those_without_it(name: str, sampling: Sampling, kind: str) -> None:
    model = views()[name]
    draft = Lookup() if kind == "lookup" else ModelProposals(views()["cut"])
    asked = [each._replace(max_tokens=24 + 9 * number, seed=number) for number, each in enumerate(prompts())]
    plain = decode(model, asked, sampling, {13})
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    draft.note(0, 1, 1e9)  # a slow plain pass, so that proposals are always worth it
    assert decode(model, asked, sampling, {13}, draft) == plain
    assert draft.is_on and max(widths[1:]) > 1  # some passes verified several tokens


def test_prompt_lookup_proposes_what_followed_and_ends_where_it_is_slower() -> None:
    lookup = Lookup()

    def rows(*texts: tuple[list[int], int]) -> list[Running]:
        return [Running(Prompt(ids, most + 1, 0), GREEDY, set()) for ids, most in texts]

    assert lookup.propose(rows(([1, 2, 3, 1, 2], 5))) == [[]]  # what a pass costs is measured first
    for _ in range(PROBE):
        lookup.note(0, 2, 1.0)
    found = lookup.propose(rows(([1, 2, 3, 4, 1, 2], 3), ([7, 8, 9], 5), ([5, 6, 5], 0)))
    assert found == [[3, 4, 1], [], []]
    lookup.note(8, ENOUGH // 2, 1.0)
    lookup.note(8, ENOUGH // 2, 1.0)
    assert lookup.is_on  # 32 tokens in 2 seconds, instead of 16
    lookup.note(8, 2, 40.0)
    assert not lookup.is_on and lookup.propose(rows(([1, 2, 3, 1, 2], 5))) == [[]]


def test_a_slot_with_room_holds_what_a_plain_one_holds_and_is_written_in_place() -> None:
    drawn = torch.Generator().manual_seed(0)

    def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        one, other = torch.randn(2, rows, 3, tokens, 8, generator=drawn)
        return one, other

    plain = DynamicLayer()
    roomy = PreallocatedSlot(*plain.update(*states(5, 7)))
    moved, rows = 0, 5
    for step in range(120):
        if step in (20, 21, 90):  # a row leaves
            rows -= 1
            for layer in (plain, roomy):
                layer.reorder_cache(torch.arange(rows))
        if step == 50:
            for layer in (plain, roomy):
                layer.crop(-4)
        before = roomy.keys.data_ptr()
        new = states(rows, 1 + step % 3)
        for ours, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        moved += roomy.keys.data_ptr() != before
    assert moved < 15 and roomy.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9), Sampling(1.0, 1.0)])
def test_a_row_says_the_same_alone_and_among_others(sampling: Sampling) -> None:
    model = views()["whole"]
    asked = prompts([3, 11, 1, 20, 7])
    together = decode(model, asked, sampling, {2})
    assert together == [decode(model, [each], sampling, {2})[0] for each in asked]
    assert together[::-1] == decode(model, asked[::-1], sampling, {2})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("kind", ["off", "lookup", "model"])
def test_rows_that_join_or_are_dropped_on_the_way_change_nothing_for_the_others(name: str, kind: str) -> None:
    model = nano(name).eval()
    samplings = [GREEDY, Sampling(0.8, 0.9), Sampling(1.0, 1.0), GREEDY, GREEDY]
    asked = [Prompt([5 + n, 6, 7, 5 + n, 6] * (1 + 3 * n), 30 - 5 * n, n) for n in range(5)]
    alone = [decode(model, [prompt], each, {13})[0] for prompt, each in zip(asked, samplings, strict=True)]
    rows = [Running(prompt, each, {13}) for prompt, each in zip(asked, samplings, strict=True)]
    draft = {"off": None, "lookup": Lookup(), "model": ModelProposals(nano(name).eval())}[kind]
    if draft is not None:
        draft.note(0, 1, 1e9)
    batch = Batch(model, draft)
    batch.join(rows[:2])
    for number in range(60):
        if number in (3, 7, 12):  # longer prompts than what is there, and shorter ones
            assert batch.takes_more
            batch.join([rows[{3: 4, 7: 2, 12: 3}[number]]])
        if number == 9:
            batch.drop([rows[4]])
        if batch.rows:
            batch.step()
    assert not batch.rows and batch.takes_more
    for row, expected in zip(rows[:4], alone[:4], strict=True):
        assert (row.ids, row.finished) == expected
    assert rows[4].ids == alone[4].ids[: len(rows[4].ids)]


def test_no_row_joins_a_batch_under_a_dynamic_plan_or_with_sliding_windows() -> None:
    for model in (views()["phased"], nano("gemma3_text").eval()):
        batch = Batch(model)
        batch.join([Running(Prompt([5, 6, 7], 9, 0), GREEDY, ())])
        assert not batch.takes_more


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_families_decode_as_they_generate(name: str) -> None:
    model = nano(name).eval()
    asked = [Prompt(list(range(5, 5 + length)), 9, length) for length in (2, 11, 6)]
    for row, prompt in zip(decode(model, asked, GREEDY, set()), asked, strict=True):
        out = model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0
        )
        assert row.ids == out[0, len(prompt.ids) :].tolist() and not row.finished


def test_batches_hold_each_prompt_once_and_those_of_one_length_together() -> None:
    drawn = random.Random(0)
    asked = [Prompt([0] * drawn.randrange(1, 60), 8, n) for n in range(50)]
    found = batches(asked, 8)
    assert sorted(n for batch in found for n in batch) == list(range(50)) and [len(b) for b in found] == [8] * 6 + [2]
    lengths = [len(asked[n].ids) for batch in found for n in batch]
    assert lengths == sorted(lengths, reverse=True)


def drawn(logits: torch.Tensor, sampling: Sampling, seed: int, draws: int) -> Counter[int]:
    row = Running(Prompt([], 1, seed), sampling, ())
    return Counter(_choose(logits, [row])[0] for _ in range(draws))


def test_tokens_are_drawn_by_their_share_of_the_nucleus() -> None:
    """Against the shares computed by hand: of 0.5, 0.3, 0.15, 0.05 at top_p 0.8 the first two are left."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    count = drawn(logits, Sampling(1.0, 0.79), 0, 4000)
    assert set(count) == {0, 1} and abs(count[0] / 4000 - 0.5 / 0.8) < 4 * math.sqrt(0.625 * 0.375 / 4000)
    cold = drawn(logits, Sampling(0.5, 1.0), 0, 4000)
    squares = [share**2 for share in (0.5, 0.3, 0.15, 0.05)]
    assert abs(cold[1] / 4000 - squares[1] / sum(squares)) < 4 * 0.5 / math.sqrt(4000)


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    logits = torch.zeros(1, 1000)  # all alike: 900 tokens make up 0.9
    assert 800 < len(drawn(logits, Sampling(1.0, 0.9), 1, 3000)) <= 901
