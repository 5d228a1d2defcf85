"""LoRA-Drop against a slow reference that keeps no cache: every layer sees its stored inputs, written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import CacheError, MethodError, PlanError
from lamella.methods.lora_drop import LoRADrop, lora_drop, released_layers, spread_layers
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import PlanCache, apply, parallel
from lamella.stack import Stack
from lamella.zoo.nano import nano

NAMES = ["llama", "qwen3", "gpt2"]
PROMPT, LENGTH = 5, 14
IDS = torch.randint(3, 128, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
MASK[1, :1] = 0


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str) -> Stack:
    stack = Stack(nano(name))
    stack.model.generation_config.eos_token_id = None
    return stack


def planned(stack: Stack, **params: Any) -> Plan:
    return Plan(
        model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="lora-drop", params=params)}
    )


def trained(view: Any) -> LoRADrop:
    """Give the corrections something to say."""
    view.lamella_policy.b.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return view.lamella_policy


def stepped(view: Any, ids: Tensor, mask: Tensor, prompt: int = PROMPT) -> tuple[Tensor, PlanCache]:
    parts, cache, begin = [], None, 0
    for end in range(prompt, ids.shape[1] + 1):
        out = view(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(parts, 1), cache


def reference(stack: Stack, policy: LoRADrop, ids: Tensor) -> Tensor:
    """The logits of one row, token by token, from the sheet's rules; every layer is called as a plain module.

    A layer is given the inputs of the columns that it has stored, at their positions, and the present one last.
    """
    base = stack.base
    call = stack.context(ids).calls  # positions and rotary angles of every column
    embedded = stack.context(ids).h
    stored: list[list[int]] = [[] for _ in stack.layers]
    inputs: list[dict[int, Tensor]] = [{} for _ in stack.layers]
    anchors: dict[int, Tensor] = {}

    def run(layer: int, columns: list[int]) -> Tensor:
        """The layer's outputs at the last of these columns, seeing all of them."""
        h = torch.cat([inputs[layer][c] for c in columns], dim=1)
        given = {name: pick(value, columns) for name, value in call[layer].items()}
        given["attention_mask"] = torch.full((len(columns),) * 2, -1e9).triu(1)[None, None]
        out = stack.layers[layer](h, **given)
        return out[:, -1:]

    def pick(value: Any, columns: list[int]) -> Any:
        if isinstance(value, tuple):
            return tuple(pick(v, columns) for v in value)
        fits = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == ids.shape[1]
        return value[:, columns] if fits else value

    logits = []
    for column in range(ids.shape[1]):
        step = column - PROMPT + 1
        refresh = step <= 0 or step % policy.refresh_every == 0
        h = embedded[:, column : column + 1]
        for layer in range(len(stack)):
            inputs[layer][column] = h
            droppable = layer in policy.index_of
            if refresh or not droppable:
                stored[layer].append(column)
                out = run(layer, stored[layer])
                if droppable:
                    anchors[layer] = out if policy.reuse == "output" else out - h
            else:
                if policy.keys == "update":
                    stored[layer].append(column)
                place = policy.index_of[layer]
                correction = policy.scale * torch.nn.functional.linear(
                    torch.nn.functional.linear(h, policy.a[place]), policy.b[place]
                )
                out = {"output": anchors[layer], "delta": h + anchors[layer], "skip": h}[policy.reuse] + correction
            h = out
        logits.append(stack.unembedding(getattr(base, stack.architecture.norm)(h)))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("keys", ["skip", "update"])
@pytest.mark.parametrize("reuse", ["output", "delta", "skip"])
@pytest.mark.parametrize("name", NAMES)
def test_both_executions_equal_the_reference(name: str, reuse: str, keys: str) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack, droppable=[1, 3], refresh_every=3, reuse=reuse, keys=keys))
    policy = trained(view)
    expected = reference(stack, policy, IDS[2:])
    whole = parallel(view, IDS[2:], torch.tensor([PROMPT])).logits
    steps, _ = stepped(view, IDS[2:], MASK[2:])
    assert (whole - expected).abs().max() <= 1e-4
    assert (steps - expected).abs().max() <= 1e-4
    assert (stack.model(input_ids=IDS[2:]).logits - expected).abs().max() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_equals_its_rows_alone(name: str) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack, droppable=[1, 2], refresh_every=3))
    trained(view)
    prompt = {"input_ids": IDS[:, :PROMPT], "attention_mask": MASK[:, :PROMPT]}
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    together = view.generate(**prompt, **settings)
    for row in range(3):
        real = MASK[row, :PROMPT].bool()
        alone = view.generate(**{key: value[row : row + 1, real] for key, value in prompt.items()}, **settings)
        assert torch.equal(alone[0, int(real.sum()) :], together[row, PROMPT:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("params", [{"droppable": [1, 2], "refresh_every": 1}, {"droppable": []}], ids=str)
def test_refreshing_always_or_dropping_nothing_is_the_base_model_to_the_bit(name: str, params: dict[str, Any]) -> None:
    stack = opened(name)
    view = apply(stack, planned(stack, **params))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    given = {"input_ids": IDS, "attention_mask": MASK}
    ours, base = (m.generate(**given, **settings, return_dict_in_generate=True) for m in (view, stack.model))
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, base.logits, strict=True))


def test_without_corrections_a_dropped_last_layer_repeats_the_anchor_s_logits_to_the_bit() -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack, droppable=[1, 2, 3], refresh_every=4))
    logits, _ = stepped(view, IDS[2:], MASK[2:])
    for column in range(PROMPT - 1, LENGTH):
        anchor = PROMPT - 1 + 4 * ((column - PROMPT + 1) // 4)
        if anchor >= PROMPT:
            assert torch.equal(logits[:, column], logits[:, anchor])
        else:  # the prompt's head multiplies several columns at once, which rounds differently
            assert torch.allclose(logits[:, column], logits[:, anchor], atol=1e-5)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_the_cache_holds_what_the_formula_says(every: int) -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack, droppable=[1, 3], refresh_every=every))
    for tokens in (1, 2, 7):
        out = view.generate(
            input_ids=IDS[2:, :PROMPT], max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        calls = tokens - 1  # the first token comes from the prompt
        lengths = [layer.keys.shape[-2] for layer in out.cache.layers]
        dropped = PROMPT + calls // every
        assert lengths == [PROMPT + calls, dropped, PROMPT + calls, dropped]


def test_two_generations_in_a_row_and_two_turns_equal_fresh_ones() -> None:
    stack = opened("llama")
    plan = planned(stack, droppable=[1, 2], refresh_every=3)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    view = apply(stack, plan)
    first = view.generate(input_ids=IDS[:1], **settings, return_dict_in_generate=True)
    again = view.generate(input_ids=IDS[1:2], **settings)
    assert torch.equal(again, apply(stack, plan).generate(input_ids=IDS[1:2], **settings))
    turn = torch.cat([first.sequences, IDS[:1, :4]], dim=1)
    with_cache = view.generate(input_ids=turn, cache=first.cache, **settings)
    assert torch.equal(with_cache, apply(stack, plan).generate(input_ids=turn, **settings))


def test_beams_carry_their_anchors() -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack, droppable=[1, 2], refresh_every=3))
    trained(view)
    out = view.generate(
        input_ids=IDS[:, :PROMPT], attention_mask=MASK[:, :PROMPT], num_beams=3, max_new_tokens=7, do_sample=False,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids, mask = out.sequences, torch.cat([MASK[:, :PROMPT], torch.ones(3, 7, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = parallel(view, ids, torch.full((3,), PROMPT), mask, position_ids=positions).logits
    told = logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, told.mean(-1), rtol=1e-4, atol=1e-4)


def test_many_generated_tokens_in_one_call_equal_one_at_a_time() -> None:
    stack = opened("gpt2")
    view = apply(stack, planned(stack, droppable=[1, 2], refresh_every=3))
    trained(view)
    expected, _ = stepped(view, IDS, MASK)
    cache = PlanCache(view.config, view.lamella_plan, PROMPT)
    parts = [view(input_ids=IDS[:, :8], attention_mask=MASK[:, :8], cache=cache).logits]  # prompt and answer at once
    parts.append(view(input_ids=IDS[:, 8:], attention_mask=MASK, cache=cache).logits)
    assert (torch.cat(parts, 1) - expected)[MASK.bool()].abs().max() <= 1e-4


def test_gradients_reach_the_corrections_and_the_anchors_alone() -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack, droppable=[1, 2], refresh_every=3))
    policy = trained(view)
    with torch.enable_grad():
        parallel(view, IDS, torch.tensor([4, 6, 5]), MASK).logits.square().mean().backward()
    assert policy.a.grad.abs().max() > 0 and policy.b.grad.abs().max() > 0


def test_training_with_the_released_visibility_differs_from_serving() -> None:
    stack = opened("llama")
    view = apply(stack, planned(stack, droppable=[1, 2], refresh_every=3))
    matched = parallel(view, IDS, torch.full((3,), PROMPT), MASK).logits
    view.lamella_policy.sees_all_keys = True
    released = parallel(view, IDS, torch.full((3,), PROMPT), MASK).logits
    assert (matched - released).abs().max() > 1e-3


def test_which_layers_are_droppable() -> None:
    assert released_layers(30)[:7] == [1, 2, 3, 5, 6, 7, 9] and 0.7 < len(released_layers(32)) / 32 <= 0.75
    half = spread_layers(30, 14)
    assert half == list(range(2, 29, 2)) and not {0, 1, 29} & set(spread_layers(30, 27))
    series = lora_drop(opened("llama"), share=0.25)
    assert series[1].policy is not None and series[1].policy.params["droppable"] == [2]
    assert series.points[1].scores["layer work"] == 1 - 0.25 * (1 - 1 / 4)


@pytest.mark.parametrize(
    ("params", "kind", "said"),
    [
        ({"droppable": [0]}, MethodError, "layer 0 cannot be dropped: give layers between 1 and 3"),
        ({"droppable": [4]}, MethodError, "layer 4 cannot be dropped: give layers between 1 and 3"),
        (
            {"droppable": [1], "reuse": "x"},
            MethodError,
            "reuse must be one of output, delta, skip, and keys must be skip or update",
        ),
        ({"droppable": [1], "refresh_every": 0}, MethodError, "refresh_every and rank must be at least 1"),
        ({"droppable": [1], "colour": "red"}, PlanError, "policy 'lora-drop' has no parameter 'colour'"),
        ({}, PlanError, "policy 'lora-drop': .*'droppable': make the plan again with `lamella plan lora-drop`"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_one_line(params: dict[str, Any], kind: type[Exception], said: str) -> None:
    stack = opened("llama")
    with pytest.raises(kind, match=said) as error:
        apply(stack, planned(stack, **params))
    assert type(error.value) is kind and "\n" not in str(error.value)


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    stack = opened("llama")
    plan = planned(stack, droppable=[1, 2])
    view = apply(stack, plan)
    cache = view(input_ids=IDS, use_cache=True).cache
    ragged = PlanCache(view.config, plan, torch.tensor([1, 2, 2]))
    for attempt, said in (
        (
            lambda: cache.crop(-1),
            "counts its steps, so its cache cannot be cropped: encode the whole conversation again",
        ),
        (
            lambda: view(input_ids=IDS[:, :2], cache=ragged),
            "counts steps for the whole batch: pad prompts on the left",
        ),
    ):
        with pytest.raises(CacheError, match=said) as error:
            attempt()
        assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match="cannot drop 9 layers"):
        spread_layers(8, 9)
    with pytest.raises(PlanError, match="policy 'lora-drop': its file"):
        apply(
            stack,
            Plan(
                model=plan.model,
                policies={"text": PolicyReference(name="lora-drop", params={"droppable": [1]}, file="no")},
            ),
        )
