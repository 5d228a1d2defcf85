"""dLLM-Skip: leave out layers that hardly turn the stream, never two neighbours."""

from lamella.methods.dllm_skip.method import apart, dllm_skip, plateau, select, study
from lamella.methods.dllm_skip.similarity import Similarity, similarity
from lamella.methods.dllm_skip.skipping import losses_without, rises

__all__ = [
    "Similarity",
    "apart",
    "dllm_skip",
    "losses_without",
    "plateau",
    "rises",
    "select",
    "similarity",
    "study",
]
