"""WRAP: rephrase the web, and train on what it says together with how it says it."""

from lamella.methods.wrap.chunks import passages
from lamella.methods.wrap.cleaning import Evaluations, Filters, cleaned, dropped_for
from lamella.methods.wrap.method import Cutting, wrap
from lamella.methods.wrap.styles import Style, open_styles

__all__ = [
    "Cutting",
    "Evaluations",
    "Filters",
    "Style",
    "cleaned",
    "dropped_for",
    "open_styles",
    "passages",
    "wrap",
]
