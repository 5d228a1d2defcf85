"""A view computes what its plan specifies, with a cache and without, and never changes the original.

The reference is the original transformers model: sublayers are disabled by forward hooks that zero their output, and
layer orders are executed by an explicit loop.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from lamella.errors import CacheError, ExportError, PlanError
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference, apply_static
from lamella.runtime import apply
from lamella.stack import Stack, share
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
LENGTH = 14  # longer than the sliding window of 8
IDS = torch.randint(3, 128, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
REAL = MASK.bool()
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

DROPS = {
    "sublayer": ["layers.1.mlp"],
    "layer": ["layers.2"],
    "first attention": ["layers.0.attn"],
    "first layer": ["layers.0"],
    "all attentions but one": ["layers.0.attn", "layers.1.attn", "layers.3.attn"],
    "all attentions": [f"layers.{layer}.attn" for layer in range(4)],
    "mixed": ["layers.0.attn", "layers.1", "layers.3.mlp"],
}
ORDERS = {"repeat": [0, 1, 1, 2, 3], "reorder": [1, 0, 3, 2], "twice": [0, 1, 2, 3, 0, 1, 2, 3], "leave out": [0, 3]}
PLANS = [*DROPS, *ORDERS]

# Places of the parts in each architecture: (layers, attention, its norm, MLP or the two maps of it, its norm).
PLACES = {
    "gpt2": ("transformer.h", "attn", "ln_1", "mlp", "ln_2"),
    "gpt_neox": ("gpt_neox.layers", "attention", "input_layernorm", "mlp", "post_attention_layernorm"),
    "opt": ("model.decoder.layers", "self_attn", "self_attn_layer_norm", "fc2", "final_layer_norm"),
    "vit": ("vit.layers", "attention", "layernorm_before", "mlp", "layernorm_after"),
}
LLAMA_PLACES = ("model.layers", "self_attn", "input_layernorm", "mlp", "post_attention_layernorm")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, **overrides: Any) -> Stack:
    stack = Stack(nano(name, **overrides))
    if stack.architecture.causal:
        stack.model.generation_config.eos_token_id = None
    return stack


def make_plan(stack: Stack, which: str | list[str]) -> Plan:
    if isinstance(which, str) and which in ORDERS:
        path = {stack.architecture.stack: PhasedPath(prefill=ORDERS[which], decode=ORDERS[which])}
        return Plan(model=ModelReference.of(stack), path=path)
    return Plan(model=ModelReference.of(stack), drop=DROPS[which] if isinstance(which, str) else which)


def zeros(_: Any, __: Any, out: Any) -> Any:
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


@contextmanager
def silenced(model: nn.Module, sites: list[str]) -> Iterator[None]:
    """Return the model with the output of these sublayers zeroed; a norm after the addition returns its input."""
    layers, *parts = PLACES.get(model.config.model_type, LLAMA_PLACES)
    hooks = []
    for site in sites:
        index, *sublayer = site.split(".")[1:]
        layer = model.get_submodule(layers)[int(index)]
        for kind, module, norm in (("attn", parts[0], parts[1]), ("mlp", parts[2], parts[3])):
            if sublayer and sublayer[0] != kind:
                continue
            hooks.append(getattr(layer, module).register_forward_hook(zeros))
            if not getattr(model.config, "do_layer_norm_before", True):
                hooks.append(getattr(layer, norm).register_forward_hook(lambda _, args, out: args[0]))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reference(model: nn.Module, which: str | list[str], **given: Tensor) -> Tensor:
    """The logits of the plan without cache, computed on the untouched transformers model."""
    given = {"input_ids": IDS, "attention_mask": MASK} | given
    if isinstance(which, list) or which in DROPS:
        with silenced(model, DROPS[which] if isinstance(which, str) else which):
            return model(**given, use_cache=False).logits
    layers = model.get_submodule(PLACES.get(model.config.model_type, LLAMA_PLACES)[0])
    calls: list[Any] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, a, k: calls.append((a, dict(k))), with_kwargs=True)
        for layer in layers
    ]
    model(**given, use_cache=False)
    for hook in hooks:
        hook.remove()
    h = calls[0][0][0]
    for layer in ORDERS[which]:
        args, kwargs = calls[layer]
        h = layers[layer](h, *args[1:], **kwargs)
    # The final norm and the head, by running the rest of the model on these hidden states.
    last = layers[-1].register_forward_hook(lambda *_: h)
    logits = model(**given, use_cache=False).logits
    last.remove()
    return logits


def continued(view: nn.Module, cuts: tuple[int, ...] = (9, 10, 12)) -> Tensor:
    """The logits of a raw continuation: the prompt, then the rest in pieces, on a left-padded batch."""
    parts, cache, begin = [], None, 0
    for end in (*cuts, LENGTH):
        out = view(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache, begin = out.cache, end
    return torch.cat(parts, dim=1)


def generated(view: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK, tokens: int = 8, **options: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    return view.generate(input_ids=ids, attention_mask=mask, **{**settings, **options})


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", PLANS)
def test_a_view_without_cache_gives_the_logits_of_the_written_out_loop(name: str, which: str) -> None:
    stack = opened(name)
    expected = reference(stack.model, which)
    view = apply_static(stack, make_plan(stack, which))
    logits = view(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(logits[REAL], expected[REAL], **CLOSE)
    assert not torch.allclose(logits[REAL], stack.model(input_ids=IDS, attention_mask=MASK).logits[REAL], atol=1e-2)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", PLANS)
def test_a_raw_continuation_on_a_left_padded_batch_equals_the_uncached_loop(name: str, which: str) -> None:
    stack = opened(name)
    expected = reference(stack.model, which)
    view = apply_static(stack, make_plan(stack, which))
    torch.testing.assert_close(continued(view)[REAL], expected[REAL], **CLOSE)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", PLANS)
def test_generation_with_cache_equals_generation_by_the_uncached_loop_token_for_token(name: str, which: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, which))
    ids, mask = IDS, MASK
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # generate counts from the first real token
        logits = reference(stack.model, which, input_ids=ids, attention_mask=mask, position_ids=positions)
        following = logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(generated(view, tokens=6), ids)
    assert torch.equal(generated(view, tokens=6, use_cache=False), ids)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", ["first attention", "all attentions but one", "repeat"])
def test_beams_with_cache_equal_beams_without(name: str, which: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, which))
    options = {"tokens": 5, "num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(generated(view, **options), generated(view, use_cache=False, **options))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", ["first attention", "all attentions but one", "twice"])
def test_a_batch_generates_what_its_rows_generate_alone(name: str, which: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, which))
    batch = generated(view)
    for row in range(len(IDS)):
        real = REAL[row]
        alone = generated(view, IDS[row : row + 1, real], MASK[row : row + 1, real])
        assert torch.equal(alone[0, int(real.sum()) :], batch[row, LENGTH:])


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", PLANS)
def test_output_hidden_states_has_an_entry_for_every_layer_in_place(name: str, which: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, which))
    states = view(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    moved = which in ORDERS and which != "leave out"  # if layers are only omitted, the others keep their order
    assert len(states) == (len(ORDERS[which]) if moved else 4) + 1
    if which == "layer":
        assert torch.equal(states[2][REAL], states[3][REAL])


@pytest.mark.parametrize("name", ["vit"])
@pytest.mark.parametrize("drop", [["layers.0.attn"], ["layers.1"], ["layers.2.mlp", "layers.3.attn"]], ids=str)
def test_a_vision_view_gives_the_logits_of_the_silenced_model(name: str, drop: list[str]) -> None:
    stack = opened(name)
    with silenced(stack.model, drop):
        expected = stack.model(pixel_values=IMAGES).logits
    view = apply_static(stack, make_plan(stack, drop))
    torch.testing.assert_close(view(pixel_values=IMAGES).logits, expected, **CLOSE)


def test_the_two_modes_agree_mask_and_removed() -> None:
    """The authors' search masks output projections by hooks; the result is executed without the sublayers."""
    stack = opened("llama")
    sublayers = {
        "layers.0.attn": "self_attn.o_proj",
        "layers.1.mlp": "mlp.down_proj",
        "layers.3.attn": "self_attn.o_proj",
    }
    hooks = []
    for site, projection in sublayers.items():
        layer = stack.model.model.layers[int(site.split(".")[1])]
        hooks.append(layer.get_submodule(projection).register_forward_hook(zeros))
    masked = stack.model(input_ids=IDS, attention_mask=MASK).logits
    for hook in hooks:
        hook.remove()
    removed = apply_static(stack, make_plan(stack, list(sublayers)))(input_ids=IDS, attention_mask=MASK).logits
    assert (masked - removed)[REAL].abs().max() <= 1e-5


@pytest.mark.parametrize("name", NANO)
def test_the_identity_plan_is_bit_exact_and_replaces_no_forward(name: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, []))
    given = {"pixel_values": IMAGES} if name == "vit" else {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(view(**given).logits, stack.model(**given).logits)
    assert [n for n, module in view.named_modules() if "forward" in vars(module)] == []
    if name != "vit":
        assert torch.equal(generated(view), generated(stack.model))


@pytest.mark.parametrize("name", NANO)
def test_a_view_shares_every_tensor_and_owns_its_modules_and_config(name: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, ["layers.0.attn", "layers.2"]))
    ours, theirs = view.state_dict(keep_vars=True), stack.model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in ours)
    buffers = dict(stack.model.named_buffers())
    assert all(tensor.data_ptr() == buffers[key].data_ptr() for key, tensor in view.named_buffers())
    assert not {id(module) for module in view.modules()} & {id(module) for module in stack.model.modules()}
    assert all(module.config is not stack.model.config for module in view.modules() if getattr(module, "config", None))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_view_with_repeats_shares_its_tensors_too(name: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, "twice"))
    own = {parameter.data_ptr() for parameter in stack.model.parameters()}
    assert {parameter.data_ptr() for parameter in view.parameters()} == own
    assert view.config.num_hidden_layers == 8 and stack.model.config.num_hidden_layers == 4


@pytest.mark.parametrize("name", CAUSAL)
def test_two_views_of_one_model_run_in_turn_and_leave_the_original_alone(name: str) -> None:
    stack = opened(name)
    given = {"input_ids": IDS, "attention_mask": MASK}
    plain = stack.model(**given).logits
    config = copy.deepcopy(stack.model.config.to_dict())
    first, second = (apply_static(stack, make_plan(stack, which)) for which in ("mixed", "repeat"))
    alone = [view(**given).logits for view in (first, second)]
    caches, logits = [None, None], [[], []]
    for begin, end in ((0, 9), (9, 11), (11, LENGTH)):  # both run on, piece by piece, in turn
        for index, view in enumerate((first, second)):
            piece = {"input_ids": IDS[:, begin:end], "attention_mask": MASK[:, :end]}
            out = view(**piece, cache=caches[index], use_cache=True)
            caches[index] = out.cache
            logits[index].append(out.logits)
            assert torch.equal(stack.model(**given).logits, plain)
    for index in (0, 1):
        torch.testing.assert_close(torch.cat(logits[index], 1)[REAL], alone[index][REAL], **CLOSE)
    assert torch.equal(first(**given).logits, alone[0]) and torch.equal(second(**given).logits, alone[1])
    assert stack.model.config.to_dict() == config


def test_a_plan_after_another_gives_the_second_not_both() -> None:
    stack = opened("llama")
    apply_static(stack, make_plan(stack, ["layers.1"]))(input_ids=IDS)
    second = apply_static(stack, make_plan(stack, ["layers.2"]))(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(
        second, reference(stack.model, ["layers.2"], attention_mask=torch.ones_like(IDS)), **CLOSE
    )


@pytest.mark.parametrize("which", ["mixed", "repeat"])
def test_dropping_a_view_frees_it(which: str) -> None:
    stack = opened("llama")
    view = apply_static(stack, make_plan(stack, which))
    generated(view)
    alive = [weakref.ref(view), weakref.ref(view.model.layers[1])]
    del view
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_writing_to_a_view_s_modules_does_not_reach_the_original() -> None:
    stack = opened("llama")
    plain = stack.model(input_ids=IDS).logits
    view = apply_static(stack, make_plan(stack, ["layers.1"]))
    view.model.layers[0].mlp = nn.Identity()
    view.config.num_hidden_layers = 1
    view.model.layers[2].register_forward_hook(zeros)
    assert torch.equal(stack.model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox"])  # each hands the cache on in its own way
@pytest.mark.parametrize("which", ["sublayer", "first attention", "layer", "all attentions", "repeat", "reorder"])
@pytest.mark.parametrize("owner", ["base", "other drop", "other order"])
def test_a_cache_that_another_plan_filled_is_refused(name: str, which: str, owner: str) -> None:
    stack = opened(name)
    others = {"base": stack.model}
    others["other drop"] = apply_static(stack, make_plan(stack, ["layers.2.mlp"]))
    others["other order"] = apply_static(stack, make_plan(stack, "twice"))
    cache = others[owner](input_ids=IDS, use_cache=True).cache
    view = apply_static(stack, make_plan(stack, which))
    with pytest.raises(CacheError) as caught:
        view(input_ids=IDS[:, :1], cache=cache, use_cache=True)
    assert "\n" not in str(caught.value) and "empty cache" in str(caught.value)


@pytest.mark.parametrize("which", ["sublayer", "layer", "last attentions", "repeat", "leave out"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_static_cache_gives_what_a_dynamic_one_gives(name: str, which: str) -> None:
    if (name, which) == ("gemma3_text", "leave out"):
        pytest.skip("removes the first full attention, in which a static cache counts: the test below")
    stack = opened(name)
    chosen: Any = ["layers.2.attn", "layers.3.attn"] if which == "last attentions" else which
    view = apply_static(stack, make_plan(stack, chosen))
    assert torch.equal(generated(view, cache_implementation="static"), generated(view))
    dynamic, static = DynamicCache(config=view.config), StaticCache(config=view.config, max_cache_len=32)
    for part in (slice(0, 6), slice(6, 7), slice(7, LENGTH)):  # a raw continuation, left-padded and ragged
        expected, found = (
            view(input_ids=IDS[:, part], attention_mask=MASK[:, : part.stop], cache=cache, use_cache=True).logits
            for cache in (dynamic, static)
        )
        torch.testing.assert_close(found[REAL[:, part]], expected[REAL[:, part]], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_static_cache_is_refused_where_a_removed_attention_counts_its_tokens(name: str) -> None:
    stack = opened(name)
    first = ["layers.1.attn"] if name == "gemma3_text" else ["layers.0.attn"]  # the first full attention, or of all
    for drop in (first, ["layers.0"]):
        view = apply_static(stack, make_plan(stack, drop))
        for run in (
            lambda view=view: view(input_ids=IDS, cache=StaticCache(config=view.config, max_cache_len=32)),
            lambda view=view: generated(view, cache_implementation="static"),
        ):
            with pytest.raises(CacheError, match=r"counts tokens: omit cache_implementation") as error:
                run()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["sublayer", "repeat"])
def test_a_static_cache_that_another_plan_has_filled_is_refused(which: str) -> None:
    stack = opened("llama")
    caches = [StaticCache(config=stack.config, max_cache_len=32) for _ in range(2)]
    stack.model(input_ids=IDS, cache=caches[0])
    apply_static(stack, make_plan(stack, "layer"))(input_ids=IDS, cache=caches[1])
    for cache in caches:
        with pytest.raises(CacheError, match="empty cache"):
            apply_static(stack, make_plan(stack, which))(input_ids=IDS[:, :1], cache=cache)


def test_a_compiled_step_with_a_static_cache_gives_the_step_itself() -> None:
    stack = opened("llama")
    view = apply_static(stack, make_plan(stack, ["layers.1.mlp", "layers.2"]))
    caches = [StaticCache(config=view.config, max_cache_len=32) for _ in range(2)]
    for cache in caches:
        view(input_ids=IDS[:, :6], cache=cache)
    steps = torch.compile(view.forward, backend="aot_eager", fullgraph=True)
    for column in range(6, 10):
        found, expected = (
            run(input_ids=IDS[:, column : column + 1], cache=cache).logits
            for run, cache in zip((steps, view), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["static", "phased", "policy"])
def test_a_view_refuses_to_save_what_is_not_the_view(kind: str, tmp_path: Any) -> None:
    stack = opened("llama")
    reference = ModelReference.of(stack)
    plans = {
        "static": Plan(model=reference, drop=["layers.1.mlp"]),
        "phased": Plan(model=reference, path={"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}),
        "policy": Plan(model=reference, policies={"text": PolicyReference(name="void")}),
    }
    view = apply(stack, plans[kind])
    for save in (view.save_pretrained, view.push_to_hub, share(view).save_pretrained):
        with pytest.raises(ExportError, match=r"lamella\.export\(stack, view\.lamella_plan, folder\)"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stack.model.save_pretrained(tmp_path / "out")  # the model itself is as it was


@pytest.mark.parametrize("which", ["repeat", "reorder", "first attention"])
def test_a_cache_that_offloads_is_refused_in_one_clear_line(which: str) -> None:
    stack = opened("llama")
    view = apply_static(stack, make_plan(stack, which))
    cache = DynamicCache(config=view.config)
    cache.offloading = True  # as it sets itself where there is an accelerator to offload from
    cache.prefetch = lambda *_: None
    with pytest.raises(CacheError, match="omit cache_implementation"):
        view(input_ids=IDS, cache=cache, use_cache=True)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", ["first attention", "all attentions", "repeat"])
def test_prompt_lookup_decoding_gives_the_tokens_of_plain_greedy(name: str, which: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, which))
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    plain = generated(view, ids, torch.ones_like(ids), tokens=16)
    assert torch.equal(generated(view, ids, torch.ones_like(ids), tokens=16, prompt_lookup_num_tokens=3), plain)


def test_a_quantised_cache_is_refused_in_one_clear_line() -> None:
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

    stack = opened("llama")
    view = apply_static(stack, make_plan(stack, "first attention"))

    class Quantised(Cache):  # as transformers builds it, without the back end that it needs
        def __init__(self) -> None:
            super().__init__(layers=[DynamicLayer() for _ in range(4)])

    with pytest.raises(CacheError, match="not with Quantised: omit cache_implementation"):
        view(input_ids=IDS, cache=Quantised(), use_cache=True)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", list(DROPS))
def test_parameter_names_of_a_view_in_order_are_the_original_s(name: str, which: str) -> None:
    stack = opened(name)
    view = apply_static(stack, make_plan(stack, which))
    assert [key for key, _ in view.named_parameters()] == [key for key, _ in stack.model.named_parameters()]
    assert [key for key, _ in view.named_modules()] == [key for key, _ in stack.model.named_modules()]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("which", ["first attention", "all attentions but one", "mixed"])
def test_removed_attention_owns_no_keys(name: str, which: str) -> None:
    stack = opened(name)
    plan = make_plan(stack, which)
    cache = apply_static(stack, plan)(input_ids=IDS, use_cache=True).cache
    for slot, layer in enumerate(cache.layers):
        gone = (slot, "attn") in plan.dropped
        assert (getattr(layer, "keys", None) is None) == gone, slot
        assert layer.get_seq_length() == LENGTH  # positions and masks of what follows are read from here


def test_the_gradient_of_a_view_reaches_the_shared_parameters_of_what_runs_only() -> None:
    stack = opened("llama")
    view = apply_static(stack, make_plan(stack, ["layers.1.attn"]))
    with torch.enable_grad():
        view(input_ids=IDS, labels=IDS).loss.backward()
    layers = stack.model.model.layers
    assert layers[1].self_attn.q_proj.weight.grad is None
    assert layers[1].mlp.up_proj.weight.grad.abs().max() > 0
    assert layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_a_plan_for_another_model_is_refused() -> None:
    stack, other = opened("llama"), opened("llama", num_hidden_layers=6)
    with pytest.raises(PlanError, match=r"for a llama of 4 layers .* is a llama of 6"):
        apply_static(other, make_plan(stack, ["layers.1"]))
    with pytest.raises(PlanError, match=r"for a llama of 4 layers .* is a gpt2 of 4"):
        apply_static(opened("gpt2"), make_plan(stack, ["layers.1"]))
    with pytest.raises(PlanError, match="another architecture"):
        apply_static(opened("llama", intermediate_size=48), make_plan(stack, ["layers.1"]))
    apply_static(Stack(nano("llama", seed=1)), make_plan(stack, ["layers.1"]))  # other weights fit


def test_apply_takes_static_plans_too() -> None:
    stack = opened("llama")
    plan = make_plan(stack, "mixed")
    ours, theirs = apply(stack, plan), apply_static(stack, plan)
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
