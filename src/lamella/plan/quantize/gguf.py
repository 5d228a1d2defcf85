"""Checkpoints as GGUF files, which llama.cpp and software based on it run.

A GGUF file contains everything: sizes and settings as key-value pairs, the tokenizer, and the tensors under llama.cpp's
own names. Matrices can be stored in 8 bits (``q8_0``: blocks of 32 values that share a 16-bit scale) or in about 5
(``q4_k_m``). A decoding step reads all matrices, so a memory-bound model decodes faster by about the factor by which it
is smaller.

Tensors are read, changed and written one at a time. In two points llama.cpp differs from transformers:

- Rotary embeddings of a Llama rotate adjacent entries of a head in llama.cpp, and entries half a head apart in
transformers: the rows of queries and keys are reordered, so that both compute the same. - Norms of a Gemma multiply by
the stored weight in llama.cpp, and by the stored weight plus 1 in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lamella.errors import ExportError, NumericsError
from lamella.files import replacing
from lamella.plan.checkpoint import Range
from lamella.plan.quantize.families import Family, Layout, family_of, layout_of, rope_of
from lamella.plan.quantize.kinds import KINDS, to_blocks, type_of
from lamella.plan.quantize.vocabulary import add_tokenizer
from lamella.progress import track

_HALF, _SINGLE = (float(np.finfo(kind).max) for kind in (np.float16, np.float32))
_LARGEST = {  # largest value that each can store; for others, that of the 16-bit scales of their blocks
    GGMLQuantizationType.F32: _SINGLE,
    GGMLQuantizationType.BF16: _SINGLE,
    GGMLQuantizationType.Q8_0: 127 * _HALF,
}


def write_gguf(folder: Path, config: Any, tokenizer: Any, file: Path, kind: str = "q8_0", name: str = "") -> int:
    """Write a checkpoint folder as a GGUF file.

    Args:
        folder: a safetensors checkpoint of a family in :data:`FAMILIES`, with whole layers.
        config: its config.
        tokenizer: its tokenizer.
        file: the file to write; it appears when it is complete.
        kind: storage of matrices, a key of :data:`KINDS`.
        name: name of the model in the file; the name of the folder if empty.

    Returns:
        The size of the file in bytes.

    Raises:
        ArchitectureError: for a family that is not in the table.
        ExportError: for a model that llama.cpp does not compute, or a file that cannot be written.
        CheckpointError: for a folder that is damaged or incomplete.
        NumericsError: for values that are not finite, or too large for ``kind``.
    """
    if kind not in KINDS:
        raise ExportError(f"unknown kind '{kind}': choose one of {', '.join(KINDS)}")
    family = family_of(folder, config)
    layout = layout_of(folder, config, family)
    arch = family.arch if layout.even else family.uneven
    if arch is None:
        raise ExportError(f"{folder}: layers of different widths, which llama.cpp supports for llama and mistral only")
    tensors = list(_tensors(layout, family, kind))
    factors = _rope_factors(config, layout)
    try:
        with replacing(file) as partial:
            writer = GGUFWriter(partial, MODEL_ARCH_NAMES[arch])
            writer.add_type("model")
            writer.add_name(name or folder.name)
            writer.add_file_type(KINDS[kind][1])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_settings(writer, config, layout)
            add_tokenizer(writer, tokenizer, layout.tokens)
            for each in tensors:
                writer.add_tensor_info(each.name, each.source.shape, np.dtype(np.float32), each.size, each.kind)
            for key, values in factors.items():
                writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for each in track(tensors, f"writing {kind}"):
                writer.write_tensor_data(each.read())
            for values in factors.values():
                writer.write_tensor_data(values)
            writer.close()
    except OSError as error:
        raise ExportError(f"{file}: cannot be written ({error.strerror or error}); choose another file") from error
    return file.stat().st_size


# The metadata of the file.


def _add_settings(writer: GGUFWriter, config: Any, layout: Layout) -> None:
    window: Any = getattr(config, "sliding_window", None)
    rope = rope_of(config)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    context = config.max_position_embeddings
    if window is not None and not windowed:  # llama.cpp would attend to the whole of a longer text
        context = min(context, window)
    writer.add_vocab_size(layout.tokens)
    writer.add_context_length(context)
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(layout.layers))
    writer.add_feed_forward_length(layout.channels[0] if layout.even else layout.channels)
    writer.add_head_count(layout.heads[0] if layout.even else layout.heads)
    writer.add_head_count_kv(layout.kv_heads[0] if layout.even else layout.kv_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if windowed:
        writer.add_sliding_window(int(window))
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _rope_factors(config: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Return the divisor of each rotary frequency [head_dim / 2], if they differ."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return {}
    plain = 1 / rope["rope_theta"] ** (np.arange(0, layout.head_dim, 2) / layout.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return {"rope_freqs.weight": (plain / scaled.double().numpy()).astype(np.float32)}


# The tensors.


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's name.
        source: its bytes in the checkpoint.
        kind: how it is stored.
        heads: number of heads of a query or key projection whose rows are reordered; None for other tensors.
        add: value that is added to its entries.
    """

    name: str
    source: Range
    kind: GGMLQuantizationType
    heads: int | None
    add: float

    @property
    def size(self) -> int:
        """The stored size in bytes."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.source.shape) // block * size

    def read(self) -> np.ndarray:
        """Return its entries as they are stored.

        Raises:
            NumericsError: if one is not finite, or does not fit.
        """
        with safe_open(self.source.file, framework="pt") as file:
            values: np.ndarray = file.get_tensor(self.source.name).float().numpy()
        if self.heads is not None:
            values = neighbouring(values, self.heads)
        if self.add:
            values = values + np.float32(self.add)
        if not np.abs(values).max() <= _LARGEST.get(self.kind, _HALF):  # the comparison is false for NaN
            raise NumericsError(f"{self.source.name}: has entries that {self.kind.name.lower()} cannot hold")
        return to_blocks(values, self.kind)


def _tensors(layout: Layout, family: Family, kind: str) -> Iterator[_Tensor]:
    """Yield the tensors in the order in which the model needs them."""
    tied = "output.weight" not in layout.outside

    def stored(name: str, source: Range, heads: int | None = None) -> _Tensor:
        type_ = type_of(kind, name, source.shape, len(layout.layers), tied)
        return _Tensor(name, source, type_, heads, family.norms if name.endswith("norm.weight") else 0.0)

    yield from (stored(name, each) for name, each in layout.outside.items())
    for layer, tensors in enumerate(layout.layers):
        heads = {"attn_q": layout.heads[layer], "attn_k": layout.kv_heads[layer]} if family.neighbours else {}
        for name, each in tensors.items():
            yield stored(f"blk.{layer}.{name}", each, heads.get(name.partition(".")[0]))


def neighbouring(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key projection in the order in which adjacent rows are rotated together.

    Row ``i`` of a head's first half is followed by row ``i`` of its second half.

    Args:
        rows: the weight.
        heads: number of heads.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
