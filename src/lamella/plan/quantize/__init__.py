"""Quantisation: int8 for torch, GGUF for llama.cpp."""

from lamella.plan.quantize.blocks import gguf_bytes, gguf_copy
from lamella.plan.quantize.families import FAMILIES
from lamella.plan.quantize.gguf import write_gguf
from lamella.plan.quantize.int8 import NEEDS, Int8Linear, int8_bytes, int8_copy, run_by_torch, write_int8
from lamella.plan.quantize.kinds import KINDS, LLAMA_CPP, is_available

__all__ = [
    "FAMILIES",
    "KINDS",
    "LLAMA_CPP",
    "NEEDS",
    "Int8Linear",
    "gguf_bytes",
    "gguf_copy",
    "int8_bytes",
    "int8_copy",
    "is_available",
    "run_by_torch",
    "write_gguf",
    "write_int8",
]
