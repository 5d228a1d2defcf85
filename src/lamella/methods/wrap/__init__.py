"""WRAP: rephrase web documents with an instruction model, and train on both versions."""

from lamella.methods.wrap.chunks import passages
from lamella.methods.wrap.cleaning import Evaluations, Filters, clean_rephrase, drop_reason
from lamella.methods.wrap.method import PassageSettings, wrap
from lamella.methods.wrap.styles import Style, open_styles

__all__ = [
    "Evaluations",
    "Filters",
    "PassageSettings",
    "Style",
    "clean_rephrase",
    "drop_reason",
    "open_styles",
    "passages",
    "wrap",
]
