"""Selective layer restoration: the rule, what a plan restores to the bit, and what it is compared with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamella
from lamella.errors import LamellaError, MethodError
from lamella.files import Work
from lamella.methods.slr import (
    EMPTY,
    MixedModel,
    answerable,
    choose,
    fixed_intervals,
    intervals,
    measure,
    measure_restored,
    mix_models,
    plan_of,
    random_intervals,
    search,
    slr,
    soup,
    with_norms_of,
)
from lamella.methods.slr.answers import ChoiceQuestion, EncodedQuestions, answer
from lamella.methods.slr.questions import Questions
from lamella.plan import ModelReference, Plan, apply_tensors, compose, fingerprint, parameters_at, restore_edit
from lamella.stack import Stack
from lamella.train import add_lora
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
OUTSIDE = ["embed", "norm", "head"]


@pytest.fixture(autouse=True)
def quietly():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "restoring all")
        yield


def encoded_questions(seed: int = 0) -> EncodedQuestions:
    generator = torch.Generator().manual_seed(seed)
    questions = [ChoiceQuestion(f"question {x}", ("a", "b", "c"), "odd" if x % 2 else "even") for x in range(6)]
    prompts = [torch.randint(3, 128, (4 + 2 * x,), generator=generator).tolist() for x in range(6)]
    return EncodedQuestions.of(questions, prompts, [[[10], [11, 12], [13]]] * 6)


def pair(name: str = "llama", **overrides: Any) -> tuple[Stack, Stack]:
    return Stack(nano(name, **overrides)), Stack(nano(name, 1, **overrides))


def restoring(post: Stack, pre: Stack, sites: list[str], folder: Path) -> Plan:
    return Plan(model=ModelReference.of(post), weights=[restore_edit(post, pre, sites, folder)])


def chosen(post: Stack, pre: Stack, folder: Path, **options: Any) -> Plan:
    """The plan of a search."""
    return plan_of(post, pre, search(post, pre, encoded_questions(), **options), folder)


def layers(start: int, stop: int) -> list[str]:
    return [f"layers.{layer}" for layer in range(start, stop)]


def state(model: Any) -> dict[str, Tensor]:
    return model.state_dict()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def point(what: Any, quality: float, diversity: float) -> MixedModel:
    return MixedModel(what, quality, diversity)


# The rule.


def test_the_most_diverse_interval_above_the_floor_is_chosen() -> None:
    post = point(EMPTY, 0.8, 0.3)
    points = [point((0, 1), 0.75, 0.5), point((0, 2), 0.721, 0.6), point((0, 3), 0.719, 0.9)]
    assert choose(points, post).what == (0, 2)  # the floor is 0.72
    assert choose(points, post, 0.5).what == (0, 3)
    assert choose(points, post, 1.0) == post


def test_ties_go_to_the_shorter_interval_and_the_smaller_share() -> None:
    post = point(EMPTY, 0.8, 0.3)
    assert choose([point((0, 3), 0.8, 0.6), point((2, 4), 0.8, 0.6)], post).what == (2, 4)
    assert choose([point(0.5, 0.8, 0.6), point(0.25, 0.8, 0.6)], post).what == 0.25


def test_nothing_better_than_post_is_the_empty_interval() -> None:
    post = point(EMPTY, 0.8, 0.6)
    assert choose([point((0, 1), 0.9, 0.6), point((1, 2), 0.9, 0.2)], post) == post
    assert choose([], post) == post


def test_two_equal_models_restore_nothing(tmp_path: Path) -> None:
    post, pre = Stack(nano("llama")), Stack(nano("llama"))
    plan = chosen(post, pre, tmp_path, min_validity=0)
    assert plan.weights == [] and plan.provenance["interval"] == [0, 0]
    assert len({tuple(row[2:]) for row in plan.provenance["table"]}) == 1
    assert equal(state(lamella.apply(post, plan)), state(post.model))


def test_a_floor_that_rules_nothing_out_is_warned_of() -> None:
    post, pre = pair()
    with pytest.warns(UserWarning, match="restoring all 4 layers keeps Q at .* raise min_quality") as seen:
        search(post, pre, encoded_questions(), min_validity=0, min_quality=0.0)
    assert "\n" not in str(seen[0].message)


def test_questions_that_post_does_not_answer_are_left_out_and_listed() -> None:
    post, pre = pair()
    questions = encoded_questions()
    quality = answer(post, questions).quality
    bound = float(quality.sort().values[2:4].mean())
    kept, dropped = answerable(post, questions, bound)
    expected = [question.prompt for question, q in zip(questions.questions, quality.tolist(), strict=True) if q < bound]
    assert dropped == expected and len(dropped) == 3 and len(kept) == 3
    found = search(post, pre, questions, min_validity=bound)
    assert list(found.dropped) == expected and found.post == measure(post, kept)


# The search.


@pytest.mark.parametrize("name", CAUSAL)
def test_the_plan_s_own_figures_are_those_of_the_model_that_it_makes(name: str, tmp_path: Path) -> None:
    post, pre = pair(name)
    plan = chosen(post, pre, tmp_path, min_validity=0, min_quality=0)
    found = measure(Stack(lamella.apply(post, plan)), encoded_questions())
    assert (found.quality, found.diversity) == pytest.approx((plan.provenance["q"], plan.provenance["d"]), abs=1e-5)
    assert plan.provenance["d"] == max([row[3] for row in plan.provenance["table"]] + [plan.provenance["d_post"]])
    assert len(plan.provenance["table"]) == 10


def test_coarse_to_fine_looks_around_the_best_coarse_interval() -> None:
    post, pre = pair(num_hidden_layers=9)
    found = search(post, pre, encoded_questions(), min_validity=0, min_quality=0, stride=3)
    coarse = measure_restored(post, pre, encoded_questions(), intervals(9, 3))
    best = max(coarse, key=lambda each: each.diversity).what
    fine = {(i, j) for i in range(best[0] - 2, best[0] + 3) for j in range(best[1] - 2, best[1] + 3) if 0 <= i < j <= 9}
    assert {each.what for each in found.points} == set(intervals(9, 3)) | fine
    everything = {
        each.what: each for each in search(post, pre, encoded_questions(), min_validity=0, min_quality=0).points
    }
    for each in found.points:
        assert each.diversity == pytest.approx(everything[each.what].diversity, abs=1e-9)


def test_an_interrupted_search_resumes_with_the_same_result(tmp_path: Path) -> None:
    post, pre = pair()
    whole = search(post, pre, encoded_questions(), min_validity=0, stride=2)
    journal = tmp_path / "intervals.jsonl"
    kept = search(post, pre, encoded_questions(), min_validity=0, stride=2, journal=journal)
    journal.write_text("\n".join(journal.read_text().splitlines()[:6]))
    again = search(post, pre, encoded_questions(), min_validity=0, stride=2, journal=journal)
    assert whole.points == kept.points == again.points and whole.chosen == again.chosen


# What a plan restores.


@pytest.mark.parametrize("name", CAUSAL)
def test_the_restored_layers_are_pre_and_all_else_is_post_bitwise(name: str, tmp_path: Path) -> None:
    post, pre = pair(name)
    before = {key: value.clone() for key, value in state(post.model).items()}
    view = lamella.apply(post, restoring(post, pre, layers(1, 3), tmp_path))
    inside = set(parameters_at(post, layers(1, 3)))
    for key, value in view.named_parameters():
        source = pre if key in inside else post
        assert torch.equal(value, source.model.get_parameter(key)) and value.dtype == source.model.dtype
        assert (value is post.model.get_parameter(key)) == (key not in inside)
    assert state(view).keys() == before.keys()
    assert equal(state(post.model), before)
    assert sum(p.numel() for p in view.parameters()) == sum(p.numel() for p in post.model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_all_layers_with_embedding_norm_and_head_are_pre_itself(name: str, tmp_path: Path) -> None:
    post, pre = pair(name)
    whole = lamella.apply(post, restoring(post, pre, layers(0, 4) + OUTSIDE, tmp_path))
    assert equal(dict(whole.named_parameters()), dict(pre.model.named_parameters()))
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, pre.model(IDS).logits)
    inside = lamella.apply(post, restoring(post, pre, layers(0, 4), tmp_path))
    for key in parameters_at(post, OUTSIDE):
        assert inside.get_parameter(key) is post.model.get_parameter(key)


def test_restoring_twice_is_restoring_once_and_two_ranges_are_their_union(tmp_path: Path) -> None:
    post, pre = pair()
    first, second, both = (restoring(post, pre, layers(*each), tmp_path) for each in ((0, 2), (1, 3), (0, 3)))
    once, twice = (state(lamella.apply(post, plan)) for plan in (first, compose(first, first)))
    assert equal(once, twice)
    union = state(lamella.apply(post, both))
    assert equal(state(lamella.apply(post, compose(first, second))), union)
    assert equal(state(lamella.apply(post, compose(second, first))), union)


@torch.no_grad()
def test_for_a_model_with_adapters_restoring_layers_is_disabling_theirs() -> None:
    pre, merged, view = Stack(nano("llama")), nano("llama"), nano("llama")
    loras = [add_lora(model, r=4, seed=0) for model in (merged, view)]
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.1 * torch.randn(each.shape, generator=generator) for name, each in loras[0].tensors().items()}
    for lora in loras:
        lora.load(tensors)
    loras[0].merge()
    loras[0].remove()
    post = Stack(merged)
    for start, stop in intervals(len(pre)):
        names = parameters_at(post, layers(start, stop))
        copied = apply_tensors(merged, {name: pre.model.get_parameter(name) for name in names})
        with loras[1].off([f"{pre.architecture.prefix}{layer}." for layer in range(start, stop)]):
            assert torch.allclose(view(IDS).logits, copied(IDS).logits, atol=1e-5)
    assert not torch.allclose(post.model(IDS).logits, pre.model(IDS).logits, atol=0.1)


def test_tied_embeddings_stay_post(tmp_path: Path) -> None:
    post, pre = pair(tie_word_embeddings=True)
    view = lamella.apply(post, restoring(post, pre, layers(0, 4), tmp_path))
    assert view.lm_head.weight is view.model.embed_tokens.weight is post.model.lm_head.weight


def test_a_saved_plan_makes_the_same_weights_from_fresh_checkpoints(tmp_path: Path) -> None:
    for name, seed in (("post", 0), ("pre", 1)):
        nano("llama", seed).save_pretrained(tmp_path / name)
    post, pre = lamella.open(tmp_path / "post"), lamella.open(tmp_path / "pre")
    plan = chosen(post, pre, tmp_path, min_validity=0, min_quality=0)
    assert plan.weights[0].file == str(tmp_path / "pre")  # named, not copied
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    fresh = lamella.apply(lamella.open(tmp_path / "post"), again)
    assert fingerprint.tensors(fresh) == fingerprint.tensors(lamella.apply(post, plan))


def test_generation_with_a_cache_equals_generation_without(tmp_path: Path) -> None:
    post, pre = pair()
    post.model.generation_config.eos_token_id = None
    view = lamella.apply(post, restoring(post, pre, layers(1, 3), tmp_path))
    questions = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(view.generate(IDS, use_cache=cache, **questions) for cache in (True, False)))


# What it is compared with.


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_soup_is_post_at_0_and_pre_at_1(name: str) -> None:
    post, pre = pair(name)
    assert equal(state(mix_models(post, pre, 0.0).model), state(post.model))
    assert equal(state(mix_models(post, pre, 1.0).model), state(pre.model))
    half = mix_models(post, pre, 0.5).model
    for key, value in half.named_parameters():
        mean = (post.model.get_parameter(key) + pre.model.get_parameter(key)) / 2
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-6)
    blocks = mix_models(post, pre, 1.0, blocks_only=True).model
    for key in parameters_at(post, OUTSIDE):
        assert blocks.get_parameter(key) is post.model.get_parameter(key)
    points = soup(post, pre, encoded_questions(), n=3)
    assert [each.what for each in points] == [0.0, 0.5, 1.0]
    assert (points[0].diversity, points[-1].diversity) == tuple(
        measure(each, encoded_questions()).diversity for each in (post, pre)
    )


def test_a_soup_of_the_blocks_alone_ends_where_all_layers_are_restored() -> None:
    post, pre = pair()
    [whole] = measure_restored(post, pre, encoded_questions(), [(0, 4)])
    end = soup(post, pre, encoded_questions(), n=2, blocks_only=True)[-1]
    assert (end.quality, end.diversity) == pytest.approx((whole.quality, whole.diversity), abs=1e-6)


def test_other_intervals_of_the_same_length() -> None:
    assert fixed_intervals(8, 3) == {"early": (0, 3), "middle": (2, 5), "late": (5, 8)}
    drawn = random_intervals(8, 3, draws=50, seed=1)
    assert {stop - start for start, stop in drawn} == {3} and {start for start, _ in drawn} == set(range(6))
    assert drawn == random_intervals(8, 3, draws=50, seed=1) != random_intervals(8, 3, draws=50, seed=2)


def test_matrices_alone_are_restored_from_a_base_with_the_norms_of_post(tmp_path: Path) -> None:
    post, pre = pair()
    view = lamella.apply(post, restoring(post, with_norms_of(post, pre), layers(0, 4), tmp_path))
    for key in parameters_at(post, layers(0, 4)):
        source = post if "norm" in key else pre
        assert torch.equal(view.get_parameter(key), source.model.get_parameter(key))


# Refusals.


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    post, pre = pair()
    wider, own = Stack(nano("llama", 1, vocab_size=140)), Questions(encoded_questions())
    (tmp_path / "file").write_text("")
    cases = {
        "stride 5": lambda: slr(post, pre, own, stride=5),
        "lower min_validity": lambda: slr(post, pre, own, min_validity=1),
        "works on decoders": lambda: slr(Stack(nano("vit")), pre, own),
        "two checkpoints of one architecture": lambda: slr(post, Stack(nano("gpt2")), own),
        "cannot be written": lambda: slr(post, pre, own, min_validity=0, work=Work(tmp_path / "file" / "x")),
        "a soup of 1": lambda: soup(post, pre, encoded_questions(), n=1),
        "use blocks_only": lambda: soup(post, wider, encoded_questions()),
    }
    for message, call in cases.items():
        with pytest.raises(LamellaError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value), message
    with pytest.raises(MethodError, match="at most"):
        answerable(post, encoded_questions(), 0.99)


def test_a_base_with_other_rows_of_the_embedding_is_restored_and_mixed_in_its_blocks(tmp_path: Path) -> None:
    post, wider = Stack(nano("llama")), Stack(nano("llama", 1, vocab_size=140))
    found = search(post, wider, encoded_questions(), min_validity=0, min_quality=0)
    assert found.chosen.what != EMPTY and soup(post, wider, encoded_questions(), n=2, blocks_only=True)
    view = lamella.apply(post, plan_of(post, wider, found, tmp_path))
    assert measure(Stack(view), encoded_questions()).diversity == pytest.approx(found.chosen.diversity, abs=1e-5)
