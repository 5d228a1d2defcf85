"""Pools: what is read, what is refused, and with which words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.errors import LamellaError
from lamella.methods.lora_recycling import AdapterPool, norm
from lamella.stack import Stack, share
from lamella.train import Adapter, add_lora
from lamella.zoo.nano import nano

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def some(seed: int = 0, size: float = 0.3, model: str = "llama", **changes: Any) -> Adapter:
    found = add_lora(share(nano(model, **changes)), 4, 8, seed=seed).adapter()
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: (a, size * torch.randn(b.shape, generator=generator)) for name, (a, b) in found.pairs.items()}
    return replace(found, pairs=pairs)


def with_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def renamed(folder: Path, change: Any) -> None:
    tensors = {change(name): each for name, each in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS)


def reasons(folder: Path) -> dict[str, str]:
    some().write(folder / "a good one")
    members = AdapterPool.open(folder).members(Stack(nano("llama")))
    assert list(members.norms) == ["a good one"]
    return dict(members.refused)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"eva_config": {"rho": 2}}, "eva_config"),
        ({"corda_config": {"corda_method": "kpm"}}, "corda_config"),
        ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
        ({"peft_type": "IA3"}, "not the folder of a LoRA adapter"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with_config(some(1).write(tmp_path / "odd"), **changes)
    (reason,) = reasons(tmp_path).values()
    assert said in reason and "\n" not in reason


def test_values_shapes_weights_and_sizes_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    broken = some(1)
    broken.pairs[broken.modules[3]][1][0, 0] = float("nan")
    broken.write(tmp_path / "nan")
    some(1, hidden_size=48).write(tmp_path / "wide")
    some(1, model="gpt2").write(tmp_path / "gpt2")
    replace(some(1), base="0123456789abcdef").write(tmp_path / "other weights")
    some(1, size=1e-5).write(tmp_path / "faint")
    some(1, size=1e4).write(tmp_path / "loud")
    folder = some(1).write(tmp_path / "pickled")
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    (some(1).write(tmp_path / "torn") / TENSORS).write_bytes(b"nothing")
    found = reasons(tmp_path)
    assert len(found) == 8 and not any("\n" in each for each in found.values())
    for name, said in {
        "nan": "not finite", "wide": "is for another model", "gpt2": "is not a module in the layers",
        "other weights": "other weights", "faint": "total scaled norm", "loud": "total scaled norm",
        "pickled": "pickled", "torn": "cannot be read",
    }.items():  # fmt: skip
        assert said in found[name], name


def test_bounds_of_the_norm_can_be_set(tmp_path: Path) -> None:
    size = norm(some())
    some().write(tmp_path / "a good one")
    some(size=1e-5).write(tmp_path / "faint")
    faint = norm(some(size=1e-5))

    def usable(low: float, high: float) -> list[str]:
        return list(AdapterPool.open(tmp_path, least_norm=low, most_norm=high).members(Stack(nano("llama"))).norms)

    assert usable(0.0, size) == ["a good one", "faint"]
    assert usable(0.0, size * 0.999) == ["faint"] and usable(faint, size) == ["a good one"]


def test_a_pool_without_anything_usable_says_why(tmp_path: Path) -> None:
    some(1, model="gpt2").write(tmp_path / "one")
    with pytest.raises(
        LamellaError, match=r"none of the 1 adapters of the pool can be used: .*is not a module"
    ) as error:
        AdapterPool.open(tmp_path).members(Stack(nano("llama")))
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(LamellaError, match="give "):
            AdapterPool.open(folder)


def test_names_are_compared_from_the_layers_on_and_heads_are_dropped(tmp_path: Path) -> None:
    one = some(1).write(tmp_path / "another prefix")
    renamed(one, lambda name: name.replace("model.layers.", "language_model.model.layers."))
    two = some(2).write(tmp_path / "with a head")
    tensors = load_file(two / TENSORS)
    extra = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
             "base_model.model.lm_head.lora_B.weight": torch.ones(128, 4)}  # fmt: skip
    save_file(tensors | extra, two / TENSORS)
    stack = Stack(nano("llama"))
    members = AdapterPool.open(tmp_path).members(stack)
    assert not members.refused
    for name, seed in (("another prefix", 1), ("with a head", 2)):
        found, wanted = members.load(name), some(seed)
        assert set(found.modules) == set(wanted.modules)
        assert all(torch.equal(found.delta(each), wanted.delta(each)) for each in wanted.modules)


def test_rank_stabilised_adapters_have_their_scale(tmp_path: Path) -> None:
    folder = some(1).write(tmp_path / "rs")
    with_config(folder, use_rslora=True)
    members = AdapterPool.open(tmp_path).members(Stack(nano("llama")))
    assert set(members.load("rs").scales.values()) == {8 / 4**0.5}
    assert members.norms["rs"] == pytest.approx(2 * norm(some(1)))


def test_adapters_are_found_at_any_depth_and_one_is_a_pool_too(tmp_path: Path) -> None:
    some(1).write(tmp_path / "author" / "one")
    some(2).write(tmp_path / "two")
    assert AdapterPool.open(tmp_path).names == ("author/one", "two")
    assert AdapterPool.open(tmp_path / "two").names == ("two",)
