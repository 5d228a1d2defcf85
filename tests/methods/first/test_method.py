"""FiRST: hard gates equal plans that name each row's layers, however the batch is made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import CacheError, MethodError, PlanError
from lamella.files import Work
from lamella.methods.first import PromptRouters, buckets, first, signatures, thresholds, train_routers, tune
from lamella.methods.first.method import Annealing
from lamella.plan import ModelReference, PhasedPath, Plan, PlanSeries, PolicyReference
from lamella.runtime import PlanCache, apply, keep_policy, parallel, with_policy
from lamella.stack import Placeholder, Stack
from lamella.train import TrainConfig, blocks
from lamella.zoo.nano import nano

NAMES = ["llama", "qwen3", "gpt2", "gemma3_text"]
PROMPT, LENGTH = 7, 12
IDS = torch.randint(3, 128, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
MASK[1, :1] = 0
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str) -> Stack:
    stack = Stack(nano(name))
    stack.model.generation_config.eos_token_id = None
    return stack


def routed(stack: Stack, **settings: Any) -> tuple[Any, PromptRouters]:
    """A view whose random routers keep a different part of the layers for different prompts."""
    routers = PromptRouters(stack, protect=(0, 0), **settings)
    routers.weight.normal_(generator=torch.Generator().manual_seed(3))
    routers.bias.zero_()
    plan = Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first", params=settings)})
    return with_policy(stack, plan, routers), routers


def kept(view: Any, routers: PromptRouters, ids: Tensor, mask: Tensor, prompt: int = PROMPT) -> Tensor:
    parallel(view, ids, torch.full((len(ids),), prompt), mask)
    return routers.last_gates.bool()


def named(stack: Stack, keep: Tensor, prefill: str) -> Any:
    """The view of a plan that names one row's layers."""
    layers = keep.nonzero().flatten().tolist()
    everything = list(range(len(stack)))
    path = PhasedPath(prefill=everything if prefill == "full" else layers, decode=layers)
    return apply(stack, Plan(model=ModelReference.of(stack), path={"text": path}))


@pytest.mark.parametrize("prefill", ["full", "route"])
@pytest.mark.parametrize("name", NAMES)
def test_each_row_runs_the_layers_that_a_named_plan_runs(name: str, prefill: str) -> None:
    stack = opened(name)
    view, routers = routed(stack, prefill=prefill)
    keep = kept(view, routers, IDS, MASK)
    assert len({tuple(row) for row in keep.tolist()}) > 1 and not keep.all()
    whole = parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits
    parts, cache = [], PlanCache(view.config, view.lamella_plan, PROMPT)
    for begin, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, LENGTH)):
        parts.append(view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache).logits)
    assert torch.equal(cache.state["kept"], keep)
    assert (torch.cat(parts, 1) - whole)[MASK.bool()].abs().max() <= 1e-4
    for row in range(4):
        if not keep[row].any():
            continue
        given = {"input_ids": IDS[row : row + 1], "attention_mask": MASK[row : row + 1]}
        expected = parallel(named(stack, keep[row], prefill), prompt_lengths=torch.tensor([PROMPT]), **given).logits
        assert (whole[row] - expected[0])[MASK[row].bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_each_row_of_a_ragged_batch_what_it_gets_alone(name: str) -> None:
    stack = opened(name)
    view, _ = routed(stack)
    prompt = {"input_ids": IDS[:, :PROMPT], "attention_mask": MASK[:, :PROMPT]}
    together = view.generate(**prompt, **SETTINGS)
    for row in range(4):
        real = MASK[row, :PROMPT].bool()
        alone = view.generate(**{key: value[row : row + 1, real] for key, value in prompt.items()}, **SETTINGS)
        assert torch.equal(alone[0, int(real.sum()) :], together[row, PROMPT:])


def test_decisions_do_not_change_with_padding_or_with_the_answer() -> None:
    stack = opened("llama")
    view, routers = routed(stack)
    keep = kept(view, routers, IDS[3:], MASK[3:])
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), IDS[3:]], dim=1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), MASK[3:]], dim=1)
    assert torch.equal(kept(view, routers, padded, mask, PROMPT + 6), keep)
    other = torch.cat([IDS[3:, :PROMPT], IDS[:1, PROMPT:]], dim=1)
    assert torch.equal(kept(view, routers, other, MASK[3:]), keep)
    assert torch.equal(signatures(stack, routers, [IDS[3, :PROMPT]]), keep)


@pytest.mark.parametrize("pool", ["mean", "vote", "last"])
def test_a_prompt_in_parts_is_pooled_as_one(pool: str) -> None:
    stack = opened("llama")
    view, routers = routed(stack, pool=pool)
    keep = kept(view, routers, IDS, MASK)
    cache = PlanCache(view.config, view.lamella_plan, PROMPT)
    for begin, end in ((0, 3), (3, 5), (5, PROMPT)):
        view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache)
    assert torch.equal(cache.state["kept"], keep)


def test_open_gates_are_the_base_model_to_the_bit() -> None:
    stack = opened("llama")
    view, routers = routed(stack)
    routers.bias.fill_(100.0)
    ours, base = (
        model.generate(input_ids=IDS, **SETTINGS, output_logits=True, return_dict_in_generate=True)
        for model in (view, stack.model)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, base.logits, strict=True))


def test_a_slot_holds_the_prompt_and_the_answer_of_the_rows_that_keep_it() -> None:
    stack = opened("llama")
    view, routers = routed(stack)
    keep = kept(view, routers, IDS, MASK)
    out = view.generate(
        input_ids=IDS[:, :PROMPT], attention_mask=MASK[:, :PROMPT], **SETTINGS, return_dict_in_generate=True
    )
    for layer, slot in enumerate(out.cache.layers):
        if keep[:, layer].any():
            assert slot.keys.shape[0] == int(keep[:, layer].sum()) and slot.keys.shape[-2] == PROMPT + 4
        else:
            assert isinstance(slot, Placeholder)


@pytest.mark.parametrize("policy", ["union", "majority"])
def test_a_batch_can_decide_as_one(policy: str) -> None:
    stack = opened("llama")
    view, routers = routed(stack)
    alone = kept(view, routers, IDS, MASK)
    routers.batch_policy = policy
    together = kept(view, routers, IDS, MASK)
    wanted = alone.any(0) if policy == "union" else alone.float().mean(0) >= 0.5
    if policy == "union":  # layer 0 sees the same hidden states; later ones depend on the first decisions
        assert together[0, 0] == wanted[0]
    assert (together == together[:1]).all()


def test_beams_keep_their_rows_apart() -> None:
    stack = opened("llama")
    view, _ = routed(stack)
    out = view.generate(
        input_ids=IDS[:, :PROMPT], attention_mask=MASK[:, :PROMPT], **SETTINGS, num_beams=3, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    ids, mask = out.sequences, torch.cat([MASK[:, :PROMPT], torch.ones(4, 5, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = parallel(view, ids, torch.full((4,), PROMPT), mask, position_ids=positions).logits
    log_probabilities = logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, log_probabilities.mean(-1), rtol=1e-4, atol=1e-4)


def test_gates_train_where_layers_are_free_and_the_model_stays(tmp_path: Path) -> None:
    stack = opened("llama")
    before = {name: tensor.clone() for name, tensor in stack.model.state_dict().items()}
    samples = blocks(IDS, (4, 6))
    config = TrainConfig(steps=12, lr=0.1, batch=2)
    runs = {
        weight: train_routers(
            stack, samples, config=config, skip_weight=weight, out=tmp_path / str(weight), protect=(1, 1)
        )
        for weight in (0.0, 1.0, 10.0)
    }
    for routers in runs.values():
        assert routers.gates == "hard"
        assert (routers.weight[[0, 3]] == 0).all() and (routers.bias[[0, 3]] == 2).all()
        assert (routers.weight[[1, 2]] != 0).any()
    assert all(torch.equal(before[name], tensor) for name, tensor in stack.model.state_dict().items())
    prompts = [row[:PROMPT] for row in IDS]
    size = {weight: float(signatures(stack, routers, prompts).float().mean()) for weight, routers in runs.items()}
    assert size[10.0] <= size[1.0] <= size[0.0] and size[10.0] < size[0.0]


@pytest.mark.parametrize("gates", ["soft", "straight"])
def test_open_gates_in_training_are_the_base_model_bitwise(gates: Any) -> None:
    stack = opened("llama")
    view, routers = routed(stack)
    routers.bias.fill_(100.0)
    routers.gates = gates
    ours = parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits
    assert torch.equal(ours, stack.model(IDS, attention_mask=MASK).logits)


def test_straight_gates_compute_what_is_served_and_train_the_routers() -> None:
    stack = opened("llama")
    view, routers = routed(stack)
    lengths = torch.full((4,), PROMPT)
    served = parallel(view, IDS, lengths, MASK).logits
    routers.gates = "soft"
    assert (parallel(view, IDS, lengths, MASK).logits - served)[MASK.bool()].abs().max() > 1e-2
    routers.gates = "straight"
    with torch.enable_grad():
        trained = parallel(view, IDS, lengths, MASK).logits
        trained[:, PROMPT:].square().sum().backward()
    torch.testing.assert_close(trained[MASK.bool()], served[MASK.bool()], rtol=1e-4, atol=1e-4)
    assert routers.weight.grad is not None and (routers.weight.grad.abs().sum(1) > 0).all()


def test_the_temperature_falls_geometrically_to_its_last_value() -> None:
    routers = PromptRouters(opened("llama"), temperature=0.25)
    annealing, seen = Annealing(routers, 3), []
    for step in range(3):
        annealing.before_step(SimpleNamespace(step=step))  # type: ignore[arg-type]
        seen.append(routers.temperature)
    assert seen == [1.0, 0.5, 0.25]
    annealing.before_step(SimpleNamespace(step=1))  # type: ignore[arg-type]  # a run that has resumed
    annealing.end(SimpleNamespace(step=3))  # type: ignore[arg-type]
    assert routers.temperature == 0.25


def test_plans_keep_the_temperature_at_which_their_routers_decide(tmp_path: Path) -> None:
    stack = opened("llama")
    series = first(stack, IDS, steps=2, gates="straight", temperature=0.5, work=Work(tmp_path))
    assert apply(stack, series[-1]).lamella_policy.temperature == 0.5


def test_thresholds_make_a_series_that_falls(tmp_path: Path) -> None:
    stack = opened("llama")
    _, routers = routed(stack)
    series = thresholds(stack, routers, [row[:PROMPT] for row in IDS])
    sizes = [sum(attn for attn, _ in plan.work) for plan in series]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4 and sizes[-1] == 0


def test_healing_keeps_as_many_layers_although_it_moves_what_routers_read(tmp_path: Path) -> None:
    stack = opened("llama")
    _, routers = routed(stack)
    samples = blocks(torch.randint(3, 128, (32, LENGTH), generator=torch.Generator().manual_seed(4)), PROMPT)
    prompts = [sample["input_ids"][:PROMPT] for sample in samples]
    plan = thresholds(stack, routers, prompts)[2]
    plan = keep_policy(plan, routers, tmp_path)
    [reference] = plan.policies.values()
    reference.params["protect"] = [0, 0]
    with torch.enable_grad():
        healed = tune(stack, plan, samples, config=TrainConfig(steps=20, lr=0.05, batch=8), work=Work(tmp_path / "run"))

    def decided(stack: Stack, plan: Plan) -> Tensor:
        assert plan.policy is not None
        routers.threshold = plan.policy.params["threshold"]
        return signatures(stack, routers, prompts)

    before, drifted = decided(stack, plan), decided(healed.stack, plan)
    now = decided(healed.stack, healed.plan)
    assert int(now.sum()) == int(before.sum()) != int(drifted.sum())
    assert healed.plan.work == [(share, share) for share in now.double().mean(0).tolist()]


def test_healing_leaves_a_threshold_that_still_keeps_as_many(tmp_path: Path) -> None:
    stack = opened("llama")
    plan = keep_policy(
        Plan(
            model=ModelReference.of(stack),
            policies={stack.stack: PolicyReference(name="first", params={"threshold": 0.01})},
        ),
        PromptRouters(stack),
        tmp_path,
    )
    with torch.enable_grad():
        healed = tune(
            stack, plan, blocks(IDS, PROMPT), config=TrainConfig(steps=2, lr=1e-3, batch=2), work=Work(tmp_path / "run")
        )
    assert healed.plan.policy is not None
    assert healed.plan.policy.params == {"threshold": 0.01} and healed.plan.work == [(1.0, 1.0)] * len(stack)


def test_a_plan_with_routers_survives_its_files(tmp_path: Path) -> None:
    stack = opened("llama")
    series = first(stack, IDS, steps=2, work=Work(tmp_path / "made"))
    (tmp_path / "kept").mkdir()
    series.write(tmp_path / "kept" / "series.json")
    again = PlanSeries.read(tmp_path / "kept" / "series.json")
    assert again == series
    ours, theirs = (apply(stack, each[-1]).lamella_policy.state_dict() for each in (series, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_of_another_shape_or_content_are_refused_in_one_line(tmp_path: Path) -> None:
    stack = opened("llama")
    other = opened("gpt2")
    blank = Plan(model=ModelReference.of(other), policies={other.stack: PolicyReference(name="first")})
    made = keep_policy(blank, PromptRouters(other), tmp_path).policy
    assert made is not None and made.file is not None
    wide = Stack(nano("llama", hidden_size=64))
    for reference, words in (
        (PolicyReference(name="first", file=made.file, sha256="0" * 64), "its hash differs"),
        (PolicyReference(name="first", file="nothing.safetensors"), "cannot be read"),
    ):
        reference._folder = tmp_path
        with pytest.raises(PlanError, match=words) as error:
            apply(stack, Plan(model=ModelReference.of(stack), policies={stack.stack: reference}))
        assert "\n" not in str(error.value)
    reference = PolicyReference(name="first", file=made.file)
    reference._folder = tmp_path
    plan = Plan(model=ModelReference.of(wide))
    plan.policies = {"text": reference}
    with pytest.raises(PlanError, match="'weight' is") as error:
        apply(wide, plan)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    stack = opened("llama")
    view, _ = routed(stack, prefill="route")
    cache = PlanCache(view.config, view.lamella_plan, PROMPT)
    with pytest.raises(CacheError, match="give the prompt in one call"):
        view(input_ids=IDS[:, :3], cache=cache)
    empty = {"input_ids": IDS, "attention_mask": MASK * (torch.arange(4) != 2)[:, None]}
    with pytest.raises(CacheError, match="a prompt of this batch is empty"):
        view.generate(**empty)
    kinds = "pool must be mean, last or vote, and prefill must be full or route"
    for settings, message in (
        ({"pool": "sum"}, kinds),
        ({"prefill": "none"}, kinds),
        ({"protect": (2, 2)}, "leaves none of 4 layers to route: give smaller values"),
        ({"batch_policy": "all"}, "batch_policy must be rows, union or majority, not all"),
    ):
        with pytest.raises(MethodError, match=message) as error:
            PromptRouters(stack, **settings)
        assert "\n" not in str(error.value)


def test_buckets_bring_similar_signatures_together() -> None:
    a, b = [True, True, False, False], [False, False, True, True]
    assert buckets(torch.tensor([a, b, a, b]), 2) == [[0, 2], [1, 3]]
    assert sorted(prompt for batch in buckets(torch.rand(7, 5) > 0.5, 3) for prompt in batch) == list(range(7))
