"""Models that predict masked tokens: folders in the layout of the public checkpoints, against transformers' decoders.

The independent reference is transformers' Llama and Qwen2 with a mask that hides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lamella
from lamella.errors import ArchitectureError, CheckpointError, LamellaError, MethodError, PlanError
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference, apply_static
from lamella.plan.export import export, export_out_of_core
from lamella.registry import get_method
from lamella.runtime import apply
from lamella.stack import Stack, find_architectures, join
from lamella.stack.diffusion import DreamForMaskedLM, LLaDAForMaskedLM
from lamella.zoo.nano import NANO_DIFFUSION, nano

IDS = torch.randint(3, 127, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, :2] = 0
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)

CODE = 'raise AssertionError("code of a checkpoint runs")\n'
LLADA = {  # the config of GSAI-ML/LLaDA-8B-Base, with small sizes
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "d_model": 32, "embedding_dropout": 0.0, "embedding_size": 128,
    "eos_token_id": 2, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 127,
    "max_sequence_length": 256, "mlp_hidden_size": 64, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "pad_token_id": 2,
    "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3",
    "use_cache": False, "vocab_size": 128, "weight_tying": False,
}  # fmt: skip
DREAM = {  # the config of Dream-org/Dream-v0-Base-7B, with small sizes
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 64, "mask_token_id": 127, "max_position_embeddings": 256,
    "max_window_layers": 3, "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "pad_token_id": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.46.2", "use_cache": False, "use_sliding_window": False, "vocab_size": 128,
}  # fmt: skip
LAYER = {  # of LLaDA: what Llama calls it
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], code: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in (f"configuration_{code}.py", f"modeling_{code}.py"):
        (folder / name).write_text(CODE)
    save_file(tensors, folder / "model.safetensors")
    return folder


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: 0.2 * torch.randn(*shape, generator=generator) + float(len(shape) == 1)
            for name, shape in shapes.items()}  # fmt: skip


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    """A tiny folder in LLaDA's layout, whose code must not run."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.weight": (128, 32),
        "model.transformer.ln_f.weight": (32,),
        "model.transformer.ff_out.weight": (128, 32),
    }
    inside = {"attn_norm": (32,), "ff_norm": (32,), "ff_proj": (64, 32), "up_proj": (64, 32), "ff_out": (32, 64)}
    inside |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (32, 32))
    for layer in range(3):
        shapes |= {f"model.transformer.blocks.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return written(tmp_path / "LLaDA", LLADA, drawn(**shapes), "llada")


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    """A tiny folder in Dream's layout, whose code must not run."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128, 32), "model.norm.weight": (32,), "lm_head.weight": (128, 32),
    }  # fmt: skip
    inside: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,)}
    inside |= {"self_attn.q_proj.weight": (32, 32), "self_attn.o_proj.weight": (32, 32), "self_attn.q_proj.bias": (32,)}
    inside |= {f"self_attn.{name}.weight": (16, 32) for name in ("k_proj", "v_proj")}
    inside |= {f"self_attn.{name}.bias": (16,) for name in ("k_proj", "v_proj")}
    inside |= {f"mlp.{name}.weight": (64, 32) for name in ("gate_proj", "up_proj")} | {"mlp.down_proj.weight": (32, 64)}
    for layer in range(3):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    return written(tmp_path / "Dream", DREAM, drawn(**shapes), "dream")


def everywhere(mask: Tensor) -> Tensor:
    """A mask by which every token sees every token of its row [batch, 1, time, time]."""
    return mask.bool()[:, None, None, :].expand(-1, -1, mask.shape[1], -1)


def bidirectional(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model.eval()


def as_llama(folder: Path) -> Any:
    """The same weights in transformers' Llama."""
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=256,
    )  # fmt: skip
    outside = {"transformer.wte": "embed_tokens", "transformer.ln_f": "norm"}
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removesuffix(".weight").removeprefix("model.")
        if name == "transformer.ff_out":
            state["lm_head.weight"] = tensor
        elif name in outside:
            state[f"model.{outside[name]}.weight"] = tensor
        else:
            *_, layer, part = name.split(".")
            state[f"model.layers.{layer}.{LAYER[part]}.weight"] = tensor
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    return bidirectional(model)


def as_qwen2(folder: Path) -> Any:
    """The same weights in transformers' Qwen2."""
    known = {name: value for name, value in DREAM.items() if name not in ("model_type", "auto_map", "architectures")}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**known))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return bidirectional(model)


@pytest.mark.parametrize(("layout", "known", "twin"),
                         [("llada", LLaDAForMaskedLM, as_llama), ("dream", DreamForMaskedLM, as_qwen2)])  # fmt: skip
def test_a_folder_in_a_checkpoint_s_layout_opens_and_computes_what_transformers_computes(
    layout: str, known: type, twin: Any, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    stack = lamella.open(folder)
    assert type(stack.model) is known and len(stack) == 3 and stack.model.config.mask_token_id == 127
    assert set(stack.model.state_dict()) == set(load_file(folder / "model.safetensors"))
    given = {"input_ids": IDS, "position_ids": POSITIONS}
    ours = stack.model(**given, attention_mask=MASK).logits
    theirs = twin(folder)(**given, attention_mask=everywhere(MASK)).logits
    torch.testing.assert_close(ours[MASK.bool()], theirs[MASK.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["llada", "dream"])
def test_tokens_see_those_behind_them_with_and_without_a_mask(layout: str, request: pytest.FixtureRequest) -> None:
    model = lamella.open(request.getfixturevalue(layout)).model
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 127
    for given in ({}, {"attention_mask": MASK}):
        before, after = (model(input_ids=ids, **given).logits[2, 0] for ids in (IDS, other))
        assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("layout", ["llada", "dream"])
def test_rows_of_a_padded_batch_are_computed_as_alone(layout: str, request: pytest.FixtureRequest) -> None:
    model = lamella.open(request.getfixturevalue(layout)).model
    together = model(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS).logits
    for row, length in enumerate(MASK.sum(-1).tolist()):
        alone = model(input_ids=IDS[row : row + 1, -length:]).logits
        torch.testing.assert_close(together[row, -length:], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_its_sublayers_compose_to_its_layers_bit_exactly(name: str) -> None:
    stack = Stack(nano(name))
    given = {"input_ids": IDS, "attention_mask": MASK}
    context = stack.context(given)
    h: Any = context.h
    for layer, module in enumerate(stack.layers):
        whole = module(h, **context.calls[layer])
        h = stack.run(h, layer, layer + 1, context)
        assert torch.equal(h, whole)
    assert torch.equal(stack.head(h), stack.model(**given).logits)
    assert torch.equal(stack.normed(join(h)), stack.hidden(given))


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_the_logits_of_some_positions_are_those_of_all(name: str) -> None:
    model = nano(name)
    some = torch.tensor([3, 7])
    torch.testing.assert_close(
        model(input_ids=IDS, logits_to_keep=some).logits, model(input_ids=IDS).logits[:, some], rtol=0, atol=1e-6
    )


def zeroed(stack: Stack, layers: list[int]) -> Any:
    """Return the model with layers that do not change the hidden states."""
    model = nano("llada" if stack.architecture.name == "llada" else "dream")
    for layer in layers:
        for sublayer in stack.architecture.sublayers:
            out = Stack(model).layers[layer].get_submodule(sublayer.out)
            nn.init.zeros_(out.weight)
    return model


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_a_dropped_layer_is_one_with_zeroed_projections_and_one_that_an_export_lacks(name: str, tmp_path: Path) -> None:
    stack = Stack(nano(name))
    plan = Plan(model=ModelReference.of(stack), drop=["layers.0", "layers.2"])
    given = {"input_ids": IDS, "attention_mask": MASK}
    view = apply(stack, plan)(**given).logits
    torch.testing.assert_close(view, zeroed(stack, [0, 2])(**given).logits, rtol=0, atol=1e-6)
    stack.model.save_pretrained(tmp_path / "whole")
    opened = lamella.open(tmp_path / "whole")
    again = Plan(model=ModelReference.of(opened), drop=["layers.0", "layers.2"])
    for out in (
        export(stack, plan, tmp_path / "from-memory"),
        export(opened, again, tmp_path / "copied"),
        export_out_of_core(tmp_path / "whole", again, tmp_path / "out-of-core"),
    ):
        small = lamella.open(out)
        assert len(small) == 2 and "lamella.load" in (out / "README.md").read_text()
        torch.testing.assert_close(small.model(**given).logits, view, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_sublayers_leave_a_native_and_a_portable_export(name: str, tmp_path: Path) -> None:
    stack = Stack(nano(name))
    plan = Plan(model=ModelReference.of(stack), drop=["layers.1.attn", "layers.2.mlp"])
    given = {"input_ids": IDS, "attention_mask": MASK}
    view = apply_static(stack, plan)(**given).logits
    native = export(stack, plan, tmp_path / "native", form="native")
    loaded = lamella.open(native)
    torch.testing.assert_close(loaded.model(**given).logits, view, rtol=0, atol=1e-6)
    carried = transformers.AutoModelForMaskedLM.from_pretrained(native, trust_remote_code=True).eval()
    torch.testing.assert_close(carried(**given).logits, view, rtol=0, atol=1e-6)
    portable = lamella.open(export(stack, plan, tmp_path / "portable", form="portable"))
    torch.testing.assert_close(portable.model(**given).logits, view, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("setting", "value"), [("block_type", "sequential"), ("rope", False), ("weight_tying", True)])
def test_a_setting_that_no_checkpoint_uses_is_refused_in_one_line(setting: str, value: Any, llada: Path) -> None:
    (llada / "config.json").write_text(json.dumps(LLADA | {setting: value}))
    with pytest.raises(CheckpointError, match=setting) as error:
        lamella.open(llada)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(dream: Path) -> None:
    tensors = load_file(dream / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, dream / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_proj\.bias"):
        lamella.open(dream)


def test_diffusion_gemma_is_refused_with_the_reason() -> None:
    with pytest.raises(ArchitectureError, match=r"diffusion_gemma .*tokens drawn at random instead of masks") as error:
        find_architectures(transformers.DiffusionGemmaConfig())
    assert "\n" not in str(error.value)


def test_a_model_in_memory_that_its_checkpoint_s_code_runs_is_refused() -> None:
    class LLaDAModelLM(LLaDAForMaskedLM.__bases__[0]):  # type: ignore[misc]
        """As a checkpoint's own code calls it."""

    with pytest.raises(ArchitectureError, match="LLaDAModelLM in memory uses the code of its checkpoint"):
        Stack(LLaDAModelLM(nano("llada").config))


@pytest.mark.parametrize("name", NANO_DIFFUSION)
def test_what_is_meant_for_decoders_is_refused_in_one_line(name: str) -> None:
    stack = Stack(nano(name))
    family = stack.architecture.name
    model = ModelReference.of(stack)
    with pytest.raises(
        MethodError, match=f"finercut works on decoders; .* is a {family}, which predicts masked tokens"
    ):
        get_method("finercut")(stack, IDS)
    for plan in (
        Plan(model=model, path={"text": PhasedPath(prefill=[0, 1, 2, 3], decode=[0, 3])}),
        Plan(model=model, policies={"text": PolicyReference(name="lora-drop", params={"droppable": [1]})}),
    ):
        with pytest.raises(PlanError, match="predicts masked tokens") as error:
            apply(stack, plan)
        assert "\n" not in str(error.value)
    with pytest.raises(LamellaError):
        lamella.make_plan("unified-skip", stack)
