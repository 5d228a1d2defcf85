"""Quantisation: int8 for torch, GGUF for llama.cpp."""

from lamella.plan.quantize.blocks import q8_0_bytes, q8_0_copy
from lamella.plan.quantize.families import FAMILIES
from lamella.plan.quantize.gguf import KINDS, write_gguf
from lamella.plan.quantize.int8 import NEEDS, Int8Linear, int8_copy, run_by_torch, write_int8

__all__ = [
    "FAMILIES",
    "KINDS",
    "NEEDS",
    "Int8Linear",
    "int8_copy",
    "q8_0_bytes",
    "q8_0_copy",
    "run_by_torch",
    "write_gguf",
    "write_int8",
]
