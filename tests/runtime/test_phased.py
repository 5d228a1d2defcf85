"""Plans that treat prompt and generated tokens differently: every execution gives the same logits.

The reference never runs Lamella's code: the prompt goes through the unmodified transformers model, whose cache is then
cut to the kept layers and passed to a second transformers model that has only those layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from lamella.errors import CacheError, PlanError
from lamella.methods.unified_skip import unified_skip
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.runtime import Phase, PlanCache, apply, parallel, phase_options
from lamella.stack import Placeholder, Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
KEPT = [[0, 3], [1, 2, 3], [2]]
PROMPT, LENGTH = 10, 15  # longer than the sliding window of 8
IDS = torch.randint(3, 128, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
MASK[2, :9] = 0  # a prompt of one real token
REAL = MASK.bool()
PROMPTS = {"input_ids": IDS[:, :PROMPT], "attention_mask": MASK[:, :PROMPT]}
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str) -> Stack:
    stack = Stack(nano(name))
    stack.model.generation_config.eos_token_id = None
    return stack


def make_plan(stack: Stack, kept: list[int], drop: tuple[str, ...] = ()) -> Plan:
    path = {"text": PhasedPath(prefill=list(range(len(stack))), decode=kept)}
    return Plan(model=ModelReference.of(stack), path=path, drop=list(drop))


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def only(model: nn.Module, kept: list[int]) -> nn.Module:
    """A transformers model that has these layers of ``model`` only."""
    thin: Any = copy.deepcopy(model)
    base = thin.get_submodule(thin.base_model_prefix)
    base = getattr(base, "decoder", base)
    name = "h" if hasattr(base, "h") else "layers"
    layers = nn.ModuleList(getattr(base, name)[index] for index in kept)
    for slot, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = slot
    setattr(base, name, layers)
    for config in {id(c): c for c in (thin.config, base.config)}.values():
        types = getattr(config, "layer_types", None)
        config.num_hidden_layers = len(kept)
        if types is not None:
            config.layer_types = [types[index] for index in kept]
    return thin


def reference(model: nn.Module, kept: list[int], ids: Tensor, mask: Tensor, prompt: int, counted: bool) -> Tensor:
    """The logits of prompts at full depth and continuations through the kept layers [batch, time, vocabulary].

    Args:
        counted: whether positions are counted from the first real token, as ``generate`` does.
    """
    where = positions(mask) if counted else torch.arange(ids.shape[1]).expand_as(ids)
    if model.config.model_type == "opt" and not counted:
        where = positions(mask)  # OPT counts so by itself
    cache = DynamicCache(config=model.config)
    first = model(
        input_ids=ids[:, :prompt],
        attention_mask=mask[:, :prompt],
        position_ids=where[:, :prompt],
        cache=cache,
        use_cache=True,
    ).logits
    if prompt == ids.shape[1]:
        return first
    cache.layers = [cache.layers[layer] for layer in kept]
    thin = only(model, kept)
    rest = thin(
        input_ids=ids[:, prompt:], attention_mask=mask, position_ids=where[:, prompt:], cache=cache, use_cache=True
    ).logits
    return torch.cat([first, rest], dim=1)


def greedy(view: nn.Module, given: dict[str, Tensor] = PROMPTS, tokens: int = 6, **options: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    return view.generate(**given, **{**settings, **options})


def furthest(one: Tensor, other: Tensor, mask: Tensor = REAL) -> float:
    return float((one - other)[mask].abs().max())


def slots(cache: Any) -> int:
    """Token slots that hold keys, of one row."""
    return sum(layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_parallel_equals_the_two_segment_reference_on_a_left_padded_ragged_batch(name: str, kept: list[int]) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, kept))
    logits = parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits
    expected = reference(stack.model, kept, IDS, MASK, PROMPT, counted=False)
    assert furthest(logits, expected) <= TOLERANCE
    assert furthest(logits, stack.model(input_ids=IDS, attention_mask=MASK).logits) > 0.05


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_a_raw_continuation_equals_the_two_segment_reference(name: str, kept: list[int]) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, kept))
    expected = reference(stack.model, kept, IDS, MASK, PROMPT, counted=False)
    for cuts in ((PROMPT, 11, 12, 13, 14), (PROMPT, 13), (PROMPT,)):  # one token at a time, and several at once
        parts, cache, begin = [], None, 0
        for end in (*cuts, LENGTH):
            out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
            parts.append(out.logits)
            cache, begin = out.cache, end
        assert furthest(torch.cat(parts, 1), expected) <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_generate_equals_the_two_segment_reference_and_parallel(name: str, kept: list[int]) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, kept))
    out = greedy(view, output_logits=True, return_dict_in_generate=True)
    ids = out.sequences
    mask = torch.cat([PROMPTS["attention_mask"], torch.ones_like(ids[:, PROMPT:])], dim=1)
    logits = torch.stack(out.logits, dim=1)
    expected = reference(stack.model, kept, ids, mask, PROMPT, counted=True)[:, PROMPT - 1 : -1]
    assert (logits - expected).abs().max() <= TOLERANCE
    assert torch.equal(expected.argmax(-1), ids[:, PROMPT:])
    whole = parallel(view, ids, torch.full((4,), PROMPT), mask, position_ids=positions(mask)).logits
    assert (logits - whole[:, PROMPT - 1 : -1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_the_first_generated_token_is_the_full_model_s_also_after_one_token(name: str, kept: list[int]) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, kept))
    assert torch.equal(greedy(view, tokens=1), greedy(stack.model, tokens=1))
    for token in (5, 77):
        single = {"input_ids": torch.tensor([[token]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
        assert torch.equal(greedy(view, single, tokens=1), greedy(stack.model, single, tokens=1))
        expected = stack.model(**single).logits
        assert torch.allclose(view(**single, use_cache=True).logits, expected, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_with_their_own_prompt_lengths_equal_each_row_alone(name: str) -> None:
    stack = opened(name)
    kept, lengths = [0, 3], torch.tensor([6, 9, 12, LENGTH])
    view = apply(stack, make_plan(stack, kept))
    together = parallel(view, IDS, lengths, MASK).logits
    for row, length in enumerate(lengths.tolist()):
        alone = reference(stack.model, kept, IDS[row : row + 1], MASK[row : row + 1], length, counted=False)
        assert furthest(together[row : row + 1], alone, REAL[row : row + 1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_a_cache_with_a_prompt_length_per_row_steps_as_parallel_runs(name: str) -> None:
    stack = opened(name)
    plan, lengths = make_plan(stack, [0, 3]), torch.tensor([6, 9, 12, 13])
    view = apply(stack, plan)
    expected = parallel(view, IDS, lengths, MASK).logits
    cache = PlanCache(view.config, plan, lengths)
    parts, begin = [], 0
    for end in (4, 8, 13, 14, LENGTH):
        parts.append(view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache).logits)
        assert cache.has_holes == (end >= 13)
        begin = end
    assert furthest(torch.cat(parts, 1), expected) <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
def test_a_batch_of_left_padded_prompts_generates_what_its_rows_generate_alone(name: str) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, [0, 3]))
    batch = greedy(view)
    for row in range(4):
        real = REAL[row, :PROMPT]
        single = {key: value[row : row + 1, real] for key, value in PROMPTS.items()}
        assert torch.equal(greedy(view, single)[0, int(real.sum()) :], batch[row, PROMPT:])


@pytest.mark.parametrize("name", CAUSAL)
def test_freed_and_retained_caches_give_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, [0, 3]))
    freed = greedy(view, return_dict_in_generate=True, output_logits=True)

    monkeypatch.setattr(PlanCache, "free", lambda self, slot: None)
    retained = greedy(view, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(freed.sequences, retained.sequences)
    assert all(torch.equal(a, b) for a, b in zip(freed.logits, retained.logits, strict=True))
    assert retained.cache.layers[1].keys is not None and not retained.cache.has_holes


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "gemma3_text"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_cache_holds_n_times_prompt_plus_generated_minus_1_token_slots(
    name: str, kept: list[int], tokens: int
) -> None:
    stack = opened(name)
    single = {key: value[3:] for key, value in PROMPTS.items()}
    cache = greedy(apply(stack, make_plan(stack, kept)), single, tokens, return_dict_in_generate=True).cache
    assert slots(cache) == len(kept) * (PROMPT + tokens - 1)
    for slot, layer in enumerate(cache.layers):
        assert isinstance(layer, Placeholder) == (slot not in kept)
        if slot not in kept:
            assert not [value for value in vars(layer).values() if isinstance(value, Tensor)]
    assert cache.get_seq_length() == PROMPT + tokens - 1


def test_a_sliding_window_limits_the_slots_of_kept_layers() -> None:
    stack = opened("gemma3_text")  # sliding (window of 8), full, sliding, full
    cache = greedy(apply(stack, make_plan(stack, [0, 3])), return_dict_in_generate=True).cache
    assert slots(cache) == 7 + (PROMPT + 6 - 1)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_speed_up_of_1_is_the_base_model_bit_exactly(name: str) -> None:
    stack = opened(name)
    view = apply(stack, unified_skip(stack, speedup=1.0)[-1])
    given = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(view(**given).logits, stack.model(**given).logits)
    ours, theirs = (greedy(model, output_logits=True, return_dict_in_generate=True) for model in (view, stack.model))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_beams_have_the_scores_that_the_reference_gives_their_tokens(name: str) -> None:
    stack = opened(name)
    kept = [0, 3]
    view = apply(stack, make_plan(stack, kept))
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    out = greedy(view, tokens=4, **options)
    ids = out.sequences
    prompt_mask = PROMPTS["attention_mask"].repeat_interleave(3, dim=0)
    mask = torch.cat([prompt_mask, torch.ones_like(ids[:, PROMPT:])], dim=1)
    logits = reference(stack.model, kept, ids, mask, PROMPT, counted=True)[:, PROMPT - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, log_probs.mean(-1), rtol=1e-4, atol=1e-4)
    plain = greedy(view, tokens=4)
    mask = torch.cat([PROMPTS["attention_mask"], torch.ones_like(plain[:, PROMPT:])], dim=1)
    logits = reference(stack.model, kept, plain, mask, PROMPT, counted=True)[:, PROMPT - 1 : -1]
    single = logits.log_softmax(-1).gather(-1, plain[:, PROMPT:, None]).squeeze(-1).mean(-1)
    assert (out.sequences_scores[::3] >= single - 1e-2).sum() >= 3  # beams look further than one


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kept", KEPT[:2], ids=str)
def test_prompt_lookup_decoding_gives_the_tokens_of_plain_greedy(name: str, kept: list[int]) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, kept))
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = greedy(view, given, tokens=16)
    assert torch.equal(greedy(view, given, tokens=16, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_prompt_in_chunks_gives_the_tokens_of_a_prompt_at_once(name: str, size: int) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, [0, 3]))
    given = {key: value[[0, 1, 3]] for key, value in PROMPTS.items()}
    assert torch.equal(greedy(view, given, prefill_chunk_size=size), greedy(view, given))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_a_second_turn_with_the_old_cache_equals_a_fresh_run(name: str) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, [0, 3]))
    first = greedy(view, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, IDS[:, PROMPT:]], dim=1)
    mask = torch.cat([PROMPTS["attention_mask"], torch.ones_like(ids[:, PROMPT:])], dim=1)
    turn = {"input_ids": ids, "attention_mask": mask}
    fresh = greedy(view, turn, output_logits=True, return_dict_in_generate=True)
    again = greedy(view, turn, output_logits=True, return_dict_in_generate=True, cache=first.cache)
    assert torch.equal(fresh.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(fresh.logits, again.logits, strict=True))
    expected = reference(stack.model, [0, 3], ids, mask, ids.shape[1], counted=True)[:, -1]  # all of it full depth
    assert (again.logits[0] - expected).abs().max() <= TOLERANCE


def test_a_new_prompt_on_a_cache_with_holes_is_refused() -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    cache = greedy(view, return_dict_in_generate=True).cache
    with pytest.raises(CacheError) as error:
        cache.new_turn()
    assert "\n" not in str(error.value) and "encode the whole conversation again" in str(error.value)
    cache.reset()
    assert not cache.has_holes and cache.get_seq_length() == 0 and slots(cache) == 0
    cache.new_turn()
    given = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(view(**given, cache=cache).logits, view(**given, use_cache=True).logits)


def test_a_cache_is_cropped_among_generated_tokens_and_not_into_the_prompt() -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    expected = reference(stack.model, [0, 3], IDS, MASK, PROMPT, counted=False)
    cache = view(**PROMPTS, use_cache=True).cache
    view(input_ids=IDS[:, PROMPT:], attention_mask=MASK, cache=cache)
    cache.crop(-(LENGTH - 12))
    assert cache.get_seq_length() == cache.layers[3].get_seq_length() == 12
    assert (
        furthest(view(input_ids=IDS[:, 12:], attention_mask=MASK, cache=cache).logits, expected[:, 12:], REAL[:, 12:])
        <= TOLERANCE
    )
    cache.crop(-(LENGTH - PROMPT))  # to the end of the prompt
    with pytest.raises(CacheError) as error:
        cache.crop(-1)
    assert "\n" not in str(error.value) and "cannot be cropped into the prompt" in str(error.value)
    assert "encode the whole conversation again with an empty cache" in str(error.value)
    assert cache.get_seq_length() == cache.layers[3].get_seq_length() == PROMPT


def test_rows_of_a_cache_can_be_reordered_selected_and_repeated() -> None:
    stack = opened("llama")
    plan, lengths = make_plan(stack, [0, 3]), torch.tensor([6, 8, 10, 9])
    view = apply(stack, plan)
    expected = parallel(view, IDS, lengths, MASK).logits
    cases = {
        "reorder_cache": (torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1])),
        "batch_select_indices": (torch.tensor([3, 0]), torch.tensor([3, 0])),
        "batch_repeat_interleave": (2, torch.arange(4).repeat_interleave(2)),
    }
    for operation, (argument, rows) in cases.items():
        for cut in (7, 12):  # within the prompts, and behind them
            cache = PlanCache(view.config, plan, lengths)
            view(input_ids=IDS[:, :cut], attention_mask=MASK[:, :cut], cache=cache)
            getattr(cache, operation)(argument)
            assert torch.equal(cache.prompt_lengths, lengths[rows])
            logits = view(input_ids=IDS[rows, cut:], attention_mask=MASK[rows], cache=cache).logits
            assert furthest(logits, expected[rows, cut:], REAL[rows, cut:]) <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_of_the_base_model_and_of_another_plan_is_refused(name: str) -> None:
    stack = opened(name)
    view = apply(stack, make_plan(stack, [0, 3]))
    base = stack.model(input_ids=IDS, use_cache=True).cache
    other = apply(stack, make_plan(stack, [0, 1]))(input_ids=IDS, use_cache=True).cache
    dropped = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]))(input_ids=IDS, use_cache=True).cache
    plain = "this plan runs with a PlanCache, not with DynamicCache: omit the cache"
    for cache, message in (
        (base, plain),
        (dropped, plain),
        (other, "this cache belongs to another plan: start from an empty one"),
    ):
        for run in (lambda c: view(input_ids=IDS[:, :1], cache=c), lambda c: greedy(view, cache=c)):
            with pytest.raises(CacheError) as error:
                run(cache)
            assert str(error.value) == message
    with pytest.raises(RuntimeError) as mixed:
        stack.model(input_ids=IDS[:, :1], cache=other)
    assert type(mixed.value) is RuntimeError
    assert "filled by a plan that does not run this attention; start from an empty cache" in str(mixed.value)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"cache_implementation": "static"}, "omit it"),
        ({"cache_implementation": "offloaded"}, "omit it"),
        ({"cache_implementation": "quantized"}, "omit it"),
        ({"generation_config": GenerationConfig(cache_implementation="static", max_new_tokens=2)}, "omit it"),
        ({"use_cache": False}, "switch it on"),
        ({"generation_config": GenerationConfig(use_cache=False, max_new_tokens=2)}, "switch it on"),
    ],
    ids=str,
)
def test_caches_that_a_plan_cannot_run_with_are_refused_in_one_line(options: dict[str, Any], advice: str) -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    with pytest.raises(CacheError) as error:
        view.generate(**PROMPTS, **options)
    assert "\n" not in str(error.value) and advice in str(error.value)


def test_generate_without_inputs_starts_from_the_begin_token_as_the_model_does() -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    settings = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    begin = torch.tensor([[stack.config.bos_token_id]])
    assert torch.equal(view.generate(**settings), view.generate(begin, **settings))
    assert view.generate(**settings).shape == stack.model.generate(**settings).shape == (1, 4)


def test_generate_takes_a_config_and_inputs_by_position_and_embeddings() -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    plain = greedy(view)
    config = GenerationConfig(do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    mask = PROMPTS["attention_mask"]
    assert torch.equal(view.generate(PROMPTS["input_ids"], config, attention_mask=mask), plain)
    embedded = stack.model.model.embed_tokens(PROMPTS["input_ids"])
    only_new = view.generate(inputs_embeds=embedded, attention_mask=mask, generation_config=config)
    assert torch.equal(only_new, plain[:, PROMPT:])


def test_sampling_with_a_seed_is_reproducible() -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(greedy(view, do_sample=True, top_k=0))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_tokens_are_streamed_as_they_are_generated() -> None:
    class Collector:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    stack, collector = opened("llama"), Collector()
    view = apply(stack, make_plan(stack, [0, 3]))
    single = {key: value[3:] for key, value in PROMPTS.items()}
    out = greedy(view, single, streamer=collector)
    assert collector.tokens == out[0].tolist() and collector.ended


def test_gradients_flow_through_parallel_and_reach_skipped_layers_from_the_prompt_alone() -> None:
    stack = opened("llama")
    view = apply(stack, make_plan(stack, [0, 3]))
    lengths = torch.tensor([8, 9, 10, 12])
    seen: list[Tensor] = []

    def watch(_: nn.Module, __: Any, out: Tensor) -> None:
        out.register_hook(seen.append)

    view.model.layers[1].mlp.register_forward_hook(watch)
    with torch.enable_grad():
        logits = parallel(view, IDS, lengths, MASK).logits
        response = torch.arange(LENGTH) >= lengths[:, None]
        picked = logits[:, :-1][response[:, 1:]]
        torch.nn.functional.cross_entropy(picked, IDS[:, 1:][response[:, 1:]]).backward()
    for layer in (0, 3):
        for parameter in stack.model.model.layers[layer].parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert stack.model.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0
    assert seen[0][response].abs().max() == 0
    assert seen[0][~response & REAL].abs().max() > 0


def test_a_phased_plan_may_drop_sublayers_for_every_token_too() -> None:
    stack = opened("llama")
    kept = [0, 3]
    view = apply(stack, make_plan(stack, kept, drop=("layers.0.attn", "layers.2.mlp")))
    hooks = [
        stack.model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: torch.zeros_like(out)),
        stack.model.model.layers[2].mlp.down_proj.register_forward_hook(lambda _, __, out: torch.zeros_like(out)),
    ]
    expected = reference(stack.model, kept, IDS, MASK, PROMPT, counted=False)
    for hook in hooks:
        hook.remove()
    assert furthest(parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits, expected) <= TOLERANCE
    cache = view(**PROMPTS, use_cache=True).cache
    rest = view(input_ids=IDS[:, PROMPT:], attention_mask=MASK, cache=cache).logits
    assert furthest(rest, expected[:, PROMPT:], REAL[:, PROMPT:]) <= TOLERANCE
    assert slots(cache) == LENGTH  # the attention of layer 3 alone


def test_a_prompt_may_leave_layers_out_too() -> None:
    stack = opened("llama")
    path = {"text": PhasedPath(prefill=[0, 2, 3], decode=[0, 3])}
    view = apply(stack, Plan(model=ModelReference.of(stack), path=path))
    expected = reference(only(stack.model, [0, 2, 3]), [0, 2], IDS, MASK, PROMPT, counted=False)
    assert furthest(parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits, expected) <= TOLERANCE
    cache = view(**PROMPTS, use_cache=True).cache
    rest = view(input_ids=IDS[:, PROMPT:], attention_mask=MASK, cache=cache).logits
    assert furthest(rest, expected[:, PROMPT:], REAL[:, PROMPT:]) <= TOLERANCE


@pytest.mark.parametrize(("prefill", "decode"), [([0, 1, 2, 3], [2, 1]), ([0, 1, 1, 2], [0, 1])])
def test_phases_that_repeat_or_move_layers_are_refused(prefill: list[int], decode: list[int]) -> None:
    stack = opened("llama")
    plan = Plan(model=ModelReference.of(stack), path={"text": PhasedPath(prefill=prefill, decode=decode)})
    with pytest.raises(PlanError, match=r"layers run once and in order; change path\.(prefill|decode)"):
        apply(stack, plan)


@pytest.mark.parametrize("keys", ["fill", "local"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_layer_that_only_generated_tokens_run(name: str, keys: Literal["fill", "local"]) -> None:
    """The reference: the untouched model, whose layer 1 adds nothing at prompt columns (and hides their keys)."""
    stack = opened(name)
    path = {"text": PhasedPath(prefill=[0, 2, 3], decode=[0, 1, 3], keys=keys)}
    view = apply(stack, Plan(model=ModelReference.of(stack), path=path))
    response = torch.arange(LENGTH) >= PROMPT
    original, family = copy.deepcopy(stack.model), stack.architecture
    layers: Any = original.get_submodule(family.base).get_submodule(family.layers)

    def pass_by(columns: Tensor) -> Any:
        return lambda _, given, out: torch.where(columns[:, None], given[0], out)

    def hide(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.ones(LENGTH, LENGTH).tril().bool() & REAL[:, None, None, :]
        if getattr(layer.self_attn if hasattr(layer, "self_attn") else layer, "sliding_window", None):
            mask = mask & torch.ones(LENGTH, LENGTH).triu(-7).bool()  # a window of 8
        mask = mask & (response | torch.eye(LENGTH).bool())
        shut = torch.zeros(4, 1, LENGTH, LENGTH).masked_fill(~mask, -1e9)
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        return (given.pop(names[0]),), given | {"attention_mask": shut}

    if keys == "local":
        layers[1].register_forward_pre_hook(hide, with_kwargs=True)
    layers[1].register_forward_hook(pass_by(~response))
    layers[2].register_forward_hook(pass_by(response))
    expected = original(input_ids=IDS, attention_mask=MASK).logits
    assert furthest(parallel(view, IDS, torch.full((4,), PROMPT), MASK).logits, expected) <= TOLERANCE
    for cuts in ((PROMPT, 11, 12, 13, 14), (PROMPT, 13), (4, PROMPT), (12,)):
        parts, cache, begin = [], PlanCache(view.config, view.lamella_plan, PROMPT), 0
        for end in (*cuts, LENGTH):
            out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
            parts.append(out.logits)
            begin = end
        assert furthest(torch.cat(parts, 1), expected) <= TOLERANCE


def test_phases_of_static_views_need_no_options() -> None:
    stack = opened("llama")
    static = apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]))
    for model in (static, stack.model):
        assert phase_options(model, torch.full((4,), PROMPT)) == {}
    assert torch.equal(
        parallel(static, IDS, torch.full((4,), PROMPT), MASK).logits,
        static(input_ids=IDS, attention_mask=MASK, use_cache=False).logits,
    )


def test_the_phase_of_a_call_says_which_tokens_are_generated() -> None:
    mixed = Phase.of(4, 3, torch.tensor([5, 6]))
    assert mixed.any_prompt and mixed.any_response and mixed.prompt_done
    assert mixed.order(IDS.device).tolist() == [[0, 1, 2], [0, 0, 1]]
    prompt, response = Phase.of(0, 3, 4), Phase.of(4, 2, 4)
    assert (prompt.any_prompt, prompt.any_response, prompt.prompt_done) == (True, False, False)
    assert (response.any_prompt, response.any_response, response.prompt_done) == (False, True, True)
    assert response.response(IDS.device).all() and not prompt.response(IDS.device).any()


def test_a_phased_view_leaves_the_original_alone() -> None:
    stack = opened("llama")
    plain = greedy(stack.model)
    view = apply(stack, make_plan(stack, [0, 3]))
    other = apply(stack, make_plan(stack, [0, 1]))
    first, second = greedy(view), greedy(other)
    assert torch.equal(greedy(stack.model), plain)
    assert torch.equal(greedy(view), first) and torch.equal(greedy(other), second)
    assert [key for key, _ in view.named_parameters()] == [key for key, _ in stack.model.named_parameters()]
    pointers = [parameter.data_ptr() for parameter in stack.model.parameters()]
    assert [parameter.data_ptr() for parameter in view.parameters()] == pointers
