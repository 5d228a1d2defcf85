"""dLLM-Skip: skip layers that hardly change the residual stream, never two adjacent ones."""

from lamella.methods.dllm_skip.method import curve_distance, dllm_skip, plateau, select, study
from lamella.methods.dllm_skip.similarity import Similarity, similarity
from lamella.methods.dllm_skip.skipping import losses_without, rises

__all__ = [
    "Similarity",
    "curve_distance",
    "dllm_skip",
    "losses_without",
    "plateau",
    "rises",
    "select",
    "similarity",
    "study",
]
