"""Small worlds whose truth is known: pictures, and what can be said of them."""

from lamella.zoo.worlds.language import (
    ANSWERS,
    QUESTIONS,
    TASKS,
    WORDS,
    Example,
    caption,
    direction,
    examples,
    listed,
    place,
)
from lamella.zoo.worlds.shapes import COLOURS, GRID, MOST, NOVEL, SHAPES, SIZE, TILE, Part, Scene, Thing, render, scenes
from lamella.zoo.worlds.words import IMAGE, word_tokenizer

__all__ = [
    "ANSWERS",
    "COLOURS",
    "GRID",
    "IMAGE",
    "MOST",
    "NOVEL",
    "QUESTIONS",
    "SHAPES",
    "SIZE",
    "TASKS",
    "TILE",
    "WORDS",
    "Example",
    "Part",
    "Scene",
    "Thing",
    "caption",
    "direction",
    "examples",
    "listed",
    "place",
    "render",
    "scenes",
    "word_tokenizer",
]
