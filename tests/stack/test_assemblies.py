"""Models with several stacks: each is bit-identical to its part of the model, with and without a cache.

Everything is compared with the transformers classes: hooks record the inputs and outputs of their layers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import lamella
from lamella.errors import ArchitectureError
from lamella.stack import Context, Model, Stack, join, open_model
from lamella.zoo import open_stack
from lamella.zoo.nano import NANO_ASSEMBLIES, nano, nano_inputs, randomise

# Where each model keeps its stacks, as its own class says: by stack the layers and their sublayers.
STACKS = {
    "llava": {
        "vision": ("model.vision_tower.encoder.layers", ["attn", "mlp"]),
        "text": ("model.language_model.layers", ["attn", "mlp"]),
    },
    "qwen2_vl": {"vision": ("model.visual.blocks", ["attn", "mlp"]),
                 "text": ("model.language_model.layers", ["attn", "mlp"])},
    "t5": {"encoder": ("encoder.block", ["attn", "mlp"]), "decoder": ("decoder.block", ["attn", "cross", "mlp"])},
    "bart": {"encoder": ("model.encoder.layers", ["attn", "mlp"]),
             "decoder": ("model.decoder.layers", ["attn", "cross", "mlp"])},
    "mbart": {"encoder": ("model.encoder.layers", ["attn", "mlp"]),
              "decoder": ("model.decoder.layers", ["attn", "cross", "mlp"])},
    "whisper": {"encoder": ("model.encoder.layers", ["attn", "mlp"]),
                "decoder": ("model.decoder.layers", ["attn", "cross", "mlp"])},
    **{name: {"encoder": (f"model.language_model.encoder.{layers}", ["attn", "mlp"]),
              "decoder": (f"model.language_model.decoder.{layers}", ["attn", "cross", "mlp"])}
       for name, layers in {"florence2": "layers", "patch_bart": "layers", "patch_mbart": "layers",
                            "patch_t5": "block"}.items()},
    "ofa": {"encoder": ("model.encoder.layers", ["attn", "mlp"]),
            "decoder": ("model.decoder.layers", ["attn", "cross", "mlp"])},
}  # fmt: skip
CASES = [(name, stack) for name, stacks in STACKS.items() for stack in stacks]
CACHED = [(name, stack) for name, stack in CASES if stack in ("text", "decoder")]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def noted(model: nn.Module, path: str, given: dict[str, Any], **options: Any) -> tuple[list, list, Any]:
    """Arguments (with the cache as it was) and outputs of every layer in a run of the model, and its output."""
    calls: list[Any] = []
    outs: list[Tensor] = []
    hooks = []
    for layer in model.get_submodule(path):
        hooks.append(
            layer.register_forward_pre_hook(lambda _, a, k: calls.append(copy.deepcopy((a, k))), with_kwargs=True)
        )
        hooks.append(
            layer.register_forward_hook(lambda _, a, out: outs.append(out[0] if isinstance(out, tuple) else out))
        )
    output = model(**given, **options)
    for hook in hooks:
        hook.remove()
    return calls, outs, output


def by_name(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    import inspect

    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    return call.pop("hidden_states"), call


@pytest.mark.parametrize("name", STACKS)
def test_the_stacks_are_named_in_the_order_in_which_they_run(name: str) -> None:
    model = lamella.open(nano(name))
    assert isinstance(model, Model) and not isinstance(model, Stack)
    assert list(model.stacks) == list(STACKS[name])
    for stack, (path, sublayers) in STACKS[name].items():
        opened = model.stacks[stack]
        layers = model.model.get_submodule(path)
        assert opened.layers is layers and opened.stack == stack
        assert list(opened.positions) == [(layer, kind) for layer in range(len(layers)) for kind in sublayers]


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_the_sublayers_compose_to_every_layer_bit_exactly(name: str, stack: str) -> None:
    model, given = nano(name), nano_inputs(name)
    calls, outs, _ = noted(model, STACKS[name][stack][0], given, use_cache=False)
    opened = open_model(model).stacks[stack]
    layers = [by_name(layer, *call) for layer, call in zip(opened.layers, calls, strict=True)]
    noted_by_hand = Context(layers[0][0], tuple(call for _, call in layers), torch.empty(0))
    for index, (h, _) in enumerate(layers):
        assert torch.equal(join(opened.run(h, index, index + 1, noted_by_hand)), outs[index])


@pytest.mark.parametrize(("name", "stack"), CACHED)
def test_they_do_so_with_a_cache(name: str, stack: str) -> None:
    """Of a continuation by one token, behind all but the last of the row."""
    model, given = nano(name), nano_inputs(name)
    words = "decoder_input_ids" if stack == "decoder" else "input_ids"
    last = given[words][:, -1:]
    first = model(**{**given, words: given[words][:, :-1]} | _marks(given), use_cache=True)
    more: dict[str, Any] = {words: last, "cache": first.cache, "use_cache": True}
    if stack == "decoder":
        more |= {
            "encoder_outputs": first.get("encoder_outputs")
            or BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state),
            **{k: v for k, v in given.items() if k == "attention_mask"},
        }
    calls, outs, _ = noted(model, STACKS[name][stack][0], more)
    opened = open_model(model).stacks[stack]
    layers = [by_name(layer, *call) for layer, call in zip(opened.layers, calls, strict=True)]
    assert all(call["cache"].get_seq_length() == given[words].shape[1] - 1 for _, call in layers[:1])
    noted_by_hand = Context(layers[0][0], tuple(call for _, call in layers), torch.empty(0))
    for index, (h, _) in enumerate(layers):
        assert torch.equal(join(opened.run(h, index, index + 1, noted_by_hand)), outs[index])


def _marks(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name][:, :-1] for name in ("mm_token_type_ids",) if name in given}


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_context_run_and_head_give_the_output_of_the_model_bit_exactly(name: str, stack: str) -> None:
    model, given = nano(name), nano_inputs(name)
    calls, outs, output = noted(model, STACKS[name][stack][0], given, use_cache=False)
    opened = open_model(model).stacks[stack]
    context = opened.context(given)
    assert torch.equal(context.h, by_name(opened.layers[0], *calls[0])[0])
    streams = dict(opened.walk(context.h, 0, len(opened), context))
    for index, out in enumerate(outs):
        assert torch.equal(streams[index, "mlp"], out)
    last = streams[opened.positions[-1]]
    if stack in ("text", "decoder"):
        expected = output.logits
    elif stack == "encoder":
        expected = output.encoder_last_hidden_state
    else:
        images = {key: given[key] for key in ("pixel_values", "image_grid_thw") if key in given}
        expected = torch.cat(list(model.model.get_image_features(**images, return_dict=True).pooler_output))
        if name == "llava":  # its language model reads the hidden states before the last layer, without the class token
            last = opened.run(context.h, 0, len(opened) - 1, context)
    found = opened.head(last)
    assert torch.equal(found.flatten(0, 1) if found.ndim > expected.ndim else found, expected)


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_skipped_sublayers_do_not_change_the_hidden_states_and_a_restart_equals_the_whole_run(
    name: str, stack: str
) -> None:
    opened = open_model(nano(name)).stacks[stack]
    context = opened.context(nano_inputs(name))
    assert torch.equal(opened.run(context.h, 0, len(opened), context, skip=opened.positions), context.h)
    before = {opened.positions[0]: context.h}
    before |= {opened.after(at): h for at, h in opened.walk(context.h, 0, len(opened), context)}
    for point, h in before.items():
        assert torch.equal(opened.run(h, point, len(opened), context), before[opened.end])


def test_positions_are_distinguished_by_modality() -> None:
    given = nano_inputs("llava")
    vision, text = open_model(nano("llava")).stacks.values()
    seen = text.context(given).modalities
    assert torch.equal(seen["image"], given["input_ids"] == 127)
    assert torch.equal(seen["text"], given["input_ids"] != 127)
    assert list(vision.context(given).modalities) == ["image"]
    encoder, decoder = open_model(nano("whisper")).stacks.values()
    assert list(encoder.context(nano_inputs("whisper")).modalities) == ["audio"]
    assert list(decoder.context(nano_inputs("whisper")).modalities) == ["text"]
    given = nano_inputs("patch_bart")
    encoder, decoder = open_model(nano("patch_bart")).stacks.values()
    seen, real = encoder.context(given).modalities, given["attention_mask"].bool()
    assert torch.equal(seen["image"], given["input_ids"] == 127)
    assert torch.equal(seen["text"], (given["input_ids"] != 127) & real) and not real.all()
    assert list(decoder.context(given).modalities) == ["text"]
    plain = Stack(nano("llama")).context(nano_inputs("llama"))
    assert torch.equal(plain.modalities["text"], plain.real) and not plain.real.all()


def test_padding_is_that_of_the_stack_s_own_inputs() -> None:
    given = nano_inputs("bart") | {"decoder_attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    encoder, decoder = open_model(nano("bart")).stacks.values()
    assert torch.equal(encoder.context(given).real, given["attention_mask"].bool())
    assert torch.equal(decoder.context(given).real, given["decoder_attention_mask"].bool())


@pytest.mark.parametrize("name", [name for name in STACKS if "encoder" in STACKS[name]])
def test_the_final_states_of_an_encoder_are_its_own(name: str) -> None:
    model, given = nano(name), nano_inputs(name)
    encoder = open_model(model).stacks["encoder"]
    read = {key: each for key, each in given.items() if not key.startswith("decoder_") or encoder.architecture.images}
    assert torch.equal(encoder.hidden(read), model(**given).encoder_last_hidden_state)


def test_text_alone_reaches_the_text_of_a_model_with_images_and_not_its_vision() -> None:
    model = nano("llava")
    vision, text = open_model(model).stacks.values()
    ids = {"input_ids": torch.randint(3, 120, (2, 8), generator=torch.Generator().manual_seed(3))}
    context = text.context(ids)
    assert torch.equal(text.head(text.run(context.h, 0, len(text), context)), model(**ids).logits)
    with pytest.raises(ArchitectureError, match="do not reach the vision"):
        vision.context(ids)


@pytest.mark.parametrize("name", STACKS)
def test_where_one_stack_is_wanted_it_must_be_named(name: str) -> None:
    model = nano(name)
    first, second = STACKS[name]
    with pytest.raises(ArchitectureError, match=f"has the stacks {first} and {second}: choose one") as error:
        open_stack(model)
    assert "\n" not in str(error.value)
    assert open_stack(model, stack=second).stack == second
    with pytest.raises(ArchitectureError, match=f"has no stack 'middle': it has {first} and {second}"):
        open_stack(model, stack="middle")


def test_a_model_with_one_stack_stands_for_it() -> None:
    stack = lamella.open(nano("llama"))
    assert isinstance(stack, Stack) and dict(stack.stacks) == {"text": stack}
    assert open_stack(stack) is stack and open_stack(stack.model, stack="text").stack == "text"
    assert dict(lamella.open(nano("vit")).stacks).keys() == {"vision"}


def test_every_nano_model_with_several_stacks_is_tested() -> None:
    assert set(STACKS) == set(NANO_ASSEMBLIES)


@pytest.mark.parametrize("name", STACKS)
def test_they_are_opened_from_a_folder(name: str, tmp_path: Any) -> None:
    model, given = nano(name), nano_inputs(name)
    model.save_pretrained(tmp_path / name)
    opened = lamella.open(tmp_path / name)
    assert list(opened.stacks) == list(STACKS[name])
    assert torch.equal(opened.model(**given).logits, model(**given).logits)


MORE = {"max_position_embeddings": 64, "decoder_start_token_id": 2}
ALIKE = {  # types that are another one under a name of their own: their class, that one, what of its config differs
    "mt5": ("MT5ForConditionalGeneration", "t5", {}),
    "marian": ("MarianMTModel", "bart", MORE),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", "bart", MORE),
    "plbart": ("PLBartForConditionalGeneration", "bart", MORE),
    "pegasus": ("PegasusForConditionalGeneration", "mbart", MORE),
    "blenderbot": ("BlenderbotForConditionalGeneration", "mbart", MORE),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_type_that_is_another_one_under_its_own_name_gives_its_logits(name: str) -> None:
    class_name, like, settings = ALIKE[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**{**NANO_ASSEMBLIES[like][1], **settings})).eval()
    randomise(model, 0)
    given = nano_inputs(like)
    output = model(**given, use_cache=False)
    encoder, decoder = open_model(model).stacks.values()
    for stack, expected in ((encoder, output.encoder_last_hidden_state), (decoder, output.logits)):
        context = stack.context(given)
        assert torch.equal(stack.head(stack.run(context.h, 0, len(stack), context)), expected)


def test_the_decoder_of_a_model_with_several_stacks_opens_alone() -> None:
    config = transformers.BartConfig(**{**NANO_ASSEMBLIES["bart"][1], "decoder_layers": 3})  # as many as its cache has
    stack = lamella.open(transformers.BartForCausalLM(config).eval())
    assert isinstance(stack, Stack) and stack.architecture.names == ("attn", "mlp")
