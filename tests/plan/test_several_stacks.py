"""Plans for models with several stacks: every named stack is applied, or refused in one line.

The reference is the transformers model itself: sublayers are disabled by hooks on the modules that write their result,
and dropped layers by hooks that return their input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lamella
from lamella.errors import ArchitectureError, PlanError
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference, compose
from lamella.plan.export import export, natural_form
from lamella.plan.weights import mask_edit, parameters_at, touched
from lamella.stack import Model, matrices
from lamella.zoo.nano import nano, nano_inputs

AUTO = {
    "llava": "AutoModelForImageTextToText",
    "qwen2_vl": "AutoModelForImageTextToText",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "ofa": "AutoModelForImageTextToText",
}
# By model and site: the module whose output is what the sublayer adds, and the norm behind the addition, if any.
WRITES = {
    "llava": {
        "vision.layers.1.attn": ["model.vision_tower.encoder.layers.1.self_attn"],
        "vision.layers.0.mlp": ["model.vision_tower.encoder.layers.0.mlp"],
        "text.layers.2.attn": ["model.language_model.layers.2.self_attn"],
    },
    "qwen2_vl": {
        "vision.layers.1.attn": ["model.visual.blocks.1.attn"],
        "vision.layers.0.mlp": ["model.visual.blocks.0.mlp"],
        "text.layers.2.mlp": ["model.language_model.layers.2.mlp"],
    },
    "t5": {
        "encoder.layers.1.mlp": ["encoder.block.1.layer.1.DenseReluDense"],
        "encoder.layers.0.attn": ["encoder.block.0.layer.0.SelfAttention"],
        "decoder.layers.0.attn": ["decoder.block.0.layer.0.SelfAttention"],
        "decoder.layers.2.cross": ["decoder.block.2.layer.1.EncDecAttention"],
        "decoder.layers.1.mlp": ["decoder.block.1.layer.2.DenseReluDense"],
    },
    "bart": {
        "encoder.layers.1.mlp": ["model.encoder.layers.1.fc2", "model.encoder.layers.1.final_layer_norm"],
        "decoder.layers.2.cross": [
            "model.decoder.layers.2.encoder_attn",
            "model.decoder.layers.2.encoder_attn_layer_norm",
        ],
        "decoder.layers.1.attn": ["model.decoder.layers.1.self_attn", "model.decoder.layers.1.self_attn_layer_norm"],
    },
    "whisper": {
        "encoder.layers.1.attn": ["model.encoder.layers.1.self_attn"],
        "decoder.layers.2.cross": ["model.decoder.layers.2.encoder_attn"],
        "decoder.layers.0.attn": ["model.decoder.layers.0.self_attn"],
    },
    "ofa": {
        "encoder.layers.1.attn": ["model.encoder.layers.1.self_attn_mid_layer_norm"],
        "encoder.layers.0.mlp": ["model.encoder.layers.0.fc2"],
        "decoder.layers.2.cross": ["model.decoder.layers.2.cross_attn_mid_layer_norm"],
        "decoder.layers.0.attn": ["model.decoder.layers.0.self_attn_mid_layer_norm"],
    },
}
# Expressible in a plain checkpoint: whole layers of both stacks, and transformers' names of their counts.
LAYERS = {
    "llava": (
        ["vision.layers.1", "text.layers.2"],
        {"vision_config.num_hidden_layers": 3, "text_config.num_hidden_layers": 3},
    ),
    "qwen2_vl": (["vision.layers.1", "text.layers.0"], {"vision_config.depth": 2, "text_config.num_hidden_layers": 3}),
    "t5": (["encoder.layers.1", "decoder.layers.2"], {"num_layers": 3, "num_decoder_layers": 2}),
    "bart": (["encoder.layers.0", "decoder.layers.1"], {"encoder_layers": 2, "decoder_layers": 3}),
    "whisper": (["encoder.layers.2", "decoder.layers.0"], {"encoder_layers": 2, "decoder_layers": 3}),
    "ofa": (["encoder.layers.0", "decoder.layers.1"], {"encoder_layers": 2, "decoder_layers": 3}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def opened(name: str) -> Model:
    return lamella.open(nano(name))


def dropping(model: Model, *sites: str) -> Plan:
    return Plan(model=ModelReference.of(model), drop=list(sites))


def zeros(module: nn.Module, args: Any, out: Any) -> Any:
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def passing(module: nn.Module, args: Any, out: Any) -> Any:
    return args[0]


@contextmanager
def silenced(model: nn.Module, name: str, sites: list[str]) -> Iterator[None]:
    hooks = []
    for site in sites:
        writes, *norm = WRITES[name][site]
        hooks.append(model.get_submodule(writes).register_forward_hook(zeros))
        hooks += [model.get_submodule(each).register_forward_hook(passing) for each in norm]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", WRITES)
def test_dropped_sublayers_of_every_stack_are_silent(name: str) -> None:
    model, given = opened(name), nano_inputs(name)
    sites = list(WRITES[name])
    for some in (sites, *([site] for site in sites)):
        with silenced(model.model, name, some):
            expected = model.model(**given, use_cache=False).logits
        view = lamella.apply(model, dropping(model, *some))
        found = view(**given, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, model.model(**given, use_cache=False).logits, atol=1e-4)


@pytest.mark.parametrize("name", WRITES)
def test_an_empty_plan_is_bit_exact_and_does_not_change_the_model(name: str) -> None:
    model, given = opened(name), nano_inputs(name)
    before = model.model(**given).logits
    view = lamella.apply(model, dropping(model))
    assert torch.equal(view(**given).logits, before)
    lamella.apply(model, dropping(model, *WRITES[name]))(**given)
    assert torch.equal(model.model(**given).logits, before)
    assert "forward" not in {key for module in model.model.modules() for key in vars(module)}


@pytest.mark.parametrize("name", WRITES)
def test_generation_with_a_cache_is_generation_without_one(name: str) -> None:
    model, given = opened(name), nano_inputs(name)
    view = lamella.apply(model, dropping(model, *WRITES[name]))
    prompt = {key: value for key, value in given.items() if not key.startswith("decoder_")}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": 99}
    cached = view.generate(**prompt, **options)
    assert torch.equal(cached, view.generate(**prompt, **options, use_cache=False))
    with silenced(model.model, name, list(WRITES[name])):
        assert torch.equal(cached, model.model.generate(**prompt, **options))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_a_cache_of_another_plan_is_refused(name: str) -> None:
    model, given = opened(name), nano_inputs(name)
    filled = model.model(**given, use_cache=True).cache
    view = lamella.apply(model, dropping(model, "decoder.layers.1.attn"))
    with pytest.raises(lamella.errors.CacheError, match="filled without this plan"):
        view(**given, cache=filled, use_cache=True)


@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers_leave_a_plain_checkpoint(name: str, tmp_path: Path) -> None:
    model, given = opened(name), nano_inputs(name)
    sites, numbers = LAYERS[name]
    plan = dropping(model, *sites)
    assert natural_form(plan, model) == "plain"
    export(model, plan, tmp_path / "out", form="plain")
    small = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(small(**given).logits, lamella.apply(model, plan)(**given).logits, rtol=1e-5, atol=1e-6)
    for path, number in numbers.items():
        config = small.config
        for part in path.split("."):
            config = getattr(config, part)
        assert config == number
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.model.parameters())
    again = lamella.open(tmp_path / "out")
    assert [len(stack) for stack in again.stacks.values()] == list(numbers.values())
    readme = (tmp_path / "out" / "README.md").read_text()
    loading = "import lamella" if name == "ofa" else f"{AUTO[name]}, AutoProcessor"  # transformers does not have OFA
    assert loading in readme


@pytest.mark.parametrize("name", WRITES)
def test_what_no_config_can_say_travels_as_a_plan(name: str, tmp_path: Path) -> None:
    model, given = opened(name), nano_inputs(name)
    plan = dropping(model, *WRITES[name])
    assert natural_form(plan, model) == "native"
    with pytest.raises(
        PlanError, match=r"^plain: no config can express that \w+\.layers\.\d lacks its .*; use --form native$"
    ):
        export(model, plan, tmp_path / "plain", form="plain")
    with pytest.raises(PlanError, match="portable: a model with several stacks is exported plain or native"):
        export(model, plan, tmp_path / "portable", form="portable")
    export(model, plan, tmp_path / "out", form="native")
    loaded = lamella.load(tmp_path / "out")
    assert torch.equal(loaded.model(**given).logits, lamella.apply(model, plan)(**given).logits)
    whole = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(whole(**given).logits, model.model(**given).logits)  # without Lamella, the whole model


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("t5", "encoder.layers.0", "encoder.layers.0 computes the position bias of all layers, so it must stay"),
        ("t5", "decoder.layers.0", "decoder.layers.0 computes the position bias"),
        (
            "llava",
            "vision.layers.3",
            "vision.layers.3 is counted by the config to locate the states that the language model reads",
        ),
    ],
)
def test_layers_that_a_plain_checkpoint_counts_on_stay(name: str, site: str, reason: str, tmp_path: Path) -> None:
    model, given = opened(name), nano_inputs(name)
    plan = dropping(model, site)
    assert natural_form(plan, model) == "native"
    with pytest.raises(PlanError) as error:
        export(model, plan, tmp_path / "out", form="plain")
    assert reason in str(error.value) and "--form native" in str(error.value) and "\n" not in str(error.value)
    lamella.apply(model, plan)(**given)  # as a view, it may go


@pytest.mark.parametrize(("selected", "counted"), [(-1, set()), (-2, {3}), (1, {0}), ([-3, 1], {0, 2, 3})])
def test_a_vision_tower_may_lose_the_layers_that_its_config_does_not_count(selected: Any, counted: set[int]) -> None:
    model = lamella.open(nano("llava", vision_feature_layer=selected))
    for layer in range(4):
        form = natural_form(dropping(model, f"vision.layers.{layer}"), model)
        assert form == ("native" if layer in counted else "plain"), layer


def test_the_bias_of_a_dropped_first_layer_is_still_that_of_the_others() -> None:
    model, given = opened("t5"), nano_inputs("t5")
    hooks = [
        model.model.encoder.block[0].layer[0].SelfAttention.register_forward_hook(zeros),
        model.model.encoder.block[0].layer[1].DenseReluDense.register_forward_hook(zeros),
    ]
    expected = model.model(**given).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(lamella.apply(model, dropping(model, "encoder.layers.0"))(**given).logits, expected)


# What a plan says


def test_sites_name_their_stack_where_there_are_several() -> None:
    model = opened("bart")
    with pytest.raises(ValueError, match=r"'layers\.1' names no stack; write encoder\.layers\.1 or decoder\.layers\.1"):
        dropping(model, "layers.1")
    with pytest.raises(ValueError, match=r"'layers\.1\.cross' is not a site; write layers\.7, layers\.7\.attn or"):
        dropping(model, "encoder.layers.1.cross")
    with pytest.raises(ValueError, match="out of range: the stack has the layers 0 to 2"):
        dropping(model, "encoder.layers.3")
    plan = dropping(model, "decoder.layers.1.cross", "encoder.layers.0")
    assert plan.chain("decoder").dropped == {(1, "cross")} and plan.chain("encoder").skipped == {
        (0, "attn"),
        (0, "mlp"),
    }
    assert plan.removed == 3
    with pytest.raises(PlanError, match="has the stacks encoder and decoder: name one of them"):
        _ = plan.skipped


def test_a_plan_of_one_stack_speaks_of_that_stack() -> None:
    decoder = opened("bart").stacks["decoder"]
    plan = Plan(model=ModelReference.of(decoder), drop=["layers.1.cross", "encoder.layers.0"])
    assert plan.skipped == {(1, "cross")} and plan.chain("encoder").skipped == {(0, "attn"), (0, "mlp")}
    given = nano_inputs("bart")
    model = opened("bart")
    expected = lamella.apply(model, dropping(model, "decoder.layers.1.cross", "encoder.layers.0"))(**given).logits
    for one in (decoder, model, model.stacks["encoder"]):
        assert torch.equal(lamella.apply(one, Plan.parse(plan.dump()))(**given).logits, expected)


def test_plans_for_several_stacks_survive_json_and_compose() -> None:
    model = opened("whisper")
    first, second = (
        dropping(model, "encoder.layers.1.mlp", "decoder.layers.2"),
        dropping(model, "encoder.layers.1.attn"),
    )
    assert Plan.parse(first.dump()) == first
    document = json.loads(first.dump())
    assert document["model"]["stacks"]["decoder"]["sublayers"] == ["attn", "cross", "mlp"]
    assert compose(first, second).drop == ["encoder.layers.1", "decoder.layers.2"]
    assert first.digest != second.digest


def test_a_stack_that_is_not_there_is_refused_wherever_it_is_named() -> None:
    model = opened("llava")
    reference, path = ModelReference.of(model), PhasedPath(prefill=[0], decode=[0])
    policy = PolicyReference(name="void")
    for wrong in ({"path": {"decoder": path}}, {"policies": {"decoder": policy}}):
        with pytest.raises(ValueError, match="there is no stack 'decoder'; the model has 'vision' and 'text'"):
            Plan(model=reference, **wrong)
    with pytest.raises(ValueError, match="names no stack"):
        Plan(model=reference, drop=["decoder.layers.0"])
    with pytest.raises(ValueError, match="vision of a model with several stacks cannot be cut in width"):
        Plan(model=reference, width={"vision.layers.0.mlp.channels": [0]})


def test_a_plan_for_another_assembly_is_refused() -> None:
    plan = dropping(opened("bart"), "decoder.layers.0")
    with pytest.raises(PlanError, match=r"is for a bart of 3 layers and a bart of 4 layers .*, but .* is a t5 of 4"):
        lamella.apply(opened("t5"), plan)
    with pytest.raises(PlanError, match="is for a bart of 3 layers and"):
        lamella.apply(lamella.open(nano("llama")), plan)


@pytest.mark.parametrize(("name", "stack"), [("bart", "decoder"), ("t5", "encoder"), ("llava", "vision")])
def test_layers_that_cannot_be_moved_are_refused(name: str, stack: str) -> None:
    model = opened(name)
    path = {stack: PhasedPath(prefill=[0, 1, 1, 2], decode=[0, 1, 1, 2])}
    with pytest.raises(PlanError, match=rf"^path\.{stack}: the layers of this {stack} run once and in their order"):
        lamella.apply(model, Plan(model=ModelReference.of(model), path=path))


def test_the_text_of_a_model_with_images_can_be_repeated() -> None:
    model, given = opened("llava"), nano_inputs("llava")
    path = {"text": PhasedPath(prefill=[0, 1, 1, 3], decode=[0, 1, 1, 3])}
    found = lamella.apply(model, Plan(model=ModelReference.of(model), path=path))(**given, use_cache=False).logits
    text = model.stacks["text"]
    context = text.context(given)
    assert torch.equal(found, text.head(text.execute(context, [0, 1, 1, 3])))


def test_text_behind_images_may_skip_layers_while_it_is_generated() -> None:
    """As a loop without a cache, over what every token would have run."""
    model, given = opened("llava"), nano_inputs("llava")
    decode = [0, 3]
    path = {"text": PhasedPath(prefill=[0, 1, 2, 3], decode=decode)}
    plan = Plan(model=ModelReference.of(model), path=path, drop=["vision.layers.0.mlp"])
    view = lamella.apply(model, plan)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    ids = view.generate(**given, **options)
    length = given["input_ids"].shape[1]
    whole = {**given, "input_ids": ids}
    logits = lamella.parallel(view, ids, torch.full((2,), length), pixel_values=given["pixel_values"]).logits
    assert torch.equal(logits[:, length - 1 : -1].argmax(-1), ids[:, length:])
    static = lamella.apply(model, Plan(model=ModelReference.of(model), drop=["vision.layers.0.mlp"]))
    assert torch.equal(static(**whole, use_cache=False).logits[:, :length], logits[:, :length])


def test_a_decoder_that_reads_an_encoder_is_no_matter_of_policies_that_do_not_say_so() -> None:
    model = opened("whisper")
    policies = {"decoder": PolicyReference(name="first")}
    with pytest.raises(PlanError, match="reads an encoder, which this policy does not support: use a path"):
        lamella.apply(model, Plan(model=ModelReference.of(model), policies=policies))


# Weights


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_has_a_site_and_every_site_its_parameters(name: str) -> None:
    model = opened(name)
    names = [each for each, _ in model.model.named_parameters()]
    sites = touched(model, names)
    assert set(parameters_at(model, sites)) == set(names)
    for stack, opened_stack in model.stacks.items():
        inside = parameters_at(model, [f"{stack}.layers.1"])
        assert inside and all(each.startswith(f"{opened_stack.architecture.prefix}1.") for each in inside)
        single = [f"{stack}.layers.1.{sublayer}" for sublayer in opened_stack.architecture.names]
        assert touched(model, parameters_at(model, single)) == [f"{stack}.layers.1"]
        assert sorted(parameters_at(model, single)) == sorted(inside)


def test_masks_reach_a_stack_of_several(tmp_path: Path) -> None:
    model, given = opened("llava"), nano_inputs("llava")
    name = "model.vision_tower.encoder.layers.1.mlp.fc1.weight"
    weight: Tensor = matrices(model.model)[name].of(model.model)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    edit = mask_edit(model, {name: keep}, tmp_path)
    assert edit.sites == ["vision.layers.1.mlp"]
    view = lamella.apply(model, Plan(model=ModelReference.of(model), weights=[edit]))
    other = nano("llava")
    other.get_parameter(name).data *= keep
    assert torch.equal(view(**given).logits, other(**given).logits)


# What it costs, and how close it stays


def test_parameters_are_counted_over_all_stacks(tmp_path: Path) -> None:
    model = opened("llava")
    text, (sites, _) = model.stacks["text"], LAYERS["llava"]
    whole, small = lamella.cost(text), lamella.cost(text, dropping(model, *sites))
    assert whole.parameters == sum(p.numel() for p in model.model.parameters())
    export(model, dropping(model, *sites), tmp_path / "out")
    exported = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert small.parameters == sum(p.numel() for p in exported.parameters())
    assert whole.sublayers == 8 and small.sublayers == 6 and small.macs < whole.macs
    for stack in (model.stacks["vision"], opened("bart").stacks["decoder"]):
        with pytest.raises(ArchitectureError, match="does not generate by itself"):
            lamella.cost(stack)


def test_fidelity_is_that_of_the_text_of_a_model_with_images() -> None:
    model = opened("llava")
    tokens = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    test = lamella.FidelityTest(model, tokens)
    assert test.of(lamella.apply(model, dropping(model, "vision.layers.0"))).kl.mean == pytest.approx(0, abs=1e-7)
    plan = dropping(model, "text.layers.1")
    found = test.of(lamella.apply(model, plan))
    p, q = (m(tokens).logits[:, 2:-1].double().log_softmax(-1) for m in (model.model, lamella.apply(model, plan)))
    assert found.kl.mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    with pytest.raises(ArchitectureError, match="does not continue text by itself"):
        lamella.FidelityTest(opened("t5"), tokens)


@pytest.mark.parametrize("method", ["random", "shortgpt", "ffn-skip", "unified-skip"])
def test_planners_of_decoders_plan_the_text_of_a_model_with_images(method: str) -> None:
    model, given = opened("llava"), nano_inputs("llava")
    tokens = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    series = lamella.make_plan(method, model.stacks["text"], tokens)
    assert series.model.stack == "text" and not series[0].removed
    view = lamella.apply(model, series[-1])
    assert series[-1].removed > 0 and series[-1].chain("vision").skipped == set()
    assert view.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[0] == 2
