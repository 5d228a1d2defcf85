"""SwitchLoRA: low-rank training whose vectors are exchanged in every step, so that the update is of full rank."""

from lamella.methods.switchlora.method import TRAINING, switchlora
from lamella.methods.switchlora.optimizer import VectorAdamW, by_vectors, forget
from lamella.methods.switchlora.switching import Exchange, Frequency, Switching

__all__ = ["TRAINING", "Exchange", "Frequency", "Switching", "VectorAdamW", "by_vectors", "forget", "switchlora"]
