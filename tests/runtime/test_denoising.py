"""The denoising loop, compared with the sampler's definition and with passes that cache nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import ArchitectureError, CacheError, MethodError
from lamella.plan import ModelReference, Plan
from lamella.runtime import Denoising, LayerCall, Pass, Policy, Sampler, apply, denoise, traced, with_policy
from lamella.runtime.denoising import COMMITS
from lamella.stack import Placeholder, Stack
from lamella.zoo.nano import NANO_DIFFUSION, nano

NAMES = list(NANO_DIFFUSION)
CACHES = ["none", "prompt", "prefix", "dual"]
ALGORITHMS = ["maskgit_plus", "topk_margin", "entropy"]
MASK_TOKEN = 127
PROMPT, LENGTH, BLOCK = 6, 8, 4
IDS = torch.randint(3, 127, (3, PROMPT), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
MASK[1, :1] = 0


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str) -> Stack:
    return Stack(nano(name).double())


def certainty(logits: Tensor, algorithm: str) -> Tensor:
    p = logits.softmax(-1)
    if algorithm == "entropy":
        return (p * p.clamp(min=1e-300).log()).sum(-1)
    first, second = p.sort(descending=True).values[..., :2].unbind(-1)
    return first - second if algorithm == "topk_margin" else first


def written_out(
    stack: Stack, prompt: Tensor, sampler: Sampler, passes: Callable[[Tensor, int, int, int], Tensor]
) -> Tensor:
    """The answer to one prompt [time], by the definition: one mask after the other, with lists.

    Args:
        passes: the logits of all columns [columns, vocabulary], of the tokens, the block's columns and its step.
    """
    block, rounds = sampler.per_block, sampler.in_all // sampler.blocks
    x = torch.cat([prompt, torch.full((sampler.length,), MASK_TOKEN)])
    for start in range(len(prompt), len(x), block):
        for step in range(rounds):
            logits = passes(x, start, start + block, step)
            if stack.architecture.name == "Dream":
                logits = torch.cat([logits[:1], logits[:-1]])
            logits[:, MASK_TOKEN] = -math.inf
            certain = certainty(logits, sampler.algorithm)
            left = [at for at in range(start, start + block) if x[at] == MASK_TOKEN]
            for at in sorted(left, key=lambda at: -float(certain[at]))[: math.ceil(len(left) / (rounds - step))]:
                x[at] = logits[at].argmax()
    return x[len(prompt) :]


def whole(model: Any) -> Callable[[Tensor, int, int, int], Tensor]:
    return lambda x, start, end, step: model(input_ids=x[None]).logits[0]


def frozen(stack: Stack, prompt: int, cache: str) -> Callable[[Tensor, int, int, int], Tensor]:
    """Run passes over all columns, in which the stored hidden states are restored before every layer."""
    streams: list[Tensor] = []

    def passes(x: Tensor, start: int, end: int, step: int) -> Tensor:
        context = stack.context(x[None])
        at = torch.arange(len(x))
        kept = at < start if cache == "prefix" else (at < start) | (at >= end)
        h: Any = context.h
        for layer in range(len(stack)):
            if step == 0:
                streams[layer:] = [h]
            else:
                h = torch.where(kept[:, None], streams[layer], h)
            h = stack.run(h, layer, layer + 1, context)
        if step == 0:
            streams[len(stack) :] = [h]
        h = torch.where(kept[:, None], streams[len(stack)], h) if step else h
        return stack.head(h)[0]

    return passes


def unseeing(stack: Stack, prompt: int) -> Callable[[Tensor, int, int, int], Tensor]:
    """Passes over all columns in which the prompt sees itself alone."""

    def passes(x: Tensor, start: int, end: int, step: int) -> Tensor:
        seen = torch.ones(1, 1, len(x), len(x), dtype=torch.bool)
        seen[:, :, :prompt, prompt:] = False
        given: Any = {"full_attention": seen} if stack.architecture.name == "Dream" else seen
        return stack.model(input_ids=x[None], attention_mask=given).logits[0]

    return passes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_commits_what_the_definition_says(name: str, algorithm: Any) -> None:
    stack = opened(name)
    for block, steps in ((BLOCK, 4), (BLOCK, 8), (None, 3), (None, 8), (2, 4)):
        sampler = Sampler(length=LENGTH, block=block, steps=steps, algorithm=algorithm)
        found = denoise(stack.model, IDS[2:], sampler=sampler)[0, PROMPT:]
        assert torch.equal(found, written_out(stack, IDS[2], sampler, whole(stack.model)))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_a_block_is_what_its_first_pass_computed(name: str, cache: Any) -> None:
    stack = opened(name)
    sampler = Sampler(length=LENGTH, block=BLOCK, steps=8, cache=cache)
    found = denoise(stack.model, IDS[2:], sampler=sampler)[0, PROMPT:]
    assert torch.equal(found, written_out(stack, IDS[2], sampler, frozen(stack, PROMPT, cache)))


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_encoded_once_is_one_that_never_sees_the_answer(name: str) -> None:
    stack = opened(name)
    sampler = Sampler(length=LENGTH, block=BLOCK, steps=8, cache="prompt")
    found = denoise(stack.model, IDS[2:], sampler=sampler)[0, PROMPT:]
    assert torch.equal(found, written_out(stack, IDS[2], sampler, unseeing(stack, PROMPT)))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", NAMES)
def test_with_one_step_for_a_block_a_cache_changes_nothing(name: str, cache: Any) -> None:
    model = opened(name).model
    plain, kept = (Sampler(length=LENGTH, block=2, steps=4, cache=each) for each in ("none", cache))
    assert torch.equal(denoise(model, IDS, MASK, plain), denoise(model, IDS, MASK, kept))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_left_padded_batch_are_answered_as_alone(name: str, cache: Any) -> None:
    model = opened(name).model
    sampler = Sampler(length=LENGTH, block=BLOCK, steps=4, cache=cache)
    together = denoise(model, IDS, MASK, sampler)
    assert torch.equal(together[:, :PROMPT], IDS)
    for row, length in enumerate(MASK.sum(-1).tolist()):
        alone = denoise(model, IDS[row : row + 1, -length:], sampler=sampler)
        assert torch.equal(together[row, PROMPT:], alone[0, length:])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "origin"])
def test_requests_that_take_turns_answer_as_one_after_the_other(algorithm: Any, cache: Any) -> None:
    stack = opened("llada")
    view = with_policy(stack, _plan(stack), Every(stack, 2))
    first = Sampler(length=LENGTH, block=BLOCK, steps=8, algorithm=algorithm, cache=cache, temperature=0.7)
    second = Sampler(length=LENGTH, steps=4, algorithm=algorithm, cache=cache, temperature=0.3, seed=1)
    alone = [denoise(view, IDS, MASK, first), denoise(view, IDS[1:], None, second)]
    requests = [Denoising(view, IDS, MASK, first), Denoising(view, IDS[1:], None, second)]
    while not all(each.done for each in requests):
        for each in requests:
            if not each.done:
                each.advance()
    assert all(torch.equal(each.tokens, expected) for each, expected in zip(requests, alone, strict=True))
    assert "seen" not in vars(view.lamella_policy)


def test_blocks_are_denoised_from_left_to_right_and_steps_commit_alike() -> None:
    request = Denoising(opened("dream").model, IDS, MASK, Sampler(length=8, block=4, steps=4))
    left = []
    while not request.done:
        request.advance()
        masked = request.answers == MASK_TOKEN
        left.append(masked.sum(-1).tolist())
        assert request.step > 2 or masked[:, 4:].all()
    assert left == [[6] * 3, [4] * 3, [2] * 3, [0] * 3]


@pytest.mark.parametrize("commits", COMMITS)
def test_what_steps_commit_adds_up(commits: str) -> None:
    for tokens in (1, 5, 8):
        for steps in range(1, tokens + 1):
            left = tokens
            for step in range(steps):
                left -= COMMITS[commits](left, step, steps)
            assert left == 0


def test_a_pass_computes_the_columns_that_its_cache_leaves() -> None:
    stack, end = opened("llada"), PROMPT + LENGTH
    expected = {
        "none": [(0, end)] * 4,
        "prompt": [(0, PROMPT)] + [(PROMPT, end)] * 4,
        "prefix": [(0, end), (PROMPT, end), (0, end), (PROMPT + BLOCK, end)],
        "dual": [(0, end), (PROMPT, PROMPT + BLOCK), (0, end), (PROMPT + BLOCK, end)],
    }
    for cache, passes in expected.items():
        request = Denoising(stack.model, IDS, MASK, Sampler(LENGTH, BLOCK, 4, cache=cache))  # type: ignore[arg-type]
        while not request.done:
            request.advance()
        assert request.passes == passes


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_layer_is_skipped_in_every_pass_and_keeps_no_keys(name: str, cache: Any) -> None:
    stack = opened(name)
    plan = Plan(model=ModelReference.of(stack), drop=["layers.0", "layers.2"])
    sampler = Sampler(LENGTH, BLOCK, 4, cache=cache)
    request = Denoising(apply(stack, plan), IDS, MASK, sampler)
    while not request.done:
        request.advance()
    zeroed = nano(name).double()
    for layer in (0, 2):
        for sublayer in stack.architecture.sublayers:
            torch.nn.init.zeros_(Stack(zeroed).layers[layer].get_submodule(sublayer.out).weight)
    assert torch.equal(request.tokens, denoise(zeroed, IDS, MASK, sampler))
    if request.cache is not None:
        held = [not isinstance(each, Placeholder) for each in request.cache.layers]
        assert held == [False, True, False, True]


# Policies


class Every(Policy):
    """Skip the second layer in every n-th step; count the passes of a request, in the request."""

    denoises = True

    def __init__(self, stack: Stack, every: int) -> None:
        super().__init__(stack)
        self.every = every

    def begin(self, run: Pass) -> None:
        assert run.denoising is not None
        run.denoising.state["seen"] = run.denoising.state.get("seen", 0) + 1

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        assert run.denoising is not None
        skips = call.index == 1 and self.every and run.denoising.step % self.every == 1
        return h if skips else call(h)


def _plan(stack: Stack) -> Plan:
    """A plan that decides something, so that a view has a policy."""
    from lamella.plan import PolicyReference

    return Plan(model=ModelReference.of(stack), policies={"text": PolicyReference(name="lora-drop")})


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_skips_nothing_is_the_model_bit_exactly(name: str) -> None:
    stack = opened(name)
    view = with_policy(stack, _plan(stack), Every(stack, 0))
    for cache in CACHES:
        sampler = Sampler(LENGTH, BLOCK, 4, cache=cache)  # type: ignore[arg-type]
        ours, theirs = (Denoising(each, IDS, MASK, sampler) for each in (view, stack.model))
        while not ours.done:
            ours.advance()
            theirs.advance()
            assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.state["seen"] == len(ours.passes)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_knows_its_step(name: str) -> None:
    stack = opened(name)
    view = with_policy(stack, _plan(stack), Every(stack, 2))
    cut = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]))
    sampler = Sampler(length=LENGTH, block=BLOCK, steps=8)
    steps = iter(range(8))

    def passes(x: Tensor, start: int, end: int, step: int) -> Tensor:
        model = cut if next(steps) % 2 else stack.model
        return model(input_ids=x[None]).logits[0]

    found = denoise(view, IDS[2:], sampler=sampler)[0, PROMPT:]
    assert torch.equal(found, written_out(stack, IDS[2], sampler, passes))


def test_a_trace_counts_what_ran() -> None:
    stack = opened("llada")
    view = with_policy(stack, _plan(stack), Every(stack, 2))
    seen = traced(view)
    request = Denoising(view, IDS, MASK, Sampler(LENGTH, BLOCK, 4, cache="dual"))
    while not request.done:
        request.advance()
    assert [ran.shape[1] for ran in seen.ran] == [end - start for start, end in request.passes]
    assert [bool(ran[:, :, 1].any()) for ran in seen.ran] == [True, False, True, False]
    assert all(ran[:, :, [0, 2, 3]].all() for ran in seen.ran)


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "nonsense"}, "algorithm 'nonsense': choose one of maskgit_plus"),
        ({"cache": "static"}, "cache 'static': choose one of none, prompt"),
        ({"length": 8, "block": 3}, "a whole number of blocks"),
        ({"length": 8, "block": 4, "steps": 3}, "a multiple of the 2 blocks"),
        ({"length": 8, "steps": 9}, "at most one for each of the 8 tokens"),
        ({"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_a_sampler_with_inconsistent_settings_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as error:
        Sampler(**given)
    assert "\n" not in str(error.value)


def test_a_decoder_and_an_empty_prompt_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="a llama predicts next token, not masked tokens") as error:
        denoise(nano("llama"), IDS)
    assert "\n" not in str(error.value)
    empty = MASK.clone()
    empty[1] = 0
    with pytest.raises(CacheError, match="a prompt of this batch is empty"):
        denoise(nano("llada"), IDS, empty)
