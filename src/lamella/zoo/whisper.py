"""Whisper checkpoints in the format of CTranslate2, converted to ordinary ones.

    model.bin    version, "WhisperSpec", revision, number of variables,
                 then for each: name, rank, sizes, type, number of bytes, bytes
                 number of aliases, then for each: name, name of its variable

Numbers are little-endian and unsigned; a name has its length in front, in two bytes, and ends with a zero byte. The
projections of queries, keys and values are stacked in one variable; in cross-attention those of keys and values.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CheckpointError
from lamella.plan import checkpoint
from lamella.plan.filling import fill

VERSION, SPEC = 6, "WhisperSpec"
KINDS = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # NumPy's types by CTranslate2's numbers
START, END = "<|startoftranscript|>", "<|endoftext|>"
ACTIVATION = "gelu"  # of all Whisper models

LAYER = {  # variables of a layer, and the modules of transformers whose tensors are stacked in them
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
REST = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
TENSORS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def convert_whisper(file: Path, folder: Path) -> None:
    """Write a Whisper model of CTranslate2, with its processor, as an ordinary checkpoint in float32.

    Args:
        file: its ``model.bin``, with ``config.json`` and ``tokenizer.json`` beside it.
        folder: the folder to write to.

    Raises:
        CheckpointError: for a file that is damaged, of another version or model, or with quantised weights.
    """
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    variables = read_variables(file)
    settings = checkpoint.read_json(file.parent / "config.json")
    tokenizer = WhisperTokenizer.from_pretrained(file.parent, trust_remote_code=False)
    try:
        config = config_of(variables, *tokenizer.convert_tokens_to_ids([START, END]))
        tensors = {name: each for key, value in variables.items() for name, each in _tensors(key, value, file)}
    except (KeyError, IndexError):
        raise CheckpointError(f"{file} does not have the variables of a Whisper model: get it again") from None
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model = fill(model, tensors, file)
    model.tie_weights()
    languages = dict(zip(tokenizer.convert_ids_to_tokens(settings["lang_ids"]), settings["lang_ids"], strict=True))
    model.generation_config = GenerationConfig(
        **{name: getattr(config, name) for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")},
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=bool(languages),
        lang_to_id=languages,
        task_to_id={task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
    )
    model.save_pretrained(folder)
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(features, tokenizer).save_pretrained(folder)


def read_variables(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the variables of a file by name, without its aliases.

    Args:
        file: in the format described above.

    Raises:
        CheckpointError: for a file that is damaged, or of another version or model.
    """
    with file.open("rb") as source:
        try:
            version, spec, _ = _number(source), _name(source), _number(source)
            if (version, spec) != (VERSION, SPEC):
                raise CheckpointError(
                    f"{file} is a {spec} in version {version} of the format: give a {SPEC} in {VERSION}"
                )
            return dict(_variable(source) for _ in range(_number(source)))
        except (struct.error, KeyError, ValueError, UnicodeDecodeError):
            raise CheckpointError(f"{file} is not a complete model of CTranslate2: get it again") from None


def config_of(variables: dict[str, np.ndarray[Any, Any]], start: int, end: int) -> Any:
    """Return the config of a Whisper model whose sizes are those of its variables.

    Args:
        variables: the variables of the model by name.
        start: id of the token with which a transcript begins.
        end: id of the token that ends it.
    """
    from transformers import WhisperConfig

    sizes: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        widths = [len(each) for name, each in variables.items() if re.fullmatch(rf"{part}/.+/ffn/linear_0/bias", name)]
        sizes |= {f"{part}_layers": len(widths), f"{part}_ffn_dim": widths[0]}
        sizes[f"{part}_attention_heads"] = int(variables[f"{part}/num_heads"])
    return WhisperConfig(
        **sizes,
        vocab_size=len(variables["decoder/embeddings/weight"]),
        d_model=variables["decoder/embeddings/weight"].shape[1],
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        activation_function=ACTIVATION,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _tensors(key: str, value: np.ndarray[Any, Any], file: Path) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of transformers, by name, that a variable holds; none for a setting."""
    part, first, *inner, last = key.split("/") if key.count("/") > 1 else (key, "", "")
    kind = TENSORS.get(last)
    if kind is None:
        return
    if value.dtype.kind != "f":
        raise CheckpointError(f"{file}: {key} is quantised to {value.dtype}: give a model in float16 or float32")
    layer = first.removeprefix("layer_")
    prefix, modules = (
        (f"model.{part}.layers.{layer}.", LAYER["/".join(inner)])
        if layer.isdecimal()
        else (f"model.{part}.", (REST[first],))
    )
    parts = torch.from_numpy(value.astype(np.float32)).chunk(len(modules))
    for module, tensor in zip(modules, parts, strict=True):
        if (kind, module.rpartition(".")[2]) != ("bias", "k_proj"):  # keys have no bias; the variable has zeros there
            yield f"{prefix}{module}.{kind}", tensor.contiguous()


def _number(source: BinaryIO, size: str = "I") -> int:
    return int(struct.unpack(f"<{size}", source.read(struct.calcsize(f"<{size}")))[0])


def _name(source: BinaryIO) -> str:
    return source.read(_number(source, "H")).rstrip(b"\0").decode()


def _variable(source: BinaryIO) -> tuple[str, np.ndarray[Any, Any]]:
    name = _name(source)
    shape = [_number(source) for _ in range(_number(source, "B"))]
    kind, size = KINDS[_number(source, "B")], _number(source)
    return name, np.frombuffer(source.read(size), kind).reshape(shape)
