"""Covariances of inputs against float64 sums over what hooks of our own have caught."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lamella.errors import MethodError, NumericsError
from lamella.methods.kore import Covariance, input_covariance, normalised
from lamella.needs import recording, without_values
from lamella.stack import Stack
from lamella.train import linear_at

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(AutoModelForCausalLM.from_pretrained(NANO_LLAMA), NANO_LLAMA)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(5, 200, (3, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def caught(model: Any, name: str, rows: list[Tensor]) -> list[Tensor]:
    """What a map reads of each row [tokens, n], in float64."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append(given[0][0].double()))
    for row in rows:
        model(row[None], use_cache=False)
    hook.remove()
    return seen


def test_every_map_has_the_sum_over_samples_of_what_it_reads(stack: Stack, tokens: Tensor) -> None:
    names = linear_at(stack.model)
    found = input_covariance(stack.model, names, tokens)
    for name in names:
        expected = (
            sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in caught(stack.model, name, list(tokens))) / 256
        )
        torch.testing.assert_close(found.of(name).double(), expected, rtol=1e-4, atol=1e-7)
    assert found.tokens == tokens.numel()


def test_maps_that_read_the_same_share_one_matrix(stack: Stack, tokens: Tensor) -> None:
    found = input_covariance(stack.model, linear_at(stack.model), tokens)
    assert len(found.matrices) == 4 * len(stack)
    first = stack.architecture.prefix + "0."
    assert {found.reads[f"{first}self_attn.{each}_proj"] for each in "qkv"} == {f"{first}self_attn.q_proj"}
    assert found.reads[f"{first}mlp.up_proj"] == f"{first}mlp.gate_proj"


def test_padding_is_left_out(stack: Stack, tokens: Tensor) -> None:
    names = linear_at(stack.model)
    alone = input_covariance(stack.model, names, tokens[:1])
    padded = torch.cat([torch.full((1, 7), 3), tokens[:1]], dim=1)
    mask = (torch.arange(31) >= 7)[None].long()
    found = input_covariance(stack.model, names, {"input_ids": padded, "attention_mask": mask})
    assert found.tokens == alone.tokens
    for name, each in alone.matrices.items():
        torch.testing.assert_close(found.matrices[name], each, rtol=1e-3, atol=1e-6)


def test_covariances_of_parts_add_up_and_come_back_from_a_file(stack: Stack, tokens: Tensor, tmp_path: Path) -> None:
    names = linear_at(stack.model)
    parts = [input_covariance(stack.model, names, part) for part in (tokens[:1], tokens[1:])]
    whole = input_covariance(stack.model, names, tokens)
    parts[0].save(tmp_path / "old.safetensors")
    summed = Covariance.read(tmp_path / "old.safetensors", whole.base) + parts[1]
    assert summed.tokens == whole.tokens and summed.reads == whole.reads
    for name, each in whole.matrices.items():
        torch.testing.assert_close(summed.matrices[name], each, rtol=1e-5, atol=1e-7)


def test_a_sum_belongs_to_the_weights_of_the_later_round(stack: Stack, tokens: Tensor) -> None:
    earlier = input_covariance(stack.model, linear_at(stack.model), tokens[:1])
    assert (replace(earlier, base="first") + replace(earlier, base="second")).base == "second"


def test_a_file_of_other_weights_and_one_that_is_none_are_refused(stack: Stack, tokens: Tensor, tmp_path: Path) -> None:
    input_covariance(stack.model, linear_at(stack.model), tokens[:1]).save(tmp_path / "old.safetensors")
    with pytest.raises(MethodError, match="other weights"):
        Covariance.read(tmp_path / "old.safetensors", "0" * 16)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "list.safetensors", {"lamella": "[1]"})
    odd = {"schema": "lamella.covariance/1", "reads": {"m": "x"}, "tokens": 1, "base": ""}
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "odd.safetensors", {"lamella": json.dumps(odd)})
    for name in ("x.safetensors", "list.safetensors", "odd.safetensors", "missing.safetensors"):
        with pytest.raises(MethodError, match=r"covariances of inputs|cannot read") as refused:
            Covariance.read(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_of_gpt2_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    names = linear_at(model)
    rows = torch.randint(0, 64, (2, 12))
    found = input_covariance(model, names, rows)
    for name in names:
        expected = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in caught(model, name, list(rows))) / 256
        torch.testing.assert_close(found.of(name).double(), expected, rtol=1e-4, atol=1e-7)


def test_the_largest_entry_is_the_scale_unless_it_is_next_to_nothing() -> None:
    x = torch.tensor([[1.0, -8.0], [4.0, 2.0]])
    assert torch.equal(normalised(x), x / 4)
    assert torch.equal(normalised(-x.abs()), x.abs() / -1.0)  # the largest of -1, -8, -4, -2 is -1
    tiny = torch.tensor([[1e-9, -2.0]])
    assert torch.equal(normalised(tiny), tiny / 2)
    assert torch.equal(normalised(torch.zeros(2, 2)), torch.zeros(2, 2))
    with pytest.raises(NumericsError, match="not finite"):
        normalised(torch.tensor([[float("nan")]]))


def test_hooks_are_gone_afterwards(stack: Stack, tokens: Tensor) -> None:
    input_covariance(stack.model, linear_at(stack.model), tokens[:1])
    assert not any(module._forward_pre_hooks for module in stack.model.modules() if isinstance(module, nn.Linear))


def test_matrices_measured_in_parts_and_kept_on_disk_are_the_same(stack: Stack, tokens: Tensor, tmp_path: Path) -> None:
    names = linear_at(stack.model)
    whole = input_covariance(stack.model, names, tokens)
    largest = max(each.numel() for each in whole.matrices.values()) * 4
    parts = input_covariance(stack.model, names, tokens, folder=tmp_path, most=largest)
    assert len(list(tmp_path.glob("*.safetensors"))) > len(stack)
    assert (parts.reads, parts.tokens) == (whole.reads, whole.tokens)
    assert set(parts.matrices) == set(whole.matrices)
    assert all(torch.equal(parts.matrices[name], each) for name, each in whole.matrices.items())


def test_measured_in_parts_they_take_less_memory(tokens: Tensor, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 2}
    model, peaks = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)), []
    largest = 4 * 1024**2  # the input of down_proj
    for most in (10**9, largest):
        with recording() as needs:
            empty = without_values(model)
            input_covariance(empty, linear_at(empty), tokens, folder=tmp_path, most=most)
        peaks.append(needs.peak)
    assert peaks[0] - peaks[1] >= 6 * largest and not list(tmp_path.iterdir())
