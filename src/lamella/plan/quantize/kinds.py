"""How GGUF files store matrices: each kind of file, the type of each of its tensors, and their blocks.

Most kinds store all matrices alike. ``q4_k_m`` mixes types as llama.cpp's own ``llama-quantize`` does, from weights
alone: 4 bits for most matrices, and 6 for the head and for those whose errors matter most. Blocks of these types are
computed by llama.cpp itself, as compiled into the package xllamacpp.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, quants

from lamella.errors import ExportError
from lamella.extras import is_installed, require

KINDS = {  # storage of matrices; vectors stay in 32 bits
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}
LLAMA_CPP = ("llama-cpp", "llama.cpp")  # the extra with xllamacpp, and its purpose
_COMPILED = {GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K}  # types whose blocks llama.cpp computes
_SHORTER = {  # with shorter blocks, for rows that are not whole blocks
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
_SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")


def type_of(kind: str, name: str, shape: Sequence[int], layers: int, tied: bool) -> GGMLQuantizationType:
    """Return the type in which a file stores a tensor.

    Vectors keep 32 bits, and matrices whose rows are not whole blocks 16.

    Args:
        kind: kind of the file, a key of :data:`KINDS`.
        name: llama.cpp's name of the tensor.
        shape: its shape.
        layers: number of layers of the model.
        tied: whether the embedding is the head, too.
    """
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    stored, _ = KINDS[kind]
    if kind == "q4_k_m" and _has_more_bits(name, layers, tied):
        stored = GGMLQuantizationType.Q6_K
    while shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        stored = _SHORTER.get(stored, GGMLQuantizationType.F16)
    return stored


def _has_more_bits(name: str, layers: int, tied: bool) -> bool:
    """Return whether ``q4_k_m`` stores a matrix in 6 bits: the head; values and outputs of the MLP in some layers."""
    if match := _SENSITIVE.fullmatch(name):
        layer, eighth = int(match[1]), layers // 8
        return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return name == ("token_embd.weight" if tied else "output.weight")


def to_blocks(values: np.ndarray, stored: GGMLQuantizationType) -> np.ndarray:
    """Return the values of a tensor as they are stored.

    Args:
        values: the values in 32 bits [..., columns].
        stored: the type.

    Raises:
        LamellaError: if llama.cpp is needed and not installed.
        ExportError: if the installed one cannot be asked.
    """
    if stored not in _COMPILED:
        blocks: np.ndarray = quants.quantize(values, stored)
        return blocks
    block, size = gguf.GGML_QUANT_SIZES[stored]
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.size // values.shape[-1], values.shape[-1]
    blocks = np.empty((*values.shape[:-1], columns // block * size), np.uint8)
    compute = _quantiser()
    if compute is None:
        raise ExportError(f"this xllamacpp does not offer {stored.name.lower()}: install another release")
    compute(int(stored), values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    return blocks


def is_available(kind: str) -> bool:
    """Return whether files of a kind can be written with what is installed.

    Args:
        kind: a key of :data:`KINDS`.
    """
    return KINDS[kind][0] not in _COMPILED or (is_installed("xllamacpp") and _quantiser() is not None)


@cache
def _quantiser() -> Any:
    """Return llama.cpp's function that quantises rows of a matrix; None if the package does not export it."""
    library = ctypes.CDLL(require("xllamacpp.xllamacpp", *LLAMA_CPP).__file__)
    function = getattr(library, "ggml_quantize_chunk", None)
    if function is not None:
        number, address = ctypes.c_int64, ctypes.c_void_p
        function.argtypes = ctypes.c_int, address, address, number, number, number, address
        function.restype = ctypes.c_size_t
    return function
