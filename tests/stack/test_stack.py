"""A stack is bit-identical to its model, from any point and in any order, and does not change the model.

Everything is compared with the transformers classes themselves: hooks record the inputs of their layers, whose own
``forward`` is then called directly.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaModel,
    MambaConfig,
    MambaModel,
)

from lamella.errors import ArchitectureError, NumericsError
from lamella.plan import ModelReference, Plan, apply_static
from lamella.plan.export import export
from lamella.stack import ARCHITECTURES, Architecture, Stack, find_architecture, join, register_architecture, share
from lamella.zoo.nano import NANO, nano, randomise

IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

# Where each architecture keeps its layers, as its own class says: (layers, final norm, head).
PLACES = {
    "gpt2": ("transformer.h", "transformer.ln_f", "lm_head"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm", "lm_head"),
    "vit": ("vit.layers", "vit.layernorm", "classifier"),
}
CASES = [(name, padded) for name in NANO for padded in (False, True) if not (name == "vit" and padded)]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def inputs(name: str, padded: bool) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": IMAGES}
    return {"input_ids": IDS, "attention_mask": MASK} if padded else {"input_ids": IDS}


def place(model: nn.Module, which: int) -> Any:
    paths = PLACES.get(model.config.model_type, ("model.layers", "model.norm", "lm_head"))
    module: Any = model
    for part in paths[which].split("."):
        module = getattr(module, part)
    return module


def noted_calls(model: nn.Module, given: dict[str, Tensor]) -> tuple[list, list, Tensor]:
    """Arguments and outputs of every layer of a run of the model, and its logits."""
    calls, outs, hooks = [], [], []
    for layer in place(model, 0):
        hooks.append(layer.register_forward_pre_hook(lambda _, a, k: calls.append((a, dict(k))), with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda _, a, out: outs.append(out)))
    options = {} if "pixel_values" in given else {"use_cache": False}
    logits = model(**given, **options).logits
    for hook in hooks:
        hook.remove()
    return calls, outs, logits


def by_hand(model: nn.Module, given: dict[str, Tensor], order: list[int]) -> Tensor:
    """The logits after running whole layers in any order, with the loop written out."""
    calls, _, _ = noted_calls(model, given)
    h = calls[0][0][0]
    for layer in order:
        args, kwargs = calls[layer]
        h = place(model, 0)[layer](h, *args[1:], **kwargs)
    norm = place(model, 1)
    h = h if norm is None else norm(h)
    return place(model, 2)(h[:, 0] if "pixel_values" in given else h)


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_the_sublayers_compose_to_the_layer_bit_exactly(name: str, padded: bool) -> None:
    model = nano(name)
    calls, _, _ = noted_calls(model, inputs(name, padded))
    stack = Stack(model)
    context = stack.context(inputs(name, padded))
    for index, layer in enumerate(place(model, 0)):
        args, kwargs = calls[index]
        assert torch.equal(
            join(stack.run(args[0], index, index + 1, context)), layer.forward(args[0], *args[1:], **kwargs)
        )


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_context_run_and_head_give_the_logits_of_the_model_bit_exactly(name: str, padded: bool) -> None:
    model = nano(name)
    calls, outs, logits = noted_calls(model, inputs(name, padded))
    stack = Stack(model)
    context = stack.context(inputs(name, padded))
    assert torch.equal(context.h, calls[0][0][0])
    streams = dict(stack.walk(context.h, 0, len(stack), context))
    for index, out in enumerate(outs):
        assert torch.equal(join(streams[index, "mlp"]), out)
    assert torch.equal(stack.head(streams[stack.positions[-1]]), logits)
    assert torch.equal(context.real, MASK.bool() if padded else torch.ones(context.h.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("DeiT", {}),
        ("Beit", {"use_relative_position_bias": True, "use_mask_token": True}),
        ("Beit", {"use_mean_pooling": False, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0}),
    ],
    ids=["deit", "beit", "beit with a class token"],
)
def test_relatives_of_vit_give_the_logits_of_the_model_bit_exactly(kind: str, changes: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=16, patch_size=4, num_labels=10, **changes)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    randomise(model, 0)
    stack = Stack(model)
    context = stack.context({"pixel_values": IMAGES})
    assert torch.equal(stack.head(stack.run(context.h, 0, len(stack), context)), model(IMAGES).logits)


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_a_restart_from_any_point_equals_the_full_run(name: str, padded: bool) -> None:
    model = nano(name)
    stack = Stack(model)
    context = stack.context(inputs(name, padded))
    before: dict[Any, Any] = {stack.positions[0]: context.h, 0: context.h}
    before |= {stack.after(position): h for position, h in stack.walk(context.h, 0, len(stack), context)}
    assert list(before) == [stack.positions[0], 0, *stack.positions[1:], stack.end]
    logits = noted_calls(model, inputs(name, padded))[2]
    for point, h in before.items():
        assert torch.equal(stack.head(stack.run(h, point, len(stack), context)), logits)
    for bad in (-1, len(stack) + 1):
        with pytest.raises(IndexError, match="out of range"):
            stack.run(context.h, bad, len(stack), context)


@pytest.mark.parametrize(("name", "padded"), CASES)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 1, 2, 3, 2], [2]], ids=str)
def test_layers_run_in_any_order_as_a_loop_over_them_does(name: str, padded: bool, order: list[int]) -> None:
    model = nano(name)
    stack = Stack(model)
    given = inputs(name, padded)
    assert torch.equal(stack.head(stack.execute(stack.context(given), order)), by_hand(model, given, order))


@pytest.mark.parametrize("name", NANO)
def test_skipped_sublayers_do_not_change_the_hidden_states(name: str) -> None:
    model = nano(name)
    stack = Stack(model)
    context = stack.context(inputs(name, False))
    nothing = stack.run(context.h, 0, len(stack), context, skip=stack.positions)
    assert torch.equal(join(nothing), context.h)
    without = stack.run(context.h, 0, len(stack), context, skip=stack.positions[2:4])
    assert torch.equal(stack.head(without), by_hand(model, inputs(name, False), [0, 2, 3]))


def test_the_soft_cap_of_the_output_is_applied() -> None:
    model = nano("gemma3_text", final_logit_softcapping=0.5)
    stack = Stack(model)
    context = stack.context(IDS)
    logits = stack.head(stack.run(context.h, 0, len(stack), context))
    assert torch.equal(logits, model(IDS).logits)
    assert logits.abs().max() <= 0.5
    uncapped = nano("gemma3_text")(IDS).logits
    torch.testing.assert_close(logits, torch.tanh(uncapped / 0.5) * 0.5)


def test_an_opt_model_with_a_projection_before_its_head_gives_its_own_logits() -> None:
    model = nano("opt", word_embed_proj_dim=16)
    stack = Stack(model)
    context = stack.context(IDS)
    assert torch.equal(stack.head(stack.run(context.h, 0, len(stack), context)), model(IDS).logits)


def test_hidden_is_what_the_head_reads() -> None:
    for name in ("llama", "gpt2", "opt", "gemma3_text"):
        model = nano(name)
        stack = Stack(model)
        assert torch.equal(stack.logits(stack.hidden(IDS)), model(IDS).logits)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    for name, (pointer, values) in before["tensors"].items():
        assert now["tensors"][name][0] == pointer and torch.equal(now["tensors"][name][1], values)
    for part in ("config", "modules", "attributes", "hooks"):
        assert now[part] == before[part], part


@pytest.mark.parametrize("name", NANO)
def test_nothing_in_the_caller_s_model_changes(name: str) -> None:
    model = nano(name)
    given = inputs(name, False)
    logits = model(**given).logits
    before = snapshot(model)
    stack = Stack(model)
    stack.head(stack.execute(stack.context(given), [1, 0, 1]))
    reference = ModelReference.of(stack)
    for drop in (["layers.1"], ["layers.0.attn", "layers.3.mlp"]):
        view = apply_static(stack, Plan(model=reference, drop=drop))
        view(**given)
        view.config.use_cache = False
        view.config.lamella = {"form": "native"}
    assert_untouched(model, before)
    assert "forward" not in {key for module in model.modules() for key in vars(module)}
    del view
    gc.collect()
    assert_untouched(model, before)
    assert torch.equal(model(**given).logits, logits)


def test_a_failing_forward_leaves_no_trace_in_the_stack() -> None:
    stack = Stack(nano("llama"))
    with pytest.raises(IndexError):
        stack.context(torch.full((1, 4), 1000))
    context = stack.context(IDS)
    assert torch.equal(stack.head(stack.run(context.h, 0, 4, context)), stack.model(IDS).logits)


def test_a_sharing_copy_shares_every_tensor_and_no_module() -> None:
    model = nano("gpt2")
    copied = share(model)
    for (name, ours), (_, theirs) in zip(copied.state_dict().items(), model.state_dict().items(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
    assert copied.config is not model.config
    assert copied.transformer.wte.weight is copied.lm_head.weight  # still tied
    alive = weakref.ref(copied)
    del copied
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("drop", [["layers.1.attn"], ["layers.0", "layers.2.mlp"]], ids=str)
def test_a_view_opened_as_a_stack_gives_the_view_s_logits(name: str, drop: list[str]) -> None:
    stack = Stack(nano(name))
    view = apply_static(stack, Plan(model=ModelReference.of(stack), drop=drop))
    given = inputs(name, name != "vit")
    expected = view(**given, **({} if name == "vit" else {"use_cache": False})).logits
    again = Stack(view)
    context = again.context(given)
    assert torch.equal(again.head(again.run(context.h, 0, len(again), context)), expected)


def test_an_unknown_architecture_is_named_with_the_way_to_add_it() -> None:
    with pytest.raises(ArchitectureError) as caught:
        Stack(MambaModel(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=32)))
    message = str(caught.value)
    assert "\n" not in message
    assert "unknown architecture 'mamba'" in message and "is not an attention followed by an MLP" in message
    assert "register_architecture(Architecture(name='mamba'" in message


def test_a_registered_family_is_found() -> None:
    config = copy.deepcopy(nano("llama").config)
    config.model_type = "mine"
    with pytest.raises(ArchitectureError):
        find_architecture(config)
    register_architecture(Architecture(**{**vars(ARCHITECTURES["llama"]), "name": "mine"}))
    try:
        assert find_architecture(config).name == "mine"
    finally:
        del ARCHITECTURES["mine"]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dinov2_is_its_sublayers_and_a_zeroed_scale_silences_one(kind: str, swiglu: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model(kind, mlp_ratio=2, use_swiglu_ffn=swiglu, **sizes)
    model = AutoModel.from_config(config).eval()
    randomise(model, 0)
    stack = Stack(model)
    context = stack.context({"pixel_values": IMAGES})
    assert torch.equal(stack.normed(stack.run(context.h, 0, 3, context)), model(IMAGES).last_hidden_state)
    plan = Plan(model=ModelReference.of(stack), drop=["layers.0.attn", "layers.1", "layers.2.mlp"])
    expected = apply_static(stack, plan)(IMAGES).last_hidden_state
    again = AutoModel.from_pretrained(export(stack, plan, tmp_path / "out", form="portable"))
    assert torch.equal(again(IMAGES).last_hidden_state, expected)


def test_what_is_no_model_with_a_head_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="give a transformers model"):
        Stack(nn.Linear(2, 2))
    with pytest.raises(ArchitectureError, match="open the model with its head"):
        Stack(LlamaModel(nano("llama").config))
    with pytest.raises(
        ArchitectureError, match="a Dinov2ForImageClassification has no `encoder`: open it as AutoModel"
    ):
        Stack(Dinov2ForImageClassification(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))


def test_non_finite_activations_are_named_by_site() -> None:
    stack = Stack(nano("llama"))
    bad = torch.full((1, 2, 32), float("nan"))
    with pytest.raises(NumericsError, match=r"after layers\.2\.mlp"):
        stack.check_finite((2, "mlp"), bad)
    stack.check_finite((2, "mlp"), torch.zeros(1, 2, 32))
