"""Quantised checkpoints: opened ones have the values defined by their format, the rest is refused.

The checkpoints are written here from the formats' own descriptions: FP8 in blocks with one scale each, and MXFP4 in
blocks of 32 (OCP Microscaling Formats 1.0, section 5.3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamella
from lamella.errors import CheckpointError
from lamella.zoo.nano import nano
from lamella.zoo.small import small

BLOCK = 16
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # what the three lower bits of a number mean


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def say(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_fp8_in_blocks_is_opened_dequantised(tmp_path: Path) -> None:
    model = nano("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    meant = {}
    for name, tensor in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = (size // BLOCK for size in tensor.shape)
        blocks = tensor.reshape(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448  # the largest number of e4m3
        stored = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        tensors |= {name: stored, f"{name}_scale_inv": scale}
        grown = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        meant[name] = stored.float() * grown
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    say(tmp_path, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    opened = lamella.open(tmp_path).model
    found = dict(opened.named_parameters())
    assert len(meant) == 7 * 4
    for name, tensor in meant.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
        assert not torch.equal(found[name], dict(model.named_parameters())[name])
    assert getattr(opened.config, "quantization_config", None) is None


def test_mxfp4_of_gpt_oss_is_opened_dequantised(tmp_path: Path) -> None:
    small("gpt_oss").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    meant = {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape  # in memory [experts, in, out], on disk the other way
        codes = torch.randint(0, 16, (experts, outside, inside // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 128, (experts, outside, inside // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., ::2] | (codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = scales
        sign = 1 - 2 * (codes >> 3).float()
        numbers = sign * E2M1[(codes & 7).long()] * 2.0 ** (scales[..., None].float() - 127)
        meant[name] = numbers.reshape(experts, outside, inside).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    say(tmp_path, {"quant_method": "mxfp4"})
    opened = lamella.open(tmp_path).model
    found = dict(opened.named_parameters())
    assert meant
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor)
    assert getattr(opened.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"quant_method": "gptq", "bits": 4}, "give the original checkpoint"),
        ({"quant_method": "awq", "bits": 4}, "give the original checkpoint"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantise it where bitsandbytes runs"),
    ],
    ids=["gptq", "awq", "bitsandbytes"],
)
def test_other_formats_are_refused_with_the_way_to_go(tmp_path: Path, settings: dict[str, Any], way: str) -> None:
    nano("llama").save_pretrained(tmp_path)
    say(tmp_path, settings)
    with pytest.raises(CheckpointError, match=way) as caught:
        lamella.open(tmp_path)
    assert "\n" not in str(caught.value) and settings["quant_method"] in str(caught.value)
