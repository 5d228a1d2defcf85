"""Every planner: its series is a decision that can be kept, from the whole model to smaller ones that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import (
    COMMANDS,
    DENOISING,
    FAMILY,
    IDS,
    KIND,
    MASK,
    NANO,
    READING,
    made,
    of_suite,
    on_families,
    opened,
    repeated,
    series,
    usual,
)

import lamella
from lamella.errors import LamellaError, MethodError
from lamella.plan import ModelReference, PlanSeries
from lamella.registry import methods
from lamella.runner import run
from lamella.runtime import Sampler, apply, denoise, parallel

METHODS = methods()
PLANNING = of_suite("plans")
MEASURING = [command for command in PLANNING if COMMANDS[command].text]
OF_TEXT = [command for command in PLANNING if usual(command) not in READING]  # models of text alone do for them
POLICIES = [command for command in PLANNING if METHODS[COMMANDS[command].slug].purpose == "skip"]
NAMING = [
    (command, name)
    for command in PLANNING
    for name in NANO
    if isinstance(COMMANDS[command].on, tuple) and not COMMANDS[command].takes(KIND[name])
]
CALIBRATION = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("command", repeated(each for each in PLANNING if "seed" in COMMANDS[each].options))
def test_another_seed_gives_another_series(command: str) -> None:
    draws_masks = command in OF_TEXT and COMMANDS[command].takes(KIND[DENOISING[0]])  # of a decoder it may draw nothing
    name = DENOISING[0] if draws_masks else usual(command)
    done = made(command, name)
    another = COMMANDS[command](**done.inputs, **done.options | {"seed": 1})
    assert another.points != series(command, name).points


@pytest.mark.parametrize("command", PLANNING)
def test_a_series_survives_json_and_names_its_method_and_model(command: str) -> None:
    found = series(command)
    assert isinstance(found, PlanSeries) and PlanSeries.parse(found.dump()) == found
    assert found.provenance["method"] == COMMANDS[command].slug
    assert found.model == ModelReference.of(opened(usual(command)))


@pytest.mark.parametrize("command", MEASURING)
def test_tokens_alone_are_calibration_too_and_stay_as_they_are(command: str) -> None:
    tokens, text = CALIBRATION.clone(), COMMANDS[command].text
    found = lamella.make_plan(command, opened(usual(command)), tokens, **COMMANDS[command].brief)
    assert found.provenance["inputs"][text]["shape"] == list(CALIBRATION.shape)
    assert torch.equal(tokens, CALIBRATION)


@pytest.mark.parametrize("command", PLANNING)
def test_the_series_runs_from_the_whole_model_to_smaller_ones(command: str) -> None:
    plans = list(series(command))
    sizes = [plan.masked if COMMANDS[command].dense else plan.removed for plan in plans]
    assert sizes[0] == 0 and len(sizes) > 1
    assert sizes == sorted(set(sizes)) and plans[-1].removed < 8
    assert not COMMANDS[command].dense or not any(plan.removed for plan in plans)


@pytest.mark.parametrize(("command", "name"), on_families(PLANNING))
def test_the_first_point_is_the_identity_to_the_bit(command: str, name: str) -> None:
    stack = opened(name)
    view = apply(stack, series(command, name)[0])
    batch = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(view(**batch).logits, stack.model(**batch).logits)


@pytest.mark.parametrize(("command", "name"), on_families(PLANNING))
def test_every_family_works_from_plan_to_generation(command: str, name: str) -> None:
    stack, found = opened(name), series(command, name)
    for plan in (found[1], found[-1]):
        view = apply(stack, plan)
        for rows in (slice(0, 1), slice(None)):  # a batch of one, and a ragged one
            batch = {"input_ids": IDS[rows], "attention_mask": MASK[rows]}
            out = view.generate(
                **batch, max_new_tokens=4, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            assert out.sequences.shape == (len(IDS[rows]), 16)
            assert all(torch.isfinite(step).all() for step in out.logits)
    assert torch.isfinite(parallel(apply(stack, found[-1]), IDS, torch.full((3,), 6), MASK).logits[MASK.bool()]).all()


@pytest.mark.parametrize("name", DENOISING)
@pytest.mark.parametrize("command", OF_TEXT)
def test_models_that_predict_masked_tokens_work_from_plan_to_answer_or_are_refused(command: str, name: str) -> None:
    if not COMMANDS[command].takes(KIND[name]):
        slug = COMMANDS[command].slug
        with pytest.raises(MethodError, match=rf"{slug} works on .*, which predicts masked tokens$"):
            run(slug, opened(name), command=COMMANDS[command].name)
        return
    stack, found = opened(name), series(command, name)
    sampler = Sampler(length=4, block=2, steps=2)
    for plan in found:
        view = apply(stack, plan)
        answers = denoise(view, IDS, MASK, sampler)
        assert answers.shape == (3, 16) and not (answers == stack.config.mask_token_id).any()
        if not plan.removed:
            assert torch.equal(answers, denoise(stack.model, IDS, MASK, sampler))


@pytest.mark.parametrize(("command", "name"), NAMING)
def test_a_family_that_a_method_does_not_name_is_refused_by_name_in_one_line(command: str, name: str) -> None:
    with pytest.raises(LamellaError, match=rf"{command} works on .*; .* is a {FAMILY[name]}$") as error:
        run(command, opened(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", MEASURING)
def test_missing_and_too_little_calibration_is_refused_in_one_line(command: str) -> None:
    stack = opened("llama")
    with pytest.raises(MethodError, match=f"{command} needs calibration"):
        lamella.make_plan(command, stack)
    for tokens in (CALIBRATION[:0], CALIBRATION[:, :1]):
        with pytest.raises(LamellaError, match="give more text") as error:
            lamella.make_plan(command, stack, tokens, **COMMANDS[command].brief)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("command", "name"), on_families(POLICIES))
def test_step_equals_parallel_through_generate_and_raw_continuation(command: str, name: str) -> None:
    stack = opened(name)
    real = MASK.bool()
    for plan in list(series(command, name))[1:]:
        view = apply(stack, plan)
        whole = parallel(view, IDS, torch.full((3,), 8), MASK).logits
        parts, cache, begin = [], None, 0
        for end in (8, 9, 11, 12):
            out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
            parts.append(out.logits)
            cache, begin = out.cache, end
        assert (torch.cat(parts, 1) - whole)[real].abs().max() <= 1e-4

        prompt: dict[str, Any] = {"input_ids": IDS[:, :8], "attention_mask": MASK[:, :8]}
        out = view.generate(
            **prompt, max_new_tokens=5, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        mask = torch.cat([MASK[:, :8], torch.ones_like(out.sequences[:, 8:])], dim=1)
        positions: Tensor = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = parallel(view, out.sequences, torch.full((3,), 8), mask, position_ids=positions).logits
        assert (torch.stack(out.logits, 1) - whole[:, 7:-1]).abs().max() <= 1e-4
