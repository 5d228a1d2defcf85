"""Pairs of checkpoints: what may differ, and what is named when it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamella
from lamella.errors import ArchitectureError, LamellaError
from lamella.methods.slr.pair import check_pair, check_same_tokens, differing_fields
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]


def refusal(ours: Stack, theirs: Stack) -> str:
    with pytest.raises(LamellaError) as error:
        check_pair(ours, theirs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", CAUSAL)
def test_two_trainings_of_one_architecture_are_a_pair(name: str) -> None:
    check_pair(Stack(nano(name)), Stack(nano(name, 1)))


def test_tokens_and_settings_outside_the_layers_may_differ() -> None:
    post = nano("llama", vocab_size=140, max_position_embeddings=512, attention_dropout=0.1, eos_token_id=5)
    check_pair(Stack(post), Stack(nano("llama", 1)))
    check_pair(Stack(nano("llama", tie_word_embeddings=True)), Stack(nano("llama", 1)))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "rms_norm_eps", 1e-3),
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("gemma3_text", "sliding_window", 4),
        ("gemma3_text", "layer_types", ["full_attention"] * 4),
        ("gpt_neox", "use_parallel_residual", False),
        ("qwen3_moe", "num_experts_per_tok", 1),
    ],
)
def test_a_setting_that_acts_inside_a_layer_is_named_with_both_values(name: str, field: str, value: Any) -> None:
    message = refusal(Stack(nano(name)), Stack(nano(name, 1, **{field: value})))
    assert "differ in settings of the layers:" in message
    assert ("rope_parameters.rope_theta is 10000.0 and 500000.0" if field == "rope_parameters" else field) in message


def test_the_longest_length_matters_where_rotations_depend_on_it() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    configs = [nano("llama", rope_parameters=rope, max_position_embeddings=size).config for size in (256, 512)]
    assert differing_fields(*configs) == {"max_position_embeddings": (256, 512)}


def test_other_families_and_depths_are_named() -> None:
    assert "a llama of 4 layers" in refusal(Stack(nano("llama")), Stack(nano("gpt2")))
    assert "a llama of 6" in refusal(Stack(nano("llama")), Stack(nano("llama", num_hidden_layers=6)))


def test_tensors_that_differ_are_named_one_by_one() -> None:
    message = refusal(Stack(nano("llama")), Stack(nano("llama", 1, intermediate_size=48)))
    assert "intermediate_size is 64 and 48" in message
    post, pre = Stack(nano("llama")), Stack(nano("llama", 1))
    pre.model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 32))
    message = refusal(post, pre)
    assert message.endswith("differ: model.layers.2.mlp.up_proj.weight is F32 [64, 32] and F32 [3, 32]")


def test_dtypes_are_compared_as_they_are_on_disk(tmp_path: Path) -> None:
    nano("llama").save_pretrained(tmp_path / "post")
    nano("llama", 1).bfloat16().save_pretrained(tmp_path / "pre")
    post, pre = lamella.open(tmp_path / "post"), lamella.open(tmp_path / "pre", dtype=torch.float32)
    message = refusal(post, pre)
    assert "model.layers.0.input_layernorm.weight is F32 [32] and BF16 [32]" in message and "and 33 more" in message
    assert "BF16" in refusal(Stack(nano("llama")), Stack(nano("llama", 1).bfloat16()))


def test_a_tensor_of_one_alone_is_named(tmp_path: Path) -> None:
    message = refusal(Stack(nano("qwen2")), Stack(without_bias()))
    assert "model.layers.0.self_attn.k_proj.bias is F32 [16] and missing" in message


def without_bias() -> Any:
    model = nano("qwen2", 1)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = None
    return model


def test_quantised_models_are_refused() -> None:
    post, pre = nano("llama"), nano("llama", 1)
    pre.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert "is quantised" in refusal(Stack(post), Stack(pre, name="base"))


def test_a_checkpoint_whose_names_only_transformers_understands_is_compared_in_memory(tmp_path: Path) -> None:
    nano("llama").save_pretrained(tmp_path / "post")
    file = tmp_path / "post" / "model.safetensors"
    tensors = {key.removeprefix("model."): value for key, value in load_file(file).items()}
    tensors["layers_of_another.0.x"] = torch.zeros(1)
    save_file(tensors, file, {"format": "pt"})
    model = nano("llama")
    check_pair(Stack(model, tmp_path / "post"), Stack(nano("llama", 1)))


class Words:
    """As much of a tokenizer as is compared."""

    def __init__(self, known: str, added: str = "") -> None:
        self.known, self.added = known.split(), added.split()

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.known + self.added)}

    def get_added_vocab(self) -> dict[str, int]:
        return {word: number for word, number in self.get_vocab().items() if word in self.added}


def test_tokenizers_may_differ_in_added_tokens_alone() -> None:
    check_same_tokens(Words("a b c", "<user> <model>"), Words("a b c", "<end>"))
    for ours, theirs in (("a b c", "a c b"), ("a b", "a b c"), ("a b c", "a b")):
        with pytest.raises(ArchitectureError, match=r"the tokenizers differ in . tokens: '[bc]' is") as error:
            check_same_tokens(Words(ours), Words(theirs))
        assert "\n" not in str(error.value)
