"""Tests of dropped image tokens: against prompts without images, masked keys, and single requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.data import MARK, ImageTextRow, Processing
from lamella.errors import MethodError, PlanError
from lamella.measure.image_tokens import ATTENDING, CRITERIA
from lamella.methods.dmllm_token_redundancy import VisualTokenSchedule
from lamella.methods.dmllm_token_redundancy.policy import STATE, VisualTokens
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import Denoising, Sampler, apply, denoise, traced
from lamella.stack import Model, Stack, open_model
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import examples

KINDS = ["llava_llada", "llava_dream"]
LAYERS, IMAGE = 6, 64
SAMPLER = Sampler(length=6, steps=4)
CACHED = Sampler(length=6, steps=4, cache="prompt")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


MADE: dict[str, tuple[Model, dict[str, Tensor]]] = {}


def made(kind: str) -> tuple[Model, dict[str, Tensor]]:
    """A model in double precision that tells its inputs apart, and a ragged batch: an image, text alone, an image."""
    if kind not in MADE:
        model, processor = shapes_vlm(kind)
        model = model.double()
        generator = torch.Generator().manual_seed(1)
        for each in model.parameters():
            if each.ndim == 2:
                each.copy_(torch.randn(each.shape, generator=generator, dtype=each.dtype) / each.shape[1] ** 0.5)
        questions_of = examples(["colour", "position"], 3, "test")
        rows = [
            ImageTextRow(
                (one.image,) if number != 1 else (),
                (
                    {"role": "user", "content": f"{MARK}\n{one.prompt}" if number != 1 else one.prompt},
                    {"role": "assistant", "content": one.answer},
                ),
            )
            for number, one in enumerate(questions_of)
        ]
        batch = Processing(processor).prompts(rows)
        batch["pixel_values"] = batch["pixel_values"].double()
        MADE[kind] = open_model(model), batch
    return MADE[kind]


def plan_of(model: Model, schedule: VisualTokenSchedule, **settings: Any) -> Plan:
    given = {
        "drops": [list(each) for each in schedule.drops], "layer": schedule.layer, "withdrawn": schedule.withdrawn
    }  # fmt: skip
    reference = PolicyReference(name="dmllm-token-redundancy", params=given | settings)
    return Plan(model=ModelReference.of(model), policies={"text": reference})


def logits(model: Any, batch: dict[str, Tensor], sampler: Sampler = SAMPLER) -> tuple[list[Tensor], Denoising]:
    """What every step of a request says [rows, length, vocabulary], and the request."""
    recorded: list[Tensor] = []

    class Noting(Denoising):
        def _commit(self, logits: Tensor, start: int, end: int) -> None:
            recorded.append(logits.clone())
            super()._commit(logits, start, end)

    request = Noting(model, sampler=sampler, **batch)
    while not request.done:
        request.advance()
    return recorded, request


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(one, other, atol=1e-8, rtol=0) for one, other in zip(ours, theirs, strict=True))


def near(criterion: str) -> float:
    """How far results may be apart: the eager attention takes its softmax in single precision."""
    return 1e-5 if criterion in ATTENDING else 1e-8


SCHEDULES = {
    "one shot": VisualTokenSchedule.one_shot(1, 0.0, 0.25),
    "late": VisualTokenSchedule.one_shot(1, 0.5, 0.25),
    "before": VisualTokenSchedule.one_shot(-1, 0.0, 0.25),
    "stairs": VisualTokenSchedule.progressive([0.0, 0.25, 0.5], [0.75, 0.5, 0.25], layer=2),
    "withdrawn": VisualTokenSchedule.withdraw(2),
    "withdrawn late": VisualTokenSchedule.withdraw(2, 0.5),
}


@pytest.mark.parametrize("sampler", [SAMPLER, CACHED])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_left_out_is_the_model_to_the_bit(kind: str, sampler: Sampler) -> None:
    model, batch = made(kind)
    for schedule in (VisualTokenSchedule(), VisualTokenSchedule.one_shot(-1, 0.0, 1.0)):
        view = apply(model, plan_of(model, schedule, criterion="divprune"))
        ours, theirs = logits(view, batch, sampler)[0], logits(model.model, batch, sampler)[0]
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def without_image(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same prompts without images, padded again."""
    token = model.model.config.image_token_id
    rows = [
        ids[real.bool() & (ids != token)] for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("sampler", [SAMPLER, CACHED])
@pytest.mark.parametrize("kind", KINDS)
def test_none_kept_from_the_start_is_the_prompt_without_its_image(kind: str, sampler: Sampler) -> None:
    model, batch = made(kind)
    view = apply(model, plan_of(model, VisualTokenSchedule.one_shot(-1, 0.0, 0.0), criterion="withdraw"))
    ours, theirs = logits(view, batch, sampler)[0], logits(model.model, without_image(model, batch), sampler)[0]
    assert same(ours, theirs)


@pytest.mark.parametrize("sampler", [SAMPLER, CACHED])
@pytest.mark.parametrize("kind", KINDS)
def test_withdrawn_behind_the_last_layer_is_the_whole_model(kind: str, sampler: Sampler) -> None:
    model, batch = made(kind)
    view = apply(model, plan_of(model, VisualTokenSchedule.withdraw(LAYERS - 1)))
    assert same(logits(view, batch, sampler)[0], logits(model.model, batch, sampler)[0])


class Masked:
    """A model in whose layers image tokens are there but nobody sees them: an independent computation.

    Args:
        gone: given step and layer, the columns that attention does not see [rows, columns] bool.
    """

    def __init__(self, stack: Stack, gone: Any) -> None:
        self.stack, self.gone = stack, gone

    def __call__(self, request: Denoising, step: int) -> Tensor:
        stack, tokens = self.stack, request.tokens
        given = {
            "input_ids": tokens, "attention_mask": request.real, "position_ids": request.positions, **request.prompt
        }  # fmt: skip
        context = stack.context(given)
        h: Any = context.h
        for layer in range(len(stack)):
            seen = request.real & ~self.gone(step, layer)
            mask = torch.zeros(seen.shape, dtype=h.dtype).masked_fill(~seen, torch.finfo(h.dtype).min)
            call = context.calls[layer] | {"attention_mask": mask[:, None, None].expand(-1, 1, seen.shape[1], -1)}
            for sublayer in stack.architecture.sublayers:
                h = sublayer.run(stack.layers[layer], h, call)
        answers = stack.head(h)
        if stack.architecture.shifted:
            answers = torch.cat([answers[:, :1], answers[:, :-1]], dim=1)
        return answers[:, request.length :]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("criterion", ["fastv", "divprune"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_leave_are_keys_that_nobody_sees(kind: str, name: str, criterion: str) -> None:
    model, batch = made(kind)
    stack, schedule = model.stacks["text"], SCHEDULES[name]
    if name == "before" and criterion == "fastv":
        with pytest.raises(PlanError, match="give a layer"):
            apply(model, plan_of(model, schedule, criterion=criterion))
        return
    view = apply(model, plan_of(model, schedule, criterion=criterion, positions="original"))
    ours, request = logits(view, batch)
    state = request.state.get(STATE)
    image = state.image

    def gone(step: int, layer: int) -> Tensor:
        if schedule.withdrawn is not None and layer > schedule.withdrawn:
            return image
        kept = image
        for begun, columns in state.selections:
            if step > begun or (step == begun and layer > schedule.layer):
                kept = torch.zeros_like(image)
                for row, each in enumerate(columns):
                    kept[row, each] = True
        return image & ~kept

    masked = Masked(stack, gone)
    again = Denoising(model.model, sampler=SAMPLER, **batch)
    for step, ours_at in enumerate(ours):
        again.step = step
        assert torch.allclose(masked(again, step), ours_at, atol=near(criterion), rtol=0)
        again._commit(ours_at.clone(), *again.block)
        kept = [schedule.keep(layer, step, 4) * IMAGE for layer in range(LAYERS)]
        assert [int((image & ~gone(step, layer))[0].sum()) for layer in range(LAYERS)] == kept
    assert torch.equal(again.tokens, request.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_deleted_from_a_cache_are_keys_that_nobody_sees(kind: str) -> None:
    model, batch = made(kind)
    late = VisualTokenSchedule.one_shot(1, 0.5, 0.25)
    view = apply(model, plan_of(model, late, criterion="divprune"))
    ours, request = logits(view, batch, CACHED)
    state, stack = request.state[STATE], model.stacks["text"]
    [(begun, columns)] = state.selections
    kept = torch.zeros_like(state.image)
    for row, each in enumerate(columns):
        kept[row, each] = True
    length = request.length

    def whole(step: int) -> Tensor:
        """One pass over prompt and answer, the prompt seeing itself alone and the answer not what was deleted."""
        again.step = step
        given = {
            "input_ids": again.tokens, "attention_mask": again.real, "position_ids": again.positions, **again.prompt
        }  # fmt: skip
        context = stack.context(given)
        h: Any = context.h
        for layer in range(LAYERS):
            seen = again.real[:, None].expand(-1, again.real.shape[1], -1).clone()
            seen[:, :length, length:] = False
            if step > begun or (step == begun and layer > 1):
                seen[:, length:] &= ~(state.image & ~kept)[:, None]
            mask = torch.zeros(seen.shape, dtype=h.dtype).masked_fill(~seen, torch.finfo(h.dtype).min)[:, None]
            for sublayer in stack.architecture.sublayers:
                h = sublayer.run(stack.layers[layer], h, context.calls[layer] | {"attention_mask": mask})
        logits = stack.head(h)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if stack.architecture.shifted else logits
        return logits[:, length:]

    again = Denoising(model.model, sampler=SAMPLER, **batch)
    for step, ours_at in enumerate(ours):
        assert torch.allclose(whole(step), ours_at, atol=1e-8, rtol=0)
        again._commit(ours_at.clone(), *again.block)
    slots = [request.cache.sparse(layer).columns for layer in range(LAYERS)]
    assert [int((each[0] >= 0).sum()) for each in slots] == [int(request.real[0, :length].sum()) - 48] * LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_layers_behind_a_withdrawal_hold_no_image_in_their_cache(kind: str) -> None:
    model, batch = made(kind)
    _, request = logits(apply(model, plan_of(model, VisualTokenSchedule.withdraw(2, 0.5))), batch, CACHED)
    image = request.state[STATE].image
    for layer in range(LAYERS):
        columns = request.cache.sparse(layer).columns
        assert not (image.gather(1, columns.clamp(min=0)) & (columns >= 0)).any()


@pytest.mark.parametrize("sampler", [SAMPLER, CACHED])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_rows_of_a_batch_are_rows_alone(criterion: str, positions: str, sampler: Sampler) -> None:
    model, batch = made("llava_llada")
    if criterion == "signal" and sampler is CACHED:
        with pytest.raises(PlanError, match="cache 'none'"):
            logits(apply(model, plan_of(model, SCHEDULES["one shot"], criterion=criterion)), batch, sampler)
        return
    if criterion == "random":
        return  # every row draws its own
    for name in ("one shot", "late", "withdrawn late"):
        view = apply(model, plan_of(model, SCHEDULES[name], criterion=criterion, positions=positions))
        together, _ = logits(view, batch, sampler)
        for row, pixels in ((0, 0), (1, None), (2, 1)):
            real = batch["attention_mask"][row].bool()
            alone = {"input_ids": batch["input_ids"][row, real][None]}
            if pixels is not None:
                alone["pixel_values"] = batch["pixel_values"][pixels][None]
            for ours, theirs in zip(logits(view, alone, sampler)[0], together, strict=True):
                assert torch.allclose(ours[0], theirs[row], atol=near(criterion), rtol=0)


def test_one_stair_is_one_shot_and_order_tells_only_in_positions() -> None:
    model, batch = made("llava_llada")
    stair = VisualTokenSchedule.progressive([0.5], [0.25], layer=1)
    assert stair == VisualTokenSchedule.one_shot(1, 0.5, 0.25)
    outputs = {
        (order, positions): logits(
            apply(model, plan_of(model, SCHEDULES["one shot"], order=order, positions=positions)), batch
        )[0]
        for order in ("position", "score")
        for positions in ("compact", "original")
    }
    assert same(outputs["position", "original"], outputs["score", "original"])
    assert not same(outputs["position", "compact"], outputs["score", "compact"])
    assert not same(outputs["position", "compact"], outputs["position", "original"])


@pytest.mark.parametrize("sampler", [SAMPLER, CACHED])
def test_requests_in_turn_are_requests_one_after_the_other(sampler: Sampler) -> None:
    model, batch = made("llava_dream")
    view = apply(model, plan_of(model, SCHEDULES["stairs"]))
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    alone = [denoise(view, sampler=sampler, **each) for each in (batch, other)]
    turns = [Denoising(view, sampler=sampler, **each) for each in (batch, other)]
    while not turns[0].done:
        for each in turns:
            each.advance()
    assert all(torch.equal(one.tokens, whole) for one, whole in zip(turns, alone, strict=True))
    assert not vars(view.lamella_policy).get("request")


def test_what_is_counted_is_what_ran() -> None:
    model, batch = made("llava_llada")
    rows = {name: each[:1] for name, each in batch.items()}
    view = apply(model, plan_of(model, SCHEDULES["stairs"]))
    trace = traced(view)
    denoise(view, sampler=SAMPLER, **rows)
    real = rows["attention_mask"].bool().sum() + SAMPLER.length - IMAGE
    for step, ran in enumerate(trace.ran):
        for layer in range(LAYERS):
            share = SCHEDULES["stairs"].keep(layer, step, 4)
            assert int(ran[0, :, layer, 0].sum()) - (int(ran.shape[1]) - int(real) - IMAGE) * (share == 1) == int(
                real + share * IMAGE
            )


def test_what_cannot_be_is_refused_in_one_line() -> None:
    model, _ = made("llava_llada")
    with pytest.raises(MethodError, match="later drops must keep fewer"):
        VisualTokenSchedule.progressive([0.5, 0.25], [0.5, 0.25])
    with pytest.raises(MethodError, match=r"keeps in \[0, 1\]"):
        VisualTokenSchedule.one_shot(0, 0.0, 1.5)
    with pytest.raises(PlanError, match="unknown criterion"):
        apply(model, plan_of(model, SCHEDULES["one shot"], criterion="best"))
    with pytest.raises(MethodError, match="layers 0 to 5"):
        VisualTokens(model.stacks["text"], [(0.0, 0.5)], layer=6)
    text = Stack(nano("llada"))
    plan = Plan(
        model=ModelReference.of(text),
        policies={"text": PolicyReference(name="dmllm-token-redundancy", params={"drops": [], "withdrawn": 1})},
    )
    with pytest.raises(PlanError, match="takes no images"):
        apply(text, plan)
