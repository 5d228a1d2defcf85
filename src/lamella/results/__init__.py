"""What methods return, and how it is described, drawn and written."""

from lamella.results.card import model_card
from lamella.results.evidence import environment, machine
from lamella.results.record import Record

__all__ = [
    "Record",
    "environment",
    "machine",
    "model_card",
]
