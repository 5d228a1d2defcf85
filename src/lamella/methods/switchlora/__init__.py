"""SwitchLoRA: low-rank training with vectors that are exchanged in every step, so that the update has full rank."""

from lamella.methods.switchlora.method import TRAINING, switchlora
from lamella.methods.switchlora.optimizer import VectorAdamW, per_vector, reset_state
from lamella.methods.switchlora.switching import ExchangeFrequency, SwitchHook, VectorExchange

__all__ = [
    "TRAINING",
    "ExchangeFrequency",
    "SwitchHook",
    "VectorAdamW",
    "VectorExchange",
    "per_vector",
    "reset_state",
    "switchlora",
]
