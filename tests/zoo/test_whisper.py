"""Whisper models of CTranslate2, written here from the description of the format, become the same model again."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

import lamella
from lamella.errors import CheckpointError
from lamella.zoo.nano import randomise
from lamella.zoo.whisper import convert_whisper

KINDS = {"float16": 4, "float32": 0, "int16": 2, "int8": 1}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
VARIABLES = {  # of the format: the tensors of transformers that are stacked in them; keys have no bias
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    """Encoder and decoder differ in depth, heads and width; weights are those of 16 bits."""
    config = WhisperConfig(
        vocab_size=263,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=24,
        num_mel_bins=80,
        max_source_positions=12,
        max_target_positions=10,
        decoder_start_token_id=257,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    made = WhisperForConditionalGeneration(config).eval()
    randomise(made, 0)
    return made.half().float()


def variables_of(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {name.removeprefix("model."): each.half().numpy() for name, each in model.state_dict().items()}
    found: dict[str, np.ndarray[Any, Any]] = {}

    def put(name: str, modules: list[str], kinds: tuple[str, str]) -> None:
        widths = len(tensors[f"{modules[0]}.weight"])
        weights = [tensors[f"{each}.weight"] for each in modules]
        biases = [tensors.get(f"{each}.bias", np.zeros(widths, np.float16)) for each in modules]
        found[f"{name}/{kinds[0]}"], found[f"{name}/{kinds[1]}"] = np.concatenate(weights), np.concatenate(biases)

    for part in ("encoder", "decoder"):
        for layer in range(getattr(model.config, f"{part}_layers")):
            for name, modules in VARIABLES.items():
                if part == "decoder" or not name.startswith("attention"):
                    kinds = ("gamma", "beta") if "norm" in name else ("weight", "bias")
                    put(f"{part}/layer_{layer}/{name}", [f"{part}.layers.{layer}.{each}" for each in modules], kinds)
        put(f"{part}/layer_norm", [f"{part}.layer_norm"], ("gamma", "beta"))
        found[f"{part}/position_encodings/encodings"] = tensors[f"{part}.embed_positions.weight"]
        found[f"{part}/num_heads"] = np.array(getattr(model.config, f"{part}_attention_heads"), np.int16)
        found[f"{part}/pre_norm"] = np.array(1, np.int8)
    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", [f"encoder.{conv}"], ("weight", "bias"))
    found["decoder/embeddings/weight"] = tensors["decoder.embed_tokens.weight"]
    return found


def write(
    folder: Path, variables: dict[str, np.ndarray[Any, Any]], version: int = 6, spec: str = "WhisperSpec"
) -> Path:
    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    folder.mkdir(parents=True, exist_ok=True)
    content = struct.pack("<I", version) + name(spec) + struct.pack("<II", 3, len(variables))
    for key, each in variables.items():
        sizes = struct.pack(f"<B{each.ndim}I", each.ndim, *each.shape)
        content += name(key) + sizes + struct.pack("<BI", KINDS[each.dtype.name], each.nbytes) + each.tobytes()
    content += struct.pack("<I", 1) + name("decoder/projection/weight") + name("decoder/embeddings/weight")
    (folder / "model.bin").write_bytes(content)
    letters = {chr(code): code for code in range(32, 288)}
    tokenizer = WhisperTokenizer(vocab=dict(zip(letters, range(256), strict=True)), merges=[])
    tokenizer.add_tokens([*SPECIAL, "<|notimestamps|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    known = {"alignment_heads": [[0, 1]], "lang_ids": [258, 259], "suppress_ids": [1, 2], "suppress_ids_begin": [3]}
    (folder / "config.json").write_text(json.dumps(known))
    return folder / "model.bin"


def test_a_converted_model_has_the_same_weights_and_generates_the_same(
    model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    convert_whisper(write(tmp_path / "given", variables_of(model)), tmp_path / "out")
    opened = lamella.open(tmp_path / "out")
    assert {name: len(each) for name, each in opened.stacks.items()} == {"encoder": 2, "decoder": 3}
    found = opened.model
    assert found.config.encoder_attention_heads == 4 and found.config.decoder_ffn_dim == 24
    for name, each in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], each, rtol=0, atol=0)
    features = torch.randn(2, 80, 24, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[257, 258, 261], [257, 259, 260]])
    with torch.no_grad():
        ours, theirs = (each(input_features=features, decoder_input_ids=ids).logits for each in (found, model))
    torch.testing.assert_close(ours, theirs)
    settings = found.generation_config
    assert settings.lang_to_id == {"<|en|>": 258, "<|de|>": 259} and settings.begin_suppress_tokens == [3]
    assert settings.task_to_id == {"transcribe": 261, "translate": 260} and settings.no_timestamps_token_id == 262
    processor = WhisperProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.decode([257, 65 - 32, 256], skip_special_tokens=True) == "A"
    assert processor.feature_extractor.feature_size == 80


def test_what_is_no_complete_whisper_model_is_refused(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    whole = variables_of(model)
    for number, (wrong, why) in enumerate(
        (
            (write(tmp_path / "version", whole, version=3), "in version 3 of the format"),
            (write(tmp_path / "spec", whole, spec="TransformerSpec"), "is a TransformerSpec"),
            (
                write(tmp_path / "int8", whole | {"decoder/layer_0/ffn/linear_0/weight": np.ones((24, 16), np.int8)}),
                "int8",
            ),
            (write(tmp_path / "absent", {k: v for k, v in whole.items() if "layer_1/ffn/linear_1" not in k}), "lacks"),
            (
                write(tmp_path / "shape", whole | {"encoder/conv1/bias": np.zeros(3, np.float16)}),
                "where the network has",
            ),
        )
    ):
        with pytest.raises(CheckpointError, match=why) as error:
            convert_whisper(wrong, tmp_path / f"out{number}")
        assert "\n" not in str(error.value)
    file = write(tmp_path / "cut", whole)
    for length in (0, 3, 30, len(file.read_bytes()) // 2):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(CheckpointError, match="not a complete model"):
            convert_whisper(file, tmp_path / "out")
