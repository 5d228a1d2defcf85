"""Decoders that read an encoder: every execution of a plan equals the transformers model with hooks.

The reference is the unmodified model over whole sequences, without a cache. At columns whose tokens do not run a layer,
a hook returns the layer's input; where a layer attends only to generated tokens, another changes its mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import lamella
from lamella.errors import CacheError, PlanError
from lamella.methods.unified_skip import unified_skip
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference
from lamella.runtime import LayerCall, Pass, PlanCache, Policy, empty_cache, parallel, traced, with_policy
from lamella.stack import Model, Placeholder
from lamella.zoo.nano import nano

NAMES = ["t5", "bart", "whisper"]
PATHS = {  # prompt, answer: a layer that answers alone run; one without which T5 has no position bias; and the reverse
    "first": ([0, 2, 3], [0, 1, 3]),
    "later": ([0, 1, 2, 3], [1, 3]),
    "new": ([1, 2, 3], [0, 1]),
}
CASES = [(path, keys) for path in PATHS for keys in ("fill", "local")]
GENERATED = [(*case, 1) for case in CASES] + [("first", "local", 3), ("later", "fill", 3)]  # with beams
ROWS, PROMPT, LENGTH = 3, 5, 10
START = {"t5": 0, "bart": 2, "whisper": 1}
IDS = torch.randint(3, 120, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
MASK[1, :1] = 0
REAL = MASK.bool()
LENGTHS = torch.tensor([5, 3, 8])
SOURCE = torch.randint(3, 120, (ROWS, 9), generator=torch.Generator().manual_seed(1))
SOURCE_MASK = torch.ones_like(SOURCE)
SOURCE_MASK[0, 6:] = 0  # encoders pad on the right
SOURCE_MASK[2, 4:] = 0
SOUND = torch.randn(ROWS, 8, 32, generator=torch.Generator().manual_seed(2)).double()
TOLERANCE = 1e-8


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, **overrides: Any) -> Model:
    model = nano(name, **({"num_decoder_layers": 4} if name == "t5" else {}) | overrides).double()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.begin_suppress_tokens = None
    return lamella.open(model)


def planned(model: Model, path: str, keys: Literal["fill", "local"] = "fill", **more: Any) -> Plan:
    prefill, decode = PATHS[path]
    paths = {"decoder": PhasedPath(prefill=prefill, decode=decode, keys=keys)}
    return Plan(model=ModelReference.of(model), path=paths, **more)


def source(name: str) -> dict[str, Tensor]:
    return {"input_features": SOUND} if name == "whisper" else {"input_ids": SOURCE, "attention_mask": SOURCE_MASK}


def words(ids: Tensor = IDS, mask: Tensor = MASK) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def prompt(name: str) -> dict[str, Tensor]:
    """A prompt of the decoder in which one row begins with the start token, or ``generate`` puts it before all."""
    ids = IDS[:, :PROMPT].clone()
    ids[2, 0] = START[name]
    return words(ids, MASK[:, :PROMPT])


@contextmanager
def hooked(model: Model, path: str, keys: str, response: Tensor, real: Tensor) -> Iterator[Any]:
    """The transformers model, in which a token runs the layers of its phase [batch, time] bool."""
    decoder = model.stacks["decoder"]
    prefill, decode = PATHS[path]
    hooks = []

    def passing(where: Tensor) -> Any:
        def hook(_: nn.Module, given: Any, out: Any) -> Any:
            chosen = torch.where(where[..., None], given[0], out[0] if isinstance(out, tuple) else out)
            return (chosen, *out[1:]) if isinstance(out, tuple) else chosen

        return hook

    def hide(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        time = response.shape[1]
        seen = torch.ones(time, time).tril().bool() & (real & response)[:, None, None] | torch.eye(time).bool()
        given["attention_mask"] = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)
        return (given.pop(names[0]),), given

    for index, layer in enumerate(decoder.layers):
        if index in decode and index not in prefill:
            hooks.append(layer.register_forward_hook(passing(~response)))
            if keys == "local":
                hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
        elif index in prefill and index not in decode:
            hooks.append(layer.register_forward_hook(passing(response)))
    try:
        yield model.model
    finally:
        for hook in hooks:
            hook.remove()


def reference(
    model: Model, name: str, path: str, keys: str, lengths: Tensor, ids: Tensor, mask: Tensor, generated: bool = False
) -> Tensor:
    """The logits of whole sequences [batch, time, vocabulary].

    Args:
        generated: whether ``generate`` made them; Whisper's counts positions from the first real token.
    """
    response = torch.arange(ids.shape[1]) >= lengths[:, None]
    repeats = len(ids) // ROWS
    given = {key: value.repeat_interleave(repeats, dim=0) for key, value in source(name).items()}
    if generated and name == "whisper":
        given["decoder_position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with hooked(model, path, keys, response, mask.bool()) as plain:
        return plain(**given, **words(ids, mask), use_cache=False).logits


def furthest(one: Tensor, other: Tensor, real: Tensor = REAL) -> float:
    return float((one - other)[real].abs().max())


def stepped(view: Any, name: str, cache: Any, cuts: tuple[int, ...], begin: int = 0) -> Tensor:
    parts, encoded = [], None
    for end in (*cuts, LENGTH):
        given = source(name) | ({} if encoded is None else {"encoder_outputs": (encoded,)})
        out = view(**given, **words(IDS[:, begin:end], MASK[:, :end]), cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, encoded, begin = out.cache, out.encoder_last_hidden_state, end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("path", "keys"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_step_and_parallel_equal_the_reference(name: str, path: str, keys: Literal["fill", "local"]) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, path, keys))
    expected = reference(model, name, path, keys, LENGTHS, IDS, MASK)
    assert furthest(parallel(view, source(name) | words(), LENGTHS).logits, expected) <= TOLERANCE
    for cuts in (tuple(range(1, LENGTH)), (4, 9), (7,), ()):  # one token at a time; calls in which some prompts end
        assert furthest(stepped(view, name, empty_cache(view, LENGTHS), cuts), expected) <= TOLERANCE
    assert furthest(model.model(**source(name), **words()).logits, expected) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_without_a_cache_the_first_call_is_the_prompt(name: str) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, "first"))
    expected = reference(model, name, "first", "fill", torch.full((ROWS,), PROMPT), IDS, MASK)
    assert furthest(stepped(view, name, None, (PROMPT, 6, 7)), expected) <= TOLERANCE


@pytest.mark.parametrize(("path", "keys", "beams"), GENERATED)
@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_the_reference(name: str, path: str, keys: Literal["fill", "local"], beams: int) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, path, keys))
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    beam = {"num_beams": beams, "num_return_sequences": 1 if name == "whisper" else beams}  # Whisper gives the best one
    outputs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = view.generate(**source(name), **prompt(name), **settings, **beam, **outputs)
    ids = out.sequences
    copies = len(ids) // ROWS
    mask = torch.cat(
        [prompt(name)["decoder_attention_mask"].repeat_interleave(copies, 0), torch.ones_like(ids[:, :5])], 1
    )
    assert torch.equal(ids[:, :PROMPT], prompt(name)["decoder_input_ids"].repeat_interleave(copies, 0))
    lengths = torch.full((len(ids),), PROMPT)
    expected = reference(model, name, path, keys, lengths, ids, mask, generated=True)[:, PROMPT - 1 : -1]
    if beams == 1:
        logits = torch.stack(list(out.logits), dim=1)
        assert (logits - expected).abs().max() <= 1e-6  # generate hands them on in float32
        assert torch.equal(expected.argmax(-1), ids[:, PROMPT:])
    else:
        likely = expected.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
        torch.testing.assert_close(out.sequences_scores.double(), likely.mean(-1), rtol=1e-5, atol=1e-5)


class Everything(Policy):
    """Run every layer for every token."""

    crosses = True

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        return call(h)


class ByHand(Policy):
    """The same, sublayer by sublayer."""

    crosses = True

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        return call.mlp(call.cross(call.attn(h)))


@pytest.mark.parametrize("policy", [Everything, ByHand])
@pytest.mark.parametrize("name", NAMES)
def test_all_layers_for_all_tokens_are_the_base_model_bit_exactly(name: str, policy: type[Policy]) -> None:
    model = opened(name)
    stack = model.stacks["decoder"]
    view = with_policy(stack, planned(model, "first"), policy(stack))
    given = source(name) | words()
    assert torch.equal(view(**given).logits, model.model(**given).logits)
    assert torch.equal(parallel(view, given, LENGTHS).logits, model.model(**given, use_cache=False).logits)
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    outputs = {"output_logits": True, "return_dict_in_generate": True}
    for beams in (1, 2):
        ours, theirs = (
            each.generate(**source(name), **prompt(name), **settings, **outputs, num_beams=beams)
            for each in (view, model.model)
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_a_t5_whose_decoder_is_the_deeper_one_generates_with_the_plan_s_own_cache() -> None:
    """Transformers 5.24 gives such a model a cache with as many slots as its encoder has layers."""
    model = opened("t5", num_layers=2)
    view = lamella.apply(model, planned(model, "first"))
    expected = reference(model, "t5", "first", "fill", LENGTHS, IDS, MASK)
    assert furthest(stepped(view, "t5", empty_cache(view, LENGTHS), (4, 9)), expected) <= TOLERANCE
    ids = view.generate(**source("t5"), **prompt("t5"), do_sample=False, max_new_tokens=5)
    mask = torch.cat([MASK[:, :PROMPT], torch.ones_like(ids[:, PROMPT:])], dim=1)
    logits = reference(model, "t5", "first", "fill", torch.full((ROWS,), PROMPT), ids, mask)
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), ids[:, PROMPT:])


@pytest.mark.parametrize("name", NAMES)
def test_the_keys_of_the_encoder_have_no_holes(name: str) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, "first"))
    cache = empty_cache(view, PROMPT)
    stepped(view, name, cache, (PROMPT,))
    own, encoded = cache.self_attention_cache, cache.cross_attention_cache
    assert isinstance(own, PlanCache) and own.has_holes and isinstance(own.layers[2], Placeholder)
    states = model.model.get_encoder()(**source(name)).last_hidden_state
    for index in range(4):  # also layer 2, that prompts run alone, and layer 1, that none of them runs
        [project] = [
            each for path, each in model.stacks["decoder"].layers[index].named_modules()
            if path.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))
        ]  # fmt: skip
        keys = project(states).unflatten(-1, (4, 8)).transpose(1, 2)
        torch.testing.assert_close(encoded.layers[index].keys, keys, rtol=0, atol=1e-10)
    cache.crop(-2)
    assert own.get_seq_length() == LENGTH - 2 and encoded.layers[0].keys.shape[2] == states.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_reordered_selected_and_repeated(name: str) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, "first", "local"))
    expected = reference(model, name, "first", "local", LENGTHS, IDS, MASK)
    cases = {
        "reorder_cache": (torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])),
        "batch_select_indices": (torch.tensor([2, 0]), torch.tensor([2, 0])),
        "batch_repeat_interleave": (2, torch.arange(ROWS).repeat_interleave(2)),
    }
    for operation, (argument, rows) in cases.items():
        cache = empty_cache(view, LENGTHS)
        view(**source(name), **words(IDS[:, :6], MASK[:, :6]), cache=cache)
        getattr(cache, operation)(argument)
        given = {key: value[rows] for key, value in source(name).items()}
        logits = view(**given, **words(IDS[rows, 6:], MASK[rows]), cache=cache).logits
        assert furthest(logits, expected[rows, 6:], REAL[rows, 6:]) <= TOLERANCE


@pytest.mark.parametrize("name", ["t5", "bart"])  # Whisper hands its caches on row by row, so ours stays inside
def test_a_cache_that_was_used_takes_another_source(name: str) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, "first"))
    settings = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    used = view.generate(**source(name), **prompt(name), **settings).cache
    other = {"input_ids": SOURCE.flip(0), "attention_mask": SOURCE_MASK.flip(0)}
    fresh, again = (view.generate(**other, **prompt(name), **settings, **more) for more in ({}, {"cache": used}))
    assert all(torch.equal(a, b) for a, b in zip(fresh.logits, again.logits, strict=True))


def test_every_piece_that_whisper_generates_has_a_prompt_of_its_own() -> None:
    model = opened("whisper")
    config = model.model.generation_config
    config.no_timestamps_token_id, config.is_multilingual = 100, False
    view = lamella.apply(model, planned(model, "first"))
    ran = {"encoder": 0, "decoder.layers.2.fc2": 0, "decoder.layers.0.fc2": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            ran[name] += 1

        return hook

    for name in ran:
        view.get_submodule(f"model.{name}").register_forward_hook(count(name))
    long = torch.randn(1, 8, 80, generator=torch.Generator().manual_seed(0)).double()  # a window is 32 frames long
    view.generate(long, attention_mask=torch.ones(1, 80), return_timestamps=True, max_new_tokens=6)
    assert ran["encoder"] >= 2 and ran["decoder.layers.2.fc2"] == ran["encoder"]  # which prompts alone run
    assert ran["decoder.layers.0.fc2"] > 2 * ran["encoder"]


def test_whisper_hands_on_everything_but_the_cache() -> None:
    model = opened("whisper")
    view = lamella.apply(model, planned(model, "first"))
    plain = view.generate(**source("whisper"), max_new_tokens=4)
    judged = view.generate(**source("whisper"), max_new_tokens=4, logprob_threshold=-9.0, temperature=(0.0,))
    assert torch.equal(judged, plain)  # its threshold needs scores
    out = view.generate(**source("whisper"), max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert set(out.keys()) == {"sequences", "scores"}


@pytest.mark.parametrize("name", NAMES)
def test_sublayers_that_a_plan_drops_do_not_run(name: str) -> None:
    model = opened(name)
    view = lamella.apply(model, planned(model, "later", drop=["decoder.layers.1.cross", "decoder.layers.0.attn"]))
    trace = traced(view)
    logits = parallel(view, source(name) | words(), torch.full((ROWS,), PROMPT)).logits
    ran, of_prompt, _ = trace.joined()
    assert trace.sublayers == ("attn", "cross", "mlp") and of_prompt[:, :PROMPT].all()
    assert ran[:, :PROMPT].all(axis=(0, 1)).tolist() == [
        [False, True, True],
        [True, False, True],
        [True, True, True],
        [True, True, True],
    ]
    assert ran[:, PROMPT:].any(axis=(0, 1))[:, 1].tolist() == [False, False, False, True]
    assert furthest(stepped(view, name, empty_cache(view, PROMPT), (PROMPT, 7)), logits) <= TOLERANCE
    whole = lamella.apply(model, planned(model, "later"))
    assert furthest(parallel(whole, source(name) | words(), torch.full((ROWS,), PROMPT)).logits, logits) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_unified_skip_plans_such_a_decoder(name: str, tmp_path: Path) -> None:
    model = opened(name)
    plan = unified_skip(model.stacks["decoder"], speedup=2)[-1]
    assert plan.path["decoder"].prefill == [0, 1, 2, 3] and len(plan.path["decoder"].decode) == 2
    again = Plan.model_validate_json(plan.model_dump_json())
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    ids = [lamella.apply(model, each).generate(**source(name), **prompt(name), **settings) for each in (plan, again)]
    assert torch.equal(*ids) and not torch.equal(
        ids[0], model.model.generate(**source(name), **prompt(name), **settings)
    )
    first = lamella.apply(model, plan).generate(**source(name), **prompt(name), **settings | {"max_new_tokens": 1})
    assert torch.equal(first, model.model.generate(**source(name), **prompt(name), **settings | {"max_new_tokens": 1}))
    lamella.export(model, plan, tmp_path / "out", form="native")
    loaded = lamella.load(tmp_path / "out").model.double()
    assert torch.equal(loaded.generate(**source(name), **prompt(name), **settings), ids[0])


def test_gradients_flow_through_parallel_into_the_cross_of_skipped_layers_from_the_prompt_alone() -> None:
    model = opened("bart")
    view = lamella.apply(model, planned(model, "later"))
    seen: list[Tensor] = []
    view.get_submodule("model.decoder.layers.2.fc2").register_forward_hook(
        lambda _, __, out: out.register_hook(seen.append) and None
    )
    with torch.enable_grad():
        logits = parallel(view, source("bart") | words(), LENGTHS).logits
        response = torch.arange(LENGTH) >= LENGTHS[:, None]
        logits[response].square().sum().backward()
    assert seen[0][response].abs().max() == 0 and seen[0][~response & REAL].abs().max() > 0
    assert model.model.model.decoder.layers[1].encoder_attn.q_proj.weight.grad.abs().max() > 0


def test_what_such_a_decoder_cannot_do_is_refused_in_one_line() -> None:
    model = opened("bart")
    plan = planned(model, "first")
    view = lamella.apply(model, plan)
    given = source("bart") | prompt("bart")
    first = Plan(model=plan.model, policies={"decoder": PolicyReference(name="first")})
    other = empty_cache(lamella.apply(model, planned(model, "later")))
    filled = model.model(**source("bart"), **words(), use_cache=True).cache
    empty = {"decoder_attention_mask": torch.zeros_like(given["decoder_attention_mask"])}
    pair = "runs with a pair of a PlanCache and the encoder's keys, not with"

    def generate(**options: Any) -> Any:
        return lambda: view.generate(**{**given, "max_new_tokens": 2, **options})

    attempts = [
        (lambda: lamella.apply(model, first), PlanError, "reads an encoder, which this policy does not support"),
        (lambda: view(**given, cache=PlanCache(view.config, plan)), CacheError, f"{pair} PlanCache"),
        (lambda: view(**given, cache=filled), CacheError, f"{pair} EncoderDecoderCache"),
        (lambda: view(**given, cache=other), CacheError, "this cache belongs to another plan"),
        (generate(cache=DynamicCache()), CacheError, f"{pair} DynamicCache"),
        (generate(**empty), CacheError, "a prompt of this batch is empty"),
        (generate(use_cache=False), CacheError, r"switch it on \(use_cache=True in Python\)"),
        (generate(cache_implementation="static"), CacheError, "not with cache 'static': omit it"),
        (
            generate(prefill_chunk_size=2),
            CacheError,
            "omit assistant_model, prompt_lookup_num_tokens and prefill_chunk_size",
        ),
    ]
    for attempt, kind, message in attempts:
        with pytest.raises(kind, match=message) as error:
            attempt()
        assert type(error.value) is kind and "\n" not in str(error.value)
    single = {key: value[:1] for key, value in given.items()}
    with pytest.raises(CacheError, match="omit assistant_model, prompt_lookup_num_tokens and"):
        view.generate(**single, max_new_tokens=2, prompt_lookup_num_tokens=2)
    plain = lamella.open(nano("llama"))
    phased = Plan(model=ModelReference.of(plain), path={"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])})
    decoder = lamella.apply(plain, phased)
    paired = EncoderDecoderCache(PlanCache(decoder.config, phased), DynamicCache())
    with pytest.raises(CacheError, match="runs with a PlanCache, not with EncoderDecoderCache"):
        decoder(input_ids=IDS, cache=paired)
