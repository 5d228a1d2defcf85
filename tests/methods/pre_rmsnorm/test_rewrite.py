"""The rewritten model computes what the original does, to rounding, in every family and form."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from pre_ln import FAMILIES, TEXT, built, error, inputs, written
from torch import nn

from lamella.errors import MethodError, PlanError
from lamella.methods.pre_rmsnorm.checking import means, output
from lamella.methods.pre_rmsnorm.rewrite import CRMSNorm, Form, RMSNorm, WideCRMSNorm, find_branches
from lamella.plan import RewriteReference
from lamella.plan.rewriting import wirings_of, with_rewrite
from lamella.stack import Model, open_model
from lamella.zoo.nano import nano

SLUG = "pre-rmsnorm"
FORMS = (
    Form(),
    Form(fold="bias"),
    Form(tied="untie"),
    Form(fold="affine", tied="untie"),
    Form(norm="crms", fold="affine", tied="untie"),
)


def swapped(model: Model) -> Any:
    """The mistake that the method exists to avoid: RMSNorm in the place of LayerNorm, and nothing recentred."""
    naive = copy.deepcopy(model.model)
    for branch in find_branches(naive, wirings_of(model.architectures)):
        for norm in branch.norms:
            old = norm.module
            naive.set_submodule(norm.path, RMSNorm(old.normalized_shape[0], old.eps, old.weight, old.bias))
    return naive


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(vars(form).values()))
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_the_same_in_float64_whatever_the_offset_of_the_embedding(name: str, form: Form) -> None:
    model, given = built(name, offset=30.0), inputs(name)
    before = copy.deepcopy(model.model.state_dict())
    size = float(output(model.model, given).detach().abs().max())
    ours = error(model.model, written(model, form), given)
    assert ours <= 1e-10 * max(size, 1)
    assert error(model.model, swapped(model), given) > 100 * max(ours, 1e-12)
    assert all(torch.equal(each, before[key]) for key, each in model.model.state_dict().items())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(vars(form).values()))
@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_in_float32_it_is_as_far_from_the_truth_as_rounding(name: str, form: Form) -> None:
    model, given = built(name), inputs(name)
    truth = output(model.model, given)
    single = open_model(copy.deepcopy(model.model).float())
    found = output(written(single, form), given).double()
    assert float((found - truth).abs().max()) <= 1e-4 * float(truth.abs().max())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(vars(form).values()))
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "vit", "dinov2"])
@torch.no_grad()
def test_in_bfloat16_it_is_as_far_from_the_truth_as_the_original(name: str, form: Form) -> None:
    model, given = built(name), inputs(name)
    truth = output(model.model, given)
    half = {key: each.bfloat16() if each.is_floating_point() else each for key, each in given.items()}
    theirs, ours = (
        float((output(copy.deepcopy(each).bfloat16(), half).double() - truth).square().mean().sqrt())
        for each in (model.model, written(model, form))
    )
    assert 0 < ours < 2 * theirs


def test_two_lookups_in_one_table_are_both_recentred() -> None:
    model, given = built("gpt2", offset=30.0), inputs("gpt2")
    given["token_type_ids"] = given["input_ids"].flip(1)
    for form in FORMS:
        assert error(model.model, written(model, form), given) < 1e-9


def test_crms_gives_the_first_entries_of_what_rms_gives() -> None:
    x = torch.randn(5, 9, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    by_hand = x / torch.sqrt((x**2).sum(-1, keepdim=True) / 9 + 1e-5)
    layer = nn.LayerNorm(9, eps=1e-5, dtype=torch.float64)
    assert torch.allclose(layer(x + 7), by_hand, atol=1e-14)
    assert torch.allclose(RMSNorm(9, 1e-5, None, None)(x), by_hand, atol=1e-14)
    assert torch.allclose(CRMSNorm(8, 1e-5)(x[:, :-1]), by_hand[:, :-1], atol=1e-14)
    assert torch.allclose(WideCRMSNorm(8, 1e-5, layer.weight, layer.bias)(x[:, :-1]), layer(x), atol=1e-14)


def test_crms_sums_in_float32_what_is_given_in_half_precision() -> None:
    u = torch.randn(4, 4095, dtype=torch.float64)
    u[:, 0] += 100  # then the entry that is not there matters
    exact = CRMSNorm(4095, 1e-5)(u.bfloat16().double())
    found = CRMSNorm(4095, 1e-5)(u.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_of_it_is_given_a_mean(name: str) -> None:
    model, given = built(name, offset=30.0), inputs(name)
    after = means(open_model(written(model, Form())), given)
    assert all(each < 1e-12 for layers in after.values() for each in layers)
    assert all(each > 1e-4 for layers in means(model, given).values() for each in layers)


@pytest.mark.parametrize("name", TEXT)
def test_it_decodes_the_same_tokens_and_resumes_from_a_cache_of_the_original(name: str) -> None:
    model, given = built(name), inputs(name)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.model.generate(**given, **options)
    for form in FORMS:
        view = written(model, form)
        assert torch.equal(view.generate(**given, **options), expected)
        ids = expected[1:, :12]
        cache = model.model(ids[:, :8], use_cache=True).cache
        continued = view(ids[:, 8:], cache=cache, use_cache=True).logits
        assert torch.allclose(continued, model.model(ids).logits[:, 8:], atol=1e-9)


def test_each_form_has_exactly_the_parameters_that_it_must_have() -> None:
    model = built("gpt2")
    d, layers, vocabulary, positions = 32, 4, 128, 256

    def count(form: Form) -> int:
        return sum(each.numel() for each in written(model, form).parameters())

    whole = count(Form())
    assert whole == sum(each.numel() for each in model.model.parameters())
    assert count(Form(tied="untie")) == whole + vocabulary * d
    gains = biases = (2 * layers + 1) * d
    assert count(Form(fold="bias")) == whole - biases + vocabulary  # the head gets a bias
    assert count(Form(fold="affine", tied="untie")) == whole + vocabulary * d - gains - biases + vocabulary
    columns = layers * (3 * d + (d + 1) + 4 * d + (4 * d + 1)) + 2 * vocabulary + positions  # each one entry narrower
    narrower = count(Form(norm="crms", fold="affine", tied="untie"))
    assert narrower == count(Form(fold="affine", tied="untie")) - columns


def test_a_tied_head_stays_tied_when_what_is_looked_up_is_recentred() -> None:
    view = written(built("gpt2"), Form())
    assert view.lm_head.weight is view.transformer.wte.weight and view.config.tie_word_embeddings
    apart = written(built("gpt2"), Form(tied="untie"))
    assert apart.lm_head.weight is not apart.transformer.wte.weight and not apart.config.tie_word_embeddings


def test_a_folded_bias_makes_a_bias_where_there_was_none() -> None:
    model, given = built("opt", enable_bias=False), inputs("opt")
    view = written(model, Form(fold="bias"))
    assert view.model.decoder.layers[0].self_attn.q_proj.bias is not None
    assert error(model.model, view, given) < 1e-10


def test_norms_without_affine_have_nothing_to_fold() -> None:
    model, given = built("opt", layer_norm_elementwise_affine=False), inputs("opt")
    for form in FORMS:
        assert error(model.model, written(model, form), given) < 1e-10


def test_norms_that_are_not_on_the_residual_stream_stay() -> None:
    bloom, clip = written(built("bloom"), Form()), written(built("clip"), Form())
    assert type(bloom.transformer.word_embeddings_layernorm) is nn.LayerNorm
    assert type(clip.pre_layrnorm) is nn.LayerNorm
    assert isinstance(clip.post_layernorm, RMSNorm)


def refused(model: Model, form: Form = FORMS[0]) -> str:
    with pytest.raises((PlanError, MethodError)) as found:
        written(model, form)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_writer_that_is_not_linear_is_refused_by_name() -> None:
    model = built("gpt2")
    model.model.transformer.h[1].mlp.c_proj = nn.LayerNorm(32)
    message = refused(model)
    assert "transformer.h.1.mlp.c_proj writes to the residual stream and is a LayerNorm, which is not linear" in message


def test_parts_that_nothing_is_known_of_are_refused_by_name() -> None:
    model = built("gpt2")
    model.model.transformer.h[2].attn.scale = nn.Parameter(torch.ones(32))
    assert "it is not known what transformer.h.2.attn.scale reads or writes" in refused(model)
    assert "it is not known what transformer.h.0.crossattention" in refused(built("gpt2", add_cross_attention=True))
    assert "it is not known what encoder.layer.0.mlp.gate_proj" in refused(built("dinov2", use_swiglu_ffn=True))


def test_an_adapter_on_a_writer_is_refused_until_it_is_merged() -> None:
    config = peft.LoraConfig(target_modules=["c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    tuned = peft.get_peft_model(built("gpt2").model, config)
    message = refused(open_model(tuned.get_base_model()))
    assert "attn.c_proj.base_layer.weight reads or writes: merge or remove it first" in message
    merged = open_model(tuned.merge_and_unload())
    assert error(merged.model, written(merged, FORMS[0]), inputs("gpt2")) < 1e-10


@torch.no_grad()
def test_a_vector_that_scales_what_is_added_is_folded_before_it_is_recentred() -> None:
    model, given = built("dinov2"), inputs("dinov2")
    view = written(model, FORMS[0])
    layer, ours = model.model.encoder.layer[1], view.encoder.layer[1]
    by_hand = layer.layer_scale2.lambda1[:, None] * layer.mlp.fc2.weight
    assert torch.allclose(ours.mlp.fc2.weight, by_hand - by_hand.mean(0), atol=1e-14)
    assert type(ours.layer_scale2) is nn.Identity and isinstance(layer.layer_scale2.lambda1, nn.Parameter)
    outside = copy.deepcopy(view)  # the mistake: recentred with the vector left outside
    for before, after in zip(model.model.encoder.layer, outside.encoder.layer, strict=True):
        after.mlp.fc2.weight.copy_(before.mlp.fc2.weight - before.mlp.fc2.weight.mean(0))
        after.mlp.fc2.bias.copy_(before.mlp.fc2.bias - before.mlp.fc2.bias.mean())
        after.layer_scale2 = before.layer_scale2
    assert error(model.model, view, given) < 1e-10 < 1e-4 < error(model.model, outside, given)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(vars(form).values()))
@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_every_state_of_an_image_is_the_same_pooled_in_any_way_masked_or_of_another_size(name: str, form: Form) -> None:
    model = built(name)
    view, masked = written(model, form), torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    given = {"pixel_values": torch.randn(2, 3, 20, 24, dtype=torch.float64), "bool_masked_pos": masked}
    before, after = model.model(**given).last_hidden_state, view(**given).last_hidden_state
    # positions of another size of image are interpolated in float32, whatever the model's own precision
    assert torch.allclose(after, before, atol=1e-5) and torch.allclose(after.mean(1), before.mean(1), atol=1e-5)
    unmasked = given["pixel_values"][..., :16, :16]
    assert torch.allclose(view(unmasked)[0], model.model(unmasked)[0], atol=1e-10)


def test_a_constant_that_a_config_leaves_out_writes_nothing() -> None:
    model, given = built("dinov2", use_mask_token=False), inputs("dinov2")
    assert error(model.model, written(model, FORMS[0]), given) < 1e-10


def test_a_norm_that_a_config_leaves_out_is_refused() -> None:
    assert "there is no model.decoder.final_layer_norm" in refused(built("opt", _remove_final_layer_norm=True))


def test_a_tied_head_would_be_scaled_twice() -> None:
    with pytest.raises(ValueError, match="a tied head would be scaled twice"):
        Form(fold="affine")
    with pytest.raises(ValueError, match="a CRMSNorm has no gain and no bias"):
        Form(norm="crms", tied="untie")
    message = {"norm": "rms", "fold": "affine", "tied": "recentre"}
    with pytest.raises(PlanError, match="a tied head would be scaled twice") as found:
        with_rewrite(built("gpt2"), RewriteReference(name=SLUG, params=message))
    assert "\n" not in str(found.value)


def test_two_writers_that_are_one_tensor_are_refused() -> None:
    model = built("gpt_neox")
    layers = model.model.gpt_neox.layers
    layers[1].mlp.dense_h_to_4h.weight = layers[0].mlp.dense_h_to_4h.weight
    assert "are one tensor, which would change for both" in refused(model, FORMS[3])


def test_a_method_that_rewrites_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="finercut is a method that does not rewrite models"):
        with_rewrite(built("gpt2"), RewriteReference(name="finercut"))


def test_models_with_rms_norms_are_refused() -> None:
    assert "model.layers.0.input_layernorm is a LlamaRMSNorm, and not a LayerNorm" in refused(open_model(nano("llama")))
