"""Architectures without an entry: derived from their class, verified, pruned, exported.

The reference is the class of transformers itself, with an MLP or an attention removed manually: the layer's own
``forward``, with another module that returns zeros.
"""

from __future__ import annotations

import copy
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lamella
from lamella.errors import ArchitectureError, ExportError
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export_out_of_core
from lamella.stack import ARCHITECTURES, Stack, digest_of_proof, find_architecture, prove, register_architecture
from lamella.zoo import opening
from lamella.zoo.small import causal_types, image_types, small, small_with_images

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = {  # ten of different kinds: how they hang together, and where an independent reference zeroes their attention
    "gemma2": "sandwich norms",
    "olmo2": "norms behind the sublayers",
    "cohere": "parallel, one norm for both",
    "falcon": "parallel or not, by its config",
    "bloom": "residual additions inside the modules",
    "mixtral": "experts",
    "deepseek_v3": "latent attention, shared experts",
    "qwen3_next": "linear and full attention, experts",
    "lfm2": "convolution and attention",
    "gemma4_text": "layers that share keys, inputs for each layer",
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "architectures.py"))


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_opens_is_cut_decodes_and_is_exported_as_the_table_says(script: Any, model_type: str) -> None:
    documented = {row["type"]: row for row in json.loads((ROOT / "docs" / "architectures.json").read_text())["types"]}
    found = script["check_type"](model_type)
    assert found | {"seconds": 0} == documented[model_type] | {"seconds": 0}
    assert found["opens"] == "derived" and found["decodes"]
    assert {"portable", "native"} <= set(found["forms"])


def test_the_table_has_every_type_of_transformers() -> None:
    found = json.loads((ROOT / "docs" / "architectures.json").read_text())
    rows = found["types"]
    assert [row["type"] for row in rows] == causal_types()
    assert [row["type"] for row in found["with_images"]] == image_types()
    assert sum(bool(row["decodes"]) for row in rows) >= 100
    assert all(row.get("why") for row in rows if not row["decodes"])


class _Nothing(nn.Module):
    """In the place of an attention that gives (zeros, weights), or of an MLP that gives zeros."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


@pytest.mark.parametrize(
    ("model_type", "attn", "mlp"),
    [("gemma2", "self_attn", "mlp"), ("olmo2", "self_attn", "mlp"), ("cohere", "self_attn", "mlp"),
     ("phi", "self_attn", "mlp"), ("falcon", "self_attention", "mlp"), ("granite", "self_attn", "mlp"),
     ("stablelm", "self_attn", "mlp"), ("phi3", "self_attn", "mlp")],
)  # fmt: skip
def test_without_a_sublayer_a_view_computes_what_the_class_does_with_zeros_there(
    model_type: str, attn: str, mlp: str
) -> None:
    model = small(model_type)
    stack = Stack(model)
    view = lamella.apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.attn", "layers.2.mlp"]))
    silent = copy.deepcopy(model)
    layers = silent.get_submodule(stack.architecture.prefix.removesuffix("."))
    setattr(layers[1], attn, _Nothing(pair=True))
    setattr(layers[2], mlp, _Nothing(pair=False))
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = silent(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(view(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"new_decoder_architecture": True}, {"parallel_attn": True}, {"parallel_attn": False, "alibi": True}],
    ids=["new", "parallel", "serial"],
)
def test_a_condition_that_all_layers_decide_alike_is_decided(settings: dict[str, Any]) -> None:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                                       num_kv_heads=2, **settings)  # fmt: skip
    stack = Stack(transformers.FalconForCausalLM(config).eval())
    prove(stack)
    [source] = stack.architecture.sources
    assert "parallel_attn" not in source.text and "new_decoder_architecture" not in source.text
    assert ("Parallel" in source.text) == (settings.get("parallel_attn") is not False)


@pytest.mark.parametrize("model_type", ["gemma4", "qwen3_5"])
def test_the_text_of_a_model_with_images_opens_and_is_cut(model_type: str, tmp_path: Path) -> None:
    model = small_with_images(model_type)
    stack = lamella.open(model, prove_again=True)
    assert isinstance(stack, Stack) and stack.stack == "text" and stack.architecture.config == "text_config"
    plan = Plan(model=ModelReference.of(stack), drop=["layers.1.attn", "layers.2.mlp"])
    view = lamella.apply(stack, plan)
    silent = copy.deepcopy(model)
    layers = silent.get_submodule(stack.architecture.prefix.removesuffix("."))
    plain = {"linear_attn": False, "self_attn": True}
    attn = next(name for name in plain if hasattr(layers[1], name))
    setattr(layers[1], attn, _Nothing(plain[attn]))
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(2))
    only_attn = lamella.apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1.attn"]))
    expected = silent(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(only_attn(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    lamella.export(stack, plan, tmp_path / "out", form="native")
    again = lamella.load(tmp_path / "out").model
    assert torch.equal(again(input_ids=ids).logits, view(input_ids=ids).logits)


def test_a_wrong_derivation_is_refused_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(small("granite"))
    prove(stack)
    attn, mlp = stack.architecture.sublayers
    wrong = replace(mlp, run=lambda layer, h, call: mlp.run(layer, h, call) * (1 + 1e-6))
    stack.architecture = replace(stack.architecture, sublayers=(attn, wrong))
    with pytest.raises(ArchitectureError, match=r"derived sublayers of layers\.\d differ from the layer") as caught:
        prove(stack)
    assert "\n" not in str(caught.value) and "register_architecture" in str(caught.value)


def test_a_wrong_readout_is_refused_by_the_proof() -> None:
    stack = Stack(small("cohere"))
    stack.architecture = replace(stack.architecture, readout=None)  # without its scale of logits
    with pytest.raises(ArchitectureError, match="readout does not yield its logits"):
        prove(stack)


def test_a_readout_of_other_states_than_the_model_reads_is_refused_by_the_proof() -> None:
    stack = Stack(small("granite"))
    stack.architecture = replace(stack.architecture, norm="")
    with pytest.raises(ArchitectureError, match="readout does not yield its logits"):
        prove(stack)


def test_layers_that_pass_on_more_than_hidden_states_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="pass on 'prev_topk_indices' besides the residual stream"):
        prove(Stack(small("glm_moe_dsa")))


def test_an_encoder_is_refused_though_its_type_has_a_causal_class() -> None:
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    with pytest.raises(ArchitectureError, match="its tokens see later tokens, so with this config it is not a decoder"):
        lamella.open(transformers.BertLMHeadModel(config).eval())


def test_a_proof_is_remembered_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    proved: list[str] = []
    monkeypatch.setattr(opening, "prove", lambda stack: proved.append(digest_of_proof(stack)))
    model = small("cohere")
    lamella.open(model)
    lamella.open(small("cohere", seed=1))  # the weights do not matter
    assert len(proved) == 1 and (tmp_path / "proofs" / proved[0]).is_file()
    lamella.open(model, prove_again=True)
    assert len(proved) == 2
    model.config.logit_scale = 0.5
    lamella.open(model)
    assert len(set(proved)) == 2


def test_an_entry_goes_before_a_derivation_and_needs_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stack: Stack) -> None:
        raise AssertionError("an entry was proved")

    monkeypatch.setattr(opening, "prove", fail)
    lamella.open(small("llama"))
    config = small("olmo").config
    assert find_architecture(config).sources
    register_architecture(replace(ARCHITECTURES["llama"], name="olmo"))
    try:
        assert not find_architecture(config).sources
    finally:
        del ARCHITECTURES["olmo"]


def test_a_config_cannot_ask_for_millions_of_layers() -> None:
    config = small("cohere").config
    config.num_hidden_layers = 10**7
    with pytest.raises(ArchitectureError, match="its config has 10000000 layers"):
        find_architecture(config)


def test_a_layer_that_its_config_cannot_place_is_not_exported_plain(tmp_path: Path) -> None:
    stack = Stack(small("diffllama"))  # a parameter of every layer depends on its index
    with pytest.raises(ExportError, match=r"counts layers, so it cannot express that layers\.2 becomes layers\.1"):
        lamella.export(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]), tmp_path / "out", form="plain")
    assert not (tmp_path / "out").exists()


def test_what_a_class_fills_in_all_layers_at_once_is_not_exported_native(tmp_path: Path) -> None:
    stack = Stack(small("falcon_h1"))
    plan = Plan(model=ModelReference.of(stack), drop=["layers.0.attn"])
    with pytest.raises(ExportError, match="of all its layers at once"):
        lamella.export(stack, plan, tmp_path / "out", form="native")


def test_a_padding_embedding_that_transformers_loads_as_zeros_is_not_exported(tmp_path: Path) -> None:
    stack = Stack(small("youtu"))
    plan = Plan(model=ModelReference.of(stack), drop=["layers.1"])
    refused = "loaded with zeros as the embedding of its padding token 0.* first"
    for form in ("plain", "portable"):
        with pytest.raises(ExportError, match=refused):
            lamella.export(stack, plan, tmp_path / "out", form=form)
    stack.model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ExportError, match=refused):
        export_out_of_core(tmp_path / "whole", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stack.model.get_input_embeddings().weight[0] = 0  # as in a model that was trained
    view = lamella.apply(stack, plan)
    for form in ("plain", "portable"):
        lamella.export(stack, plan, tmp_path / form, form=form)
        again = lamella.load(tmp_path / form).model
        ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(2))
        assert torch.equal(again(input_ids=ids).logits, view(input_ids=ids).logits)


def test_a_native_export_runs_in_plain_transformers(tmp_path: Path) -> None:
    stack = Stack(small("cohere"))
    view = lamella.apply(stack, plan := Plan(model=ModelReference.of(stack), drop=["layers.0.attn", "layers.2.mlp"]))
    lamella.export(stack, plan, tmp_path / "out", form="native")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(plain).__module__.startswith("transformers_modules")
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(2))
    assert torch.equal(plain(input_ids=ids).logits, view(input_ids=ids).logits)
